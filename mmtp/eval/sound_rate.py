"""Rate and distortion of tokenizers of sound beside the codecs of files: Opus and Codec2, container included.

A tokenizer's rate is what its codes take, each of a codebook at the same length and a recording in whole bytes, and four bytes for
its number of samples. Codecs hear the recording at the tokenizer's rate, resampled where they know only others.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import soundfile
import torch
from jaxtyping import Float
from torch import Tensor

from mmtp.eval.codes import EvalError
from mmtp.eval.curves import Point, Progress, RateResult, few_codebooks, first_codebooks
from mmtp.eval.distortion import MEASURES, Distortions, NotInstalled, fit, package, resample
from mmtp.eval.sound import Recording, SoundResult, coded_bytes
from mmtp.eval.speech import WordErrors
from mmtp.tokenizers.base import DiscreteTokenizer

OPUS_RATES = (8000, 12000, 16000, 24000, 48000)
OPUS_KBPS = (6.0, 256.0)
"""Bit rates of one channel at libsndfile's compression levels of 1 and 0."""

CODEC2_RATE = 8000
CODEC2_HEADER = 7
"""Bytes at the head of a .c2 file: magic (3), version (2), mode, flags."""
CODEC2_DELAY = 160
"""Samples by which decoded sound comes late, in all three modes; without them STOI rises by 0.2."""


@dataclass(frozen=True)
class SoundPoint(Point):
    """Figures over the recordings of a set; ``bytes`` are those of a second. A measure that could not be taken is None.

    Attributes:
        mel: distance of mel spectra.
        si_sdr: dB.
        stoi: intelligibility, 0 to 1.
        pesq: opinion score, 1 to 4.64.
        words: word errors of a recogniser, as a share of the words that were said.
    """

    COLUMNS: ClassVar = (
        {"bytes": ("bytes per second", "{:.0f}")}
        | {m.name: (m.label, m.format) for m in MEASURES if m.name != "stft"}
        | {"words": ("word errors", "{:.1%}")}
    )
    AXES: ClassVar = {
        "bytes": "bytes per second",
        "stoi": "STOI",
        "mel": "mel distance",
        "pesq": "PESQ (wide-band)",
        "words": "word errors",
    }
    SETTING: ClassVar = "{} kbit/s"

    mel: float | None
    si_sdr: float | None
    stoi: float | None
    pesq: float | None
    words: float | None


@dataclass(frozen=True)
class SoundCodec:
    """A codec of files.

    Attributes:
        settings: kbit/s.
        roundtrip: of a sound ``[1, t]``, its rate and a setting: what comes back, and the bytes of the file. Raises
            :class:`~mmtp.eval.distortion.NotInstalled`.
    """

    settings: Sequence[float]
    roundtrip: Callable[[Float[Tensor, "1 t"], int, float], tuple[Float[Tensor, "1 t"], int]]


def compare_sound_rates(
    tokenizer: DiscreteTokenizer,
    result: SoundResult,
    name: str,
    recordings: Sequence[Recording],
    recognizer: Callable[[Tensor, int], str] | None = None,
    *,
    progress: Progress | None = None,
) -> RateResult[SoundPoint]:
    """Puts a tokenizer's figures beside those of every codec on the same recordings.

    Args:
        tokenizer: of mono sound; a residual one is measured with fewer codebooks as well.
        result: of the tokenizer on these recordings.
        name: what the comparison calls it.
        recordings: at the tokenizer's rate.
        recognizer: what hears words, as for :func:`~mmtp.eval.sound.evaluate_sound_tokenizer`; None leaves word errors out.
        progress: called with settings measured and settings in all.

    Raises:
        EvalError: there are no recordings.
    """
    if not recordings:
        raise EvalError("the set holds no recordings to measure")
    rate, few = int(tokenizer.spec.sample_rate or 0), few_codebooks(tokenizer.spec)
    seconds = sum(recording.sound.shape[1] for recording in recordings) / rate
    done, total = 0, len(few) + sum(len(codec.settings) for codec in CODECS.values())
    points: list[SoundPoint] = []
    notes = _notes(name, result.distortions)
    fewer: list[SoundPoint] = []
    for k in few:
        tally = _Tally(rate, recognizer)
        for recording in recordings:
            codes = tokenizer.encode([recording.sound])
            codes = replace(codes, ids=codes.ids[:, :k])
            output = fit(tokenizer.decode(codes)[0].float().cpu(), recording.sound.shape[1])
            tally.add(recording, output, coded_bytes(codes, tokenizer.spec.codebook_sizes[:k]))
        fewer.append(tally.point(name, first_codebooks(k), seconds))
        done += 1
        if progress is not None:
            progress(done, total)
    for codec_name, codec in CODECS.items():
        for kbps in codec.settings:
            tally = _Tally(rate, recognizer)
            try:
                for recording in recordings:
                    tally.add(recording, *codec.roundtrip(recording.sound, rate, kbps))
            except NotInstalled as reason:
                notes.append(f"{codec_name}: {reason}")
                done += len(codec.settings)
                break
            points.append(tally.point(codec_name, f"{kbps:g}", seconds))
            differs = tally.distortions.left_out != result.distortions.left_out
            notes += _notes(f"{codec_name} {kbps:g}", tally.distortions) if differs else []
            done += 1
            if progress is not None:
                progress(done, total)
    own = _point(name, "", result.bytes_per_second, result.distortions, result.heard.reconstruction if result.heard else WordErrors())
    return RateResult(own, points, notes, fewer)


