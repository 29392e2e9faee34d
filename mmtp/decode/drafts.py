"""Drafts: tokens that may follow, proposed by the model's head or by what else implements two small protocols.

A :class:`Drafts` is a way of drafting, a :class:`Drafter` what it keeps for one batch. Whatever they propose, the engine's output is
that of plain decoding, or distributed like it: see :mod:`mmtp.decode.sample`.
"""

import sys
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mmtp.decode.cache import KVCache
from mmtp.decode.chooser import Chooser, exact_width
from mmtp.decode.rows import Choice, Lane, Row
from mmtp.decode.step import Step
from mmtp.decode.waiting import Waiting
from mmtp.models.heads.base import BELOW, Places, continuous_inputs, mask_vectors, vertical
from mmtp.stream.vocab import Special


@runtime_checkable
class Drafter(Protocol):
    """Proposes tokens for the rows of a batch. What it keeps, it keeps by lanes, as :class:`mmtp.decode.cache.KVCache` does."""

    @property
    def lookahead(self) -> int:
        """How many tokens behind a place what is kept of the place may hang on."""
        ...

    @property
    def pads(self) -> bool:
        """Whether a lane that reads a prompt makes the passes of its own as wide for all others in focus."""
        ...

    def propose(self, rows: list[Row], lanes: list[Lane], hidden: Float[Tensor, "b s d"], counts: list[int], least: int) -> None:
        """Adds drafts to rows that go on, by :meth:`mmtp.decode.rows.Row.take_draft`, as long as they want them at what making one takes.
        Where a row wants none it does no work for it.

        Where a row judges by rejection, the probabilities that a draft carries must be those it was drawn by, and the noise its own.

        Args:
            rows: that want drafts, with the token chosen last as the end of ``tokens``.
            lanes: those in focus: the rows, others that want none now, such as go on ``reading`` their prompts, and the branches of those
                that are guided.
            hidden: states of the last pass: those of the anchors that it added, then those behind drafts that were refused, and padding.
            counts: how many anchors each lane has added.
            least: width of passes and rows of logits at least, where the very probabilities of drafts count; else 0.
        """
        ...

    def restart(self, lane: int) -> None:
        """Forgets what is kept of a lane in focus: the branch begins anew."""
        ...

    def focus(self, first: int, count: int) -> None:
        """Turns to ``count`` lanes from ``first`` on; :meth:`propose` is of these alone."""
        ...

    def held(self, lane: int) -> int:
        """Tokens of any lane of which what is needed is kept; the lane's length where nothing is needed."""
        ...

    def keeps(self, lane: int, length: int) -> bool:
        """Whether of the first so many tokens of any lane all is still kept that those behind them need."""
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Puts what is kept of the first ``length`` tokens of a lane into another, in place of what that held; 0 empties it."""
        ...

    def swap(self, one: int, other: int) -> None:
        """Exchanges what two lanes hold."""
        ...


class KeepsNothing:
    """What a :class:`Drafter` does by lanes if it keeps nothing between passes: nothing."""

    lookahead, pads = 0, False

    def restart(self, lane: int) -> None: ...

    def focus(self, first: int, count: int) -> None: ...

    def held(self, lane: int) -> int:
        return sys.maxsize

    def keeps(self, lane: int, length: int) -> bool:
        return True

    def copy(self, source: int, target: int, length: int) -> None: ...

    def swap(self, one: int, other: int) -> None: ...


@runtime_checkable
class Drafts(Protocol):
    """A way of drafting."""

    def length(self, model: Step) -> int:
        """Drafts per pass at most, for a model; 0 where it gives none."""
        ...

    def begin(self, chooser: Chooser, num_lanes: int, capacity: int, exact: bool = False) -> Drafter:
        """A drafter for one batch.

        Args:
            chooser: that verifies.
            num_lanes: lanes of the batch.
            capacity: tokens per lane at most.
            exact: whether what is kept is to be the same bits in every batch.
        """
        ...


WAITING = 512
"""States of a lane that may wait for a head; what is more is read at once, so that a long picture keeps no more of them."""


@dataclass(frozen=True, kw_only=True)
class HeadDrafts:
    """Drafts by the model's own head.

    Attributes:
        rows: draft rows of pictures from those above them as well, where the head predicts them.
    """

    rows: bool = True

    def length(self, model: Step) -> int:
        return model.head.mtp_depth + self._vertical(model)

    def begin(self, chooser: Chooser, num_lanes: int, capacity: int, exact: bool = False) -> Drafter:
        head = chooser.model.head
        # Of anchors that have waited the newest join the next pass, which is so much wider.
        cache = chooser.new_cache(head.num_caches, num_lanes, capacity + exact_width(head.mtp_depth), exact, backbone=False)
        return HeadDrafter(chooser, cache, head.mtp_depth, self._vertical(chooser.model), exact)

    def _vertical(self, model: Step) -> int:
        return vertical(model.head) if self.rows else 0


class HeadDrafter:
    """Proposes tokens with the model's head.

    Anchors are the positions whose hidden states are known. Depth k reads x[t+k] at every new anchor t; the newest anchor's state
    then draws the draft. The head's own cache advances with the anchors; where a later token was drafted wrongly, depths beyond
    the first keep what they read, which costs a little acceptance around a rejection and never the result.

    Where the head predicts rows, its states for the codes below all anchors are kept, and after the last depth a row of the batch
    drafts on with those of the row above, all at once, for none depends on another.

    Anchors of lanes for which no drafts are wanted wait, and cost nothing until some are. What is kept of them is then the same as if
    they had been read as they came, with the tokens that stood: when they are read hangs on their own row alone, and shows in no draft.

    Args:
        chooser: gives model, logits and grammar.
        cache: of the head's layers.
        depth: tokens to propose at most.
        below: codes of the row below to propose at most.
        exact: whether what is kept is to be the same bits in every batch.

    Attributes:
        making: what a draft along the row takes, in passes of the model. Those of the row below are there already.
    """

    def __init__(self, chooser: Chooser, cache: KVCache, depth: int, below: int, exact: bool) -> None:
        self.chooser, self.cache, self.depth, self.vertical, self.exact = chooser, cache, depth, below, exact
        head, lanes, device = chooser.model.head, len(cache.lengths), chooser.device
        self.making = chooser.costs.head_step(chooser.model)
        self.continuous, self.waiting = continuous_inputs(head), Waiting(lanes)
        self._modality = [slot.modality.index for slot in chooser.slots]
        # By lane and place, as in the cache; room is made with the cache's.
        self._banks = torch.zeros(lanes, 0, dtype=torch.long, device=device)
        self._vectors = torch.zeros(lanes, 0, dtype=torch.bool, device=device)
        width = chooser.model.config.backbone.width if self.vertical else 0
        self._below = torch.zeros(lanes, 0, width, dtype=chooser.dtype, device=device)

    @property
    def lookahead(self) -> int:
        return self.depth if self.chooser.model.head.num_caches else 0

    @property
    def pads(self) -> bool:
        return self.chooser.model.head.num_caches > 0 and not self.chooser.compiled

    def restart(self, lane: int) -> None:
        self.cache.lengths[lane] = 0
        self.waiting.drop(self.cache.first + lane)

    def focus(self, first: int, count: int) -> None:
        self.cache.focus(first, count)

    def held(self, lane: int) -> int:
        return self.cache.held(lane) + self.waiting.count(lane)

    def keeps(self, lane: int, length: int) -> bool:
        return self.cache.keeps(lane, min(length, self.cache.held(lane)))

    def copy(self, source: int, target: int, length: int) -> None:
        read = min(length, self.cache.held(source))
        self.cache.copy(source, target, read)
        self.waiting.copy(source, target, length - read)
        read -= self.cache.oldest(target)
        for kept in (self._banks, self._vectors, self._below):
            kept[target, :read] = kept[source, :read]

    def swap(self, one: int, other: int) -> None:
        self.cache.swap(one, other)
        self.waiting.swap(one, other)
        for kept in (self._banks, self._vectors, self._below):
            kept[[one, other]] = kept[[other, one]]

    def propose(self, rows: list[Row], lanes: list[Lane], hidden: Float[Tensor, "b s d"], counts: list[int], least: int) -> None:
        chooser, head, exact = self.chooser, self.chooser.model.head, least > 0
        open_rows = [row for row in rows if not row.done and row.wants(self.making)]
        if head.num_caches:
            hidden, counts = self._due(open_rows, lanes, hidden, counts)
        elif not open_rows:
            self.cache.commit(counts)
            return
        if not any(counts):
            return  # rows that have read nothing, such as those that have just written a span at once, have no anchor to draft from
        if not head.num_caches:
            hidden, counts = self._newest(hidden, counts)
        width = exact_width(max(counts)) if self.exact else max(counts)
        hidden = torch.nn.functional.pad(hidden[:, :width], (0, 0, 0, max(0, width - hidden.shape[1])))
        mask = self._begin(lanes, counts, width)
        state = hidden
        # A layer that is left out holds what stood there before, which hangs on other rows; and others may copy it.
        filled = self._filled if self.exact else 1
        for k in range(1, self.depth + 1):
            state, out = head.draft(k, state, *self._read(k, lanes, counts, mask), self.cache.layers)
            if k == 1:
                self._keep_below(hidden, lanes, counts, mask)
            open_rows = [row for row in open_rows if row.wants(self.making)]
            if not open_rows and k >= filled:
                break
            wanted = [self._choice(row, counts, k) for row in open_rows]
            proposed = chooser.propose(_identity, out, wanted, exact)
            open_rows = [row for row, draft in zip(open_rows, proposed, strict=True) if row.take_draft(draft, k, self.making)]
        self.cache.commit(counts)
        if self.vertical:
            self._draft_rows(open_rows, exact)

    def _due(
        self, open_rows: list[Row], lanes: list[Lane], hidden: Float[Tensor, "b s d"], counts: list[int]
    ) -> tuple[Float[Tensor, "b _ d"], list[int]]:
        """What is to be read now: states of rows that drafts are wanted for, those that have waited before the new ones. Others wait."""
        for row in open_rows:
            if row.branch is not None and row.branch.fresh:
                self.restart(row.branch.index)
        wanted = {lane.index for row in open_rows for lane in row.lanes if not lane.rests}
        due: dict[int, Float[Tensor, "_ d"]] = {}
        for lane, count in zip(lanes, counts, strict=True):
            place = self.cache.first + lane.index
            if lane.index in wanted and not self.waiting.count(place):
                continue
            self.waiting.add(place, hidden[lane.index, :count])
            waiting = self.waiting.count(place)
            if waiting > self.depth and (lane.index in wanted or waiting > WAITING):
                self._catch_up(lane, waiting - self.depth)
                waiting = self.depth
            due[lane.index] = self.waiting.take(place, waiting) if lane.index in wanted else hidden[0, :0]
        if not due:
            return hidden, counts
        counts = [len(due[i]) if i in due else count for i, count in enumerate(counts)]
        joined = hidden.new_zeros(len(lanes), max(counts), hidden.shape[2])
        for i, count in enumerate(counts):
            joined[i, :count] = due[i] if i in due else hidden[i, :count]
        return joined, counts

    def _catch_up(self, lane: Lane, count: int) -> None:
        """Reads the oldest of a lane's anchors that wait, in a pass of their own. All that they look ahead at has to stand."""
        first, lanes, index = self.cache.first, len(self.cache.lengths), lane.index
        self.cache.focus(first + index, 1)
        lane.index = 0
        width = exact_width(count) if self.exact else count
        hidden = torch.nn.functional.pad(self.waiting.take(self.cache.first, count)[None], (0, 0, 0, width - count))
        mask, state = self._begin([lane], [count], width), hidden
        for k in range(1, self._filled + 1):
            state, _ = self.chooser.model.head.draft(k, state, *self._read(k, [lane], [count], mask), self.cache.layers)
            if k == 1:
                self._keep_below(hidden, [lane], [count], mask)
        self.cache.commit([count])
        lane.index = index
        self.cache.focus(first, lanes)

    @property
    def _filled(self) -> int:
        """Depths that fill the layers of the head."""
        return self.depth if self.chooser.model.head.num_caches > 1 else 1

    def _begin(self, lanes: list[Lane], counts: list[int], width: int) -> Tensor:
        """Readies a pass, notes which media its anchors predict, and returns its mask."""
        places = [self.cache.first + lane.index for lane in lanes]
        before = [self.cache.oldest(place) for place in places]
        chooser = self.chooser
        mask = self.cache.begin(width, counts if chooser.compiled else None)
        more = self.cache.capacity - self._banks.shape[1]
        if more > 0:
            self._banks, self._vectors = (torch.nn.functional.pad(kept, (0, more)) for kept in (self._banks, self._vectors))
            self._below = torch.nn.functional.pad(self._below, (0, 0, 0, more))
        for place, oldest in zip(places, before, strict=True):
            if (gone := self.cache.oldest(place) - oldest) > 0:
                for kept in (self._banks, self._vectors, self._below):
                    kept[place] = kept[place].roll(-gone, 0)
        for lane, count in zip(lanes, counts, strict=True):
            first, start = self.cache.lengths[lane.index], self.cache.starts[lane.index]
            kinds = [self._modality[slot] for slot in lane.slots[first : first + count]]
            self._banks[self.cache.first + lane.index, start : start + count] = chooser.tensor(kinds)
            if self.continuous == "masked":
                vectors = [token == Special.FEATURE for token in lane.tokens[first : first + count]]
                self._vectors[self.cache.first + lane.index, start : start + count] = chooser.tensor(vectors)
        if self.continuous == "masked":
            mask = mask_vectors(mask, self._seen(self._vectors), chooser.tensor(self.cache.starts))
        return mask

    def _keep_below(self, hidden: Float[Tensor, "b s d"], lanes: list[Lane], counts: list[int], mask: Tensor) -> None:
        """States for the codes below new anchors."""
        if not self.vertical:
            return
        below = self.chooser.model.head.below(hidden, *self._read(0, lanes, counts, mask), self.cache.layers)
        for lane, count in zip(lanes, counts, strict=True):
            start = self.cache.starts[lane.index]
            self._below[self.cache.first + lane.index, start : start + count] = below[lane.index, :count]

    def _read(self, k: int, lanes: list[Lane], counts: list[int], mask: Tensor) -> tuple[Float[Tensor, "b s d"], Places]:
        """Embeddings and places of x[t+k] at the new anchors t, drafts included."""
        width = mask.shape[2]
        tokens, positions, modalities = [], [], []
        for lane, count in zip(lanes, counts, strict=True):
            first = self.cache.lengths[lane.index] + k
            have = len(lane.tokens)
            window = (lane.tokens[first:] + lane.drafts[max(0, first - have) :])[:count]
            place = (lane.positions[first:] + lane.draft_positions[max(0, first - have) :])[:count]
            tokens.append(window + [0] * (width - len(window)))
            positions.append(place + [(0, 0, 0)] * (width - len(place)))
            drafted = [state.slot for state in lane.draft_states]
            slots = (lane.slots[first + 1 :] + drafted[max(0, first + 1 - have) :])[:count]
            modalities.append([self._modality[slot] for slot in slots] + [0] * (width - len(slots)))
        tensor, banks = self.chooser.tensor, self._seen(self._banks)
        if self.continuous == "embeddings":
            embedded = self.chooser.embed(tensor(tokens), lanes, [length + k for length in self.cache.lengths])
        else:
            embedded = self.chooser.model.embed(tensor(tokens))  # tokens at the places of vectors are the placeholder
        newest = [max(0, count - 1) for count in counts] if k else None
        return embedded, Places(tensor(positions), tensor(modalities), banks, mask, newest)

    def _seen(self, kept: Tensor) -> Tensor:
        """What is kept of the lanes in focus, as far as the pass attends."""
        cache = self.cache
        return kept[cache.first : cache.first + len(cache.lengths), : cache.extent]

    def _draft_rows(self, open_rows: list[Row], exact: bool) -> None:
        """Goes on with the codes that the row above has predicted, as far as its anchors are known."""
        wanted, distances = [], []
        for row in open_rows:
            above, place = row.draft_states[-1].above, len(row.tokens) + len(row.drafts)
            known, oldest = self.cache.lengths[row.index], self.cache.oldest(self.cache.first + row.index)
            for anchor in range(max(place - above, oldest), min(place - above + self.vertical, known) if above else 0):
                weight = row.weight(row.draft_states[-1], anchor + above - place)
                wanted.append(Choice(row, anchor - oldest, row.slots[anchor], anchor + above, self._guide(row, anchor), weight))
                distances.append(above)
        for choice, above, draft in zip(
            wanted, distances, self.chooser.propose(_identity, self._seen(self._below), wanted, exact), strict=True
        ):
            # What was chosen past the end of the span, or of a video's frame, has no row above it.
            if choice.row.draft_states[-1].above == above and choice.row.wants():
                choice.row.take_draft(draft, BELOW)

    def _guide(self, row: Row, anchor: int) -> tuple[int, int] | None:
        """Where the branch has its state for the code below an anchor; a draft may do without."""
        if row.branch is None or not row.branch.open:
            return None
        place, oldest = anchor - len(row.tokens) + len(row.branch.tokens), self.cache.oldest(self.cache.first + row.branch.index)
        return (row.branch.index, place - oldest) if oldest <= place < self.cache.lengths[row.branch.index] else None

    def _newest(self, hidden: Float[Tensor, "b s d"], counts: list[int]) -> tuple[Float[Tensor, "b 1 d"], list[int]]:
        """The newest anchor of every lane: all that a head needs which keeps nothing between passes."""
        before = [max(0, count - 1) for count in counts]
        self.cache.commit(before)
        newest = hidden[torch.arange(len(counts), device=hidden.device), before].unsqueeze(1)
        return newest, [count - skipped for count, skipped in zip(counts, before, strict=True)]

    @staticmethod
    def _choice(row: Row, counts: list[int], k: int) -> Choice:
        """The place of draft k. Guided where the branch has an anchor; a draft may do without, it is verified with guidance."""
        anchors = 0 if row.branch is None else counts[row.branch.index]
        guide = row.branch.guide(k - 1, anchors - 1) if row.branch is not None and anchors else None
        state = row.draft_states[-1]
        place = len(row.tokens) + k - 1
        return Choice(row, counts[row.index] - 1, state.slot, place, guide, row.weight(state), answer=row.answer(-1))


def _identity(states: Tensor) -> Tensor:
    return states
