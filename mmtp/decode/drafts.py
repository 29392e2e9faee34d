"""Drafts: tokens that may follow, proposed by the model's head or by what else implements two small protocols.

A :class:`Drafts` is a way of drafting, a :class:`Drafter` what it keeps for one batch. Whatever they propose, the engine's output is
that of plain decoding, or distributed like it: see :mod:`mmtp.decode.sample`.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mmtp.decode.cache import KVCache
from mmtp.decode.chooser import Chooser, exact_width
from mmtp.decode.rows import Choice, Lane, Row
from mmtp.decode.step import Step
from mmtp.models.heads.base import BELOW, Places, continuous_inputs, mask_vectors, vertical
from mmtp.stream.vocab import Special


@runtime_checkable
class Drafter(Protocol):
    """Proposes tokens for the rows of a batch. What it keeps, it keeps by lanes, as :class:`mmtp.decode.cache.KVCache` does."""

    @property
    def lookahead(self) -> int:
        """How many tokens behind a place what is kept of the place may hang on."""
        ...

    def propose(self, rows: list[Row], lanes: list[Lane], hidden: Float[Tensor, "b s d"], counts: list[int], least: int) -> None:
        """Adds drafts to rows that go on, by :meth:`mmtp.decode.rows.Row.take_draft`, as long as they want them.

        Where a row judges by rejection, the probabilities that a draft carries must be those it was drawn by, and the noise its own.

        Args:
            rows: with the token chosen last as the end of ``tokens``.
            lanes: those in focus: the rows, and the branches of those that are guided.
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

    def copy(self, source: int, target: int, length: int) -> None:
        """Puts what is kept of the first ``length`` tokens of a lane into another, in place of what that held; 0 empties it."""
        ...

    def swap(self, one: int, other: int) -> None:
        """Exchanges what two lanes hold."""
        ...


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


class HeadDrafts:
    """Drafts by the model's own head."""

    def length(self, model: Step) -> int:
        return model.head.mtp_depth + vertical(model.head)

    def begin(self, chooser: Chooser, num_lanes: int, capacity: int, exact: bool = False) -> Drafter:
        head = chooser.model.head
        return HeadDrafter(chooser, chooser.new_cache(head.num_caches, num_lanes, capacity, exact), head.mtp_depth)


