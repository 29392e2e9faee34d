"""What every tokenizer of encoder, quantizer and decoder shares, whatever its medium."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmtp.tokenizers.reference import FingerprintCache, Reference, fault
from mmtp.types import MmtpError


class Autoencoder(nn.Module, ABC):
    """Encoder, quantizer and decoder, in this order. Subclasses say what media are and how they pass the networks.

    Attributes:
        codes_error: what codes that are not this tokenizer's raise.
    """

    codes_error: ClassVar[type[MmtpError]] = MmtpError

    def __init__(self, config: Any, encoder: nn.Module, decoder: nn.Module, *, dim: int) -> None:
        """Of a configuration with a ``quantizer``, and of networks from media to latents ``dim`` wide and back."""
        super().__init__()
        self.config = config
        self.dim = dim
        self.encoder = encoder
        self.quantizer = config.quantizer.build(dim=dim)
        self.decoder = decoder
        self._fingerprint = FingerprintCache()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @abstractmethod
    def grid(self, shape: Sequence[int]) -> tuple[int, ...]: ...

    def num_tokens(self, shape: Sequence[int]) -> int:
        return math.prod(self.grid(shape)) * len(self.quantizer.codebook_sizes)

    def check_codes(self, ids: Int[Tensor, "b k *grid"]) -> None:
        """Refuses codes that this tokenizer cannot have made; the first few of its codebooks are enough.

        Raises:
            MmtpError: of class ``codes_error``: no codebook, more than this tokenizer has, or a code outside its codebook.
        """
        if message := fault(ids.transpose(0, 1), self.quantizer.codebook_sizes):
            raise self.codes_error(message)

    def codebook_vectors(self, codebook: int = 0) -> Float[Tensor, "n d"]:
        """The vector behind every code of a codebook, those before it being at code 0: codes whose vectors are near look or sound alike."""
        ids = torch.zeros(self.quantizer.codebook_sizes[codebook], 1, codebook + 1, dtype=torch.long, device=self.device)
        ids[:, 0, codebook] = torch.arange(len(ids), device=self.device)
        with Reference(self):
            # As the first of a pyramid, a code stands for all cells, which differ a little at the border only.
            return torch.cat([self.quantizer.lookup(some).mean(1) for some in ids.split(1024)])
