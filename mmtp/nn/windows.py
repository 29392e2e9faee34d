"""Attention of packed documents, by windows that are no longer than the longest of them.

A row of a batch holds many documents that do not see each other, and scores between them are computed to be masked. Windows hold the same
documents, as many to a window as fit into the length of the longest: of a row of n documents of one length, an n-th of the scores is left.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

GAIN = 0.8
"""Share of the scores of whole rows that windows may have: where more are left, they do not pay for the copies in and out."""


@dataclass(frozen=True)
class Windows:
    """How documents stand in windows, worked out once for all layers.

    Attributes:
        index: flat place in the rows of what each place of a window holds; 0 where it holds nothing.
        inverse: flat place in the windows of each place of the rows.
        mask: True where a position may look; or what that adds to scores. Places that hold nothing see such places only.
    """

    index: Int[Tensor, "w l"]
    inverse: Int[Tensor, " n"]
    mask: Bool[Tensor, "w 1 l l"] | Float[Tensor, "w 1 l l"]

    @staticmethod
    def of(
        document_ids: Int[Tensor, "b s"],
        bidirectional: Int[Tensor, "b s"] | None = None,
        until: Int[Tensor, "b s"] | None = None,
        window: int = 0,
    ) -> "Windows | None":
        """Those of a batch, which stands in host memory; None where whole rows cost hardly more.

        Args:
            document_ids: of every position; -1 on padding, which sees some of the padding.
            bidirectional: number of the span a position belongs to whose positions see each other; -1 outside.
            until: the last place of the row that each position sees outside of its span; itself where nothing is given.
            window: how many positions each sees outside of its span at most, up to itself and with it; 0 for all.
        """
        b, s = document_ids.shape
        # Queries of a document may stand behind the rest of the row: sorted, a document is in one piece, and padding before all others.
        kinds = int(document_ids.max()) + 2
        keys, order = (document_ids + 1 + kinds * torch.arange(b)[:, None]).flatten().sort(stable=True)
        found, sizes = keys.unique_consecutive(return_counts=True)
        real = found % kinds > 0
        length = int(sizes[real].max()) if real.any() else 1
        pieces = _cut(sizes.tolist(), length)
        windows = _first_fit([size for _, size in pieces], length)
        if len(windows) * length**2 > GAIN * b * s**2:
            return None
        index, piece = torch.zeros(len(windows), length, dtype=torch.long), torch.full((len(windows), length), -1)
        for w, held in enumerate(windows):
            end = 0
            for number in held:
                start, size = pieces[number]
                begin, end = end, end + size
                index[w, begin:end] = order[start : start + size]
                piece[w, begin:end] = number
        filled = (piece >= 0).flatten().nonzero()[:, 0]
        inverse = torch.empty(b * s, dtype=torch.long).index_put((index.flatten()[filled],), filled)
        place = index % s
        sees = place[:, None] <= (place if until is None else until.flatten()[index])[..., None]
        sees &= place[..., None] - place[:, None] < (window or s)
        if bidirectional is not None:
            span = bidirectional.flatten()[index]
            sees |= (span[:, None] == span[..., None]) & (span >= 0)[..., None]
        mask = (sees & (piece[:, None] == piece[..., None])).unsqueeze(1)
        for values in (index, mask):
            for axis in (0, -2, -1):
                # Compiled code is to serve all windows: their number and length differ from batch to batch.
                torch._dynamo.maybe_mark_dynamic(values, axis % values.ndim)
        return Windows(index, inverse, mask)

    def biased(self, dtype: torch.dtype) -> "Windows":
        """The same with what the mask adds to scores, so that layers share the making."""
        return replace(self, mask=additive(self.mask, dtype))

    def enter(self, x: Num[Tensor, "b h s d"]) -> Num[Tensor, "w h l d"]:
        """What stands in the windows of rows."""
        rows = x.transpose(1, 2).flatten(0, 1)
        return _Select.apply(rows, self.index.flatten(), self.inverse).unflatten(0, self.index.shape).transpose(1, 2)

    def leave(self, x: Num[Tensor, "w h l d"], rows: int) -> Num[Tensor, "b h s d"]:
        """What stands in the rows of windows."""
        places = x.transpose(1, 2).flatten(0, 1)
        return _Select.apply(places, self.inverse, self.index.flatten()).unflatten(0, (rows, -1)).transpose(1, 2)


class _Select(torch.autograd.Function):
    """Rows by their index; of their gradients, each row gets that of the place which ``inverse`` names.

    Where a window holds nothing there is a copy of some row, and gradients that are not 0. They stay among such places, which see
    each other only, and no row asks for them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad,) = grad_outputs
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def additive(mask: Bool[Tensor, "b #h s t"] | Float[Tensor, "b #h s t"], dtype: torch.dtype) -> Float[Tensor, "b #h s t"]:
    """What a mask adds to scores."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def _cut(sizes: list[int], length: int) -> list[tuple[int, int]]:
    """Begin and size of what stands one behind the other. What padding sees does not matter: where longer than a window, it is cut."""
    pieces, begin = [], 0
    for size in sizes:
        pieces += [(begin + done, min(length, size - done)) for done in range(0, size, length)]
        begin += size
    return pieces


def _first_fit(sizes: list[int], length: int) -> list[list[int]]:
    """Numbers of what each window holds, longest first."""
    windows: list[list[int]] = []
    left: list[int] = []
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        place = next((w for w, room in enumerate(left) if room >= sizes[number]), len(left))
        if place == len(left):
            windows.append([])
            left.append(length)
        windows[place].append(number)
        left[place] -= sizes[number]
    return windows
