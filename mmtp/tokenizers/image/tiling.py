"""Cutting an axis into overlapping windows, and joining again what a network made of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """A part of an axis, and how much each of its places counts where windows are joined: over all windows the weights add up to 1."""

    start: int
    stop: int
    weights: Float[Tensor, " n"]

    @property
    def range(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How pictures of more than ``side * side`` cells are cut.

    Attributes:
        side: cells along one side of a tile.
        encoder_overlap: cells that neighbouring tiles share at least when a picture is encoded.
        decoder_overlap: the same when it is decoded.
        blend: whether tiles fade into each other over their overlap, where they differ; else one follows the other at its middle, where
            both are what the whole picture would give.
    """

    side: int
    encoder_overlap: int
    decoder_overlap: int
    blend: bool

    def __post_init__(self) -> None:
        assert self.side > max(self.encoder_overlap, self.decoder_overlap), "tiles would be overlap only"

    def tiles(self, rows: int, columns: int, overlap: int, unit: int) -> Iterator[tuple[Window, Window]]:
        """Windows of rows and of columns of every tile, in places of which a cell has ``unit``."""
        fade = max(1, overlap * unit) if self.blend else 1
        down, across = (windows(n, self.side, overlap, fade, unit) for n in (rows, columns))
        return product(down, across)


def windows(count: int, size: int, overlap: int, fade: int = 1, unit: int = 1) -> Iterator[Window]:
    """The fewest windows of ``size`` cells that cover ``count`` and share at least ``overlap`` with each other, evenly spread.

    Args:
        count: cells of the axis; up to ``size`` of them are one window.
        size: of a window.
        overlap: below ``size``.
        fade: places over which a window gives way to the next, linearly, about the middle of what they share; 1 is a hard seam.
        unit: places per cell. Windows begin and end with whole cells, but speak of places.
    """
    last = max(0, -(-(count - size) // (size - overlap)))
    starts = [i * (count - size) // last for i in range(1, last + 1)]
    bounds = [(start * unit, (start + size) * unit) for start in (0, *starts)] if last else [(0, count * unit)]
    # The share of all windows from each on: these differences add up to 1 wherever seams lie.
    seams = [None, *((after[0] + before[1]) // 2 for before, after in pairwise(bounds)), None]
    for (start, stop), (left, right) in zip(bounds, pairwise(seams), strict=True):
        places = torch.arange(start, stop)
        weights = torch.ones(stop - start) if left is None else _rise(places, left, fade)
        yield Window(start, stop, weights if right is None else weights - _rise(places, right, fade))


def _rise(places: Tensor, seam: int, fade: int) -> Tensor:
    """From 0 to 1 about a seam; a place lies half a step after its number."""
    return ((places + 0.5 - seam) / fade + 0.5).clamp(0, 1)
