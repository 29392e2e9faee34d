"""What frozen teachers say of a data set, computed once and kept beside it.

``DATASET/teachers/NAME/`` holds ``teacher.json`` (which teacher, of which data), one Arrow IPC file for each shard of the data set, and a
journal. Rows are what a teacher was asked about, each once per shard: a picture by a digest of its codes, the words of a document by a
digest of its stream without media. So documents that share a picture or a question share a row, and a document finds its own by what it is.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from jaxtyping import Float16, Int, Integer, UInt

from mmtp.data.errors import DataError
from mmtp.data.loader import ShardDataset
from mmtp.data.manifest import shard_name
from mmtp.data.storage import Journal, digest, write_durable
from mmtp.stream.analysis import Span
from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.vocab import VocabLayout
from mmtp.stream.words import is_text, skeleton
from mmtp.types import Modality

FOLDER, HEAD, JOURNAL = "teachers", "teacher.json", "journal.jsonl"
FORMAT = 1
ROWS_PER_BATCH = 512

Entry = Mapping[str, np.ndarray]
"""A row: its columns, flat."""

C = TypeVar("C", bound="TeacherCache")


@dataclass(frozen=True)
class CacheHead:
    """The contents of teacher.json.

    Attributes:
        kind: ``image`` or ``text``: what the teacher was asked about.
        teacher: its name.
        fingerprint: of its weights, and of how it was asked.
        dataset: fingerprint of the data set.
        width: channels of its features, or tokens that are kept of a distribution.
    """

    kind: str
    teacher: str
    fingerprint: str
    dataset: str
    width: int

    def to_bytes(self) -> bytes:
        return (json.dumps({"format": FORMAT, **asdict(self)}, indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def read(cls, folder: Path) -> "CacheHead":
        """Reads what ``to_bytes`` wrote.

        Raises:
            DataError: there is none, or it is damaged.
        """
        path = folder / HEAD
        try:
            values = json.loads(path.read_bytes())
            if (version := values.pop("format")) != FORMAT:
                raise DataError(f"{path}: has format {version}, this mmtp reads {FORMAT}; update mmtp")
            return cls(**values)
        except FileNotFoundError as error:
            dataset = folder.parent.parent
            raise DataError(f"{folder}: no teacher has been asked; run: mmtp teach {dataset} --teacher {folder.name}") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path}: is damaged; {_again(folder)}") from error


@dataclass(frozen=True)
class CacheRecord:
    """A finished file, as the journal notes it.

    Attributes:
        shard: its number.
        xxh3: hash of the file.
        bytes: size of the file.
        rows: what the teacher was asked about.
        answers: positions that it has said something of.
        positions: positions that there were.
        sums: of every channel of features, over all of them.
        squares: sums of their squares.
    """

    shard: int
    xxh3: str
    bytes: int
    rows: int
    answers: int
    positions: int
    sums: list[float] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)


class Picture(NamedTuple):
    """A picture of a document: its digest, its span and its codes."""

    key: str
    span: Span
    codes: Int[np.ndarray, "k h w"]


def pictures(tokens: Integer[np.ndarray, " s"], grammar: StreamGrammar) -> list[Picture]:
    """The pictures of a document that are written in codes, in order."""
    found = []
    for span in grammar.spans(tokens):
        if span.modality is Modality.IMAGE and not span.continuous:
            codes = grammar.codes(tokens, span)
            found.append(Picture(digest(json.dumps(codes.shape).encode() + codes.astype("<i8").tobytes()), span, codes))
    return found


def words(tokens: Integer[np.ndarray, " s"], layout: VocabLayout) -> tuple[str, Int[np.ndarray, " n"]]:
    """Digest of the words of a document, and the document without its media."""
    found = skeleton(tokens, layout)
    return digest(found.astype("<i8").tobytes()), found


def to_bytes(entries: Mapping[str, Entry], columns: Mapping[str, pa.DataType]) -> bytes:
    """Rows as an Arrow IPC file; equal rows give equal bytes."""
    schema = pa.schema([("key", pa.string()), *((name, pa.large_list(kind)) for name, kind in columns.items())])
    keys = list(entries)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        for start in range(0, len(keys), ROWS_PER_BATCH):
            part = keys[start : start + ROWS_PER_BATCH]
            arrays: list[pa.Array] = [pa.array(part, pa.string())]
            for name, kind in columns.items():
                values = [entries[key][name].ravel() for key in part]
                offsets = np.cumsum([0, *map(len, values)], dtype=np.int64)
                arrays.append(pa.LargeListArray.from_arrays(offsets, pa.array(np.concatenate(values), kind)))
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
    return sink.getvalue().to_pybytes()


class _File:
    """The rows of one file by their keys, through a memory map."""

    def __init__(self, path: Path, record: CacheRecord, folder: Path) -> None:
        try:
            if digest(path.read_bytes()) != record.xxh3:
                raise DataError(f"{path}: is damaged (its hash is another than was written); {_again(path)}")
            batches = pa.ipc.open_file(pa.memory_map(str(path)))
            self._batches = [batches.get_batch(i) for i in range(batches.num_record_batches)]
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: cannot be read ({error}); {_again(folder)}") from error
        places = ((b, row, key) for b, batch in enumerate(self._batches) for row, key in enumerate(batch.column("key").to_pylist()))
        self._places = {key: (b, row) for b, row, key in places}

    def get(self, key: str) -> dict[str, np.ndarray] | None:
        if key not in self._places:
            return None
        b, row = self._places[key]
        columns = {name: self._batches[b].column(name) for name in self._batches[b].schema.names if name != "key"}
        out = {}
        for name, column in columns.items():
            lo, hi = column.offsets[row].as_py(), column.offsets[row + 1].as_py()
            out[name] = column.values.slice(lo, hi - lo).to_numpy()
        return out


class TeacherCache(ABC):
    """What a teacher says of the documents of a data set.

    Args:
        dataset: that it was asked about.
        teacher: its name.

    Raises:
        DataError: it was not asked, not about all, about other data, or about something else.
    """

    kind: ClassVar[str]

    def __init__(self, dataset: ShardDataset, teacher: str) -> None:
        self.dataset, self.folder = dataset, cache_folder(dataset.folder, teacher)
        self.head = CacheHead.read(self.folder)
        if self.head.kind != self.kind:
            raise DataError(f"{self.folder}: this teacher was asked about {self.head.kind}, and is to teach {self.kind}; name another")
        if self.head.dataset != dataset.fingerprint:
            raise DataError(
                f"{self.folder}: belongs to data with fingerprint {self.head.dataset}, and {dataset.folder} has {dataset.fingerprint}; "
                f"{_again(self.folder)}"
            )
        self.records = read_records(self.folder)
        if len(self.records) < dataset.manifest.shards:
            raise DataError(
                f"{self.folder}: {len(self.records)} of {dataset.manifest.shards} shards are there; run the same mmtp teach again"
            )
        self._files: dict[int, _File] = {}

    def entry(self, index: int, key: str) -> dict[str, np.ndarray]:
        """The row of what a document holds.

        Raises:
            DataError: there is none: names the document.
        """
        number, _ = self.dataset.locate(index)
        if number not in self._files:
            record = self.records[number]
            self._files[number] = _File(self.folder / shard_name(number), record, self.folder)
        found = self._files[number].get(key)
        if found is None:
            raise DataError(
                f"{self.folder}: has no entry for {self.dataset.where(index)} ({self.dataset[index].key}); {_again(self.folder)}"
            )
        return found

    @staticmethod
    @abstractmethod
    def columns(layout: VocabLayout) -> dict[str, pa.DataType]:
        """Columns of its files, besides the key."""


class PictureCache(TeacherCache):
    """Features of a visual teacher: one vector for each cell of a picture's grid of codes."""

    kind = "image"

    @staticmethod
    def columns(layout: VocabLayout) -> dict[str, pa.DataType]:
        return {"features": pa.float16()}

    def features(self, index: int) -> tuple[Int[np.ndarray, " n"], Float16[np.ndarray, "n c"]]:
        """Offsets of all codes of a document's pictures, and what the teacher sees in the cell of each."""
        tokens = self.dataset[index].tokens
        found = self._grammar.analyse(tokens)
        offsets, vectors = [np.zeros(0, np.int64)], [np.zeros((0, self.head.width), np.float16)]
        for key, span, _ in pictures(tokens, self._grammar):
            cells = self.entry(index, key)["features"].reshape(-1, self.head.width)
            rows, columns = found.coordinates[span.body, 1:].T
            offsets.append(np.arange(span.body_start, span.end - 1))
            vectors.append(cells[rows * span.grid[1] + columns])
        return np.concatenate(offsets), np.concatenate(vectors)

    @cached_property
    def _grammar(self) -> StreamGrammar:
        return StreamGrammar(self.dataset.layout)


