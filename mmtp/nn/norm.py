"""Root-mean-square normalisation."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """RMSNorm with a learned gain, computed in float32 (Zhang and Sennrich 2019, eq. 4).

    Args:
        width: size of the last axis.
        eps: added to the mean square.
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return torch.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)
