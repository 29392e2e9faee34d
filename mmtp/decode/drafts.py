"""Drafts: tokens that may follow, proposed by the model's head or by what else implements two small protocols.

A :class:`Drafts` is a way of drafting, a :class:`Drafter` what it keeps for one batch. Whatever they propose, the engine's output is
that of plain decoding, or distributed like it: see :mod:`mmtp.decode.sample`.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmtp.decode.cache import BLOCK, KVCache
from mmtp.decode.rows import Choice, Lane, Row
from mmtp.decode.sample import Draft
from mmtp.decode.step import Step
from mmtp.models.heads.base import BELOW, Places, continuous_inputs, mask_vectors, vertical
from mmtp.stream.vocab import Slot, Special


@runtime_checkable
class Verifier(Protocol):
    """What drafting asks of the engine that verifies."""

    model: Step
    slots: Sequence[Slot]
    dtype: torch.dtype

    @property
    def device(self) -> torch.device: ...

    def embed(self, tokens: Int[Tensor, "b s"], lanes: list[Lane], firsts: Sequence[int]) -> Float[Tensor, "b s d"]:
        """Embeddings of a window of every lane, vectors included."""
        ...

    def propose(self, norm: Any, hidden: Float[Tensor, "b s d"], wanted: list[Choice], exact: bool = False) -> list[Draft]:
        """Draws a draft at every wanted place from states."""
        ...

    def new_cache(self, layers: int, rows: int, capacity: int) -> KVCache:
        """An empty cache of the model's sizes."""
        ...

    def tensor(self, values: list[Any]) -> Tensor:
        """On the model's device."""
        ...


@runtime_checkable
class Drafter(Protocol):
    """Proposes tokens for the rows of a batch."""

    def propose(self, rows: list[Row], lanes: list[Lane], hidden: Float[Tensor, "b s d"], counts: list[int], least: int) -> None:
        """Adds drafts to rows that go on, by :meth:`mmtp.decode.rows.Row.take_draft`, as long as they want them.

        Where a row judges by rejection, the probabilities that a draft carries must be those it was drawn by, and the noise its own.

        Args:
            rows: with the token chosen last as the end of ``tokens``.
            lanes: the rows, and the branches of those that are guided.
            hidden: states of the anchors that the last pass added, padded at the end.
            counts: how many anchors each lane has added.
            least: width of passes and rows of logits at least, where the very probabilities of drafts count; else 0.
        """
        ...

    def restart(self, lane: int) -> None:
        """Forgets what is kept of a lane: the branch begins anew."""
        ...


@runtime_checkable
class Drafts(Protocol):
    """A way of drafting."""

    def length(self, model: Step) -> int:
        """Drafts per pass at most, for a model; 0 where it gives none."""
        ...

    def begin(self, engine: Verifier, num_lanes: int, capacity: int) -> Drafter:
        """A drafter for one batch.

        Args:
            engine: that verifies.
            num_lanes: rows of the batch, branches included.
            capacity: tokens per lane at most.
        """
        ...


class HeadDrafts:
    """Drafts by the model's own head."""

    def length(self, model: Step) -> int:
        return model.head.mtp_depth + vertical(model.head)

    def begin(self, engine: Verifier, num_lanes: int, capacity: int) -> Drafter:
        return HeadDrafter(engine, engine.new_cache(engine.model.head.num_caches, num_lanes, capacity), engine.model.head.mtp_depth)


class HeadDrafter:
    """Proposes tokens with the model's head.

    Anchors are the positions whose hidden states are known. Depth k reads x[t+k] at every new anchor t; the newest anchor's state
    then draws the draft. The head's own cache advances with the anchors; where a later token was drafted wrongly, depths beyond
    the first keep what they read, which costs a little acceptance around a rejection and never the result.

    Where the head predicts rows, its states for the codes below all anchors are kept, and after the last depth a row of the batch
    drafts on with those of the row above, all at once, for none depends on another.

    Args:
        engine: gives model, logits and grammar.
        cache: of the head's layers.
        depth: tokens to propose at most.
    """

    def __init__(self, engine: Verifier, cache: KVCache, depth: int) -> None:
        self.engine, self.cache, self.depth = engine, cache, depth
        self.vertical = vertical(engine.model.head)
        shape = (len(cache.lengths), cache.limit + BLOCK)
        self._banks = torch.zeros(shape, dtype=torch.long, device=engine.device)
        self.continuous = continuous_inputs(engine.model.head)
        self._vectors = torch.zeros(shape, dtype=torch.bool, device=engine.device)
        self._modality = [slot.modality.index for slot in engine.slots]
        width = engine.model.config.backbone.width if self.vertical else 0
        self._below = torch.zeros(*shape, width, dtype=engine.dtype, device=engine.device)

    def restart(self, lane: int) -> None:
        self.cache.lengths[lane] = 0

    def propose(self, rows: list[Row], lanes: list[Lane], hidden: Float[Tensor, "b s d"], counts: list[int], least: int) -> None:
        engine, model, exact = self.engine, self.engine.model, least > 0
        if not model.head.num_caches:
            hidden, counts = self._newest(hidden, counts)
            hidden = torch.nn.functional.pad(hidden, (0, 0, 0, max(0, least - 1)))
        mask = self.cache.begin(hidden.shape[1])
        for lane, count in zip(lanes, counts, strict=True):
            first = self.cache.lengths[lane.index]
            kinds = [self._modality[slot] for slot in lane.slots[first : first + count]]
            self._banks[lane.index, first : first + count] = engine.tensor(kinds)
            if self.continuous == "masked":
                vectors = [token == Special.FEATURE for token in lane.tokens[first : first + count]]
                self._vectors[lane.index, first : first + count] = torch.tensor(vectors, device=engine.device)
        if self.continuous == "masked":
            mask = mask_vectors(mask, self._vectors[:, : self.cache.extent], engine.tensor(self.cache.lengths))
        state = hidden
        open_rows = [row for row in rows if not row.done]
        for k in range(1, self.depth + 1):
            state, out = model.head.draft(k, state, *self._read(k, lanes, counts, mask), self.cache.layers)
            if k == 1 and self.vertical:
                below = model.head.below(hidden, *self._read(0, lanes, counts, mask), self.cache.layers)
                for lane, count in zip(lanes, counts, strict=True):
                    first = self.cache.lengths[lane.index]
                    self._below[lane.index, first : first + count] = below[lane.index, :count]
            open_rows = [row for row in open_rows if row.wants(k)]
            if not open_rows:
                break
            wanted = [self._choice(row, counts, k) for row in open_rows]
            proposed = engine.propose(_identity, out, wanted, exact)
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
        tensor, banks = self.engine.tensor, self._banks[:, : self.cache.extent]
        if self.continuous == "embeddings":
            embedded = self.engine.embed(tensor(tokens), lanes, [length + k for length in self.cache.lengths])
        else:
            embedded = self.engine.model.embed(tensor(tokens))  # tokens at the places of vectors are the placeholder
        return embedded, Places(tensor(positions), tensor(modalities), banks, mask)

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
        for choice, above, draft in zip(wanted, distances, self.engine.propose(_identity, self._below, wanted, exact), strict=True):
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
