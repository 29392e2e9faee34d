"""Sources of media for training: what mixes of pictures and of sounds share."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track

from mmtp.config import Config
from mmtp.data.errors import DecodeError
from mmtp.data.sources import Sample, open_source
from mmtp.types import Modality


@dataclass(frozen=True, kw_only=True)
class MixSource(Config):
    """One source of a mix.

    Attributes:
        source: what ``mmtp tokenize`` takes (``easy-vqa:train``, a tar, a folder); paths start at the data root.
        weight: share of the samples, relative to the other sources.
        hold_out: every medium whose place in the source is a multiple of this is left out, for tuning; 0 leaves none out.
    """

    source: str
    weight: float = 1.0
    hold_out: int = 0

    def __post_init__(self) -> None:
        if self.weight <= 0 or self.hold_out < 0:
            raise ValueError(f"weight {self.weight:g}, hold_out {self.hold_out}: above 0, and at least 0, are wanted")


def read_samples(source: MixSource, modality: Modality, data_root: Path, *, progress: bool = False) -> Iterator[Sample]:
    """The media files of a source that are not held out, with their labels. What cannot be read is passed over."""
    place = source.source
    opened = open_source(place if place.partition(":")[0] in ("easy-vqa", "hf") else data_root / place, modality)
    for i, item in enumerate(track(opened.items(), f"reading {place}", disable=not progress, transient=True)):
        if source.hold_out and i % source.hold_out == 0:
            continue
        try:
            yield opened.read(item)
        except DecodeError:
            continue


def read_files(source: MixSource, modality: Modality, data_root: Path, *, progress: bool = False) -> Iterator[bytes]:
    """The media of :func:`read_samples` alone."""
    return (sample.media for sample in read_samples(source, modality, data_root, progress=progress))


def draw_sources(sources: Sequence[MixSource], seed: int, step: int, count: int) -> tuple[list[int], torch.Generator]:
    """Which source each sample of a step's batch comes from, and the generator to draw the rest with: functions of seed and step alone."""
    draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
    weights = torch.tensor([source.weight for source in sources])
    return torch.multinomial(weights, count, replacement=True, generator=draw).tolist(), draw