class Distributions(NamedTuple):
    """What a language teacher expects at some text tokens.

    Attributes:
        offsets: of these tokens in the document.
        ids: local ids of the text tokenizer, those that the teacher finds most probable among the tokens that both vocabularies have.
        log_probs: theirs. What is left of the distribution belongs to all other tokens.
    """

    offsets: Int[np.ndarray, " m"]
    ids: UInt[np.ndarray, "m k"]
    log_probs: Float16[np.ndarray, "m k"]


class WordCache(TeacherCache):
    """Next-token distributions of a language teacher, where a token of its own begins with one of the text tokenizer's."""

    kind = "text"

    @staticmethod
    def columns(layout: VocabLayout) -> dict[str, pa.DataType]:
        assert layout.text is not None
        return {"places": pa.uint32(), "ids": pa.uint16() if layout.text.size <= 2**16 else pa.uint32(), "log_probs": pa.float16()}

    def distributions(self, index: int) -> Distributions:
        """What the teacher expects at the text tokens of a document."""
        tokens = self.dataset[index].tokens
        found = self.entry(index, words(tokens, self.dataset.layout)[0])
        offsets = np.flatnonzero(is_text(tokens, self.dataset.layout))[found["places"]]
        ids, log_probs = (found[name].reshape(len(offsets), self.head.width) for name in ("ids", "log_probs"))
        return Distributions(offsets, ids, log_probs)


