"""One vocabulary over all media: the sole owner of which id means what.

Ids stand in this order: 32 special slots, the text tokenizer's ids, ``<dim 1>`` … ``<dim max_dim>``, then one range per codebook of
every media tokenizer. Tokenizers speak of local ids (0 up to the codebook's size), streams of vocabulary ids.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Int, Integer
from torch import Tensor

from mmtp.config import Config
from mmtp.stream.patterns import Pattern
from mmtp.types import MmtpError, Modality, TokenizerSpec

NUM_SPECIALS = 32
SIZE_MULTIPLE = 64

Range = tuple[int, int]
Ids = TypeVar("Ids", int, Integer[np.ndarray, "..."], Integer[Tensor, "..."])


class Special(IntEnum):
    """Ids that are neither text nor code; the rest of the 32 is kept for later."""

    PAD = 0
    BOS = 1
    EOS = 2
    USER = 3
    ASSISTANT = 4
    SYSTEM = 5
    END = 6
    BOI = 7
    EOI = 8
    BOA = 9
    EOA = 10
    BOV = 11
    EOV = 12
    BOF = 13
    EOF = 14
    FEATURE = 15

    @property
    def label(self) -> str:
        """As it is written in messages: ``<boi>``."""
        return f"<{self.name.lower()}>"


ROLES = {"user": Special.USER, "assistant": Special.ASSISTANT, "system": Special.SYSTEM}
OPENERS = {Modality.IMAGE: Special.BOI, Modality.AUDIO: Special.BOA, Modality.VIDEO: Special.BOV}
CLOSERS = {Modality.IMAGE: Special.EOI, Modality.AUDIO: Special.EOA, Modality.VIDEO: Special.EOV}
NUM_DIMS = {Modality.IMAGE: 2, Modality.AUDIO: 0, Modality.VIDEO: 3}
"""Dims that a span writes after its opener; sound writes none, its length shows at its end."""


class VocabError(MmtpError):
    """Entries that make no vocabulary, or ids outside of it."""


class VocabMismatch(VocabError):
    """Two vocabularies that should be one: names the tokenizer that differs."""


@runtime_checkable
class HasSpec(Protocol):
    """All that a layout asks of a tokenizer."""

    @property
    def spec(self) -> TokenizerSpec: ...


@dataclass(frozen=True)
class TextEntry:
    """The text tokenizer: its name, how many ids it has, and its fingerprint."""

    name: str
    size: int
    fingerprint: str = ""


@dataclass(frozen=True)
class MediaEntry:
    """A media tokenizer.

    Attributes:
        modality: the medium.
        name: what messages call it.
        fingerprint: of its configuration and weights.
        codebook_sizes: ids per codebook; empty for continuous features, which a model reads, and writes only where ``written`` says so.
        delays: steps by which each codebook lags (see :class:`~mmtp.stream.patterns.Pattern`); none given: all 0.
        written: of continuous features: whether a model writes them as well.
    """

    modality: Modality
    name: str
    fingerprint: str = ""
    codebook_sizes: tuple[int, ...] = ()
    delays: tuple[int, ...] = ()
    written: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "delays", tuple(self.delays) or (0,) * len(self.codebook_sizes))
        if self.modality is Modality.TEXT:
            raise VocabError(f"{self.name!r}: a text tokenizer is a TextEntry")
        if len(self.delays) != len(self.codebook_sizes):
            raise VocabError(f"{self.name!r}: {len(self.delays)} delays for {len(self.codebook_sizes)} codebooks")
        if self.codebook_sizes and min(self.codebook_sizes) < 1:
            raise VocabError(f"{self.name!r}: every codebook needs at least one entry, {list(self.codebook_sizes)} given")
        if self.continuous and self.modality is Modality.VIDEO:
            raise VocabError(f"{self.name!r}: continuous features are known for pictures and sounds, not for {self.modality}")
        if not self.continuous:
            Pattern(self.delays)
            if self.written:
                raise VocabError(f"{self.name!r}: written is for continuous features; codes are written in any case")

    @property
    def continuous(self) -> bool:
        return not self.codebook_sizes

    @property
    def pattern(self) -> Pattern:
        """Order of the codes; that of a continuous entry is one placeholder per cell."""
        return Pattern(self.delays or (0,))


@dataclass(frozen=True)
class Slot:
    """A place of the grammar: the set of ids that may stand there.

    Attributes:
        name: ``doc``, ``image.codes.0``, …
        modality: what a token here counts as (loss weights, acceptance statistics).
        ranges: legal ids as half-open ranges, sorted, disjoint, none adjacent.
        generable: the part of ``ranges`` that a model may write: without what is input only.
        expected: the legal ids in words, for messages.
    """

    name: str
    modality: Modality
    ranges: tuple[Range, ...]
    generable: tuple[Range, ...]
    expected: str

    @cached_property
    def size(self) -> int:
        """Number of legal ids."""
        return sum(hi - lo for lo, hi in self.ranges)

    @cached_property
    def forced(self) -> int | None:
        """The one legal id where there is only one, else None."""
        return self.ranges[0][0] if self.size == 1 else None

    def __contains__(self, token: int) -> bool:
        return any(lo <= token < hi for lo, hi in self.ranges)

    def generates(self, token: int) -> bool:
        """Whether a model may write a token here."""
        return any(lo <= token < hi for lo, hi in self.generable)


@dataclass(frozen=True)
class VocabLayout(Config):
    """Which id means what. Serialises like any configuration; ``hash`` goes into shards and checkpoints.

    Attributes:
        text: the text tokenizer, if there is one.
        media: media tokenizers; at most one with codebooks per modality, and at most one continuous in all.
        max_dim: greatest extent of a span along one axis of its grid.
    """

    text: TextEntry | None = None
    media: tuple[MediaEntry, ...] = ()
    max_dim: int = 64

    def __post_init__(self) -> None:
        if self.max_dim < 1:
            raise VocabError(f"max_dim: at least 1 is wanted, {self.max_dim} given")
        if self.text is not None and self.text.size < 1:
            raise VocabError(f"{self.text.name!r}: a text tokenizer needs at least one id")
        kinds = ["continuous" if entry.continuous else f"discrete {entry.modality}" for entry in self.media]
        for entry, kind in zip(self.media, kinds, strict=True):
            if kinds.count(kind) > 1:
                raise VocabError(f"{entry.name!r}: there is another {kind} tokenizer; keep one")

    def to_dict(self) -> dict[str, Any]:
        """As of any configuration, but ``written`` only where it is true: vocabularies of before it keep their hash."""
        data = super().to_dict()
        for entry in data["media"]:
            if not entry["written"]:
                del entry["written"]
        return data

    @classmethod
    def of(
        cls,
        tokenizers: Mapping[str, HasSpec],
        max_dim: int = 64,
        delays: Mapping[str, Sequence[int]] | None = None,
        written: bool = False,
        codebooks: Mapping[str, int] | None = None,
    ) -> "VocabLayout":
        """The layout over a set of tokenizers, the same whatever their order.

        Args:
            tokenizers: name -> anything with a ``spec``.
            max_dim: greatest extent of a span along one axis.
            delays: name -> delay of every codebook, where they are not all 0.
            written: whether the vectors of a continuous tokenizer are written as well.
            codebooks: name of a residual tokenizer -> how many of its codebooks streams hold, from the first on, where not all.

        Raises:
            VocabError: two tokenizers of one kind, or codebooks that a tokenizer does not have or cannot do without.
        """
        text, media = None, []
        for name, tokenizer in tokenizers.items():
            spec = tokenizer.spec
            if spec.modality is not Modality.TEXT:
                lags = tuple((delays or {}).get(name, ()))
                sizes = _first((codebooks or {}).get(name, 0), name, spec)
                media.append(MediaEntry(spec.modality, name, spec.fingerprint, sizes, lags, written and not sizes))
            elif text is None:
                text = TextEntry(name, spec.codebook_sizes[0], spec.fingerprint)
            else:
                raise VocabError(f"{name!r}: there is another text tokenizer, {text.name!r}; keep one")
        return cls(text, tuple(sorted(media, key=lambda e: (e.modality.index, e.continuous))), max_dim)

    @classmethod
    def joined(cls, layouts: Mapping[str, "VocabLayout"]) -> "VocabLayout":
        """The vocabulary over the tokenizers of several, which may know different media.

        Where the first knows all that the others do, it is the first itself.

        Args:
            layouts: what each belongs to, for messages -> the layout.

        Raises:
            VocabMismatch: two of them have different tokenizers of one kind; names both.
        """
        found: dict[str, tuple[str, TextEntry | MediaEntry]] = {}
        for where, layout in layouts.items():
            for kind, entry in layout._entries().items():
                owner, known = found.setdefault(kind, (where, entry))
                if known != entry:
                    raise VocabMismatch(_differs(where, kind, entry, known) + f", as in {owner}")
        first = next(iter(layouts.values()))
        max_dim = max(layout.max_dim for layout in layouts.values())
        if len(first._entries()) == len(found) and first.max_dim == max_dim:
            return first
        entries = [entry for _, entry in found.values()]
        media = sorted((e for e in entries if isinstance(e, MediaEntry)), key=lambda e: (e.modality.index, e.continuous))
        return cls(next((e for e in entries if isinstance(e, TextEntry)), None), tuple(media), max_dim)

    def ids_of(self, part: "VocabLayout") -> Int[np.ndarray, " ids"]:
        """What the ids of a layout are called in this one, which knows all its tokenizers (see :meth:`joined`); unused ids become <pad>."""
        table = np.zeros(part.size, dtype=np.int64)
        table[:NUM_SPECIALS] = np.arange(NUM_SPECIALS)
        ranges = [(part.text_range, self.text_range), (part.dim_range, self.dim_range)]
        ranges += [(own, self._code_ranges[key]) for key, own in part._code_ranges.items()]
        for (lo, hi), (start, _) in ranges:
            table[lo:hi] = np.arange(start, start + hi - lo)
        return table

    def text_first(self) -> Int[np.ndarray, " ids"]:
        """For every id its place where text comes first, as in the vocabularies of language models, and the specials behind it."""
        (lo, hi), ids = self.text_range, np.arange(self.size)
        ids[lo:hi] -= lo
        ids[:NUM_SPECIALS] += hi - lo
        return ids

    @cached_property
    def hash(self) -> str:
        """16 hex digits; equal exactly where the layouts are."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def text_range(self) -> Range:
        return NUM_SPECIALS, NUM_SPECIALS + (self.text.size if self.text else 0)

    @property
    def dim_range(self) -> Range:
        return self.text_range[1], self.text_range[1] + self.max_dim

    @cached_property
    def _code_ranges(self) -> dict[tuple[Modality, int], Range]:
        ranges, lo = {}, self.dim_range[1]
        for entry in self.media:
            for k, size in enumerate(entry.codebook_sizes):
                ranges[entry.modality, k] = (lo, lo + size)
                lo += size
        return ranges

    @property
    def used(self) -> int:
        """Ids in use, before padding."""
        return max((hi for _, hi in self._code_ranges.values()), default=self.dim_range[1])

    @property
    def size(self) -> int:
        """Ids in all: a multiple of 64."""
        return -(-self.used // SIZE_MULTIPLE) * SIZE_MULTIPLE

    def entry(self, modality: Modality) -> MediaEntry:
        """The discrete tokenizer of a modality.

        Raises:
            VocabError: the layout has none.
        """
        for entry in self.media:
            if entry.modality is modality and not entry.continuous:
                return entry
        raise VocabError(f"this vocabulary has no {modality} tokenizer; it has {', '.join(self._names()) or 'none'}")

    @property
    def continuous(self) -> MediaEntry | None:
        """The continuous tokenizer, if there is one."""
        return next((entry for entry in self.media if entry.continuous), None)

    def code_range(self, modality: Modality, codebook: int = 0) -> Range:
        """Vocabulary ids of one codebook; for text, of the text tokenizer."""
        if modality is Modality.TEXT and self.text is not None:
            return self.text_range
        num_codebooks = len(self.entry(modality).codebook_sizes)
        if not 0 <= codebook < num_codebooks:
            raise VocabError(f"{modality} has {num_codebooks} codebooks; there is no codebook {codebook}")
        return self._code_ranges[modality, codebook]

    def to_global(self, ids: Ids, modality: Modality, codebook: int = 0) -> Ids:
        """Vocabulary ids of local ids.

        Raises:
            VocabError: an id that the tokenizer does not have.
        """
        lo, hi = self.code_range(modality, codebook)
        self._check(ids, 0, hi - lo, f"{modality} codebook {codebook}: local ids")
        return ids + lo

    def from_global(self, ids: Ids, modality: Modality, codebook: int = 0) -> Ids:
        """Local ids of vocabulary ids.

        Raises:
            VocabError: an id outside the codebook's range.
        """
        lo, hi = self.code_range(modality, codebook)
        self._check(ids, lo, hi, f"{modality} codebook {codebook}: vocabulary ids")
        return ids - lo

    def dim(self, extent: int) -> int:
        """The id that says how far a span reaches along one axis.

        Raises:
            VocabError: the extent is 0 or beyond ``max_dim``.
        """
        if not 1 <= extent <= self.max_dim:
            raise VocabError(f"a span of extent {extent} along one axis: this vocabulary has dims from 1 to {self.max_dim}")
        return self.dim_range[0] + extent - 1

    def text_ids(self, tokens: Integer[np.ndarray, " s"]) -> Int[np.ndarray, " n"]:
        """Local ids of the text tokens of a stream; everything else is left out."""
        lo, hi = self.text_range
        tokens = np.asarray(tokens).astype(np.int64)
        return tokens[(tokens >= lo) & (tokens < hi)] - lo

    def describe(self, token: int) -> str:
        """An id in words: ``<boi>``, ``text 17``, ``image code 4 of codebook 0``."""
        token = int(token)
        if 0 <= token < NUM_SPECIALS:
            return Special(token).label if token < len(Special) else f"reserved id {token}"
        lo, hi = self.text_range
        if lo <= token < hi:
            return f"text {token - lo}"
        lo, hi = self.dim_range
        if lo <= token < hi:
            return f"<dim {token - lo + 1}>"
        for (modality, k), (lo, hi) in self._code_ranges.items():
            if lo <= token < hi:
                return f"{modality} code {token - lo} of codebook {k}"
        return f"id {token}, which no tokenizer of this vocabulary uses"

    def check_same(self, other: "VocabLayout", where: str) -> None:
        """Refuses another vocabulary.

        Args:
            other: the layout that should equal this one.
            where: what ``other`` belongs to, for the message.

        Raises:
            VocabMismatch: names the tokenizer that differs, with both fingerprints.
        """
        if self == other:
            return
        mine, others = self._entries(), other._entries()
        for kind in [*mine, *(k for k in others if k not in mine)]:
            here, there = mine.get(kind), others.get(kind)
            if here != there:
                raise VocabMismatch(_differs(where, kind, there, here))
        if self.max_dim != other.max_dim:
            raise VocabMismatch(f"{where}: max_dim is {other.max_dim}, but {self.max_dim} is wanted")
        raise VocabMismatch(f"{where}: tokenizers stand in the order {other._names()}, but {self._names()} is wanted")

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """All places of the grammar, in fixed order: start, doc, turn, dim, those of every media tokenizer, done."""
        text = ([("text", self.text_range)] if self.text else []) + [_one(OPENERS[e.modality]) for e in self.media if not e.continuous]
        bof = [_one(Special.BOF)] if self.continuous is not None else []
        written, read = (bof, []) if self.continuous is not None and self.continuous.written else ([], bof)
        roles = [_one(role) for role in ROLES.values()]
        slots = [
            _slot("start", Modality.TEXT, [_one(Special.BOS)]),
            _slot("doc", Modality.TEXT, [*text, *roles, _one(Special.EOS), *written], read),
            _slot("turn", Modality.TEXT, [*text, _one(Special.END), *written], read),
            _slot("dim", Modality.TEXT, [(f"<dim 1> to <dim {self.max_dim}>", self.dim_range)]),
        ]
        for entry in self.media:
            slots += self._feature_slots(entry) if entry.continuous else self._code_slots(entry)
        return (*slots, _slot("done", Modality.TEXT, [_one(Special.PAD)]))

    @cached_property
    def modalities(self) -> tuple[Modality, ...]:
        """Modalities of the slots, in the order of :class:`~mmtp.types.Modality`; text is always among them."""
        return tuple(sorted({slot.modality for slot in self.slots}, key=lambda modality: modality.index))

    @cached_property
    def slot_index(self) -> dict[str, int]:
        """Slot name -> its place in ``slots``."""
        return {slot.name: index for index, slot in enumerate(self.slots)}

    def _feature_slots(self, entry: MediaEntry) -> list[Slot]:
        return [
            _slot("feature.codes.0", entry.modality, [], [_one(Special.FEATURE)]),
            _slot("feature.end", entry.modality, [_one(Special.EOF)]),
        ]

    def _code_slots(self, entry: MediaEntry) -> list[Slot]:
        modality, closer = entry.modality, _one(CLOSERS[entry.modality])
        codes = [(f"{modality} code of codebook {k}", self._code_ranges[modality, k]) for k in range(len(entry.codebook_sizes))]
        slots = [_slot(f"{modality}.codes.{k}", modality, [code]) for k, code in enumerate(codes)]
        if not NUM_DIMS[modality]:
            for k in sorted(set(entry.pattern.ramp_down_starts)):
                slots.append(_slot(f"{modality}.boundary.{k}", modality, [codes[0], codes[k] if k else closer]))
        return [*slots, _slot(f"{modality}.end", modality, [closer])]

    def _entries(self) -> dict[str, TextEntry | MediaEntry]:
        entries: dict[str, TextEntry | MediaEntry] = {"text": self.text} if self.text else {}
        return entries | {f"continuous {e.modality}" if e.continuous else str(e.modality): e for e in self.media}

    def _names(self) -> list[str]:
        return [entry.name for entry in self._entries().values()]

    @staticmethod
    def _check(ids: Any, lo: int, hi: int, what: str) -> None:
        array = ids.cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
        if array.size and (array.min() < lo or array.max() >= hi):
            raise VocabError(f"{what} from {lo} to {hi - 1} are wanted, {array.min()} to {array.max()} given")


def _first(codebooks: int, name: str, spec: TokenizerSpec) -> tuple[int, ...]:
    """Sizes of the codebooks that streams hold."""
    if codebooks and not (spec.residual and codebooks <= spec.num_codebooks):
        why = f"has {spec.num_codebooks}" if spec.residual else "is not residual: it needs all it has"
        raise VocabError(f"{name!r}: the first {codebooks} codebooks are wanted, and it {why}")
    return spec.codebook_sizes[: codebooks or None]


def _one(special: Special) -> tuple[str, Range]:
    return special.label, (int(special), int(special) + 1)


def _slot(name: str, modality: Modality, generable: list[tuple[str, Range]], input_only: list[tuple[str, Range]] | None = None) -> Slot:
    legal = generable + (input_only or [])
    *most, last = [words for words, _ in legal]
    expected = f"{', '.join(most)} or {last}" if most else last
    return Slot(name, modality, _merge(r for _, r in legal), _merge(r for _, r in generable), expected)


def _merge(ranges: Iterable[Range]) -> tuple[Range, ...]:
    merged: list[Range] = []
    for lo, hi in sorted(ranges):
        if merged and merged[-1][1] == lo:
            merged[-1] = (merged[-1][0], hi)
        else:
            merged.append((lo, hi))
    return tuple(merged)


def _differs(where: str, kind: str, found: TextEntry | MediaEntry | None, wanted: TextEntry | MediaEntry | None) -> str:
    return f"{where}: {kind} tokenizer is {_entry_words(found)}, but {_entry_words(wanted)} is wanted"


def _entry_words(entry: TextEntry | MediaEntry | None) -> str:
    if entry is None:
        return "none"
    sizes = [entry.size] if isinstance(entry, TextEntry) else list(entry.codebook_sizes)
    lags = f", delays {list(entry.delays)}" if isinstance(entry, MediaEntry) and any(entry.delays) else ""
    written = ", written" if isinstance(entry, MediaEntry) and entry.written else ""
    return f"{entry.name!r} (fingerprint {entry.fingerprint or 'none'}, sizes {sizes}{lags}{written})"
