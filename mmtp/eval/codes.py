"""How much of its codebooks a tokenizer uses, counted over a whole set."""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from mmtp.eval.report import Table
from mmtp.tokenizers.base import DiscreteTokenizer
from mmtp.types import Codes, MmtpError

T = TypeVar("T")

BATCH = 64


class EvalError(MmtpError):
    """A measurement that cannot be made."""


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
    def entropies(self) -> list[float]:
        """Per codebook, :func:`entropy`."""
        return [entropy(count) for count in self.counts]

    @property
    def perplexities(self) -> list[float]:
        """Per codebook, 2 to the entropy: as many codes used evenly would carry as much."""
        return [2**bits for bits in self.entropies]

    def figures(self) -> dict[str, float]:
        """``codebook_usage``, ``perplexity`` and ``entropy_bits``, as means over codebooks."""
        return {"codebook_usage": mean(self.usages), "perplexity": mean(self.perplexities), "entropy_bits": mean(self.entropies)}

    def codebooks(self) -> list[dict[str, float]]:
        """The same of each codebook."""
        found = zip(self.usages, self.perplexities, self.entropies, strict=True)
        return [{"usage": usage, "perplexity": spread, "entropy_bits": bits} for usage, spread, bits in found]

    def table(self, caption: str = "") -> Table:
        """The same for people, beside what each codebook has room for."""
        rows = [
            [
                str(k),
                len(count),
                f"{100 * book['usage']:.1f} %",
                f"{book['perplexity']:.1f}",
                f"{book['entropy_bits']:.2f} of {math.log2(len(count)):.2f} bits",
            ]
            for k, (count, book) in enumerate(zip(self.counts, self.codebooks(), strict=True))
        ]
        return Table(["codebook", "entries", "in use", "perplexity", "entropy"], rows, caption)


def count_codes(tokenizer: DiscreteTokenizer, media: Iterable[Tensor], batch: int = BATCH) -> CodeCounts:
    """Encodes a whole set and counts its codes; nothing is decoded.

    Args:
        tokenizer: with codes.
        media: as it takes them; read once, in batches.
        batch: how many pass at a time.

    Raises:
        EvalError: the set is empty.
    """
    counts = CodeCounts(tokenizer.spec.codebook_sizes)
    for some in batches(media, batch):
        counts.add(tokenizer.encode(some))
    if not counts.tokens:
        raise EvalError("the set holds nothing to measure")
    return counts


def entropy(counts: Int[Tensor, " codes"]) -> float:
    """Entropy of a histogram of codes in bits: what a code would take on average, were it written as short as its share allows."""
    p = counts[counts > 0].double() / counts.sum()
    return float(-(p * p.log2()).sum())


def batches(items: Iterable[T], size: int = BATCH) -> Iterator[list[T]]:
    """Lists of so many items; the last may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)