def opus(sound: Float[Tensor, "1 t"], rate: int, kbps: float) -> tuple[Float[Tensor, "1 t"], int]:
    """Through an OGG file of Opus (RFC 6716, RFC 7845) at a variable bit rate around ``kbps`` (6 to 256), by libsndfile.

    Raises:
        NotInstalled: this libsndfile was built without Opus.
    """
    if "OPUS" not in soundfile.available_subtypes("OGG"):
        raise NotInstalled(f"libsndfile {soundfile.__libsndfile_version__} was built without it")
    inner = min((r for r in OPUS_RATES if r >= rate), default=OPUS_RATES[-1])
    least, most = OPUS_KBPS
    file = io.BytesIO()
    soundfile.write(
        file, _array(resample(sound, rate, inner)), inner, "OPUS", format="OGG", compression_level=(most - kbps) / (most - least)
    )
    data = file.getvalue()
    decoded, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    return fit(resample(torch.from_numpy(decoded)[None], inner, rate), sound.shape[1]), len(data)


def codec2(sound: Float[Tensor, "1 t"], rate: int, kbps: float) -> tuple[Float[Tensor, "1 t"], int]:
    """Through Codec2 (Rowe), a vocoder of speech at 8 kHz, at 3.2, 2.4 or 1.2 kbit/s, and the header of its files.

    Its delay is taken out. It makes up the phases, so that SI-SDR says nothing of it.

    Raises:
        NotInstalled: the package pycodec2 is not there.
    """
    coder = package("pycodec2", "audio-eval").Codec2(round(1000 * kbps))
    step = coder.samples_per_frame()
    samples = (_array(resample(sound, rate, CODEC2_RATE)) * 32767).round().clip(-32768, 32767).astype(np.int16)
    frames = np.pad(samples, (0, -(len(samples) + CODEC2_DELAY) % step + CODEC2_DELAY)).reshape(-1, step)
    coded = [coder.encode(frame) for frame in frames]
    decoded = np.concatenate([coder.decode(data) for data in coded]).astype(np.float32) / 32768
    output = resample(torch.from_numpy(decoded[CODEC2_DELAY:])[None], CODEC2_RATE, rate)
    return fit(output, sound.shape[1]), CODEC2_HEADER + sum(map(len, coded))


CODECS = {"Opus": SoundCodec((6, 8, 12, 16, 24), opus), "Codec2": SoundCodec((1.2, 2.4, 3.2), codec2)}


class _Tally:
    """Sums of one codec at one setting over a set."""

    def __init__(self, rate: int, recognizer: Callable[[Tensor, int], str] | None) -> None:
        self.rate, self.recognizer = rate, recognizer
        self.distortions, self.words, self.bytes = Distortions(), WordErrors(), 0

    def add(self, recording: Recording, output: Float[Tensor, "1 t"], file_bytes: int) -> None:
        self.distortions.add(output, recording.sound, self.rate)
        self.bytes += file_bytes
        if self.recognizer is not None and recording.text:
            self.words.add(self.recognizer(output, self.rate), recording.text)

    def point(self, name: str, setting: str, seconds: float) -> SoundPoint:
        return _point(name, setting, self.bytes / seconds, self.distortions, self.words)


def _point(name: str, setting: str, bytes_per_second: float, distortions: Distortions, words: WordErrors) -> SoundPoint:
    means = {field: distortions.means.get(field) for field in ("mel", "si_sdr", "stoi", "pesq")}
    return SoundPoint(name, setting, bytes_per_second, words=words.rate, **means)


def _notes(name: str, distortions: Distortions) -> list[str]:
    remarks = ((measure.label, distortions.remark(measure.name)) for measure in distortions.measures)
    return [f"{name}, {label}: {remark}" for label, remark in remarks if remark]


def _array(sound: Float[Tensor, "1 t"]) -> np.ndarray:
    return sound[0].detach().cpu().float().clamp(-1, 1).numpy()
