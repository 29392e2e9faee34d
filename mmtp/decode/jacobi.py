"""Drafts of codes by the model itself: what it chose behind a draft that was refused is drafted again.

Speculative Jacobi decoding (Teng et al., arXiv 2410.01699). A pass that verifies drafts gives a choice at every place of its window. Those
behind the first refusal come of a wrong token or two before them, yet of the whole model and of all that stands, and are often right:
they are the next round's drafts. Where none are left, places are drafted by what the model predicted at the nearest one before them,
for neighbours are alike. Neither needs a head or a pass, so that models without one draft too. Text has no such neighbours and is left to
others.

A choice is carried as it is. With coupling it was drawn with the noise of its place, so once what comes before it is right, it is the true
one: windows converge as a fixed-point iteration does. With rejection it is a sample of what the model predicted behind the old drafts, and
carries that as its q; the next pass keeps it as often as can be (MC-SJD, arXiv 2510.24211). Drawn anew, as the first paper has it, drafts
would change in every round. So nothing that is drafted here may depend on what stood behind its place (:mod:`mmtp.decode.sample`).
"""

import sys
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mmtp.decode.chooser import Chooser
from mmtp.decode.drafts import Drafter, Drafts
from mmtp.decode.rows import Choice, Lane, Row
from mmtp.decode.sample import Draft
from mmtp.decode.step import Step
from mmtp.models.heads.base import CARRIED, FORCED, NEARBY
from mmtp.types import Modality


@dataclass(frozen=True, kw_only=True)
class JacobiDrafts:
    """Drafts of pictures', sounds' and videos' codes from the pass before.

    Attributes:
        max_drafts: tokens to propose at most, those of ``first`` among them.
        first: another way, whose drafts come first: it knows the token chosen last, which the carried ones do not. None for none.
    """

    max_drafts: int = 12
    first: Drafts | None = None

    def __post_init__(self) -> None:
        if self.max_drafts < 1:
            raise ValueError(f"max_drafts {self.max_drafts}: at least 1 is wanted")

    def length(self, model: Step) -> int:
        return max(self.max_drafts, 0 if self.first is None else self.first.length(model))

    def begin(self, chooser: Chooser, num_lanes: int, capacity: int, exact: bool = False) -> Drafter:
        first = (
            None if self.first is None or not self.first.length(chooser.model) else self.first.begin(chooser, num_lanes, capacity, exact)
        )
        return _JacobiDrafter(chooser, self.max_drafts, first)


class _JacobiDrafter:
    """Keeps nothing of its own: rows hold what the last pass chose."""

    def __init__(self, chooser: Chooser, max_drafts: int, first: Drafter | None) -> None:
        self.chooser, self.max_drafts, self.first = chooser, max_drafts, first

    @property
    def lookahead(self) -> int:
        return 0 if self.first is None else self.first.lookahead

    @property
    def pads(self) -> bool:
        return self.first is not None and self.first.pads

    def restart(self, lane: int) -> None:
        if self.first is not None:
            self.first.restart(lane)

    def focus(self, first: int, count: int) -> None:
        if self.first is not None:
            self.first.focus(first, count)

    def held(self, lane: int) -> int:
        return sys.maxsize if self.first is None else self.first.held(lane)

    def keeps(self, lane: int, length: int) -> bool:
        return self.first is None or self.first.keeps(lane, length)

    def copy(self, source: int, target: int, length: int) -> None:
        if self.first is not None:
            self.first.copy(source, target, length)

    def swap(self, one: int, other: int) -> None:
        if self.first is not None:
            self.first.swap(one, other)

    def propose(self, rows: list[Row], lanes: list[Lane], hidden: Float[Tensor, "b s d"], counts: list[int], least: int) -> None:
        if self.first is not None:
            self.first.propose(rows, lanes, hidden, counts, least)
        plans = [plan for row in rows if not row.done and (plan := self._plan(row))]
        wanted = [choice for plan in plans for choice, _ in plan if choice.draft is None]
        drawn = iter(self.chooser.propose(self.chooser.model.backbone.norm, hidden, wanted, least > 0))
        for plan in plans:
            drafts = [choice.draft or next(drawn) for choice, _ in plan]
            for (choice, offset), draft in zip(plan, drafts, strict=True):
                row = choice.row
                # A draft may have ended the span before its time.
                if row.draft_states[-1].slot != choice.slot or not row.wants() or not row.take_draft(draft, offset):
                    break

    def _plan(self, row: Row) -> list[tuple[Choice, int]]:
        """The places that come next, as far as they are of codes: where in the last pass the prediction of each is, and the offset to
        count it by; no more than are to pay. Those that hold a draft need not be drawn.
        """
        if not (most := row.wanted(self.max_drafts - len(row.drafts))):
            return []
        slots, length, ahead = self.chooser.slots, len(row.tokens), row.draft_states[-1].copy()
        behind = {choice.place: (choice, chosen) for choice, chosen in row.judged if choice.place >= length}
        first = length + len(row.drafts)
        # What a draft comes of stands before it, or at its place.
        before = [choice for choice, _ in row.judged if choice.place < first]
        nearest = {choice.slot: choice for choice in before}
        of_medium = {slots[choice.slot].modality: choice for choice in before}
        plan = []
        for place in range(first, first + most):
            index, slot = ahead.slot, slots[ahead.slot]
            carried, chosen = behind.get(place, (None, None))
            if carried is not None:
                nearest[carried.slot] = of_medium[slots[carried.slot].modality] = carried
            if ahead.done or (slot.forced is None and (slot.modality is Modality.TEXT or slot.modality not in of_medium)):
                break
            offset = FORCED if slot.forced is not None else CARRIED if carried is not None and carried.slot == index else NEARBY
            if slot.forced is not None:
                choice = Choice(row, 0, index, place, draft=Draft(slot.forced))
            elif carried is not None and offset == CARRIED:
                choice = carried._replace(draft=chosen)
            else:
                # Where no place of this codebook was read, one of another: the draft may be poor, but the next pass reads one.
                source = nearest.get(index, of_medium[slot.modality])
                choice = source._replace(slot=index, place=place, weight=row.weight(ahead), draft=None, answer=None)
            plan.append((choice, offset))
            ahead.push(slots[index].generable[-1][0] if slot.forced is None else slot.forced)
        return plan