def open_caches(kind: type[C], datasets: Sequence[ShardDataset], teacher: str) -> list[C]:
    """One teacher's caches of several data sets.

    Raises:
        DataError: one is missing, unfinished or of other data, or they were made by different teachers.
    """
    caches = [kind(dataset, teacher) for dataset in datasets]
    for cache in caches[1:]:
        if cache.head.fingerprint != caches[0].head.fingerprint:
            raise DataError(
                f"{cache.folder}: was made by another teacher, or asked otherwise, than {caches[0].folder} (fingerprints "
                f"{cache.head.fingerprint} and {caches[0].head.fingerprint}); {_again(cache.folder)}"
            )
    return caches


def cache_folder(dataset: Path, teacher: str) -> Path:
    """Where what a teacher says of a data set is kept."""
    return dataset / FOLDER / teacher


def begin(folder: Path, head: CacheHead) -> dict[int, CacheRecord]:
    """Begins a cache, or goes on with one; gives the shards that are there.

    Raises:
        DataError: the folder holds what another teacher said, or what was said of other data.
    """
    if (folder / HEAD).exists():
        old = CacheHead.read(folder)
        for name, what in (("dataset", "belongs to data with fingerprint"), ("fingerprint", "was made by a teacher with fingerprint")):
            if getattr(old, name) != getattr(head, name):
                raise DataError(f"{folder}: {what} {getattr(old, name)}, now {getattr(head, name)}; {_again(folder)}")
    folder.mkdir(parents=True, exist_ok=True)
    write_durable(folder / HEAD, head.to_bytes())
    Journal(folder / JOURNAL).repair()
    return read_records(folder)


def read_records(folder: Path) -> dict[int, CacheRecord]:
    """Finished files by number of the shard, where they stand there at full length."""
    records = (CacheRecord(**entry) for entry in Journal(folder / JOURNAL).read()[0])
    return {record.shard: record for record in records if _is_there(folder / shard_name(record.shard), record)}


def _is_there(path: Path, record: CacheRecord) -> bool:
    return path.is_file() and path.stat().st_size == record.bytes


def _again(path: Path) -> str:
    return f"remove {path} and run mmtp teach again"
