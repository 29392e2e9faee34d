"""Drafts by the model's refiner: states that the last pass has left, put right for what is true now.

As in :mod:`mmtp.decode.jacobi`, what a pass left behind a refused draft is where the next drafts come from. There choices are drafted as
they are, though they were made for other tokens; here a state that has read another token than now stands before its place is told so, by
the small layer of :mod:`mmtp.models.refiner`, and a draft is drawn of what it then predicts. Where drafts come to agree again with what was
read, choices are carried as they are, and cost nothing. Beyond the places of the last pass, drafts go on from the state before.

With coupling a draft is drawn with the noise of its place. With rejection the last pass's choice becomes a sample of what the layer then
predicts, and stays the same token as often as can be (:func:`mmtp.decode.sample.redraw`), for all that leads to a draft stands before its
place.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mmtp.decode.chooser import MIN_EXACT_WIDTH, Chooser
from mmtp.decode.drafts import Drafter, KeepsNothing
from mmtp.decode.rows import Choice, DecodeError, Lane, Row
from mmtp.decode.sample import Draft
from mmtp.decode.step import Step
from mmtp.models.heads.base import CARRIED, FORCED, NEARBY
from mmtp.models.refiner import Refiner
from mmtp.nn import native
from mmtp.nn.refinement import Drafted, Place, Trail


@dataclass(frozen=True, kw_only=True)
class RefinedDrafts:
    """Drafts by the refiner of the model, of the media that it has learnt.

    Attributes:
        max_drafts: tokens to propose at most.
    """

    max_drafts: int = 12

    def __post_init__(self) -> None:
        if self.max_drafts < 1:
            raise ValueError(f"max_drafts {self.max_drafts}: at least 1 is wanted")

    def length(self, model: Step) -> int:
        """As of any :class:`mmtp.decode.drafts.Drafts`.

        Raises:
            DecodeError: the model has no refiner.
        """
        if model.refiner is None:
            raise DecodeError("drafts by a refiner: the model has none; make one with mmtp refiner")
        return self.max_drafts

    def begin(self, chooser: Chooser, num_lanes: int, capacity: int, exact: bool = False) -> Drafter:
        return RefinedDrafter(chooser, self.max_drafts, chooser.model.refiner, chooser.model.refiner.media)


class _Left(NamedTuple):
    """What the last pass has left for a place.

    Attributes:
        slot: of the place, as the pass had it.
        read: the token before the place, as the pass had it.
        chosen: what it chose there, a sample of what the states predict.
        states: of the row, and of its branch where it is guided.
    """

    slot: int
    read: int
    chosen: Draft
    states: list[Float[Tensor, " d"]]


@dataclass(eq=False)
class _Trail:
    """Where the drafts of a row stand.

    Attributes:
        row: whose.
        before: state that predicted the token at the end, and that of its branch where it is guided.
        left: by place.
        open: whether more drafts follow.
    """

    row: Row
    before: list[Float[Tensor, " d"]]
    left: dict[int, _Left] = field(default_factory=dict)
    open: bool = True

    @property
    def lanes(self) -> list[int]:
        """Lanes whose states draft: the row's, and its branch's where that has one."""
        branch = self.row.branch if len(self.before) > 1 else None
        return [self.row.index] if branch is None or not branch.draft_states[-1].in_span else [self.row.index, branch.index]

    def left_for(self, place: int, slot: int, lanes: int) -> _Left | None:
        """What the last pass has left for a place, if it had it in the same slot, and for as many lanes, so guided if it is."""
        left = self.left.get(place)
        return left if left is not None and left.slot == slot and len(left.states) >= lanes else None


class _Plan(NamedTuple):
    """Drafts of a row that are to be made in one call.

    Attributes:
        lefts: what the last pass has left for each place.
        slots: of the places.
        asked: of the kernel.
    """

    lefts: list[_Left | None]
    slots: list[int]
    asked: Trail


class RefinedDrafter(KeepsNothing):
    """Keeps nothing of its own: rows hold what the last pass chose, and the pass its states.

    Args:
        chooser: gives model, logits and grammar.
        max_drafts: tokens to propose at most.
        refiner: that drafts.
        media: of the tokens that are drafted.
    """

    def __init__(self, chooser: Chooser, max_drafts: int, refiner: Refiner, media: Collection[str]) -> None:
        self.chooser, self.max_drafts = chooser, max_drafts
        self._drafted = [slot.forced is None and slot.modality in media for slot in chooser.slots]
        # Small products are mostly calls. One that makes all drafts of a row is worth a compiler, whoever runs the passes.
        self.compiled = chooser.device.type == "cpu" and native.usable()
        if self.compiled:
            norm = chooser.model.backbone.norm
            self._refinement = refiner.compiled(chooser.model.embedding.table.weight, norm.weight, norm.eps)
        self.refiner = refiner.to(chooser.device, chooser.dtype)

    def propose(self, rows: list[Row], lanes: list[Lane], hidden: Float[Tensor, "b s d"], counts: list[int], least: int) -> None:
        trails = [self._begin(row, hidden) for row in rows if not row.done and self._begins(row)]
        at_once = [trail for trail in trails if self._at_once(trail.row)]
        trails = [trail for trail in trails if trail not in at_once]
        while at_once := [trail for trail in at_once if self._goes_on(trail)]:
            self._draft_all(at_once)
        while trails := [trail for trail in trails if self._goes_on(trail)]:
            self._draft(trails, len(lanes), hidden, least)

    def _at_once(self, row: Row) -> bool:
        """Whether all drafts of a row can be made in one call, which knows no constraint, nor what rejection must know as withheld."""
        if not self.compiled or row.answer(-1) is not None:
            return False
        return not row.rejects or not any(map(self.chooser.slots[row.draft_states[-1].slot].generates, row.withheld))

    def _making(self, row: Row) -> float:
        """What a draft takes, of the row's part of the pass."""
        return row.alone(self.chooser.costs.draft if self._at_once(row) else self.chooser.costs.draft_by_calls)

    def _begins(self, row: Row) -> bool:
        """Whether there is something to draft, and a state to draft from: a pass that ends in a whole scale has chosen nothing."""
        if not row.judged or not row.wants():
            return False
        index = row.state.slot
        return self.chooser.slots[index].forced is not None or self._pays(row, index)

    def _pays(self, row: Row, slot: int) -> bool:
        """Whether the next draft of a row, which is of a slot, is worth its making."""
        return self._drafted[slot] and row.wants(self._making(row))

    def _begin(self, row: Row, hidden: Float[Tensor, "b s d"]) -> _Trail:
        """Finds what the last pass has left."""
        length = len(row.tokens)
        newest = next(i for i, (choice, _) in enumerate(row.judged) if choice.place == length - 1)
        trail = _Trail(row, _states(hidden, row.judged[newest][0]))
        for (previous, _), (choice, chosen) in pairwise(row.judged[newest : newest + 1 + self.max_drafts]):
            if previous.draft is not None:
                trail.left[choice.place] = _Left(choice.slot, previous.draft.token, chosen, _states(hidden, choice))
        return trail

    def _goes_on(self, trail: _Trail) -> bool:
        """Whether a token comes next that is worth drafting. What the grammar leaves no choice about is drafted at once."""
        row, slots = trail.row, self.chooser.slots
        while trail.open and len(row.drafts) < self.max_drafts and row.wants():
            index = row.draft_states[-1].slot
            if (forced := slots[index].forced) is None:
                return self._pays(row, index)
            trail.open = row.take_draft(Draft(forced), FORCED)
        return False

    def _draft_all(self, trails: list[_Trail]) -> None:
        """As many drafts of rows as pay, in one call, up to a place about which the grammar leaves no choice."""
        plans = [(trail, plan) for trail in trails if (plan := self._plan(trail)) is not None]
        if plans:
            drafted = self._refinement([plan.asked for _, plan in plans], torch.get_num_threads())
            for (trail, plan), found in zip(plans, drafted, strict=True):
                self._take(trail, plan, found)

    def _plan(self, trail: _Trail) -> _Plan | None:
        """What is to be drafted of a row; None for nothing."""
        row, logits, lanes, trail.open = trail.row, self.chooser.logits, trail.lanes, False
        ahead, place = row.draft_states[-1].copy(), len(row.tokens) + len(row.drafts)
        modality = self.chooser.slots[ahead.slot].modality
        settings, guided = row.sampling.of(modality), len(lanes) > 1
        slot = any_token = -1
        weights = ids = torch.empty(0)
        places: list[Place] = []
        lefts: list[_Left | None] = []
        slots: list[int] = []
        for _ in range(row.wanted(self.max_drafts - len(row.drafts), self._making(row))):
            if ahead.slot != slot:
                slot = ahead.slot
                if ahead.done or not self._drafted[slot] or self.chooser.slots[slot].modality is not modality:
                    break
                (weights, ids), any_token = logits.pairs(slot), self._any(slot)
            how, left = Place(weights, ids, row.weight(ahead) if guided else 1.0), trail.left_for(place, slot, len(lanes))
            if left is not None:
                chosen = logits.local(slot, left.chosen.token)
                how = how._replace(states=left.states[: len(lanes)], read=left.read, chosen=chosen, drawn_of=left.chosen.probabilities)
            if settings.rejects:
                numbers = row.noise.uniforms(place, len(row.tokens))
                how = how._replace(uniforms=(numbers.keep, numbers.draft))
            elif settings.temperature:
                how = how._replace(noise=row.noise.at(place, ids.shape[0]))
            places.append(how)
            lefts.append(left)
            slots.append(slot)
            ahead.push(any_token)
            place += 1
        if not places:
            return None
        second, newest = (row.tokens[-2:] + row.drafts)[-2:]
        cuts = settings.top_k, settings.top_p, settings.min_p
        return _Plan(lefts, slots, Trail(trail.before[: len(lanes)], newest, second, places, settings.temperature, *cuts))

    def _take(self, trail: _Trail, plan: _Plan, found: Drafted) -> None:
        """Adds what was drafted of a row, as far as it fits behind what stands by then, and still pays."""
        row, newest, trail.before = trail.row, plan.asked.newest, list(found.before)
        making_any = self._making(row)
        for left, slot, token, probabilities in zip(plan.lefts, plan.slots, found.tokens, found.probabilities, strict=True):
            draft, making, offset = Draft(token, probabilities), making_any, NEARBY if left is None else CARRIED
            if left is not None and left.read == newest:
                draft, making = left.chosen, 0.0
            # A draft may have ended the span before its time.
            if row.draft_states[-1].slot != slot or not row.wants(making) or not row.take_draft(draft, offset, making):
                return
            newest = token
        trail.open = True

    def _any(self, slot: int) -> int:
        """A token behind which the slot goes on for as long as it may."""
        first, generates = self.chooser.model.config.layout.text_range[0], self.chooser.slots[slot].generates
        return first if generates(first) else self.chooser.slots[slot].generable[-1][0]

    def _draft(self, trails: list[_Trail], lanes: int, hidden: Float[Tensor, "b s d"], least: int) -> None:
        """One draft more of each row."""
        wanted, offsets = [], []
        indices: list[int] = []
        states: list[Tensor] = []
        befores: list[Tensor] = []
        reads: list[int] = []
        tokens: list[int] = []
        carried: list[bool] = []
        for trail in trails:
            row, state, of_lanes = trail.row, trail.row.draft_states[-1], trail.lanes
            second, newest = (row.tokens[-2:] + row.drafts)[-2:]
            place = len(row.tokens) + len(row.drafts)
            left = trail.left_for(place, state.slot, len(of_lanes))
            states += (trail.before if left is None else left.states)[: len(of_lanes)]
            befores += trail.before[: len(of_lanes)]
            reads += [second if left is None else left.read] * len(of_lanes)
            tokens += [newest] * len(of_lanes)
            carried += [left is not None] * len(of_lanes)
            indices += of_lanes
            guide, chosen = (of_lanes[1], 0) if len(of_lanes) > 1 else None, None if left is None else left.chosen
            wanted.append(Choice(row, 0, state.slot, place, guide, row.weight(state), chosen, row.answer(-1)))
            offsets.append(NEARBY if left is None else CARRIED)
        chooser = self.chooser
        refined = self._refine(states, befores, reads, tokens, carried, least)
        spread = refined.new_zeros(lanes, 1, refined.shape[1])
        spread[indices, 0] = refined
        drafts = chooser.propose(chooser.model.backbone.norm, spread, wanted, least > 0)
        for trail, choice, draft, offset in zip(trails, wanted, drafts, offsets, strict=True):
            trail.before = _states(spread, choice)
            trail.open = trail.row.take_draft(draft, offset, self._making(trail.row))

    def _refine(
        self, states: list[Tensor], befores: list[Tensor], reads: list[int], tokens: list[int], carried: list[bool], least: int
    ) -> Float[Tensor, "n d"]:
        count, chooser = len(states), self.chooser
        # Products of fewer rows are those of other kernels, and the very probabilities of drafts may count.
        spare = max(0, MIN_EXACT_WIDTH - count) if least else 0
        state, before = (torch.stack(each + each[:1] * spare) for each in (states, befores))
        embedded = chooser.model.embed(chooser.tensor([reads + [0] * spare, tokens + [0] * spare])).to(chooser.dtype)
        left = chooser.tensor(carried + [False] * spare)
        refined = self.refiner(state, embedded[0], before, embedded[1], left)
        right = left & chooser.tensor([read == token for read, token in zip(reads, tokens, strict=True)] + [False] * spare)
        return torch.where(right.unsqueeze(1), state, refined)[:count]


def _states(hidden: Float[Tensor, "b s d"], choice: Choice) -> list[Float[Tensor, " d"]]:
    """The state of a place, and the one that guides it."""
    own = hidden[choice.row.index, choice.column]
    return [own] if choice.guide is None else [own, hidden[choice.guide]]
