import sys
import types
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmtp.data.errors import DataError, DecodeError, Reason
from mmtp.data.sources import open_source
from mmtp.data.sources.tables import _hub_data
from mmtp.types import Modality


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [{"image": {"bytes": f"png {i}".encode(), "path": None}, "caption": f"number {i}", "n": i, "when": b"x"} for i in range(7)]
    rows[3]["image"] = None
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=3)
    return tmp_path / "t.parquet"


def test_rows_are_samples(table: Path) -> None:
    source = open_source(table)
    items = source.items()
    assert [item.key for item in items] == [f"t.parquet#{i // 3}.{i % 3}" for i in range(7)]
    assert source.read(items[4]).media == b"png 4"
    assert source.read(items[4]).labels == {"caption": "number 4", "n": 4}
    with pytest.raises(DecodeError, match="column 'image' is empty") as caught:
        source.read(items[3])
    assert caught.value.reason is Reason.MISSING


def test_keys_and_plain_bytes(tmp_path: Path) -> None:
    pq.write_table(pa.table({"jpg": [b"1", b"2"], "__key__": ["a", "b"], "text": ["x", ""]}), tmp_path / "t.parquet")
    source = open_source(tmp_path)
    assert [item.key for item in source.items()] == ["a", "b"]
    assert source.read(source.items()[0]).labels["caption"] == "x"
    assert "caption" not in source.read(source.items()[1]).labels


def test_bad_tables_are_refused(table: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no audio column; one of audio, wav, flac, mp3, bytes is wanted, the table has image"):
        open_source(table, Modality.AUDIO).items()
    source = open_source(table)
    items = source.items()
    table.write_bytes(table.read_bytes()[:-20])
    with pytest.raises(DataError, match="has changed or gone since the plan was made"):
        source.read(items[0])
    with pytest.raises(DataError, match=r"t\.parquet: is no Parquet file, or is cut off; fetch it again"):
        source.items()


def test_the_hub_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    _hub_data.cache_clear()
    with pytest.raises(DataError, match=r"reading from the Hub needs an extra: pip install 'mmtp\[hf\]'"):
        open_source("hf:owner/name:test").items()


class Table:
    """As much of a Hugging Face data set as is used here."""

    column_names = ["image", "caption"]
    _fingerprint = "f00"

    def cast_column(self, column: str, feature: Any) -> "Table":
        assert (column, feature) == ("image", ("Image", False))
        return self

    def __len__(self) -> int:
        return 2

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"image": {"bytes": b"%d" % row, "path": None}, "caption": f"c{row}"}


def test_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    module = types.SimpleNamespace(
        load_dataset=lambda name, split: asked.append((name, split)) or Table(), Image=lambda decode: ("Image", decode)
    )
    monkeypatch.setitem(sys.modules, "datasets", module)
    _hub_data.cache_clear()
    source = open_source("hf:owner/name:test")
    items = source.items()
    assert [(i.key, i.stamp) for i in items] == [("test/0", "f00"), ("test/1", "f00")]
    sample = source.read(items[1])
    assert (sample.media, sample.labels) == (b"1", {"caption": "c1"})
    assert asked == [("owner/name", "test")]
    _hub_data.cache_clear()
