"""Passes whose lanes have different numbers of tokens: where the tokens are among the padding."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int, Num
from torch import Tensor

MOST = 0.85
"""Share of tokens among the places of a pass up to which it pays to leave out the others: packing costs a little."""
APART = 0.5
"""Share of the places of a pass that two bands have to leave of them to pay: each makes its own calls."""


class Ragged(NamedTuple):
    """Places that hold tokens, of a pass over some lanes with padding behind the shorter ones.

    What is computed for each place by itself may be computed for these alone, as in passes of continuous batches (Yu et al. 2022, Orca,
    section 3.2, selective batching); only attention needs to know lanes.

    Attributes:
        at: the places, counted lane by lane.
        lanes: of the pass.
        width: places of each lane.
        bands: lanes of about as many tokens, to attend together: where some read prompts and others a few tokens, the few are padded to the
            longest of their own alone.
    """

    at: Int[Tensor, " n"]
    lanes: int
    width: int
    bands: "Sequence[Band]" = ()

    @classmethod
    def of(cls, widths: Sequence[int], width: int, device: torch.device) -> "Ragged | None":
        """Of a pass ``width`` places wide whose lanes have so many tokens; None where there is too little padding to be left out."""
        if sum(widths) > MOST * width * len(widths):
            return None
        split = min(range(1, len(widths)), key=lambda lane: _area(widths[:lane]) + _area(widths[lane:]), default=0)
        apart = split and _area(widths[:split]) + _area(widths[split:]) <= APART * width * len(widths)
        parts = [(0, widths[:split]), (split, widths[split:])] if apart else [(0, widths)]
        whole = cls._part(widths, width, device)
        bands, first = [], 0
        for lane, counts in parts:
            part = cls._part(counts, max(*counts, 1), device) if apart else whole
            bands.append(Band(slice(lane, lane + len(counts)), slice(first, first + sum(counts)), part))
            first += sum(counts)
        return whole._replace(bands=bands)

    @classmethod
    def _part(cls, widths: Sequence[int], width: int, device: torch.device) -> "Ragged":
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


class Band(NamedTuple):
    """Lanes of a pass that attend together.

    Attributes:
        lanes: which.
        tokens: theirs, among those of the pass.
        ragged: where those stand among the places of these lanes.
    """

    lanes: slice
    tokens: slice
    ragged: Ragged


def _area(widths: Sequence[int]) -> int:
    """Places of lanes as wide as the widest, one at least."""
    return len(widths) * max(1, *widths)
