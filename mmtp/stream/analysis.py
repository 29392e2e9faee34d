"""The grammar over a whole document at once: numpy over tokens, Python only over spans."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int

from mmtp.stream.rules import GrammarError, SpanRule
from mmtp.stream.vocab import NUM_SPECIALS, ROLES, Special, VocabLayout
from mmtp.types import Modality


@dataclass(frozen=True)
class Span:
    """A closed span of one medium inside a stream.

    Attributes:
        modality: the medium.
        start: offset of the opener.
        end: offset after the closer.
        grid: extent along every axis: ``(h, w)``, ``(t, h, w)`` or ``(t,)``.
        body_start: offset of the first code.
        continuous: whether the body holds placeholders of features.
    """

    modality: Modality
    start: int
    end: int
    grid: tuple[int, ...]
    body_start: int
    continuous: bool = False

    @property
    def body(self) -> slice:
        """Where the codes stand."""
        return slice(self.body_start, self.end - 1)


@dataclass(frozen=True)
class StreamInfo:
    """What the grammar knows of every position of a document.

    Attributes:
        slots: index into ``layout.slots``: the set of ids that may stand there.
        modality: ``Modality.index`` of the slot.
        positions: rotary positions (time, row, column).
        codebook: of a code, else -1.
        coordinates: (time, row, column) of a code in its grid, 0 on axes that the medium lacks; -1 outside of bodies.
        spans: closed spans, in order.
        complete: whether the document has ended.
    """

    slots: Int[np.ndarray, " s"]
    modality: Int[np.ndarray, " s"]
    positions: Int[np.ndarray, "s 3"]
    codebook: Int[np.ndarray, " s"]
    coordinates: Int[np.ndarray, "s 3"]
    spans: tuple[Span, ...]
    complete: bool


class Analyser:
    """Tables of one layout, and the walk over documents."""

    def __init__(self, layout: VocabLayout, rules: dict[int, SpanRule]) -> None:
        self.layout = layout
        self.rules = rules
        self.slot_modality = np.array([slot.modality.index for slot in layout.slots])
        index = layout.slot_index
        self.start, self.doc, self.turn, self.dim, self.done = (index[name] for name in ("start", "doc", "turn", "dim", "done"))
        self.is_opener = np.zeros(NUM_SPECIALS, dtype=bool)
        self.is_opener[list(rules)] = True
        self.turn_change = np.zeros(NUM_SPECIALS, dtype=np.int64)
        self.turn_change[list(ROLES.values())] = 1
        self.turn_change[Special.END] = -1
        # Row: doc, turn, done. The last column stands for ids outside of the vocabulary.
        self.text_slots = np.array([self.doc, self.turn, self.done])
        self.text_legal = np.zeros((3, layout.size + 1), dtype=bool)
        for row, slot in zip(self.text_legal, self.text_slots, strict=True):
            for lo, hi in layout.slots[slot].ranges:
                row[lo:hi] = True

    def __call__(self, tokens: Int[np.ndarray, " s"]) -> StreamInfo:
        return _Walk(self, tokens).run()


class _Walk:
    """One pass over one document."""

    def __init__(self, tables: Analyser, tokens: np.ndarray) -> None:
        n = len(tokens)
        self.tables = tables
        self.tokens = tokens
        self.n = n
        self.slots = np.empty(n, dtype=np.int64)
        self.positions = np.empty((n, 3), dtype=np.int64)
        self.codebook = np.full(n, -1, dtype=np.int64)
        self.coordinates = np.full((n, 3), -1, dtype=np.int64)
        self.spans: list[Span] = []
        self.cursor = 0
        self.position = 0
        self.in_turn = 0
        self.ended = False
        self.known = np.where((tokens >= 0) & (tokens < tables.layout.size), tokens, tables.layout.size)
        self.special = np.where(self.known < NUM_SPECIALS, self.known, Special.PAD)
        self.openers = np.flatnonzero(tables.is_opener[self.special])

    def run(self) -> StreamInfo:
        self._forced(self.tables.start)
        for opener in self.openers.tolist():
            if opener >= self.cursor:
                self._text(opener + 1)
                self._span(self.tables.rules[int(self.tokens[opener])], opener)
        self._text(self.n)
        return StreamInfo(
            self.slots,
            self.tables.slot_modality[self.slots],
            self.positions,
            self.codebook,
            self.coordinates,
            tuple(self.spans),
            self.ended,
        )

    def _text(self, end: int) -> None:
        """Everything up to ``end`` that is in no span: text, roles, ends of turns, the opener of a span, the end and padding."""
        start, tables = self.cursor, self.tables
        if start >= end:
            return
        special = self.special[start:end]
        change = tables.turn_change[special]
        # States are those *before* each token; after the first illegal token they mean nothing, and nothing reads them.
        in_turn = self.in_turn + np.cumsum(change) - change
        is_end = special == Special.EOS
        state = np.where(np.cumsum(is_end) > is_end, 2, in_turn == 1)
        slots = tables.text_slots[state]
        self._require(tables.text_legal[state, self.known[start:end]], slots)
        self.slots[start:end] = slots
        self._place(start, end, np.arange(self.position, self.position + end - start)[:, None])
        self.in_turn = int(in_turn[-1] + change[-1])
        self.ended = self.ended or bool(is_end.any())
        self.position += end - start
        self.cursor = end

    def _span(self, rule: SpanRule, opener: int) -> None:
        grid = []
        for _ in range(rule.num_dims):
            if self.cursor == self.n:
                return
            self._forced(self.tables.dim)
            grid.append(int(self.tokens[self.cursor - 1]) - self.tables.layout.dim_range[0] + 1)
        body_start = self.cursor
        frames = self._body(rule, tuple(grid)) if grid else self._open_body(rule)
        if frames is None or self.cursor == self.n:
            return
        extent = tuple(grid) or (frames,)
        self.position += max(extent)
        self._forced(rule.close_slot if grid or rule.pattern.max_delay else rule.boundary_slots[0])
        self.spans.append(Span(rule.modality, opener, self.cursor, extent, body_start, rule.continuous))

    def _body(self, rule: SpanRule, grid: tuple[int, ...]) -> int | None:
        """A body whose grid is known; None where the document ends inside."""
        plan = _plan(rule, grid)
        start, end = self.cursor, min(self.n, self.cursor + len(plan.slots))
        size = end - start
        tokens = self.tokens[start:end]
        self._require((tokens >= plan.lo[:size]) & (tokens < plan.hi[:size]), plan.slots)
        self._write(plan, start, end, plan.slots)
        return len(plan.slots) if size == len(plan.slots) else None

    def _open_body(self, rule: SpanRule) -> int | None:
        """A body whose length shows at its end: at a step's start comes codebook 0, or what only an end can bring."""
        start = self.cursor
        if start == self.n:
            return None
        closer = np.flatnonzero(self.special[start:] == rule.closer)
        size = int(closer[0]) + 1 if len(closer) else self.n - start
        # A sound that is longer than the rest of the document tells what stands where as long as this one goes on.
        plan = _sound_plan(rule, -(-size // rule.pattern.num_codebooks) + rule.pattern.max_delay)
        slots = plan.slots[:size].copy()
        boundary = np.flatnonzero((plan.codebook[:size] == 0) & (plan.step[:size] > 0))
        known = np.minimum(plan.step[boundary], len(rule.boundary_slots)) - 1
        slots[boundary] = np.array(rule.boundary_slots)[known]
        tokens = self.tokens[start : start + size]
        goes_on = (tokens >= plan.lo[:size]) & (tokens < plan.hi[:size])
        if goes_on.all():
            self._write(plan, start, start + size, slots)
            return None
        at = int(np.argmin(goes_on))
        legal = goes_on.copy()
        legal[at] = int(tokens[at]) in self.tables.layout.slots[slots[at]]
        self._require(legal[: at + 1], slots)
        frames = int(plan.step[at])
        if rule.pattern.max_delay:
            plan = _sound_plan(rule, frames)
            slots = np.concatenate([slots[: at + 1], plan.slots[at + 1 :]])
            at = min(len(plan.slots), self.n - start)
            tokens = self.tokens[start : start + at]
            self._require((tokens >= plan.lo[:at]) & (tokens < plan.hi[:at]), slots)
        self._write(plan, start, start + at, slots)
        return frames if at == frames * rule.pattern.num_codebooks else None

    def _write(self, plan: "_Plan", start: int, end: int, slots: np.ndarray) -> None:
        size = end - start
        self.slots[start:end] = slots[:size]
        self.codebook[start:end] = plan.codebook[:size]
        self.coordinates[start:end] = plan.coordinates[:size]
        self._place(start, end, self.position + plan.offsets[:size])
        self.cursor = end

    def _forced(self, slot: int) -> None:
        """One token that must stand in the slot."""
        if self.cursor == self.n:
            return
        token = int(self.tokens[self.cursor])
        if token not in self.tables.layout.slots[slot]:
            self._refuse(self.cursor, slot)
        self.slots[self.cursor] = slot
        self._place(self.cursor, self.cursor + 1, self.position)
        self.position += 1
        self.cursor += 1

    def _place(self, start: int, end: int, positions: np.ndarray | int) -> None:
        self.positions[start:end] = positions

    def _require(self, legal: np.ndarray, slots: np.ndarray) -> None:
        if not legal.all():
            first = int(np.argmin(legal))
            self._refuse(self.cursor + first, int(slots[first]))

    def _refuse(self, offset: int, slot: int) -> None:
        layout = self.tables.layout
        raise GrammarError(offset, layout.slots[slot].expected, found(layout, int(self.tokens[offset])))


def found(layout: VocabLayout, token: int) -> str:
    """A token as messages show it: id and meaning."""
    words = layout.describe(token)
    return words if words.startswith(("<", "id ", "reserved")) else f"{token} ({words})"


@dataclass(frozen=True)
class _Plan:
    """What a body of known length holds, code by code."""

    slots: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    codebook: np.ndarray
    step: np.ndarray
    coordinates: np.ndarray
    offsets: np.ndarray


@lru_cache(maxsize=64)
def _plan(rule: SpanRule, grid: tuple[int, ...]) -> _Plan:
    frame, codebook, step = rule.pattern.order(int(np.prod(grid)))
    axes = np.stack(np.unravel_index(frame, grid), axis=-1)
    coordinates = np.zeros((len(frame), 3), dtype=np.int64)
    coordinates[:, list(rule.axes)] = axes
    return _fill(rule, codebook, step, coordinates, coordinates)


def _sound_plan(rule: SpanRule, frames: int) -> _Plan:
    frame, codebook, step = rule.pattern.order(frames)
    coordinates = np.stack([frame, np.zeros_like(frame), np.zeros_like(frame)], axis=-1)
    return _fill(rule, codebook, step, coordinates, frame[:, None])


def _fill(rule: SpanRule, codebook: np.ndarray, step: np.ndarray, coordinates: np.ndarray, offsets: np.ndarray) -> _Plan:
    bounds = np.array(rule.ranges)[codebook]
    return _Plan(np.array(rule.code_slots)[codebook], bounds[:, 0], bounds[:, 1], codebook, step, coordinates, offsets)
