"""What the continuous tokenizers share: one medium at a time to one vector per cell, with the cell's place on the grid."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmtp.config import Config
from mmtp.tokenizers.base import EncodeOnlyError
from mmtp.tokenizers.reference import FingerprintCache, Reference
from mmtp.types import Latents, MmtpError, TokenizerSpec, grid_coordinates


class LatentsError(MmtpError):
    """Latents that are not this tokenizer's."""


class FeatureTokenizer(nn.Module, ABC):
    """Media to vectors; subclasses describe themselves in ``_describe`` and make the vectors of one medium in ``_features``.

    Every medium is taken by itself: float32 sums depend on the shape of a batch, so that its latents cannot depend on what else is in the
    list. A tokenizer without a way back keeps the ``decode`` of this class.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config: Any = config
        self._fingerprint = FingerprintCache()

    @property
    def spec(self) -> TokenizerSpec:
        return replace(self._describe(), fingerprint=self._fingerprint.of(self.config, self))

    @abstractmethod
    def grid(self, shape: Sequence[int]) -> tuple[int, ...]: ...

    def num_tokens(self, shape: Sequence[int]) -> int:
        return math.prod(self.grid(shape))

    def encode(self, media: Sequence[Tensor]) -> Latents:
        """Latents of media as ``spec`` describes them, in reading order of the grid, in evaluation mode and float32.

        Raises:
            MmtpError: a medium is of another shape, empty or not finite; names which and, where it is a value, its place.
        """
        sizes = [self._size(medium, i) for i, medium in enumerate(media)]
        if not sizes:
            table = torch.zeros(0, 0, 2, dtype=torch.long)
            return Latents(torch.zeros(0, 0, self._describe().latent_dim), table, table.new_zeros(0))
        with Reference(self):
            values = [self._features(medium).cpu() for medium in media]
        return Latents.pad(values, [self._coordinates(size) for size in sizes], sizes)

    def decode(self, latents: Latents) -> Sequence[Tensor]:
        """There is no way back, unless a subclass has one.

        Raises:
            EncodeOnlyError: always.
        """
        raise EncodeOnlyError(f"{type(self).__name__} has no decoder: its latents are for a model to read")

    @abstractmethod
    def _describe(self) -> TokenizerSpec:
        """The spec, all but the fingerprint."""

    @abstractmethod
    def _size(self, medium: Tensor, index: int) -> tuple[int, ...]:
        """Extent of a medium that can be encoded; an error that names ``index`` where it cannot."""

    @abstractmethod
    def _features(self, medium: Float[Tensor, "c *size"]) -> Float[Tensor, "n d"]:
        """Vectors of one medium, in reading order."""

    def _coordinates(self, size: Sequence[int]) -> Int[Tensor, "n axes"]:
        return grid_coordinates(self.grid(size))


def plane(latents: Latents, index: int, dim: int) -> Float[Tensor, "d rows columns"]:
    """The vectors of one item on their grid.

    Raises:
        LatentsError: they are not ``dim`` wide, are not finite, or are not one per cell, in reading order.
    """
    values, coordinates = latents.item(index), latents.coordinates[index, : int(latents.lengths[index])]
    rows, columns = (int(n) + 1 for n in coordinates.amax(0)) if len(values) else (0, 0)
    if values.shape[1] != dim:
        raise LatentsError(f"item {index}: latents are {values.shape[1]} wide, {dim} wanted")
    if not values.isfinite().all():
        raise LatentsError(f"item {index}: latents hold values that are not finite (NaN or infinity)")
    if not len(values) or not torch.equal(coordinates.cpu(), grid_coordinates((rows, columns))):
        raise LatentsError(f"item {index}: {len(values)} latents are not those of a whole grid, in reading order")
    return rearrange(values, "(h w) d -> d h w", h=rows)
