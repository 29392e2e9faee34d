"""How far a sound is from its original: spectra, the waveform, intelligibility and listeners' opinion.

Sounds are compared sample by sample: both have one length and one rate, and are not shifted against each other first (PESQ does so
by itself). A measure has no value for some sounds (the loudness of silence cannot be matched); such sounds are left out of its mean
and counted, with the reason.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torchaudio.functional
from jaxtyping import Float
from torch import Tensor

from mmtp.types import MmtpError

SILENCE = 2.0**-16
"""Half a step of 16-bit samples: what never exceeds it is silence in a file."""

WINDOWS = (2048, 512)
BANDS = (150, 80)
FLOOR = 1e-5
STOI_SECONDS = 0.4
PESQ_SECONDS = (0.25, 60.0)
PESQ_RATE = 16000

Sound = Float[Tensor, "1 t"]


class Undefined(MmtpError):
    """A measure that has no value for a sound; the text says why."""


class NotInstalled(MmtpError):
    """Something that an optional package does; the text says how to install it."""


def package(name: str, extra: str) -> Any:
    """A module of an optional package.

    Raises:
        NotInstalled: it is not there.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise NotInstalled(f"not installed: pip install 'mmtp[{extra}]'") from error


def mel_distance(output: Sound, target: Sound, rate: int) -> float:
    """Distance of mel spectra, at least 0; that of the evaluation of DAC (Kumar et al., arXiv 2306.06546).

    Mean absolute differences of mel magnitudes and of the logarithms (base 10) of their squares, summed over windows of 2048 samples
    with 150 bands and of 512 with 80. Beyond both ends is silence, so that sounds of any length can be compared.
    """
    total = 0.0
    for window, bands in zip(WINDOWS, BANDS, strict=True):
        with warnings.catch_warnings():
            # At low rates some bands are narrower than the spectrum's steps and stay empty, in both sounds.
            warnings.simplefilter("ignore", UserWarning)
            bank = torchaudio.functional.melscale_fbanks(
                window // 2 + 1, 0.0, rate / 2, bands, rate, norm="slaney", mel_scale="slaney"
            ).double()
        total += _difference(*(_magnitudes(sound, window) @ bank for sound in (output, target)))
    return total


def stft_distance(output: Sound, target: Sound, rate: int) -> float:
    """The same of the spectra themselves: multi-resolution STFT distance. At least 0."""
    return sum(_difference(*(_magnitudes(sound, window) for sound in (output, target))) for window in WINDOWS)


