"""One shard: an Arrow IPC file whose rows are documents.

Columns: ``key``; ``tokens`` (vocabulary ids, uint16 where the vocabulary allows it, else uint32); ``seg_modality``, ``seg_length``,
``seg_shape``, ``seg_target`` (runs of the stream, which cover all tokens); ``meta`` (JSON). The schema's metadata hold the vocabulary,
the tokenizers' fingerprints, the configuration, the range of inputs, and what of it went to quarantine and why. Where the vocabulary has
a continuous tokenizer, there is ``features`` (float16) as well: the vectors of a document's continuous spans, one behind the other, whose
grids are the spans' ``seg_shape``.
Equal contents give equal bytes. pyarrow, Polars, DuckDB and pandas read the files as they are.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float16, Int

from mmtp.data.errors import DataError, Reason
from mmtp.data.storage import digest, readable_json
from mmtp.stream.packing import PackDocument
from mmtp.stream.template import EncodedDocument, SegmentRecord
from mmtp.stream.vocab import Special, VocabLayout
from mmtp.types import Modality

FORMAT = 1
ROWS_PER_BATCH = 512

_MODALITIES = list(Modality)


@dataclass(frozen=True)
class Quarantined:
    """An input that could not be used.

    Attributes:
        key: its name in the plan.
        file: the file it stands in.
        reason: why, as a code.
        detail: why, in words.
    """

    key: str
    file: str
    reason: Reason
    detail: str

    def to_dict(self) -> dict[str, str]:
        return {"key": self.key, "file": self.file, "reason": str(self.reason), "detail": self.detail}


@dataclass(frozen=True)
class ShardHead:
    """What a shard says of itself, besides its rows.

    Attributes:
        layout: the vocabulary.
        tokenizers: name -> fingerprint.
        config: how inputs became documents.
        range: first input, and the one behind the last.
        quarantine: inputs of the range that gave no document.
    """

    layout: VocabLayout
    tokenizers: Mapping[str, str]
    config: Mapping[str, Any]
    range: tuple[int, int]
    quarantine: tuple[Quarantined, ...] = ()

    def to_metadata(self) -> dict[str, str]:
        values = {
            "format": FORMAT,
            "layout": self.layout.to_dict(),
            "layout_hash": self.layout.hash,
            "tokenizers": dict(self.tokenizers),
            "config": dict(self.config),
            "config_hash": config_hash(self.config),
            "range": list(self.range),
            "quarantine": [q.to_dict() for q in self.quarantine],
        }
        return {f"mmtp.{name}": json.dumps(value, sort_keys=True) for name, value in values.items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[bytes, bytes] | None, where: Path) -> "ShardHead":
        """Reads what ``to_metadata`` wrote.

        Raises:
            DataError: this is no shard, or one of a newer mmtp.
        """
        values = {k.decode()[5:]: v for k, v in (metadata or {}).items() if k.startswith(b"mmtp.")}
        if "format" not in values:
            raise DataError(f"{where}: is an Arrow file, but no shard of mmtp")
        if (version := json.loads(values["format"])) != FORMAT:
            raise DataError(f"{where}: has format {version}, this mmtp reads {FORMAT}; update mmtp")
        read = {name: json.loads(value) for name, value in values.items()}
        quarantine = tuple(Quarantined(q["key"], q["file"], Reason(q["reason"]), q["detail"]) for q in read["quarantine"])
        lo, hi = read["range"]
        return cls(VocabLayout.from_dict(read["layout"], f"{where}: layout"), read["tokenizers"], read["config"], (lo, hi), quarantine)


@dataclass(frozen=True)
class Row:
    """A document.

    Attributes:
        key: its name: that of the input, ``#``, and a number.
        tokens: vocabulary ids.
        target_mask: whether training predicts each token.
        meta: what is known of it besides: input, task, size of the medium, caption.
        features: vectors of its continuous spans, in order; None where it has none.
        feature_grids: extent of every such span's grid of vectors.
    """

    key: str
    tokens: Int[np.ndarray, " s"]
    target_mask: Bool[np.ndarray, " s"]
    meta: dict[str, Any]
    features: Float16[np.ndarray, "n d"] | None = None
    feature_grids: Int[np.ndarray, "spans axes"] | None = None

    def packed(self) -> PackDocument:
        """What packing needs of it."""
        features = None if self.features is None else torch.from_numpy(self.features.astype(np.float32))
        return PackDocument(self.tokens, self.target_mask, features, self.feature_grids)


@dataclass
class ShardBuilder:
    """Collects documents and makes the file's bytes."""

    layout: VocabLayout
    rows: list[tuple[str, EncodedDocument, dict[str, Any]]] = field(default_factory=list)

    def add(self, key: str, document: EncodedDocument, meta: dict[str, Any]) -> None:
        self.rows.append((key, document, meta))

    @property
    def num_tokens(self) -> int:
        return sum(len(document.tokens) for _, document, _ in self.rows)

    def to_bytes(self, head: ShardHead) -> bytes:
        """The whole shard as an Arrow IPC file."""
        schema = _schema(self.layout).with_metadata(head.to_metadata())
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, schema) as writer:
            for start in range(0, len(self.rows), ROWS_PER_BATCH):
                writer.write_batch(self._batch(self.rows[start : start + ROWS_PER_BATCH], schema))
        return sink.getvalue().to_pybytes()

    def _batch(self, rows: Sequence[tuple[str, EncodedDocument, dict[str, Any]]], schema: pa.Schema) -> pa.RecordBatch:
        documents = [document for _, document, _ in rows]
        records: list[SegmentRecord] = [record for document in documents for record in document.segments]
        runs = _offsets(len(document.segments) for document in documents)
        shapes = _lists(_offsets(len(r.shape) for r in records), np.array([n for r in records for n in r.shape]), pa.uint32())
        columns = {
            "key": pa.array([key for key, _, _ in rows], pa.string()),
            "tokens": _lists(
                _offsets(len(d.tokens) for d in documents),
                np.concatenate([d.tokens for d in documents]),
                schema.field("tokens").type.value_type,
            ),
            "seg_modality": _lists(runs, np.array([r.modality.index for r in records]), pa.uint8()),
            "seg_length": _lists(runs, np.array([r.length for r in records]), pa.uint32()),
            "seg_shape": pa.ListArray.from_arrays(pa.array(runs, pa.int32()), shapes),
            "seg_target": _lists(runs, np.array([r.target for r in records]), pa.bool_()),
            "meta": pa.array([readable_json(meta) for _, _, meta in rows], pa.string()),
        }
        if "features" in schema.names:
            vectors = [np.zeros(0, np.float16) if d.features is None else d.features.numpy().astype(np.float16).ravel() for d in documents]
            offsets = np.cumsum([0, *map(len, vectors)], dtype=np.int64)
            columns["features"] = pa.LargeListArray.from_arrays(offsets, pa.array(np.concatenate(vectors), pa.float16()))
        return pa.RecordBatch.from_arrays(list(columns.values()), schema=schema)


