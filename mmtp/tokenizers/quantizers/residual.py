"""Residual quantizers: every codebook codes what those before it have left over.

While training, a random number of the last codebooks is left out of each step (quantizer dropout, SoundStream, arXiv 2107.03312, section
III-C), so that the first few alone are a lower bit rate of their own.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from vector_quantize_pytorch import ResidualFSQ as _ResidualFSQ
from vector_quantize_pytorch import ResidualLFQ as _ResidualLFQ
from vector_quantize_pytorch import ResidualVQ as _ResidualVQ

from mmtp.tokenizers.quantizers.base import LibraryQuantizer, QuantizerConfig
from mmtp.tokenizers.quantizers.scalar import check_levels
from mmtp.tokenizers.quantizers.vector import replace_dead_codes, start_in_training


class ResidualVQ(LibraryQuantizer):
    """Residual vector quantization (SoundStream, arXiv 2107.03312, algorithm 1), of few dimensions as in DAC (arXiv 2306.06546)."""

    residual: ClassVar[bool] = True

    @dataclass(frozen=True, kw_only=True)
    class Config(QuantizerConfig):
        """``num_codebooks`` of ``codebook_size`` entries.

        Attributes:
            num_codebooks: codes of a latent.
            codebook_size: entries of each codebook.
            codebook_dim: numbers of an entry; latents are projected to them once, and back.
            decay: of the moving average that keeps the codebooks.
            dead_code_share: as for VQ.
            commitment: weight of the loss that draws latents to their entries.
            dropout: whether training leaves out a random number of the last codebooks.
        """

        num_codebooks: int = 8
        codebook_size: int = 1024
        codebook_dim: int = 8
        decay: float = 0.99
        dead_code_share: float = 0.2
        commitment: float = 0.25
        dropout: bool = True

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        self.config = config
        self.vq = start_in_training(
            _ResidualVQ(
                dim=dim,
                num_quantizers=config.num_codebooks,
                codebook_size=config.codebook_size,
                codebook_dim=config.codebook_dim,
                kmeans_init=True,
                decay=config.decay,
                threshold_ema_dead_code=int(config.dead_code_share > 0),
                commitment_weight=config.commitment,
                quantize_dropout=True,
                quantize_dropout_cutoff_index=_cutoff(config.num_codebooks, config.dropout),
            )
        )
        self.codebook_sizes = (config.codebook_size,) * config.num_codebooks

    def _quantize(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for layer in self.vq.layers:
            replace_dead_codes(layer, self.config.dead_code_share, latents[..., 0].numel())
        out, ids, losses = self.vq(latents)
        return out, ids, losses.sum()

    def _lookup(self, ids: Tensor) -> Tensor:
        return self.vq.get_output_from_indices(ids)


class ResidualFSQ(LibraryQuantizer):
    """Residual finite scalar quantization: every further codebook rounds the rest on a finer grid."""

    residual: ClassVar[bool] = True

    @dataclass(frozen=True, kw_only=True)
    class Config(QuantizerConfig):
        """``num_codebooks`` of ``levels`` each; ``dropout`` as for residual VQ."""

        num_codebooks: int = 4
        levels: tuple[int, ...] = (8, 5, 5, 5)
        dropout: bool = True

        def __post_init__(self) -> None:
            check_levels(self.levels)

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        self.config = config
        self.fsq = _ResidualFSQ(
            levels=list(config.levels),
            num_quantizers=config.num_codebooks,
            dim=dim,
            quantize_dropout=True,
            quantize_dropout_cutoff_index=_cutoff(config.num_codebooks, config.dropout),
        )
        self.codebook_sizes = (math.prod(config.levels),) * config.num_codebooks

    def _quantize(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, ids = self.fsq(latents)
        return out, ids, out.new_zeros(())

    def _lookup(self, ids: Tensor) -> Tensor:
        return self.fsq.get_output_from_indices(ids)


class ResidualLFQ(LibraryQuantizer):
    """Residual lookup-free quantization: every further codebook halves the step."""

    residual: ClassVar[bool] = True

    @dataclass(frozen=True, kw_only=True)
    class Config(QuantizerConfig):
        """``num_codebooks`` of ``2^bits`` entries; ``entropy`` and ``commitment`` as for LFQ, ``dropout`` as for residual VQ."""

        num_codebooks: int = 4
        bits: int = 10
        entropy: float = 0.1
        commitment: float = 0.25
        dropout: bool = True

        def __post_init__(self) -> None:
            if not 1 <= self.bits <= 12:
                raise ValueError(f"bits {self.bits}: 1 to 12 are wanted; the entropy loss is over 2^bits codes at once")

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        self.config = config
        self.lfq = _ResidualLFQ(
            dim=dim,
            num_quantizers=config.num_codebooks,
            codebook_size=2**config.bits,
            entropy_loss_weight=config.entropy,
            commitment_loss_weight=config.commitment,
            quantize_dropout=True,
            quantize_dropout_cutoff_index=_cutoff(config.num_codebooks, config.dropout),
        )
        self.codebook_sizes = (2**config.bits,) * config.num_codebooks

    def _quantize(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, ids, losses = self.lfq(latents)
        return out, ids, losses.sum()

    def _lookup(self, ids: Tensor) -> Tensor:
        return self.lfq.get_output_from_indices(ids)


def _cutoff(num_codebooks: int, dropout: bool) -> int:
    """Where dropout may begin. The library looks up fewer codebooks only where dropout is on: unwanted, it begins behind the last."""
    return 0 if dropout else num_codebooks - 1
