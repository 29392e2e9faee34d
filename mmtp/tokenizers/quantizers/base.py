"""The contract of quantizers: latents to codes and back. The classes are thin over vector-quantize-pytorch, which does the mathematics.

They differ from the library's own classes in three things: latents are always ``[b, n, d]`` (the library's picture layout loses
axes), the result is always a :class:`Quantized` with int64 ids ``[b, m, k]``, and arithmetic is always float32, whatever
autocast surrounds it (in bfloat16 FSQ loses half its codes: vector-quantize-pytorch issue 114).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmtp.config import Config, ConfigError


@dataclass(frozen=True)
class Quantized:
    """What a quantizer gives.

    Attributes:
        latents: what the decoder reads; gradients flow to the input.
        ids: code of every position (``m`` is ``n``, but for a pyramid) in every codebook; -1 where quantizer dropout left one out of this
            training step.
        loss: the quantizer's own training loss (commitment, entropy); 0 where it has none.
    """

    latents: Float[Tensor, "b n d"]
    ids: Int[Tensor, "b m k"]
    loss: Float[Tensor, ""]


@runtime_checkable
class Quantizer(Protocol):
    """The contract of every quantizer. Built as ``config.build(dim=width_of_latents)``.

    Attributes:
        codebook_sizes: entries of each codebook.
        scales: empty where every latent has codes of its own. Else latents are a square grid, and codes one row for a pyramid of square
            grids over it, coarse to fine: these are their cells per side. Then ``n`` of ids is not ``n`` of latents, and ``lookup`` takes
            the codes of the first few scales as well.
        residual: whether ``lookup`` takes the first few codebooks alone.
    """

    codebook_sizes: tuple[int, ...]
    scales: tuple[int, ...]
    residual: ClassVar[bool]

    def forward(self, latents: Float[Tensor, "b n d"]) -> Quantized: ...

    def lookup(self, ids: Int[Tensor, "b m k"]) -> Float[Tensor, "b n d"]:
        """Latents of codes; in evaluation mode equal to what ``forward`` gives beside these ids.

        A residual quantizer takes the first few of its codebooks as well: a lower bit rate.
        """
        ...


class QuantizerConfig(Config):
    """Base of quantizer configurations: a field of this type may hold any registered quantizer's."""

    family: ClassVar[str] = "quantizer"


class LibraryQuantizer(nn.Module, ABC):
    """What the wrapped classes share: float32, and the library's results in one form.

    Subclasses set ``codebook_sizes`` and say how the library is called, in ``_quantize`` and ``_lookup``.
    """

    codebook_sizes: tuple[int, ...]
    scales: tuple[int, ...] = ()
    residual: ClassVar[bool] = False

    def forward(self, latents: Float[Tensor, "b n d"]) -> Quantized:
        """Quantizes latents; in training mode with everything that training changes (codebooks by moving average, dropout)."""
        with torch.autocast(latents.device.type, enabled=False):
            out, ids, loss = self._quantize(latents.float())
        return Quantized(out, ids.long(), loss)

    def lookup(self, ids: Int[Tensor, "b m k"]) -> Float[Tensor, "b n d"]:
        """Latents of codes."""
        with torch.autocast(ids.device.type, enabled=False):
            return self._lookup(ids)

    @abstractmethod
    def _quantize(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, ids ``[b, m, k]`` of any integer type, and the loss as a scalar."""

    @abstractmethod
    def _lookup(self, ids: Tensor) -> Tensor: ...


def refuse_scales(quantizer: Quantizer, latents: str) -> None:
    """Refuses a quantizer of scales where there is no square grid.

    Raises:
        ConfigError: it has scales; says what ``latents`` are in its place.
    """
    if quantizer.scales:
        raise ConfigError(f"quantizer: one of scales codes square grids of latents; here they are {latents}")
