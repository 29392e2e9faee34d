"""Lookup-free quantizers: every latent channel becomes a bit."""

from dataclasses import dataclass

import torch
from torch import Tensor
from vector_quantize_pytorch import LFQ as _LFQ

from mmtp.tokenizers.quantizers.base import LibraryQuantizer, QuantizerConfig


class LFQ(LibraryQuantizer):
    """Lookup-free quantization (MAGVIT-v2, arXiv 2310.05737, section 3.1): a code is the signs of its latent's channels.

    An entropy loss keeps all codes in use. Over all ``2^bits`` codes at once it is slow (2^14 codes: 9 s a step for 4,096 latents), so
    bits are taken in groups of at most ``group_bits``, each with an entropy loss of its own (Open-MAGVIT2, arXiv 2409.04410).
    """

    spherical = False

    @dataclass(frozen=True, kw_only=True)
    class Config(QuantizerConfig):
        """``bits`` of a code; the codebook has ``2^bits`` entries.

        Attributes:
            bits: channels.
            group_bits: bits over which the entropy loss is exact.
            entropy: weight of the entropy loss.
            diversity: weight of evenness over all against sureness of each, within the entropy loss.
            commitment: weight of the loss that draws channels to -1 and 1.
            inverse_temperature: of the softmax in the entropy loss.
        """

        bits: int = 12
        group_bits: int = 9
        entropy: float = 0.1
        diversity: float = 1.0
        commitment: float = 0.25
        inverse_temperature: float = 10.0

        def __post_init__(self) -> None:
            if not 1 <= self.bits <= 24:
                raise ValueError(f"bits {self.bits}: 1 to 24 are wanted")
            if self.group_bits < 1:
                raise ValueError(f"group_bits {self.group_bits}: at least 1 is wanted")

        @property
        def groups(self) -> int:
            """The fewest groups of equal size that are small enough."""
            return next(n for n in range(1, self.bits + 1) if self.bits % n == 0 and self.bits // n <= self.group_bits)

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        self.config = config
        self.group_size = 2 ** (config.bits // config.groups)
        self.lfq = _LFQ(
            dim=dim,
            codebook_size=self.group_size,
            num_codebooks=config.groups,
            keep_num_codebooks_dim=True,
            entropy_loss_weight=config.entropy,
            diversity_gamma=config.diversity,
            commitment_loss_weight=config.commitment,
            has_projections=True,
            spherical=self.spherical,
        )
        self.codebook_sizes = (2**config.bits,)

    def _quantize(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, ids, loss = self.lfq(latents, inv_temperature=self.config.inverse_temperature)
        return out, (ids.long() * self._weights(ids)).sum(-1, keepdim=True), loss

    def _lookup(self, ids: Tensor) -> Tensor:
        return self.lfq.indices_to_codes(ids // self._weights(ids) % self.group_size)

    def _weights(self, ids: Tensor) -> Tensor:
        """Place value of each group within a code."""
        return self.group_size ** torch.arange(self.config.groups, device=ids.device)


class BSQ(LFQ):
    """Binary spherical quantization (Zhao et al., arXiv 2406.07548, section 4): as LFQ, of latents on a unit sphere.

    The error of a code is bounded, and bits become nearly independent, so that the grouped entropy loss is close to the full one.
    Each group of bits has a sphere of its own.
    """

    spherical = True

    @dataclass(frozen=True, kw_only=True)
    class Config(LFQ.Config):
        """As for LFQ."""
