"""Drafts from a smaller model over the same vocabulary, as speculative decoding began (Leviathan et al. 2023; Chen et al. 2023)."""

import sys
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mmtp.decode.chooser import Chooser, exact_width
from mmtp.decode.rows import Choice, Lane, Row
from mmtp.decode.step import Step


class ModelDrafts:
    """Drafts by another model, token by token. It reads placeholders where vectors stand, for they are in the other's width.

    Args:
        model: in evaluation mode, over the vocabulary of the model that it drafts for.
        max_drafts: tokens to propose at most.
    """

    def __init__(self, model: Step, max_drafts: int = 4) -> None:
        if max_drafts < 1:
            raise ValueError(f"max_drafts {max_drafts}: at least 1 is wanted")
        self.chooser, self.max_drafts = Chooser(model), max_drafts

    def length(self, model: Step) -> int:
        """As of any :class:`mmtp.decode.drafts.Drafts`.

        Raises:
            VocabMismatch: the two models differ in their vocabularies.
        """
        model.config.layout.check_same(self.chooser.model.config.layout, "the drafting model")
        return self.max_drafts

    def begin(self, chooser: Chooser, num_lanes: int, capacity: int, exact: bool = False) -> "_ModelDrafter":
        own = self.chooser
        if own.device != chooser.device:
            model: Any = own.model
            own = self.chooser = Chooser(model.to(chooser.device))
        compiled = chooser.compiled or chooser.recorded
        if compiled and not (own.compiled or own.recorded) and not own.model.backbone.uncompiled:
            own = self.chooser = Chooser(own.model, compiled=True)
        return _ModelDrafter(own, self.max_drafts, num_lanes, capacity, exact, chooser.costs.passes_of(own.model, chooser.model))


class _Begun:
    """A lane when it was drafted last.

    Attributes:
        length: of it.
        drafts: that it was given.
    """

    def __init__(self, length: int = 0, drafts: Sequence[int] = ()) -> None:
        self.length, self.drafts = length, drafts


class _ModelDrafter:
    """Keeps what the model has read of every lane, drafts included; those that stood are not read again."""

    lookahead = 0

    def __init__(self, chooser: Chooser, max_drafts: int, num_lanes: int, capacity: int, exact: bool, making: float) -> None:
        self.chooser, self.max_drafts, self.making, self.pads = chooser, max_drafts, making, not chooser.leaves_out_padding(exact)
        # A pass is as wide as the longest unread end, and begins behind the longest lane.
        layers = chooser.model.config.backbone.num_caches
        self.cache = chooser.new_cache(layers, num_lanes, 2 * (capacity + exact_width(max_drafts + 1)), exact, max_drafts)
        self._all = [_Begun() for _ in range(num_lanes)]
        self._begun = self._all

    def restart(self, lane: int) -> None:
        self.cache.lengths[lane] = 0
        self._begun[lane].length, self._begun[lane].drafts = 0, ()

    def focus(self, first: int, count: int) -> None:
        self.cache.focus(first, count)
        self._begun = self._all[first : first + count]

    def held(self, lane: int) -> int:
        return sys.maxsize  # what is missing is read later

    def keeps(self, lane: int, length: int) -> bool:
        return True  # likewise

    def copy(self, source: int, target: int, length: int) -> None:
        read = min(length, self.cache.held(source), self._all[source].length)
        read = read if self.cache.keeps(source, read) else 0
        self.cache.copy(source, target, read)
        self._all[target] = _Begun(read)

    def swap(self, one: int, other: int) -> None:
        self.cache.swap(one, other)
        self._all[one], self._all[other] = self._all[other], self._all[one]

    def propose(self, rows: list[Row], lanes: list[Lane], hidden: Float[Tensor, "b s d"], counts: list[int], least: int) -> None:
        for row in rows:
            if row.branch is not None and row.branch.fresh:
                self.restart(row.branch.index)
        for i, (lane, begun) in enumerate(zip(lanes, self._begun, strict=True)):
            stood = begun.length + _common(begun.drafts, lane.tokens[begun.length :])
            self.cache.lengths[i] = min(self.cache.lengths[i], stood)
        if chunks := {lane.index: self.cache.lengths[lane.index] + counts[lane.index] for lane in lanes if lane.reading}:
            self._pass(lanes, chunks, least)
        open_rows = [row for row in rows if not row.done]
        for k in range(1, self.max_drafts + 1):
            open_rows = [row for row in open_rows if row.wants(self.making)]
            if not open_rows:
                break
            reading = [lane for row in open_rows for lane in row.lanes if lane is row or lane.draft_states[-1].in_span]
            states, ends = self._pass(lanes, {lane.index: len(lane.tokens) + len(lane.drafts) for lane in reading}, least)
            wanted = []
            for row in open_rows:
                state, branch = row.draft_states[-1], row.branch
                guide = branch.guide(k - 1, ends[branch.index]) if branch is not None and ends[branch.index] >= 0 else None
                place, weight = len(row.tokens) + k - 1, row.weight(state)
                wanted.append(Choice(row, ends[row.index], state.slot, place, guide, weight, answer=row.answer(-1)))
            proposed = self.chooser.propose(self.chooser.model.backbone.norm, states, wanted, least > 0)
            open_rows = [row for row, draft in zip(open_rows, proposed, strict=True) if row.take_draft(draft, k, self.making)]
        for lane, begun in zip(lanes, self._begun, strict=True):
            begun.length, begun.drafts = len(lane.tokens), lane.drafts

    def _pass(self, lanes: list[Lane], until: dict[int, int], least: int) -> tuple[Float[Tensor, "b s d"], list[int]]:
        """Reads what has not been read of some lanes, up to an offset of each; the column of each lane's last state, -1 for none."""
        model, lengths, tensor = self.chooser.model, self.cache.lengths, self.chooser.tensor
        windows = [(lane.tokens + lane.drafts)[lengths[lane.index] : until.get(lane.index, 0)] for lane in lanes]
        places = [(lane.positions + lane.draft_positions)[lengths[lane.index] :] for lane in lanes]
        longest = max(map(len, windows))
        longest = exact_width(longest) if least else longest
        mask = self.cache.begin(longest, self.chooser.widths(windows, least > 0))
        tokens = tensor([w + [0] * (longest - len(w)) for w in windows])
        positions = tensor([(p + [(0, 0, 0)] * longest)[:longest] for p in places])
        slots = [lane.window_slots(lengths[lane.index], len(window)) for lane, window in zip(lanes, windows, strict=True)]
        states = model.extend(model.embed(tokens), positions, mask, self.cache.layers, slots)
        self.cache.commit([len(w) for w in windows])
        return states, [len(w) - 1 for w in windows]


def _common(drafts: Sequence[int], tokens: list[int]) -> int:
    """How many drafts stood."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(drafts, tokens, strict=False)))
