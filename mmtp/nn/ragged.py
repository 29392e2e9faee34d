"""Passes whose lanes have different numbers of tokens: where the tokens are among the padding."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int, Num
from torch import Tensor

MOST = 0.85
"""Share of tokens among the places of a pass up to which it pays to leave out the others: packing costs a little."""


class Ragged(NamedTuple):
    """Places that hold tokens, of a pass over some lanes with padding behind the shorter ones.

    What is computed for each place by itself may be computed for these alone, as in passes of continuous batches (Yu et al. 2022, Orca,
    section 3.2, selective batching); only attention needs to know lanes.

    Attributes:
        at: the places, counted lane by lane.
        lanes: of the pass.
        width: places of each lane.
    """

    at: Int[Tensor, " n"]
    lanes: int
    width: int

    @classmethod
    def of(cls, widths: Sequence[int], width: int, device: torch.device) -> "Ragged | None":
        """Of a pass ``width`` places wide whose lanes have so many tokens; None where there is too little padding to be left out."""
        if sum(widths) > MOST * width * len(widths):
            return None
        at = [lane * width + i for lane, count in enumerate(widths) for i in range(count)]
        return cls(torch.tensor(at, dtype=torch.long, device=device), len(widths), width)

    def pack(self, x: Num[Tensor, "b s *d"]) -> Num[Tensor, "1 n *d"]:
        """Values of the tokens, one behind the other."""
        return x.flatten(0, 1)[self.at].unsqueeze(0)

    def spread(self, packed: Num[Tensor, "1 n *d"]) -> Num[Tensor, "b s *d"]:
        """Values back at their places, 0 between them."""
        out = packed.new_zeros(self.lanes * self.width, *packed.shape[2:])
        out[self.at] = packed[0]
        return out.unflatten(0, (self.lanes, self.width))
