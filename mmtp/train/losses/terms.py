"""Terms of a loss before they are added up."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Term(NamedTuple):
    """One term: its weight and its value, a scalar."""

    weight: float
    value: Tensor


def weighted_sum(terms: Mapping[str, Term]) -> Float[Tensor, ""]:
    """The sum of all terms, each times its weight."""
    return torch.stack([term.weight * term.value for term in terms.values()]).sum()


class ReconstructionLoss(nn.Module, ABC):
    """How far a reconstruction is from its original: what losses of pictures and of sounds share."""

    @abstractmethod
    def terms(self, output: Float[Tensor, "b c *size"], target: Float[Tensor, "b c *size"]) -> tuple[dict[str, Term], dict[str, float]]:
        """The terms, and numbers for the log.

        Args:
            output: reconstruction, values in [-1, 1].
            target: original.
        """

    def forward(self, output: Float[Tensor, "b c *size"], target: Float[Tensor, "b c *size"]) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """The weighted sum of the terms, and the numbers."""
        terms, metrics = self.terms(output, target)
        return weighted_sum(terms), metrics
