"""The nouns that every other module shares: modalities, what a tokenizer produces, what a model reads.

Shapes are written in jaxtyping; ``b`` is batch, ``k`` codebooks, ``n`` positions, ``d`` channels, ``s`` stream positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class MmtpError(ValueError):
    """An error a user can mend: one line that names the file, field or offset and says what to do."""


class Modality(StrEnum):
    """What a position of a stream stands for."""

    TEXT = "text"
    IMAGE = "image"
    AUDIO = "audio"
    VIDEO = "video"

    @property
    def index(self) -> int:  # pyrefly: ignore  # str.index has no meaning here
        """A small fixed integer, used in shards and batches."""
        return list(Modality).index(self)


@dataclass(frozen=True, kw_only=True)
class TokenizerSpec:
    """What the rest of the library knows of a tokenizer.

    Attributes:
        modality: the medium it reads and writes.
        codebook_sizes: entries of each codebook, one per level; empty for a continuous tokenizer.
        scales: cells per side of the square grids, coarse to fine, whose codes follow each other in one row (next-scale codes); else empty.
        downsampling: samples per grid cell along each grid axis (pixels for pictures, samples for sound).
        channels: channels of the medium (3 for RGB, 1 for mono sound, 0 for text).
        value_range: least and greatest value of the medium, as ``decode`` returns it.
        sample_rate: samples per second for sound, frames per second for video, else None.
        latent_dim: width of continuous latents; 0 for a discrete tokenizer.
        residual: whether the first few codebooks alone are the same medium at a lower bit rate; ``decode`` takes them.
        fingerprint: hash of configuration and weights; equal fingerprints give equal codes.
    """

    modality: Modality
    codebook_sizes: tuple[int, ...] = ()
    scales: tuple[int, ...] = ()
    downsampling: tuple[int, ...] = ()
    channels: int = 0
    value_range: tuple[float, float] = (0.0, 1.0)
    sample_rate: float | None = None
    latent_dim: int = 0
    residual: bool = False
    fingerprint: str = ""

    @property
    def num_codebooks(self) -> int:
        return len(self.codebook_sizes)


@dataclass(frozen=True)
class Codes:
    """Discrete codes of a batch: local ids, never vocabulary ids.

    Attributes:
        ids: int64 local ids, 0 where an item of a ragged batch has ended.
        lengths: valid extent of every item along every grid axis.
        sizes: extent of the medium itself (pixels, samples) before it was padded to the grid, so that ``decode``
            can crop to exactly what went in; None where the grid alone decides.
    """

    ids: Int[Tensor, "b k *grid"]
    lengths: Int[Tensor, "b axes"]
    sizes: Int[Tensor, "b axes"] | None = None

    def __len__(self) -> int:
        return self.ids.shape[0]

    def item(self, index: int) -> Int[Tensor, "k *grid"]:
        """The valid codes of one item, padding cut away."""
        window = tuple(slice(0, int(n)) for n in self.lengths[index])
        return self.ids[(index, slice(None), *window)]

    @staticmethod
    def stack(items: "list[Codes]") -> "Codes":
        """Joins batches of possibly different grids into one padded batch."""
        grid = torch.stack([c.lengths.amax(0) for c in items]).amax(0).tolist()
        padded = []
        for codes in items:
            out = codes.ids.new_zeros((*codes.ids.shape[:2], *grid))
            out[(..., *(slice(0, n) for n in codes.ids.shape[2:]))] = codes.ids
            padded.append(out)
        sizes = [c.sizes for c in items]
        return Codes(
            torch.cat(padded),
            torch.cat([c.lengths for c in items]),
            torch.cat([s for s in sizes if s is not None]) if all(s is not None for s in sizes) else None,
        )


@dataclass(frozen=True)
class Latents:
    """Continuous tokens of a batch.

    Attributes:
        values: one vector per position; zero where an item has ended.
        coordinates: grid coordinates of every position, in reading order; zero where an item has ended, -1 for a vector that belongs to
            the whole medium and comes before those of the grid.
        lengths: valid positions of every item.
        sizes: extent of the medium itself (pixels, samples) before it was padded to the grid, so that ``decode`` can crop to exactly
            what went in; None where the grid alone decides.
    """

    values: Float[Tensor, "b n d"]
    coordinates: Int[Tensor, "b n axes"]
    lengths: Int[Tensor, " b"]
    sizes: Int[Tensor, "b axes2"] | None = None

    def __len__(self) -> int:
        return self.values.shape[0]

    @property
    def mask(self) -> Bool[Tensor, "b n"]:
        """True at valid positions."""
        return torch.arange(self.values.shape[1], device=self.lengths.device) < self.lengths[:, None]

    def item(self, index: int) -> Float[Tensor, "n d"]:
        """The vectors of one item, padding cut away."""
        return self.values[index, : int(self.lengths[index])]

    @staticmethod
    def pad(
        values: Sequence[Float[Tensor, "_ d"]], coordinates: Sequence[Int[Tensor, "_ axes"]], sizes: Sequence[Sequence[int]] | None = None
    ) -> "Latents":
        """One batch of items of possibly different lengths, at least one."""
        return Latents(
            pad_sequence(list(values), batch_first=True),
            pad_sequence(list(coordinates), batch_first=True),
            torch.tensor([len(v) for v in values], dtype=torch.long, device=values[0].device),
            None if sizes is None else torch.tensor(sizes, dtype=torch.long),
        )


def grid_coordinates(grid: Sequence[int]) -> Int[Tensor, "n axes"]:
    """Coordinates of every cell of a grid, in reading order."""
    return torch.cartesian_prod(*map(torch.arange, grid)).reshape(-1, len(grid))


@dataclass(frozen=True)
class Segment:
    """A run of one modality inside a document, before it becomes a stream.

    Attributes:
        modality: what the ids are.
        ids: local ids; text ``[n]``, media ``[k, *grid]``. None for continuous features.
        features: one vector per cell, ``[*grid, d]``, where the segment is continuous.
        places: grid of the positions at which a model reads the features, where its connector joins or resamples them; None: one per cell.
        target: whether training predicts this segment (answers: yes; questions: as the task says).
    """

    modality: Modality
    ids: Int[Tensor, "..."] | None = None
    features: Float[Tensor, "..."] | None = None
    target: bool = True
    places: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Grid of the segment: ``(n,)`` for text, ``(h, w)`` for a picture, ``(t,)`` for sound."""
        if self.ids is not None:
            return tuple(self.ids.shape) if self.modality is Modality.TEXT else tuple(self.ids.shape[1:])
        assert self.features is not None
        return tuple(self.features.shape[:-1])


@dataclass(frozen=True)
class Batch:
    """Packed rows, as the model reads them.

    Attributes:
        tokens: vocabulary ids; the pad id where a row has ended.
        positions: rotary positions on three axes (time, row, column); all equal on text.
        document_ids: which document of the row a position belongs to; -1 on padding.
        slots: index of the grammar slot (the set of legal ids) in which each token stands.
        loss_mask: whether the token is a target of training.
        features: continuous vectors of all spans; None where the batch has none.
        feature_index: flat index (row * s + position) of every place that reads them.
        feature_grids: extent of every span's grid of vectors, in order, as many vectors as its product; None: one column of them all.
    """

    tokens: Int[Tensor, "b s"]
    positions: Int[Tensor, "b s 3"]
    document_ids: Int[Tensor, "b s"]
    slots: Int[Tensor, "b s"]
    loss_mask: Bool[Tensor, "b s"]
    features: Float[Tensor, "n d"] | None = None
    feature_index: Int[Tensor, " m"] | None = None
    feature_grids: Int[Tensor, "spans axes"] | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> "Batch":
        moved: dict[str, Any] = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return Batch(**moved)
