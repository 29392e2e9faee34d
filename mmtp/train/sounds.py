"""Sounds for training, kept decoded in memory and mixed by weight: a batch is a function of seed and step alone."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int16
from torch import Tensor

from mmtp.config import Config, ConfigError
from mmtp.data.errors import DecodeError
from mmtp.data.media import decode_sound
from mmtp.train.losses.audio import magnitudes
from mmtp.train.mix import MixSource, draw_sources, read_files
from mmtp.types import Modality

LOUDEST = 32767
"""Sounds are kept as 16-bit integers, as most files have them, in half the memory."""

SPECTRUM, QUIETEST = 512, -80.0
"""Samples of a spectrum in a picture, and the level in dB below a full-scale tone that is black."""


@dataclass(frozen=True, kw_only=True)
class SoundData(Config):
    """``[data]`` of an audio tokenizer's recipe: the sources, and the length of a training window, rounded to whole frames of codes."""

    sources: tuple[MixSource, ...]
    seconds: float = 1.0

    def __post_init__(self) -> None:
        if self.seconds <= 0:
            raise ValueError(f"seconds {self.seconds:g}: more than 0 is wanted")


class SoundMix:
    """The sounds of all sources, decoded.

    Args:
        config: the sources.
        data_root: where their relative paths start.
        seed: decides, with the step, which windows a batch holds.
        sample_rate: samples per second that all sounds are brought to.
        hop: samples of a frame; windows are whole frames.
        progress: whether to show a bar while reading.

    Raises:
        ConfigError: a source holds no sound that can be read.
    """

    def __init__(self, config: SoundData, data_root: Path, seed: int, *, sample_rate: int, hop: int, progress: bool = False) -> None:
        self.config, self.seed = config, seed
        self.samples = hop * max(1, round(config.seconds * sample_rate / hop))
        self.sounds = [read_sounds(s, sample_rate, data_root, progress=progress) for s in config.sources]
        for source, sounds in zip(config.sources, self.sounds, strict=True):
            if not sounds:
                raise ConfigError(f"data.sources: {source.source}: holds no sound that can be read")
        # A sound comes in the measure of its length, so that every second of a source counts alike.
        self.ends = [torch.tensor([s.shape[1] for s in sounds]).cumsum(0) for sounds in self.sounds]

    def batch(self, step: int, count: int) -> Float[Tensor, "b 1 t"]:
        """``count`` windows in [-1, 1]; a shorter sound is followed by silence."""
        which, draw = draw_sources(self.config.sources, self.seed, step, count)
        windows = []
        for i in which:
            place = torch.randint(int(self.ends[i][-1]), (), generator=draw)
            sound = self.sounds[i][int(torch.searchsorted(self.ends[i], place, right=True))]
            first = int(torch.randint(max(0, sound.shape[1] - self.samples) + 1, (), generator=draw))
            window = sound[:, first : first + self.samples]
            windows.append(F.pad(window, (0, self.samples - window.shape[1])))
        return torch.stack(windows).float().div_(LOUDEST)


def read_sounds(source: MixSource, sample_rate: int, data_root: Path, *, progress: bool = False) -> list[Int16[Tensor, "1 _"]]:
    """Every usable sound of a source, at one rate. Damaged files are passed over."""
    out = []
    for data in read_files(source, Modality.AUDIO, data_root, progress=progress):
        try:
            sound, _ = decode_sound(data, sample_rate=sample_rate)
        except DecodeError:
            continue
        out.append(sound.mul(LOUDEST).round().to(torch.int16))
    return out


def spectrogram(sound: Float[Tensor, "1 t"]) -> Float[Tensor, "3 f n"]:
    """A picture of a sound in [-1, 1]: time to the right, frequency upward, the brighter the louder (in dB)."""
    from matplotlib import colormaps

    hann = torch.hann_window(SPECTRUM)
    level = 20 * (magnitudes(sound[None].float().cpu(), hann)[0] / (hann.sum() / 2)).clamp_min(1e-10).log10()
    bright = (1 - level / QUIETEST).clamp(0, 1).flip(0)
    return torch.from_numpy(colormaps["magma"](bright.numpy())[..., :3]).permute(2, 0, 1).float()
