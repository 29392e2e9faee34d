"""Token streams back to what they stand for: pictures, sound and words."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mmtp import hub
from mmtp.data.errors import DataError
from mmtp.data.shards import Row
from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.vocab import ROLES, Special, VocabLayout
from mmtp.tokenizers.matching import by_fingerprint
from mmtp.types import Codes, Modality

BATCH_ROWS = 64

_ROLE_NAMES = {int(special): role for role, special in ROLES.items()}


@dataclass(frozen=True)
class Part:
    """A piece of a document.

    Attributes:
        modality: of the piece.
        role: whose turn it stands in; None outside of turns.
        codes: local ids: text ``[n]``, media ``[k, *grid]``; empty for continuous features.
        value: the string, picture ``[3, h, w]``, video ``[3, t, h, w]`` or sound ``[c, t]``; None until it is decoded, and for
            continuous features.
    """

    modality: Modality
    role: str | None
    codes: Int[np.ndarray, "..."]
    value: str | Tensor | None = None


@dataclass(frozen=True)
class Restored:
    """A document, decoded.

    Attributes:
        row: what it was decoded from.
        parts: its pieces, in order.
    """

    row: Row
    parts: tuple[Part, ...]

    @property
    def transcript(self) -> str:
        """The document in words, a line for each turn; media as ``<image 8x8>``."""
        lines: list[str] = []
        turn: object = ()
        for part in self.parts:
            grid = "x".join(map(str, part.codes.shape[1:]))
            text = part.value if isinstance(part.value, str) else f"<{part.modality} {grid}>"
            if part.role != turn:
                lines.append(f"{part.role}: {text}" if part.role else text)
            else:
                lines[-1] += f" {text}"
            turn = part.role
        return "\n".join(lines)


class Restorer:
    """Decodes documents of one vocabulary.

    Args:
        layout: the vocabulary.
        tokenizers: by the names that the layout gives them; see :func:`load_tokenizers`.
    """

    def __init__(self, layout: VocabLayout, tokenizers: Mapping[str, Any]) -> None:
        self.layout = layout
        self.grammar = StreamGrammar(layout)
        self.text = tokenizers.get(layout.text.name) if layout.text else None
        self.media = {e.modality: tokenizers[e.name] for e in layout.media if e.name in tokenizers}

    def __call__(self, rows: Iterable[Row]) -> Iterator[Restored]:
        """Decodes documents, some dozens at a time.

        Raises:
            GrammarError: a stream that breaks the grammar.
        """
        coming = iter(rows)
        while batch := list(islice(coming, BATCH_ROWS)):
            documents = [self.parts(row.tokens) for row in batch]
            self._decode(batch, documents)
            yield from (Restored(row, tuple(parts)) for row, parts in zip(batch, documents, strict=True))

    def parts(self, tokens: Int[np.ndarray, " s"]) -> list[Part]:
        """The pieces of a stream: words decoded, media as codes.

        Raises:
            GrammarError: the stream breaks the grammar.
        """
        parts: list[Part] = []
        role, at = None, 0
        for span in [*self.grammar.spans(tokens), None]:
            words: list[int] = []
            for token in [*tokens[at : span.start if span else len(tokens)].tolist(), -1]:
                lo, hi = self.layout.text_range
                if lo <= token < hi:
                    words.append(token - lo)
                    continue
                if words:
                    parts.append(Part(Modality.TEXT, role, np.array(words), self._words(words)))
                    words = []
                role = _ROLE_NAMES.get(token, None if token == Special.END else role)
            if span is not None:
                codes = np.zeros((0, *span.grid), dtype=np.int64) if span.continuous else self.grammar.codes(tokens, span)
                parts.append(Part(span.modality, role, codes))
                at = span.end
        return parts

    def _words(self, ids: list[int]) -> str:
        return self.text.decode_text(ids) if self.text is not None else " ".join(f"text {i}" for i in ids)

    def _decode(self, rows: Sequence[Row], documents: list[list[Part]]) -> None:
        """Decodes the media of some documents, all of one grid at a time; a medium that several documents share, once."""
        groups: dict[tuple[Modality, tuple[int, ...]], dict[tuple[bytes, tuple[int, ...]], list[tuple[int, int]]]] = {}
        for d, parts in enumerate(documents):
            for p, part in enumerate(parts):
                if part.modality in self.media and len(part.codes):
                    same = part.codes.tobytes(), self._size(rows[d], parts, part)
                    groups.setdefault((part.modality, part.codes.shape), {}).setdefault(same, []).append((d, p))
        for (modality, shape), distinct in groups.items():
            ids = torch.from_numpy(np.stack([documents[d][p].codes for (d, p), *_ in distinct.values()]))
            sizes = torch.tensor([size for _, size in distinct])
            with torch.no_grad():
                values = self.media[modality].decode(Codes(ids, torch.tensor([shape[1:]] * len(ids)), sizes))
            for places, value in zip(distinct.values(), values, strict=True):
                for d, p in places:
                    documents[d][p] = replace(documents[d][p], value=value)

    def _size(self, row: Row, parts: list[Part], part: Part) -> tuple[int, ...]:
        """Extent of the medium before it was padded to whole cells: the row knows that of the one medium it was made of."""
        size = row.meta.get("size")
        if size is not None and sum(p.modality is part.modality for p in parts) == 1:
            return tuple(size)
        cell = self.media[part.modality].spec.downsampling
        return tuple(n * d for n, d in zip(part.codes.shape[1:], cell, strict=True))


def load_tokenizers(layout: VocabLayout, given: Iterable[str | Path] = (), *, needed: bool = True) -> dict[str, Any]:
    """The tokenizers of a vocabulary, by its names for them.

    Args:
        layout: the vocabulary.
        given: zoo entries, folders or Hub ids; each serves the entry whose fingerprint it has. Entries that none serves are
            looked for by name.
        needed: False leaves out what cannot be found.

    Raises:
        DataError: an entry has no tokenizer with its fingerprint.
    """
    entries = [*([layout.text] if layout.text else []), *(entry for entry in layout.media if not entry.continuous)]
    served, strangers = by_fingerprint(entries, given)
    found: dict[str, Any] = {}
    for entry in entries:
        if (tokenizer := served.get(entry.name)) is None:
            try:
                tokenizer = hub.from_pretrained(entry.name)
            except hub.HubError as error:
                if needed:
                    wrong = "".join(f"; {name} is not it: it {what}" for name, what in strangers.items())
                    wanted = f"the folder with fingerprint {entry.fingerprint}" if wrong else "its folder"
                    raise DataError(f"tokenizer {entry.name!r} is not in the zoo; name {wanted} with --tokenizer{wrong}") from error
                continue
        if (print_ := tokenizer.spec.fingerprint) != entry.fingerprint:
            if needed:
                raise DataError(
                    f"tokenizer {entry.name!r}: the data were made with fingerprint {entry.fingerprint}, the one of that name has "
                    f"{print_}; name the right one with --tokenizer"
                )
            continue
        found[entry.name] = tokenizer
    return found
