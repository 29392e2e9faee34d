"""Scales that are due: where a model writes pictures scale by scale, all codes of the next one are asked for at once.

Queries (:mod:`mmtp.models.next_scale`) stand behind what a pass reads, where drafts stand elsewhere. Nothing of them is kept: the codes
that come of them are tokens like any others, which the next pass reads, with the queries of the scale after them behind.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmtp.decode.rows import Choice, Lane, Row
from mmtp.decode.step import Step


@dataclass(frozen=True)
class Due:
    """A scale that a row writes in the next pass.

    Attributes:
        row: whose.
        queries: of all its codes.
        known: how many of these stand already, for a prefix may end within a scale. Queries do not see them.
        any_code: an id that may stand at their places.
    """

    row: Row
    queries: Float[Tensor, "n d"]
    known: int
    any_code: int

    @classmethod
    def of(cls, model: Step, row: Row) -> "Due | None":
        """What is due in a row, if anything is."""
        pyramid, index = model.next_scale, row.state.coordinate[2]
        scale = None if pyramid is None else pyramid.due(row.state)
        if scale is None:
            return None
        begin, start = len(row.tokens) - index, pyramid.starts[scale]
        codes = torch.tensor(row.tokens[begin : begin + start], dtype=torch.long, device=pyramid.codebook.device)
        return cls(row, model.ask(codes - pyramid.first_id), index - start, pyramid.first_id)

    def __len__(self) -> int:
        return len(self.queries)

    def positions(self, lane: Lane) -> list[tuple[int, int, int]]:
        """Where the queries stand: those of the codes, in the row or in its branch."""
        ahead = lane.state.copy()
        return lane.positions[len(lane.tokens) - self.known :] + [ahead.push(self.any_code) for _ in range(len(self) - self.known)]

    def stand(self, lane: Lane, begin: int, embedded: Float[Tensor, "b s d"], mask: Bool[Tensor, "b 1 s t"]) -> None:
        """Puts the queries into a pass, behind what it reads of a lane from offset ``begin`` on, and lets them see what they may."""
        end = len(lane.tokens)
        columns = slice(end - begin, end - begin + len(self))
        embedded[lane.index, columns] = self.queries.to(embedded.dtype)
        mask[lane.index, :, columns, end - self.known : end] = False
        mask[lane.index, :, columns, end : end + len(self)] = True

    def choices(self, read: Sequence[int]) -> list[Choice]:
        """The places where codes are chosen.

        Args:
            read: how many tokens the pass reads of each lane, ahead of the queries.
        """
        row, branch = self.row, self.row.branch
        return [
            Choice(
                row,
                read[row.index] + self.known + j,
                row.state.slot,
                len(row.tokens) + j,
                None if branch is None else (branch.index, read[branch.index] + self.known + j),
                row.weight(row.state, j),
            )
            for j in range(len(self) - self.known)
        ]
