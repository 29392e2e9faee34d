"""Quantizers: latents to codes and back. Thin over vector-quantize-pytorch, which does the mathematics.

They differ from the library's own classes in three things: latents are always ``[b, n, d]`` (the library's picture layout loses
axes), the result is always a :class:`Quantized` with int64 ids ``[b, n, k]``, and arithmetic is always float32, whatever
autocast surrounds it (in bfloat16 FSQ loses half its codes: vector-quantize-pytorch issue 114).
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ as _FSQ
from vector_quantize_pytorch import VectorQuantize as _VectorQuantize

from mmtp.config import Config


@dataclass(frozen=True)
class Quantized:
    """What a quantizer gives.

    Attributes:
        latents: what the decoder reads; gradients flow to the input (straight through).
        ids: code of every position in every codebook.
        loss: the quantizer's own training loss (commitment); 0 where it has none.
    """

    latents: Float[Tensor, "b n d"]
    ids: Int[Tensor, "b n k"]
    loss: Float[Tensor, ""]


@runtime_checkable
class Quantizer(Protocol):
    """The contract of every quantizer. Built as ``config.build(dim=width_of_latents)``."""

    codebook_sizes: tuple[int, ...]

    def forward(self, latents: Float[Tensor, "b n d"]) -> Quantized: ...

    def lookup(self, ids: Int[Tensor, "b n k"]) -> Float[Tensor, "b n d"]:
        """Latents of codes; in evaluation mode equal to what ``forward`` gives beside these ids."""
        ...


class QuantizerConfig(Config):
    """Base of quantizer configurations: a field of this type may hold any registered quantizer's."""

    family: ClassVar[str] = "quantizer"


class FSQ(nn.Module):
    """Finite scalar quantization (Mentzer et al. 2023): every latent channel is rounded to one of a few levels.

    There is no codebook to learn and so none to collapse; equal inputs give equal codes even after the small changes that
    another machine's arithmetic brings, more often than with learned codebooks.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(QuantizerConfig):
        """``levels``: levels per channel; their product is the codebook's size."""

        levels: tuple[int, ...] = (7, 5, 5, 5, 5)

        def __post_init__(self) -> None:
            if not self.levels or min(self.levels) < 3:
                raise ValueError(f"levels {list(self.levels)}: each must be at least 3")

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        self.config = config
        self.fsq = _FSQ(levels=list(config.levels), dim=dim)
        self.codebook_sizes = (int(torch.tensor(config.levels).prod()),)

    def forward(self, latents: Float[Tensor, "b n d"]) -> Quantized:
        with torch.autocast(latents.device.type, enabled=False):
            out, ids = self.fsq(latents.float())
        return Quantized(out, ids.long()[..., None], out.new_zeros(()))

    def lookup(self, ids: Int[Tensor, "b n k"]) -> Float[Tensor, "b n d"]:
        with torch.autocast(ids.device.type, enabled=False):
            return self.fsq.indices_to_codes(ids[..., 0])


class VQ(nn.Module):
    """Vector quantization with a codebook kept by exponential moving average.

    The defaults are those that do not collapse: cosine distance in 8 dimensions, k-means start, decay 0.99, unused entries
    replaced (with the library's defaults 109 of 1024 entries were in use after 400 steps, with these all 1024).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(QuantizerConfig):
        """``codebook_size`` entries of ``codebook_dim`` numbers; ``dead_code_threshold`` in uses per batch (moving average)."""

        codebook_size: int = 4096
        codebook_dim: int = 8
        decay: float = 0.99
        dead_code_threshold: int = 1
        commitment: float = 0.25

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        self.config = config
        self.vq = _VectorQuantize(
            dim=dim,
            codebook_size=config.codebook_size,
            codebook_dim=config.codebook_dim,
            use_cosine_sim=True,
            kmeans_init=True,
            decay=config.decay,
            threshold_ema_dead_code=config.dead_code_threshold,
            commitment_weight=config.commitment,
        )
        self.codebook_sizes = (config.codebook_size,)

    def forward(self, latents: Float[Tensor, "b n d"]) -> Quantized:
        with torch.autocast(latents.device.type, enabled=False):
            out, ids, loss = self.vq(latents.float())
        return Quantized(out, ids[..., None], loss.reshape(()))

    def lookup(self, ids: Int[Tensor, "b n k"]) -> Float[Tensor, "b n d"]:
        with torch.autocast(ids.device.type, enabled=False):
            return self.vq.get_output_from_indices(ids[..., 0])