def si_sdr(output: Sound, target: Sound, rate: int) -> float:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al., arXiv 1811.02508, section 2), of sounds less their means.

    Within ±100, which stand for equal up to scale and for nothing in common.

    Raises:
        Undefined: one of the sounds is silent.
    """
    _audible(output, target)
    output, target = ((sound.double() - sound.double().mean()) for sound in (output, target))
    signal = (output * target).sum() / target.square().sum() * target
    ratio = float(signal.square().sum() / (output - signal).square().sum().clamp_min(1e-300))
    return min(100.0, max(-100.0, 10 * math.log10(max(ratio, 1e-10))))


def stoi(output: Sound, target: Sound, rate: int) -> float:
    """Short-time objective intelligibility (Taal et al. 2011, IEEE TASLP 19(7)), about 0 to 1, by the package pystoi.

    Raises:
        Undefined: the original is silent, or sounds for less than the 0.4 s that a segment takes.
        NotInstalled: the package is not there.
    """
    pystoi = package("pystoi", "audio-eval")
    _audible(target)
    if target.shape[1] < STOI_SECONDS * rate:
        raise Undefined(f"under {STOI_SECONDS:g} s")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Not enough STFT frames", RuntimeWarning)
        try:
            return float(pystoi.stoi(_samples(target), _samples(output), rate))
        except RuntimeWarning as error:
            raise Undefined(f"under {STOI_SECONDS:g} s that are not silent") from error


def pesq(output: Sound, target: Sound, rate: int) -> float:
    """Wide-band PESQ (ITU-T P.862.2) at 16 kHz, 1.0 to 4.64 (a mean opinion score), by the package pesq.

    Raises:
        Undefined: a sound is silent, the original is under 0.25 s or over 60 s long (for which neither the recommendation nor the
            package's fixed tables are made), or has no utterance in it.
        NotInstalled: the package is not there.
    """
    library = package("pesq", "pesq")
    _audible(output, target)
    least, most = PESQ_SECONDS
    if not least * rate <= target.shape[1] <= most * rate:
        raise Undefined(f"under {least:g} s" if target.shape[1] < least * rate else f"over {most:g} s")
    output, target = (resample(sound, rate, PESQ_RATE) for sound in (output, target))
    try:
        return float(library.pesq(PESQ_RATE, _samples(target), _samples(output), "wb"))
    except library.BufferTooShortError as error:
        raise Undefined(f"under {least:g} s") from error
    except library.NoUtterancesError as error:
        raise Undefined("no utterance is found") from error


@dataclass(frozen=True)
class Measure:
    """A distortion and how it is shown.

    Attributes:
        name: for machines.
        label: for people.
        format: of its value.
        function: of output, original and rate; raises :class:`Undefined` and :class:`NotInstalled`.
    """

    name: str
    label: str
    format: str
    function: Callable[[Sound, Sound, int], float]

    def show(self, value: float) -> str:
        return self.format.format(value)


MEASURES = (
    Measure("mel", "mel distance", "{:.3f}", mel_distance),
    Measure("stft", "STFT distance", "{:.3f}", stft_distance),
    Measure("si_sdr", "SI-SDR", "{:.2f} dB", si_sdr),
    Measure("stoi", "STOI", "{:.3f}", stoi),
    Measure("pesq", "PESQ (wide-band)", "{:.2f}", pesq),
)


class Distortions:
    """Means of all measures over the recordings of a set.

    Attributes:
        measures: what is measured.
        left_out: by measure, how many recordings it has no value for, by reason.
        not_installed: by measure, how to install what it needs.
    """

    def __init__(self) -> None:
        self.measures = MEASURES
        self._values: dict[str, list[float]] = {measure.name: [] for measure in self.measures}
        self.left_out: dict[str, Counter[str]] = {measure.name: Counter() for measure in self.measures}
        self.not_installed: dict[str, str] = {}

    def add(self, output: Sound, target: Sound, rate: int) -> None:
        """Measures one sound ``[1, t]`` beside its original, of the same length."""
        for measure in self.measures:
            if measure.name in self.not_installed:
                continue
            try:
                self._values[measure.name].append(measure.function(output, target, rate))
            except Undefined as reason:
                self.left_out[measure.name][str(reason)] += 1
            except NotInstalled as reason:
                self.not_installed[measure.name] = str(reason)

    @property
    def means(self) -> dict[str, float | None]:
        """By measure, the mean over the recordings that it has a value for; None where there is none."""
        return {name: sum(values) / len(values) if values else None for name, values in self._values.items()}

    def remark(self, name: str) -> str:
        """What a measure's mean leaves out, in words; empty where it leaves out nothing."""
        if name in self.not_installed:
            return self.not_installed[name]
        return ", ".join(f"{count} left out: {reason}" for reason, count in self.left_out[name].items())


def resample(sound: Sound, rate: int, new_rate: int) -> Float[Tensor, "1 t2"]:
    """The sound at another rate (windowed sinc)."""
    return sound if rate == new_rate else torchaudio.functional.resample(sound, rate, new_rate)


def fit(sound: Float[Tensor, "1 t"], samples: int) -> Float[Tensor, "1 t2"]:
    """The sound cut, or followed by silence, to so many samples."""
    return torch.nn.functional.pad(sound[:, :samples], (0, max(0, samples - sound.shape[1])))


def _audible(*sounds: Sound) -> None:
    """The last one is the original."""
    for sound, name in zip(reversed(sounds), ("the original", "the reconstruction"), strict=False):
        if float((sound - sound.mean()).abs().max()) < SILENCE:
            raise Undefined(f"{name} is silent")


def _magnitudes(sound: Sound, window: int) -> Float[Tensor, "n f"]:
    sound, hann = sound[0].double(), torch.hann_window(window, dtype=torch.double)
    return torch.stft(sound, window, window // 4, window=hann, pad_mode="constant", return_complex=True).abs().T


def _difference(a: Float[Tensor, "n f"], b: Float[Tensor, "n f"]) -> float:
    logs = (spectrum.square().clamp_min(FLOOR).log10() for spectrum in (a, b))
    return float((a - b).abs().mean() + (next(logs) - next(logs)).abs().mean())


def _samples(sound: Sound) -> Any:
    return sound[0].double().numpy()
