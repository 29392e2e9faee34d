"""Finite scalar quantization."""

import math
from dataclasses import dataclass

from torch import Tensor
from vector_quantize_pytorch import FSQ as _FSQ

from mmtp.tokenizers.quantizers.base import LibraryQuantizer, QuantizerConfig


class FSQ(LibraryQuantizer):
    """Finite scalar quantization (Mentzer et al., arXiv 2309.15505, section 3): every latent channel is rounded to one of a few levels.

    There is no codebook to learn and so none to collapse; equal inputs give equal codes even after the small changes that
    another machine's arithmetic brings, more often than with learned codebooks.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(QuantizerConfig):
        """``levels``: levels per channel; their product is the codebook's size."""

        levels: tuple[int, ...] = (7, 5, 5, 5, 5)

        def __post_init__(self) -> None:
            check_levels(self.levels)

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        self.config = config
        self.fsq = _FSQ(levels=list(config.levels), dim=dim)
        self.codebook_sizes = (math.prod(config.levels),)

    def _quantize(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, ids = self.fsq(latents)
        return out, ids[..., None], out.new_zeros(())

    def _lookup(self, ids: Tensor) -> Tensor:
        return self.fsq.indices_to_codes(ids[..., 0])


def check_levels(levels: tuple[int, ...]) -> None:
    """Refuses levels that round everything to one side."""
    if not levels or min(levels) < 3:
        raise ValueError(f"levels {list(levels)}: each must be at least 3")
