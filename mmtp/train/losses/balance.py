"""A loss's terms balanced by what they do to the reconstruction, not by how large they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmtp.config import Config
from mmtp.train.losses.terms import Term, weighted_sum


@dataclass(frozen=True, kw_only=True)
class BalanceConfig(Config):
    """``decay`` of the running mean of every gradient's norm."""

    decay: float = 0.999


class Balancer(nn.Module):
    """Gives every term of a loss the share of the gradient that its weight says (EnCodec, arXiv 2210.13438, section 3.4).

    Of every term's gradient g_i at the reconstruction the norm is tracked, and what goes back into the decoder is
    sum_i (w_i / sum_j w_j) g_i / <|g_i|>: so weights are shares, whatever the size of the terms. Norms are per item, averaged over the
    batch, and running means are corrected for their start at zero, as in EnCodec's own code.

    Args:
        config: memory of the running means.
        names: of all terms that may come; a term may join in late.
    """

    norms: Tensor
    seen: Tensor

    def __init__(self, config: BalanceConfig, names: Sequence[str]) -> None:
        super().__init__()
        self.config = config
        self.names = tuple(names)
        self.register_buffer("norms", torch.zeros(len(self.names)))
        self.register_buffer("seen", torch.zeros(len(self.names)))

    def forward(self, terms: Mapping[str, Term], output: Float[Tensor, "b *size"]) -> Float[Tensor, ""]:
        """A scalar whose value is the weighted sum of the terms, and whose gradient at ``output`` is the balanced one."""
        total = sum(term.weight for term in terms.values())
        balanced = torch.zeros_like(output)
        for name, term in terms.items():
            (gradient,) = torch.autograd.grad(term.value, output, retain_graph=True)
            norm = self._mean_norm(self.names.index(name), gradient.flatten(1).norm(dim=1).mean())
            balanced += term.weight / total * gradient / norm.clamp_min(1e-12)
        carrier = (output * balanced).sum()
        return weighted_sum(terms).detach() + carrier - carrier.detach()

    def _mean_norm(self, i: int, norm: Float[Tensor, ""]) -> Float[Tensor, ""]:
        self.norms[i] = torch.lerp(norm.float(), self.norms[i], self.config.decay)
        self.seen[i] = 1 - self.config.decay * (1 - self.seen[i])
        return self.norms[i] / self.seen[i]
