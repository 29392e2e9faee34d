"""Documents as files: PNG, MP4 or GIF, WAV, a text of all words, and a sheet of the pictures."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mmtp.data.errors import DataError
from mmtp.data.media import contact_sheet, encode_png, write_wav
from mmtp.data.restore import Restored, Restorer, load_tokenizers
from mmtp.data.shards import Row
from mmtp.data.sources.base import SUFFIXES
from mmtp.data.video import STILL_RATE, Container, encode_video
from mmtp.stream.vocab import VocabLayout
from mmtp.types import Modality

SHEET, WORDS = "contact-sheet.png", "documents.txt"
SHEET_PICTURES = 400

_ENDINGS = frozenset().union(*SUFFIXES.values())


@dataclass(frozen=True)
class Exported:
    """How much was written."""

    documents: int
    pictures: int
    videos: int
    sounds: int


def export(
    rows: Sequence[Row] | Any,
    layout: VocabLayout,
    out: str | Path,
    *,
    tokenizers: Iterable[str | Path] = (),
    limit: int | None = None,
    video: Container = "mp4",
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Writes one picture, video or sound for each input, ``documents.txt``, and ``contact-sheet.png`` of the first 400 pictures.

    Videos are on the sheet with their first frame. Their frame rate is that of the files they were made of; where it is not known, because
    a document has several or a model wrote it, it is the tokenizer's, and else 10 frames per second.


    Args:
        rows: documents: a data set, a shard.
        layout: their vocabulary.
        out: folder; made where it does not exist.
        tokenizers: where the layout's own are not in the zoo, see :func:`~mmtp.data.restore.load_tokenizers`.
        limit: only so many documents.
        video: what videos are written as.
        progress: called with (documents done, documents in all).

    Raises:
        DataError: a tokenizer is missing or another, or a file cannot be written.
        GrammarError: a stream that breaks the grammar.
    """
    folder = Path(out)
    total = len(rows) if limit is None else min(limit, len(rows))
    restorer = Restorer(layout, load_tokenizers(layout, tokenizers))
    names = _Names()
    sheet: list[Tensor] = []
    counts = {Modality.IMAGE: 0, Modality.VIDEO: 0, Modality.AUDIO: 0}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / WORDS, "w", encoding="utf-8", errors="replace") as words:
            for done, document in enumerate(restorer(rows[i] for i in range(total)), start=1):
                words.write(f"# {document.row.key}\n{document.transcript}\n\n")
                for modality, name, value in _media(document, names):
                    counts[modality] += 1
                    rate = restorer.media[modality].spec.sample_rate
                    if modality is Modality.AUDIO:
                        write_wav(folder / f"{name}.wav", value, rate)
                        continue
                    if modality is Modality.VIDEO:
                        rate = document.row.meta.get("frame_rate", rate or STILL_RATE)
                        (folder / f"{name}.{video}").write_bytes(encode_video(value, rate, video))
                        value = value[:, 0]
                    else:
                        (folder / f"{name}.png").write_bytes(encode_png(value))
                    sheet += [value] if len(sheet) < SHEET_PICTURES else []
                if progress is not None:
                    progress(done, total)
        if sheet:
            (folder / SHEET).write_bytes(encode_png(contact_sheet(sheet)))
    except OSError as error:
        raise DataError(f"{error.filename or folder}: cannot be written ({error.strerror}); make room, or choose another --out") from error
    return Exported(total, counts[Modality.IMAGE], counts[Modality.VIDEO], counts[Modality.AUDIO])


def _media(document: Restored, names: "_Names") -> Iterator[tuple[Modality, str, Tensor]]:
    """The media of a document that no earlier document of the same input had."""
    for part in document.parts:
        if isinstance(part.value, Tensor):
            name = names.new(document.row.meta.get("input", document.row.key), part.codes.tobytes())
            if name is not None:
                yield part.modality, name, part.value


class _Names:
    """File names from keys, which may hold anything: letters, digits, ``._-`` stay; no two are equal, none leaves the folder."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, bytes]] = set()
        self._used: set[str] = set()

    def new(self, key: str, codes: bytes) -> str | None:
        """A name; None where this medium of this input has one already."""
        if (key, codes) in self._seen:
            return None
        self._seen.add((key, codes))
        stem, _, ending = key.rpartition(".")
        stem = re.sub(r"[^\w.-]+", "_", stem if ending.lower() in _ENDINGS else key).strip("._")[:100] or "item"
        name, number = stem, 1
        while name.lower() in self._used:
            number += 1
            name = f"{stem}-{number}"
        self._used.add(name.lower())
        return name
