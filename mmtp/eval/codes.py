"""How much of its codebooks a tokenizer uses, counted over a whole set."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from mmtp.types import Codes


class CodeCounts:
    """Histograms of codes, one per codebook, and what follows from them.

    Attributes:
        counts: how often each entry of each codebook has occurred.
    """

    def __init__(self, codebook_sizes: Sequence[int]) -> None:
        self.counts = [torch.zeros(size, dtype=torch.long) for size in codebook_sizes]

    def add(self, codes: Codes) -> None:
        """Counts the valid codes of a batch, of any grid."""
        for i in range(len(codes)):
            for count, ids in zip(self.counts, codes.item(i), strict=True):
                count += torch.bincount(ids.flatten().cpu(), minlength=len(count))

    @property
    def tokens(self) -> int:
        """Codes counted, over all codebooks."""
        return sum(int(count.sum()) for count in self.counts)

    @property
    def bits(self) -> float:
        """What the codes take, each of a codebook at the same length: the logarithm (base 2) of the codebook's size."""
        return sum(int(count.sum()) * math.log2(len(count)) for count in self.counts)

    @property
    def usages(self) -> list[float]:
        """Per codebook, the share of the entries that occur."""
        return [float((count > 0).float().mean()) for count in self.counts]

    @property
    def perplexities(self) -> list[float]:
        """Per codebook, :func:`perplexity`."""
        return [perplexity(count) for count in self.counts]


def perplexity(counts: Int[Tensor, " codes"]) -> float:
    """2 to the entropy (bits) of a histogram of codes: as many codes used evenly would carry as much."""
    p = counts[counts > 0].double() / counts.sum()
    return float(torch.exp(-(p * p.log()).sum()))
