"""Gated feed-forward layer."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mmtp.nn.linear import Linear


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` (Shazeer 2020, section 2), gate and up in one matrix.

    Args:
        width: of the residual stream.
        hidden: of the gated layer.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = Linear(width, 2 * hidden, bias=False)
        self.down = Linear(hidden, width, bias=False)

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)
