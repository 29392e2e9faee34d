"""What a reply holds, as it comes: tokens to characters, rows of pictures and stretches of sound.

What an event says is final. Characters come when all their bytes are there, a row of a picture when all its codes are, in whatever order
the codebooks take turns, and sound as soon as its decoder has seen what it hangs on.
"""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmtp.decode.batcher import Piece
from mmtp.decode.stats import Generation
from mmtp.nn.pyramid import scale_ends
from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.rules import SpanRule
from mmtp.stream.vocab import Special, VocabLayout
from mmtp.tokenizers.audio.codec import AudioTokenizer
from mmtp.tokenizers.audio.stream import DecoderStream, WindowDecoderStream, decoder_stream
from mmtp.types import Modality, Segment

Decode = Callable[[Segment], Tensor]


@dataclass(frozen=True)
class TextPiece:
    """Characters that follow those before."""

    text: str


@dataclass(frozen=True, eq=False, kw_only=True)
class GridPiece:
    """The next part of a picture or a video: a row, a scale of a picture that is a pyramid of grids, or a frame of a video's codes.

    Attributes:
        modality: picture or video.
        span: number among the pictures, sounds and videos of the reply.
        index: number of the part; parts come in order.
        grid: extent of the whole, ``(h, w)`` or ``(t, h, w)``; ``(1, n)`` of a pyramid.
        codes: local ids of the part: of a row ``[k, w]``, of a scale ``[k, side, side]``, of a frame ``[k, h, w]``.
        standing: local ids of all parts so far, in reading order.
        decode: a segment to its medium.
    """

    modality: Modality
    span: int
    index: int
    grid: tuple[int, ...]
    codes: Int[Tensor, "k *part"]
    standing: Int[Tensor, "k n"] = field(repr=False)
    decode: Decode = field(repr=False)

    def so_far(self) -> Float[Tensor, "3 *size"]:
        """What there is, decoded: the upper part of a picture ``[3, h, w]``, a pyramid's picture up to this scale, a video's first frames.

        What is still to come has part in the lowest pixels of a picture, so these may change; in its place stands the last row once more.
        """
        if self.modality is Modality.VIDEO:
            return self.decode(Segment(self.modality, self.standing.unflatten(1, (-1, *self.grid[1:]))))
        if self.codes.ndim > 2:
            return self.decode(Segment(self.modality, self.standing.unsqueeze(1)))
        rows = self.standing.unflatten(1, (-1, self.grid[1]))
        known, whole = rows.shape[1], self.grid[0]
        picture = self.decode(Segment(self.modality, torch.cat([rows, rows[:, -1:].expand(-1, whole - known, -1)], 1)))
        return picture[:, : picture.shape[1] * known // whole]


@dataclass(frozen=True, eq=False, kw_only=True)
class SoundChunk:
    """Samples that follow those before.

    Attributes:
        span: number among the pictures, sounds and videos of the reply.
        sound: in [-1, 1]; of the last chunk there may be none.
        start: samples before it.
        sample_rate: samples per second.
        last: whether the sound ends with it. One that the limit cuts has no last chunk.
    """

    span: int
    sound: Float[Tensor, "c n"]
    start: int
    sample_rate: float
    last: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class VectorSpan:
    """A span of vectors that the model has written, at its end.

    Attributes:
        span: number among the pictures, sounds and videos of the reply.
        segment: with features ``[*grid, d]``.
        decode: a segment to its medium.
    """

    span: int
    segment: Segment
    decode: Decode = field(repr=False)

    def decoded(self) -> Tensor:
        """The medium that they stand for.

        Raises:
            EncodeOnlyError: the tokenizer has no way back.
        """
        return self.decode(self.segment)


@dataclass(frozen=True, eq=False)
class End:
    """The reply is done; no event follows."""

    generation: Generation


Event = TextPiece | GridPiece | SoundChunk | VectorSpan | End


class TextReader:
    """Tokens of a reply to its characters.

    Args:
        layout: the vocabulary.
        tokenizer: of its text; None where it has none.
    """

    def __init__(self, layout: VocabLayout, tokenizer: Any) -> None:
        self._first, self._end = layout.text_range
        self._tokenizer = tokenizer
        self._decoder = None if tokenizer is None else tokenizer.incremental_decoder()

    def push(self, tokens: Sequence[int], final: bool = False) -> str:
        """The characters that the text among these tokens completes, whatever stands between its bytes.

        Args:
            tokens: vocabulary ids that follow those before.
            final: nothing follows: bytes that are left over become U+FFFD.
        """
        if self._decoder is None:
            return ""
        ids = [token - self._first for token in tokens if self._first <= token < self._end]
        return self._decoder.decode(self._tokenizer.decode_bytes(ids), final)


class Reader:
    """New tokens of a stream to events. A span that has begun before is left out.

    Args:
        grammar: of the vocabulary.
        tokenizers: by the names that the vocabulary gives them.
        decode: a segment to its medium.
    """

    def __init__(self, grammar: StreamGrammar, tokenizers: Mapping[str, Any], decode: Decode) -> None:
        self._grammar, self._tokenizers, self._decode = grammar, tokenizers, decode
        layout = grammar.layout
        self._text = TextReader(layout, None if layout.text is None else tokenizers[layout.text.name])
        self._span: _Span | None = None
        self._spans = 0

    def read(self, piece: Piece) -> Iterator[Event]:
        """What new tokens complete."""
        vectors = iter(() if piece.vectors is None else piece.vectors.cpu())
        begun = 0
        for i, token in enumerate(piece.tokens):
            vector = next(vectors) if token == Special.FEATURE else None
            if self._span is None and token in self._grammar.rules:
                yield from self._told(piece.tokens[begun:i])
                self._span = self._open(self._grammar.rules[token])
            elif self._span is None:
                continue
            elif self._span.take(token, vector):
                yield from self._span.settled(closed=True)
                self._span = None
            begun = i + 1
        yield from self._told(piece.tokens[begun:], final=piece.generation is not None)
        if self._span is not None:
            yield from self._span.settled()
        if piece.generation is not None:
            yield End(piece.generation)

    def _told(self, tokens: Sequence[int], final: bool = False) -> Iterator[Event]:
        if text := self._text.push(tokens, final):
            yield TextPiece(text)

    def _open(self, rule: SpanRule) -> "_Span":
        entries = self._grammar.layout.media
        name = next(e.name for e in entries if e.modality is rule.modality and e.continuous == rule.continuous)
        kind = _Vectors if rule.continuous else _Grid if rule.num_dims else _Sound
        self._spans += 1
        return kind(self._spans - 1, rule, self._grammar.first_dim, self._tokenizers[name], self._decode)


class _Span(ABC):
    """An open span, and what of it has been told."""

    def __init__(self, number: int, rule: SpanRule, first_dim: int, tokenizer: Any, decode: Decode) -> None:
        self.number, self.rule, self.tokenizer, self.decode = number, rule, tokenizer, decode
        self._first_dim = first_dim
        self.grid: tuple[int, ...] = ()
        self.ids: list[list[int]] = [[] for _ in rule.ranges]  # of each codebook, which has its codes in order in every pattern
        self.vectors: list[Float[Tensor, " d"]] = []

    @property
    def cells(self) -> int:
        """Cells, or frames, that have all their codes."""
        return min(map(len, self.ids))

    def codes(self, start: int, stop: int) -> Int[Tensor, "k n"]:
        """Those of some cells, in reading order."""
        return torch.tensor([ids[start:stop] for ids in self.ids], dtype=torch.long)

    def take(self, token: int, vector: Float[Tensor, " d"] | None) -> bool:
        """Takes its next token, and says whether that ends it."""
        if len(self.grid) < self.rule.num_dims:
            self.grid += (token - self._first_dim + 1,)
        elif vector is not None:
            self.vectors.append(vector)
        elif token == self.rule.closer:
            return True
        else:
            k, first = next((k, low) for k, (low, high) in enumerate(self.rule.ranges) if low <= token < high)
            self.ids[k].append(token - first)
        return False

    @abstractmethod
    def settled(self, closed: bool = False) -> Iterator[Event]:
        """What has become complete since it was asked last."""


class _Grid(_Span):
    """A picture or a video."""

    told = 0
    start = 0  # cells of the parts told

    @cached_property
    def parts(self) -> list[tuple[int, ...]]:
        """Extents of all parts."""
        scales = self.tokenizer.spec.scales
        if self.grid in [(1, end) for end in scale_ends(scales)]:
            return [(side, side) for side in scales]
        return [self.grid[1:]] * self.grid[0]

    def settled(self, closed: bool = False) -> Iterator[Event]:
        if len(self.grid) < self.rule.num_dims:
            return
        cells = self.cells
        for part in self.parts[self.told :]:
            start, end = self.start, self.start + math.prod(part)
            if end > cells:
                return
            standing = self.codes(0, end)
            codes = standing[:, start:].unflatten(1, part)
            yield GridPiece(
                modality=self.rule.modality, span=self.number, index=self.told, grid=self.grid, codes=codes, standing=standing,
                decode=self.decode,
            )  # fmt: skip
            self.told, self.start = self.told + 1, end


class _Sound(_Span):
    """A sound of codes. Of a tokenizer that cannot decode chunks it comes as a whole, at its end."""

    told = 0  # frames
    start = 0  # samples

    @cached_property
    def stream(self) -> DecoderStream | WindowDecoderStream | None:
        return decoder_stream(self.tokenizer) if isinstance(self.tokenizer, AudioTokenizer) else None

    def settled(self, closed: bool = False) -> Iterator[Event]:
        frames = self.cells
        if self.stream is None:
            if not closed:
                return
            sound = self.decode(Segment(Modality.AUDIO, self.codes(0, frames)))
        else:
            new = self.codes(self.told, frames)
            sound = self.stream.flush(new) if closed else self.stream.push(new)
        self.told = frames
        if closed or sound.shape[1]:
            rate = self.tokenizer.spec.sample_rate
            yield SoundChunk(span=self.number, sound=sound, start=self.start, sample_rate=rate, last=closed)
        self.start += sound.shape[1]


class _Vectors(_Span):
    """A span of vectors."""

    def settled(self, closed: bool = False) -> Iterator[Event]:
        if closed:
            features = torch.stack(self.vectors).unflatten(0, self.grid)
            yield VectorSpan(span=self.number, segment=Segment(self.rule.modality, features=features), decode=self.decode)


class Events(Iterator[Event]):
    """The events of a reply, in order. Closing ends the request that they come of.

    Args:
        pieces: of a row, see :meth:`mmtp.decode.batcher.Batcher.stream`.
        reader: makes events of them.
    """

    def __init__(self, pieces: Generator[Piece], reader: Reader) -> None:
        self._pieces, self._reader = pieces, reader
        self._ready: deque[Event] = deque()

    def __next__(self) -> Event:
        while not self._ready:
            self._ready += self._reader.read(next(self._pieces))
        return self._ready.popleft()

    def close(self) -> None:
        """Ends the request, if it has not ended; nothing more comes."""
        self._pieces.close()
        self._ready.clear()
