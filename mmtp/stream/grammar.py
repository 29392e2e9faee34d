"""The one automaton over streams: what may stand where, at which position, and what it means.

A document is ``<bos> … <eos>``. Outside of turns stand text and spans; a role token opens a turn, which holds text and spans up to
``<end>``. Spans (:class:`~mmtp.stream.rules.SpanRule`) describe themselves: a picture is ``<boi> <dim H> <dim W>``, H·W·K codes,
``<eoi>``; sound is ``<boa>``, whole frames, ``<eoa>``; video has three dims; continuous features are ``<bof> <dim H> <dim W>``,
H·W placeholders, ``<eof>``, with time and bands of a sound as H and W.

Positions have three axes (time, row, column). A counter p runs over text and specials: (p, p, p). A body with base b (the counter
after its dims) puts the codes of cell (r, c) at (b, b+r, b+c), of video cell (t, r, c) at (b+t, b+r, b+c), of sound frame t at
(b+t, b+t, b+t), features of sound at time t and band f at (b+t, b, b+f); the counter goes on at b plus the longest axis. (Multi-axis
positions: Qwen2-VL, Wang et al. 2024, section 2.1.)

Two forms agree on every stream, legal or not: :meth:`StreamGrammar.analyse` for training, :class:`GrammarState` for decoding.
"""

import math
from collections.abc import Iterable

import numpy as np
from jaxtyping import Int, Integer
from torch import Tensor

from mmtp.stream.analysis import Analyser, Span, StreamInfo, found
from mmtp.stream.rules import NO_SPAN, GrammarError, span_rules
from mmtp.stream.vocab import NUM_SPECIALS, ROLES, Special, VocabLayout
from mmtp.types import Modality

__all__ = ["GrammarError", "GrammarState", "Span", "StreamGrammar", "StreamInfo"]

Triple = tuple[int, int, int]
Tokens = Integer[np.ndarray, " s"] | Integer[Tensor, " s"]

_START, _TEXT, _DIMS, _BODY, _CLOSE, _DONE = range(6)
_OPEN = 1 << 62  # frames of a body whose end is not known yet
_NOWHERE: Triple = (-1, -1, -1)


class StreamGrammar:
    """The grammar of one vocabulary."""

    def __init__(self, layout: VocabLayout) -> None:
        self.layout = layout
        self.rules = span_rules(layout)
        self._analyser = Analyser(layout, self.rules)
        # Plain tuples and ints, read by GrammarState.push.
        self.ranges = tuple(slot.ranges for slot in layout.slots)
        index = layout.slot_index
        self.start, self.doc, self.turn, self.dim, self.done = (index[name] for name in ("start", "doc", "turn", "dim", "done"))
        self.first_dim = layout.dim_range[0]

    def analyse(self, tokens: Tokens, complete: bool = False) -> StreamInfo:
        """Slots, positions and meaning of every token of one document.

        Args:
            tokens: vocabulary ids of one document, or of the start of one.
            complete: whether the document must have ended.

        Raises:
            GrammarError: offset and expectation of the first token that breaks the grammar.
        """
        array = _as_numpy(tokens)
        info = self._analyser(array)
        if complete and not info.complete:
            slot = self.begin(array.tolist()).slot
            raise GrammarError(len(array), self.layout.slots[slot].expected, "the end of the stream")
        return info

    def begin(self, prefix: Iterable[int] = ()) -> "GrammarState":
        """The state after ``prefix``, from which it goes on token by token.

        Raises:
            GrammarError: the prefix breaks the grammar.
        """
        state = GrammarState(self)
        for token in prefix:
            state.push(token)
        return state

    def spans(self, tokens: Tokens) -> list[Span]:
        """The closed spans of a document, in order."""
        return list(self.analyse(tokens).spans)

    def codes(self, tokens: Tokens, span: Span) -> Int[np.ndarray, "k *grid"]:
        """Local ids of a span's codes, as its tokenizer decodes them.

        Args:
            tokens: the document that the span was found in.
            span: one with codes; continuous features have none.
        """
        assert not span.continuous, "features have no codes"
        entry = self.layout.entry(span.modality)
        frame, codebook, _ = entry.pattern.order(math.prod(span.grid))
        first = np.array([self.layout.code_range(span.modality, k)[0] for k in range(len(entry.codebook_sizes))])
        codes = np.empty((len(first), math.prod(span.grid)), dtype=np.int64)
        codes[codebook, frame] = _as_numpy(tokens)[span.body] - first[codebook]
        return codes.reshape(-1, *span.grid)

    def describe(self, token: int) -> str:
        """An id in words: ``<boi>``, ``text 17``, ``image code 4 of codebook 0``."""
        return self.layout.describe(token)