class HeadDrafter:
    """Proposes tokens with the model's head.

    Anchors are the positions whose hidden states are known. Depth k reads x[t+k] at every new anchor t; the newest anchor's state
    then draws the draft. The head's own cache advances with the anchors; where a later token was drafted wrongly, depths beyond
    the first keep what they read, which costs a little acceptance around a rejection and never the result.

    Where the head predicts rows, its states for the codes below all anchors are kept, and after the last depth a row of the batch
    drafts on with those of the row above, all at once, for none depends on another.

    Args:
        chooser: gives model, logits and grammar.
        cache: of the head's layers.
        depth: tokens to propose at most.
    """

    def __init__(self, chooser: Chooser, cache: KVCache, depth: int) -> None:
        self.chooser, self.cache, self.depth = chooser, cache, depth
        head, lanes, device = chooser.model.head, len(cache.lengths), chooser.device
        self.vertical, self.continuous = vertical(head), continuous_inputs(head)
        self._modality = [slot.modality.index for slot in chooser.slots]
        # By lane and place; room is made with the cache's.
        self._banks = torch.zeros(lanes, 0, dtype=torch.long, device=device)
        self._vectors = torch.zeros(lanes, 0, dtype=torch.bool, device=device)
        width = chooser.model.config.backbone.width if self.vertical else 0
        self._below = torch.zeros(lanes, 0, width, dtype=chooser.dtype, device=device)

    @property
    def lookahead(self) -> int:
        return self.depth if self.chooser.model.head.num_caches else 0

    def restart(self, lane: int) -> None:
        self.cache.lengths[lane] = 0

    def focus(self, first: int, count: int) -> None:
        self.cache.focus(first, count)

    def held(self, lane: int) -> int:
        return self.cache.held(lane)

    def copy(self, source: int, target: int, length: int) -> None:
        self.cache.copy(source, target, length)
        for kept in (self._banks, self._vectors, self._below):
            kept[target, :length] = kept[source, :length]

    def swap(self, one: int, other: int) -> None:
        self.cache.swap(one, other)
        for kept in (self._banks, self._vectors, self._below):
            kept[[one, other]] = kept[[other, one]]

    def _begin(self, width: int) -> Tensor:
        """Readies a pass and returns its mask."""
        mask, more = self.cache.begin(width), self.cache.capacity - self._banks.shape[1]
        if more > 0:
            self._banks, self._vectors = (torch.nn.functional.pad(kept, (0, more)) for kept in (self._banks, self._vectors))
            self._below = torch.nn.functional.pad(self._below, (0, 0, 0, more))
        return mask

    def propose(self, rows: list[Row], lanes: list[Lane], hidden: Float[Tensor, "b s d"], counts: list[int], least: int) -> None:
        chooser, model, exact = self.chooser, self.chooser.model, least > 0
        if not any(counts):
            return  # rows that have read nothing, such as those that have just written a span at once, have no anchor to draft from
        hidden = hidden[:, : exact_width(max(counts)) if least else max(counts)]
        if not model.head.num_caches:
            hidden, counts = self._newest(hidden, counts)
            hidden = torch.nn.functional.pad(hidden, (0, 0, 0, max(0, least - 1)))
        mask = self._begin(hidden.shape[1])
        for lane, count in zip(lanes, counts, strict=True):
            first = self.cache.lengths[lane.index]
            kinds = [self._modality[slot] for slot in lane.slots[first : first + count]]
            self._banks[self.cache.first + lane.index, first : first + count] = chooser.tensor(kinds)
            if self.continuous == "masked":
                vectors = [token == Special.FEATURE for token in lane.tokens[first : first + count]]
                self._vectors[self.cache.first + lane.index, first : first + count] = chooser.tensor(vectors)
        if self.continuous == "masked":
            mask = mask_vectors(mask, self._seen(self._vectors), chooser.tensor(self.cache.lengths))
        state = hidden
        open_rows = [row for row in rows if not row.done]
        for k in range(1, self.depth + 1):
            state, out = model.head.draft(k, state, *self._read(k, lanes, counts, mask), self.cache.layers)
            if k == 1 and self.vertical:
                below = model.head.below(hidden, *self._read(0, lanes, counts, mask), self.cache.layers)
                for lane, count in zip(lanes, counts, strict=True):
                    first = self.cache.lengths[lane.index]
                    self._below[self.cache.first + lane.index, first : first + count] = below[lane.index, :count]
            open_rows = [row for row in open_rows if row.wants(k)]
            if not open_rows:
                break
            wanted = [self._choice(row, counts, k) for row in open_rows]
            proposed = chooser.propose(_identity, out, wanted, exact)
            open_rows = [row for row, draft in zip(open_rows, proposed, strict=True) if row.take_draft(draft, k)]
        self.cache.commit(counts)
        if self.vertical:
            self._draft_rows(open_rows, exact)

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
            known = self.cache.lengths[row.index]
            for anchor in range(place - above, min(place - above + self.vertical, known) if above else 0):
                weight = row.weight(row.draft_states[-1], anchor + above - place)
                wanted.append(Choice(row, anchor, row.slots[anchor], anchor + above, self._guide(row, anchor), weight))
                distances.append(above)
        for choice, above, draft in zip(
            wanted, distances, self.chooser.propose(_identity, self._seen(self._below), wanted, exact), strict=True
        ):
            # What was chosen past the end of the span, or of a video's frame, has no row above it.
            if choice.row.draft_states[-1].above == above and choice.row.wants(BELOW):
                choice.row.take_draft(draft, BELOW)

    def _guide(self, row: Row, anchor: int) -> tuple[int, int] | None:
        """Where the branch has its state for the code below an anchor; a draft may do without."""
        if row.branch is None or not row.branch.open:
            return None
        column = anchor - len(row.tokens) + len(row.branch.tokens)
        return (row.branch.index, column) if 0 <= column < self.cache.lengths[row.branch.index] else None

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
