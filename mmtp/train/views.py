"""Pictures with what is said of them, each in fixed or in ever new views: a batch is a function of seed and step alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mmtp.config import ConfigError
from mmtp.train.mix import draw_sources
from mmtp.train.pictures import PictureData, augment, read_captioned


class View(NamedTuple):
    """One way of seeing one picture: its source, its place there, and the number that decides crop and flip."""

    source: int
    picture: int
    number: int


class PictureViews:
    """The pictures and captions of all sources, and views of them.

    Args:
        config: the sources.
        data_root: where their relative paths start.
        seed: decides, with the step, which views a batch holds, and with a view's number how it is cropped and flipped.
        views: in how many ways each picture is seen; 0 makes a new one at every draw.
        progress: whether to show a bar while reading.

    Raises:
        ConfigError: a source holds no picture that can be read.
    """

    def __init__(self, config: PictureData, data_root: Path, seed: int, *, views: int = 0, progress: bool = False) -> None:
        self.config, self.seed, self.views = config, seed, views
        self.samples = [read_captioned(source, config.size, data_root, progress=progress) for source in config.sources]
        for source, samples in zip(config.sources, self.samples, strict=True):
            if not samples:
                raise ConfigError(f"data.sources: {source.source}: holds no picture that can be read")

    def draw(self, step: int, count: int) -> list[View]:
        """The views of a step's batch."""
        which, draw = draw_sources(self.config.sources, self.seed, step, count)

        def number(below: int) -> int:
            return int(torch.randint(below, (), generator=draw))

        return [View(i, number(len(self.samples[i])), number(self.views or 2**31)) for i in which]

    def all(self) -> list[View]:
        """Every fixed view, source by source and picture by picture; :meth:`place` says where each stands."""
        return [View(i, j, k) for i, samples in enumerate(self.samples) for j in range(len(samples)) for k in range(self.views)]

    def place(self, view: View) -> int:
        """Where a fixed view stands among :meth:`all`."""
        return (sum(map(len, self.samples[: view.source])) + view.picture) * self.views + view.number

    def pixels(self, views: Sequence[View]) -> Float[Tensor, "b 3 size size"]:
        """Views as pictures in [-1, 1]."""
        out = []
        for view in views:
            number = 0
            for part in (self.seed, *view):
                number = (number * 1_000_003 + part) % 2**63
            draw = torch.Generator().manual_seed(number)
            picture, _ = self.samples[view.source][view.picture]
            out.append(augment(picture, self.config.sources[view.source], self.config.size, draw))
        return torch.stack(out).float().div_(127.5).sub_(1)

    def captions(self, views: Sequence[View]) -> list[str]:
        """What is said of views; empty where that is nothing."""
        return [self.samples[view.source][view.picture][1] for view in views]