class GrammarState:
    """Where a stream stands after the tokens pushed so far. Speculation copies it often, so it is a few plain ints.

    Attributes:
        slot: index into ``layout.slots`` of the ids that may come next.
        offset: number of tokens pushed.
    """

    __slots__ = ("_counter", "_frames", "_grammar", "_grid", "_in_turn", "_k", "_phase", "_rule", "_step", "offset", "slot")

    def __init__(self, grammar: StreamGrammar) -> None:
        self._grammar = grammar
        self.slot = grammar.start
        self.offset = 0
        self._phase = _START
        self._counter = 0  # position of the next text token, or base of the body
        self._in_turn = False
        self._rule = NO_SPAN
        self._grid: tuple[int, ...] = ()  # dims read so far
        self._frames = 0
        self._step = 0
        self._k = 0

    def copy(self) -> "GrammarState":
        """A state of its own that goes on from here."""
        new = GrammarState.__new__(GrammarState)
        new._grammar = self._grammar
        new.slot = self.slot
        new.offset = self.offset
        new._phase = self._phase
        new._counter = self._counter
        new._in_turn = self._in_turn
        new._rule = self._rule
        new._grid = self._grid
        new._frames = self._frames
        new._step = self._step
        new._k = self._k
        return new

    @property
    def done(self) -> bool:
        """Whether the document has ended; only padding may follow."""
        return self._phase == _DONE

    @property
    def in_span(self) -> bool:
        """Whether a picture, a sound or a video is open: its dims, codes or closer come next."""
        return self._phase in (_DIMS, _BODY, _CLOSE)

    @property
    def modality(self) -> Modality:
        """What the next token counts as."""
        return self._grammar.layout.slots[self.slot].modality

    @property
    def codebook(self) -> int:
        """Codebook of the next token, -1 where no code is due. Where a sound may end: as if it went on."""
        return self._k if self._phase == _BODY else -1

    @property
    def span_modality(self) -> Modality:
        """The medium of the open span, text where none is; its dims count as text in :attr:`modality`."""
        return self._rule.modality if self.in_span else Modality.TEXT

    def progress(self, ahead: int = 0) -> float:
        """How far the next token is through the body of its span: 0 at the first cell, 1 at the last.

        0 before the body, and in sounds, whose length shows only at their end.

        Args:
            ahead: ask for the code so many further on.
        """
        if self._phase != _BODY or not self._grid:
            return 1.0 if self._phase == _CLOSE and self._grid else 0.0
        last = self._frames + self._rule.pattern.max_delay - 1
        return min(1.0, (self._step + (self._k + ahead) // self._rule.pattern.num_codebooks) / max(1, last))

    @property
    def grid(self) -> tuple[int, ...]:
        """Dims that the open span has told so far; none where no span is open, and in sounds, whose length shows only at their end."""
        return self._grid if self.in_span else ()

    @property
    def coordinate(self) -> Triple:
        """(time, row, column) of the next token in its grid, -1 where no code is due. Where a sound may end: as if it went on."""
        return self._cell() if self._phase == _BODY else _NOWHERE

    @property
    def above(self) -> int:
        """Tokens back from the next code to that of the same codebook one row above.

        0 where there is none, and in patterns with delays, where the distance changes along a row.
        """
        if self._phase != _BODY or len(self._grid) < 2 or self._rule.pattern.max_delay or not self._cell()[1]:
            return 0
        return self._grid[-1] * self._rule.pattern.num_codebooks

    @property
    def position(self) -> Triple:
        """Rotary position of the next token. Where a sound may end: as if it went on; :meth:`push` gives the final word."""
        counter = self._counter
        if self._phase != _BODY:
            return counter, counter, counter
        time, row, column = self._cell()
        if not self._grid:
            return counter + time, counter + time, counter + time
        return counter + time, counter + row, counter + column

    def push(self, token: int) -> Triple:
        """Takes the next token and returns the position at which it stands.

        Raises:
            GrammarError: the token may not stand here; the state is as before.
        """
        grammar = self._grammar
        for lo, hi in grammar.ranges[self.slot]:
            if lo <= token < hi:
                break
        else:
            expected = grammar.layout.slots[self.slot].expected
            raise GrammarError(self.offset, expected, found(grammar.layout, token))
        self.offset += 1
        counter = self._counter
        phase = self._phase
        if phase == _BODY:
            rule = self._rule
            if self.slot != rule.code_slots[self._k] and not rule.ranges[0][0] <= token < rule.ranges[0][1]:
                return self._end_of_sound(token)
            position = self.position
            self._advance()
            return position
        if phase == _DIMS:
            self._grid += (token - grammar.first_dim + 1,)
            self._counter = counter + 1
            if len(self._grid) == self._rule.num_dims:
                self._open_body(math.prod(self._grid))
        else:
            self._counter = counter + 1
            if phase == _CLOSE:
                self._resume()
            elif token < NUM_SPECIALS:
                self._special(token)
        return counter, counter, counter

    def _special(self, token: int) -> None:
        grammar = self._grammar
        if token in grammar.rules:
            rule = self._rule = grammar.rules[token]
            self._grid = ()
            if rule.num_dims:
                self._phase, self.slot = _DIMS, grammar.dim
            else:
                self._open_body(_OPEN)
        elif token == Special.EOS:
            self._phase, self.slot = _DONE, grammar.done
        elif token != Special.PAD:
            self._in_turn = token in _ROLE_IDS
            self._resume()

    def _resume(self) -> None:
        """Back to text: in the turn, or in the document."""
        self._phase = _TEXT
        self.slot = self._grammar.turn if self._in_turn else self._grammar.doc

    def _open_body(self, frames: int) -> None:
        self._phase = _BODY
        self._frames = frames
        self._step = 0
        self._k = 0
        self.slot = self._rule.code_slots[0]

    def _advance(self) -> None:
        """On to the next code in pattern order, or to the closer."""
        rule, step, k, frames = self._rule, self._step, self._k, self._frames
        delays = rule.pattern.delays
        while True:
            k += 1
            if k == len(delays):
                k = 0
                step += 1
                if step == frames + rule.pattern.max_delay:
                    self._close()
                    return
            if 0 <= step - delays[k] < frames:
                break
        self._step, self._k = step, k
        if k == 0 and frames == _OPEN:
            self.slot = rule.boundary_slots[min(step, len(rule.boundary_slots)) - 1]
        else:
            self.slot = rule.code_slots[k]

    def _end_of_sound(self, token: int) -> Triple:
        """A step starts with something else than codebook 0: so many frames it was."""
        self._frames = self._step
        if token == self._rule.closer:
            self._close()
            counter = self._counter
            self._counter = counter + 1
            self._resume()
            return counter, counter, counter
        self._k = -1
        self._advance()
        position = self.position
        self._advance()
        return position

    def _close(self) -> None:
        self._phase = _CLOSE
        self.slot = self._rule.close_slot
        self._counter += max(self._grid) if self._grid else self._frames

    def _cell(self) -> Triple:
        frame = self._step - self._rule.pattern.delays[self._k]
        grid = self._grid
        if not grid:
            return frame, 0, 0
        row, column = divmod(frame, grid[-1])
        if len(grid) == 2:
            return (0, row, column) if self._rule.axes[0] else (row, 0, column)
        time, row = divmod(row, grid[1])
        return time, row, column


_ROLE_IDS = frozenset(int(role) for role in ROLES.values())


def _as_numpy(tokens: np.ndarray | Tensor) -> np.ndarray:
    array = tokens.detach().cpu().numpy() if isinstance(tokens, Tensor) else np.asarray(tokens)
    return array.astype(np.int64)
