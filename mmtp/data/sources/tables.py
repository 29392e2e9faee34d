"""Rows of Parquet files, and rows of a Hugging Face data set (extra ``hf``)."""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmtp.data.errors import DataError, DecodeError, Reason
from mmtp.data.media import read_bytes
from mmtp.data.sources.base import Item, Sample, normal_labels, stamp, unique
from mmtp.types import Modality

COLUMNS = {
    Modality.IMAGE: ("image", "img", "jpg", "png", "bytes"),
    Modality.AUDIO: ("audio", "wav", "flac", "mp3", "bytes"),
    Modality.VIDEO: ("video", "mp4", "webm", "gif", "bytes"),
}
"""Columns in which the medium is looked for, in this order: bytes, or the struct of bytes and path that the Hub uses."""

_KEYS = ("key", "__key__", "id")


@dataclass(frozen=True)
class ParquetSource:
    """Rows of Parquet files, in the order of the files' names. Other columns become labels where JSON can hold them.

    Attributes:
        root: folder that the files' names, and paths inside the tables, are relative to.
        files: the tables.
        modality: which column is the medium.
    """

    root: Path
    files: tuple[str, ...]
    modality: Modality

    @property
    def name(self) -> str:
        return str(self.root / (self.files[0] if len(self.files) == 1 else "*.parquet"))

    def items(self) -> list[Item]:
        items = []
        for file in self.files:
            path = self.root / file
            try:
                table = pq.ParquetFile(path)
            except (OSError, pa.ArrowInvalid) as error:
                raise DataError(f"{path}: is no Parquet file, or is cut off; fetch it again ({str(error).splitlines()[0]})") from error
            self._column(table.schema_arrow.names, path)
            key = next((name for name in _KEYS if name in table.schema_arrow.names), None)
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                keys = [str(k) for k in table.read_row_group(group, [key])[key].to_pylist()] if key else None
                for row in range(rows):
                    place = json.dumps({"group": group, "row": row})
                    items.append(Item(keys[row] if keys else f"{file}#{group}.{row}", file, place, *stamp(path)))
        return unique(items)

    def read(self, item: Item) -> Sample:
        path, place = self.root / item.file, json.loads(item.place)
        if stamp(path) != (item.size, item.stamp):
            raise DataError(f"{path}: has changed or gone since the plan was made; choose another --out, or bring the old file back")
        try:
            group = _row_group(path, item.stamp, place["group"])
        except (OSError, pa.ArrowInvalid) as error:
            raise DecodeError(Reason.CORRUPT, f"row group {place['group']} is damaged ({str(error).splitlines()[0]})") from error
        row = {name: group[name][place["row"]].as_py() for name in group.column_names}
        return _sample(item.key, row, self._column(group.column_names, path), self.root)

    def _column(self, names: list[str], path: Path) -> str:
        return _media_column(names, self.modality, str(path))


@dataclass(frozen=True)
class HubSource:
    """A split of a Hugging Face data set.

    Attributes:
        dataset: its name on the Hub, or the path of a loading folder.
        split: which part.
        modality: which column is the medium.
    """

    dataset: str
    split: str
    modality: Modality

    @property
    def name(self) -> str:
        return f"hf:{self.dataset}:{self.split}"

    def items(self) -> list[Item]:
        data = _hub_data(self.dataset, self.split, self.modality)
        version = str(getattr(data, "_fingerprint", ""))
        return [Item(f"{self.split}/{i}", self.name, json.dumps({"row": i}), -1, version) for i in range(len(data))]

    def read(self, item: Item) -> Sample:
        data = _hub_data(self.dataset, self.split, self.modality)
        return _sample(item.key, data[json.loads(item.place)["row"]], _media_column(data.column_names, self.modality, self.name), Path())


@lru_cache(maxsize=2)
def _row_group(path: Path, time: str, group: int) -> pa.Table:
    """One decoded row group: rows are read in order, so that each is decoded about once. ``time`` tells files of one name apart."""
    return pq.ParquetFile(path).read_row_group(group)


@lru_cache(maxsize=1)
def _hub_data(name: str, split: str, modality: Modality) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"hf:{name}: reading from the Hub needs an extra: pip install 'mmtp[hf]'") from error
    try:
        data = datasets.load_dataset(name, split=split)
    except Exception as error:  # the loader raises whatever its builder or the network does
        raise DataError(f"hf:{name}:{split}: cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0]})") from error
    column = _media_column(data.column_names, modality, f"hf:{name}")
    feature = {Modality.IMAGE: "Image", Modality.AUDIO: "Audio", Modality.VIDEO: "Video"}[modality]
    return data.cast_column(column, getattr(datasets, feature)(decode=False))


def _media_column(names: list[str], modality: Modality, where: str) -> str:
    for column in COLUMNS[modality]:
        if column in names:
            return column
    raise DataError(f"{where}: has no {modality} column; one of {', '.join(COLUMNS[modality])} is wanted, the table has {', '.join(names)}")


def _sample(key: str, row: dict[str, Any], column: str, root: Path) -> Sample:
    medium = row.pop(column)
    if isinstance(medium, dict):
        medium = medium.get("bytes") or medium.get("path")
    if isinstance(medium, str):
        medium = read_bytes(root / medium)
    if not isinstance(medium, bytes):
        raise DecodeError(Reason.MISSING, f"column {column!r} is empty")
    return Sample(key, medium, normal_labels({k: v for k, v in row.items() if v is not None and _is_json(v)}))


def _is_json(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_json, value))
    return isinstance(value, str | int | float | bool)
