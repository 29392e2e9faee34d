"""Pictures for training, kept decoded in memory and mixed by weight: a batch is a function of seed and step alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from mmtp.config import Config, ConfigError
from mmtp.data.errors import DecodeError
from mmtp.data.media import decode_image, resize
from mmtp.train.mix import MixSource, draw_sources, read_samples
from mmtp.types import Modality

STORED = 4
"""Pictures that are cropped at random are kept at up to this many times the training size along their shorter side."""


@dataclass(frozen=True, kw_only=True)
class PictureSource(MixSource):
    """One source of a mix, and how its pictures are varied.

    Attributes:
        crop: least and greatest side of the random square window, as a share of the shorter side.
        flips: none, left to right, or all eight symmetries of the square.
    """

    crop: tuple[float, float] = (1.0, 1.0)
    flips: Literal["none", "horizontal", "all"] = "none"


@dataclass(frozen=True, kw_only=True)
class PictureData(Config):
    """``[data]`` of a tokenizer's recipe: pixels per side of a training picture, and the sources."""

    sources: tuple[PictureSource, ...]
    size: int = 64


class PictureMix:
    """The pictures of all sources, decoded.

    Args:
        config: the sources.
        data_root: where their relative paths start.
        seed: decides, with the step, which pictures a batch holds and how they are cropped and flipped.
        progress: whether to show a bar while reading.

    Raises:
        ConfigError: a source holds no picture that can be read.
    """

    def __init__(self, config: PictureData, data_root: Path, seed: int, *, progress: bool = False) -> None:
        self.config, self.seed = config, seed
        self.pictures = [read_pictures(s, config.size, data_root, progress=progress) for s in config.sources]
        for source, pictures in zip(config.sources, self.pictures, strict=True):
            if not pictures:
                raise ConfigError(f"data.sources: {source.source}: holds no picture that can be read")

    def batch(self, step: int, count: int) -> Float[Tensor, "b 3 h w"]:
        """``count`` pictures in [-1, 1]."""
        which, draw = draw_sources(self.config.sources, self.seed, step, count)
        samples = []
        for i in which:
            pictures = self.pictures[i]
            picture = pictures[int(torch.randint(len(pictures), (), generator=draw))]
            samples.append(augment(picture, self.config.sources[i], self.config.size, draw))
        return torch.stack(samples).float().div_(127.5).sub_(1)


def read_pictures(source: PictureSource, size: int, data_root: Path, *, progress: bool = False) -> list[UInt8[Tensor, "3 h w"]]:
    """Every usable picture of a source as bytes, its shorter side at most what training needs. Damaged files are passed over."""
    return [picture for picture, _ in read_captioned(source, size, data_root, progress=progress)]


def read_captioned(
    source: PictureSource, size: int, data_root: Path, *, progress: bool = False
) -> list[tuple[UInt8[Tensor, "3 h w"], str]]:
    """The pictures of :func:`read_pictures`, each with what is said of it: its caption, else its tags, else nothing."""
    shorter = size if source.crop == (1.0, 1.0) else STORED * size
    out = []
    for sample in read_samples(source, Modality.IMAGE, data_root, progress=progress):
        try:
            picture = decode_image(sample.media).mul(255).round().to(torch.uint8)
        except DecodeError:
            continue
        text = sample.labels.get("caption") or ", ".join(sample.labels.get("tags") or [])
        out.append((scaled(picture, size, shorter, source.crop), text))
    return out


def scaled(picture: UInt8[Tensor, "3 h w"], size: int, shorter: int, crop: tuple[float, float]) -> UInt8[Tensor, "3 _ _"]:
    """A picture whose shorter side is at most ``shorter``, or exactly that where it is cropped at its whole side only."""
    height, width = picture.shape[1:]
    if min(height, width) > shorter or crop == (1.0, 1.0):
        scale = shorter / min(height, width)
        picture = resize(picture, (max(size, round(height * scale)), max(size, round(width * scale))), "stretch")
    return picture


def augment(picture: UInt8[Tensor, "3 h w"], source: PictureSource, size: int, draw: torch.Generator) -> UInt8[Tensor, "3 size size"]:
    """A random square window of a picture, brought to ``size`` and perhaps turned over."""
    height, width = picture.shape[1:]
    low, high = source.crop
    share = low + (high - low) * float(torch.rand((), generator=draw))
    side = max(1, round(min(height, width) * share))
    top = int(torch.randint(height - side + 1, (), generator=draw))
    left = int(torch.randint(width - side + 1, (), generator=draw))
    out = picture[:, top : top + side, left : left + side]
    if side != size:
        out = F.interpolate(out[None].contiguous(memory_format=torch.channels_last), (size, size), mode="bilinear", antialias=True)[0]
    return turned(out, source.flips, int(torch.randint(8, (), generator=draw)))


def turned(picture: UInt8[Tensor, "3 h w"], flips: str, turn: int) -> UInt8[Tensor, "3 _ _"]:
    """A picture in one of the eight symmetries of the square (``turn``), as far as ``flips`` allows them."""
    if flips != "none" and turn & 1:
        picture = picture.flip(2)
    if flips == "all" and turn & 2:
        picture = picture.flip(1)
    if flips == "all" and turn & 4:
        picture = picture.transpose(1, 2)
    return picture
