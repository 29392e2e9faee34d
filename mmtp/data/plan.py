"""The frozen plan of a run: every input, and which range of them each shard holds."""

import json
import os
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from mmtp.data.errors import DataError
from mmtp.data.sources import Item, Source
from mmtp.data.storage import digest

MIN_INPUTS, MAX_INPUTS, TYPICAL_SHARDS = 256, 65536, 64

_FIELDS = {field.name: pa.int64() if field.type is int else pa.string() for field in fields(Item)}
_FIELDS["file"] = pa.binary()  # names of files are bytes, and need not be UTF-8


@dataclass(frozen=True)
class Plan:
    """Inputs in order, cut into ranges of equal length (the last may be shorter).

    Attributes:
        source: name of the source.
        inputs: table of :class:`~mmtp.data.sources.Item`.
        shard_inputs: inputs per shard.
    """

    source: str
    inputs: pa.Table
    shard_inputs: int

    @classmethod
    def of(cls, source: Source, shard_inputs: int | None = None) -> "Plan":
        """The plan of a source.

        Args:
            source: it is indexed here, and not read.
            shard_inputs: inputs per shard; by default so many that there are about 64 shards of 256 to 65,536 inputs.

        Raises:
            DataError: the source is empty.
        """
        items = source.items()
        if not items:
            raise DataError(f"{source.name}: holds no inputs")
        if shard_inputs is None:
            shard_inputs = min(max(-(-len(items) // TYPICAL_SHARDS), MIN_INPUTS), MAX_INPUTS)
        columns = {name: pa.array([_stored(getattr(item, name), kind) for item in items], kind) for name, kind in _FIELDS.items()}
        return cls(source.name, pa.table(columns), shard_inputs)

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """Reads what ``to_bytes`` wrote.

        Raises:
            DataError: the file is missing or damaged.
        """
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            head = json.loads(table.schema.metadata[b"mmtp.plan"])
            return cls(head["source"], table.replace_schema_metadata(), head["shard_inputs"])
        except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: is missing or damaged; run the same mmtp tokenize again to make it anew") from error

    def to_bytes(self) -> bytes:
        """An Arrow IPC file; the same bytes for the same plan."""
        head = json.dumps({"shard_inputs": self.shard_inputs, "source": self.source}, sort_keys=True)
        table = self.inputs.replace_schema_metadata({"mmtp.plan": head})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=MAX_INPUTS)
        return sink.getvalue().to_pybytes()

    @cached_property
    def hash(self) -> str:
        return digest(self.to_bytes())

    def __len__(self) -> int:
        return self.inputs.num_rows

    @property
    def num_shards(self) -> int:
        return -(-len(self) // self.shard_inputs)

    def range(self, shard: int) -> tuple[int, int]:
        """First input of a shard, and the one behind its last."""
        return shard * self.shard_inputs, min((shard + 1) * self.shard_inputs, len(self))

    def items(self, shard: int) -> list[Item]:
        """The inputs of a shard."""
        lo, hi = self.range(shard)
        return _items(self.inputs.slice(lo, hi - lo))

    def difference(self, other: "Plan") -> str:
        """In words, the first thing in which ``other`` (the newer plan) differs."""
        if self.source != other.source:
            return f"the source was {self.source} and is {other.source}"
        if self.shard_inputs != other.shard_inputs:
            return f"shards held {self.shard_inputs} inputs and are to hold {other.shard_inputs}"
        for row, (old, new) in enumerate(zip(_items(self.inputs), _items(other.inputs), strict=False)):
            if old != new:
                if old.key != new.key:
                    return f"input {row} was {old.key!r} and is {new.key!r}"
                return f"input {old.key!r} has changed ({_changes(old, new)})"
        return f"there were {len(self)} inputs and are {len(other)}"


def _stored(value: Any, kind: pa.DataType) -> Any:
    if kind == pa.binary():
        return os.fsencode(value)
    return value.encode("utf-8", "backslashreplace").decode() if kind == pa.string() else value


def _items(table: pa.Table) -> list[Item]:
    return [Item(**(row | {"file": os.fsdecode(row["file"])})) for row in table.to_pylist()]


def _changes(old: Item, new: Item) -> str:
    changed = [name for name in _FIELDS if getattr(old, name) != getattr(new, name)]
    return ", ".join(f"{name} was {getattr(old, name)}, is {getattr(new, name)}" for name in changed)