class _Batch:
    """A record batch as numpy views, so that a row costs a few slices."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        batch.validate(full=True)  # an offset beyond its buffer would crash where it is used
        tokens, runs = batch.column("tokens"), batch.column("seg_length")
        self.batch = batch
        self.tokens, self.token_offsets = tokens.values.to_numpy(), tokens.offsets.to_numpy()
        self.lengths, self.run_offsets = runs.values.to_numpy(), runs.offsets.to_numpy()
        self.targets = batch.column("seg_target").values.to_numpy(zero_copy_only=False)
        features = batch.column("features") if "features" in batch.schema.names else None
        self.features = None if features is None else (features.values.to_numpy(), features.offsets.to_numpy())
        if not np.array_equal(batch.column("seg_target").offsets.to_numpy(), self.run_offsets):
            raise ValueError("columns of segments differ in length")


class Shard:
    """Random access to a shard through a memory map. Opening reads the head and the lengths, nothing else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._sound():
            self._file = pa.ipc.open_file(pa.memory_map(str(path)))
            self.head = ShardHead.from_metadata(self._file.schema.metadata, path)
            self._batches = [self._file.get_batch(i) for i in range(self._file.num_record_batches)]
        self._views: dict[int, _Batch] = {}
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    @cached_property
    def lengths(self) -> Int[np.ndarray, " n"]:
        """Tokens of every document."""
        parts = [np.diff(batch.column("tokens").offsets.to_numpy()) for batch in self._batches]
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)

    @cached_property
    def keys(self) -> list[str]:
        """Names of every document."""
        with self._sound():
            return [key for batch in self._batches for key in batch.column("key").to_pylist()]

    def __getitem__(self, index: int) -> Row:
        """The document of a row.

        Raises:
            DataError: the file is damaged.
        """
        view, row = self._at(index)
        tokens = view.tokens[view.token_offsets[row] : view.token_offsets[row + 1]].astype(np.int64)
        runs = slice(view.run_offsets[row], view.run_offsets[row + 1])
        mask = np.repeat(view.targets[runs], view.lengths[runs])
        if len(mask) != len(tokens):
            raise damaged(self.path, f"row {index}: its segments have {len(mask)} tokens, it has {len(tokens)}")
        places = int((tokens == Special.FEATURE).sum())
        grids = self._feature_grids(tokens, index) if places else None
        features = self._features(view, index, row, places, 0 if grids is None else int(grids.prod(1).sum()))
        with self._sound():
            key, meta = view.batch.column("key")[row].as_py(), json.loads(view.batch.column("meta")[row].as_py())
            return Row(key, tokens, mask, meta, features, grids)

    def segments(self, index: int) -> list[SegmentRecord]:
        """The runs of a row's stream."""
        view, row = self._at(index)
        columns = (view.batch.column(f"seg_{name}")[row].as_py() for name in ("modality", "length", "shape", "target"))
        return [SegmentRecord(_MODALITIES[m], n, tuple(shape), t) for m, n, shape, t in zip(*columns, strict=True)]

    def _feature_grids(self, tokens: np.ndarray, index: int) -> Int[np.ndarray, "spans axes"]:
        """Grids of the vectors of a row's continuous spans."""
        records = self.segments(index)
        starts = np.cumsum([0, *(record.length for record in records)])
        return np.array([r.shape for r, start in zip(records, starts, strict=False) if tokens[start] == Special.FEATURE], dtype=np.int64)

    def _features(self, view: _Batch, index: int, row: int, places: int, count: int) -> Float16[np.ndarray, "n d"] | None:
        """The vectors of a row, as many as its continuous spans hold."""
        values, offsets = view.features or (np.zeros(0, np.float16), np.zeros(row + 2, np.int64))
        found = values[offsets[row] : offsets[row + 1]]
        if bool(count) != bool(len(found)) or (count and len(found) % count):
            raise damaged(self.path, f"row {index}: it has {places} <feature> tokens, and {len(found)} numbers for them")
        return found.reshape(count, -1) if count else None

    def _at(self, index: int) -> tuple[_Batch, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: row {index} of {len(self)}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        if number not in self._views:
            with self._sound():
                self._views[number] = _Batch(self._batches[number])
        return self._views[number], index - int(self._starts[number])

    @contextmanager
    def _sound(self) -> Iterator[None]:
        """What Arrow and the readers of the head raise, as one error that says what to do."""
        try:
            yield
        except DataError:
            raise
        except FileNotFoundError as error:
            raise DataError(f"{self.path}: no such shard; run the same mmtp tokenize again to make it anew") from error
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
            raise damaged(self.path, (str(error) or type(error).__name__).splitlines()[0]) from error


def damaged(path: Path, what: str) -> DataError:
    """The error of a shard that is not as it was written."""
    return DataError(f"{path}: is damaged ({what}); delete it and run the same mmtp tokenize again: only this shard is made anew")


def check_hash(path: Path, wanted: str) -> None:
    """Compares a file with the hash that was noted when it was written.

    Raises:
        DataError: it differs.
    """
    try:
        found = digest(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); run the same mmtp tokenize again to make it anew") from error
    if found != wanted:
        raise damaged(path, f"its hash is {found[:8]}…, {wanted[:8]}… was written")


def config_hash(config: Mapping[str, Any]) -> str:
    """Hash of plain values, whatever the order of their keys."""
    return digest(json.dumps(dict(config), sort_keys=True).encode())[:16]


def token_type(layout: VocabLayout) -> pa.DataType:
    """The narrowest type that holds every id of a vocabulary."""
    return pa.uint16() if layout.size <= 2**16 else pa.uint32()


def _schema(layout: VocabLayout) -> pa.Schema:
    return pa.schema(
        [
            ("key", pa.string()),
            ("tokens", pa.list_(token_type(layout))),
            ("seg_modality", pa.list_(pa.uint8())),
            ("seg_length", pa.list_(pa.uint32())),
            ("seg_shape", pa.list_(pa.list_(pa.uint32()))),
            ("seg_target", pa.list_(pa.bool_())),
            ("meta", pa.string()),
            *([("features", pa.large_list(pa.float16()))] if any(entry.continuous for entry in layout.media) else []),
        ]
    )


def _offsets(lengths: Iterable[int]) -> np.ndarray:
    return np.cumsum([0, *lengths]).astype(np.int32)


def _lists(offsets: np.ndarray, values: np.ndarray, kind: pa.DataType) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, kind))
