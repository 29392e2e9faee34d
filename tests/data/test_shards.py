from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtp.data.errors import DataError, Reason
from mmtp.data.shards import Quarantined, Shard, ShardBuilder, ShardHead, check_hash, config_hash, token_type
from mmtp.data.storage import digest
from mmtp.stream.template import EncodedDocument, SegmentRecord, encode_document
from mmtp.stream.vocab import MediaEntry, TextEntry, VocabLayout
from mmtp.types import Modality, Segment

LAYOUT = VocabLayout(TextEntry("t", 300, "aa"), (MediaEntry(Modality.IMAGE, "i", "bb", (625,)),), 16)
HEAD = ShardHead(LAYOUT, {"t": "aa", "i": "bb"}, {"tasks": ["plain"]}, (4, 9), (Quarantined("k", "f", Reason.EMPTY, "nothing"),))


def document(rng: np.random.Generator) -> EncodedDocument:
    records = [
        SegmentRecord(Modality.TEXT, int(rng.integers(1, 9)), (3,), bool(rng.integers(2))),
        SegmentRecord(Modality.IMAGE, 6, (2, 3), bool(rng.integers(2))),
        SegmentRecord(Modality.TEXT, int(rng.integers(1, 9)), (1,), True),
    ]
    return EncodedDocument(rng.integers(0, LAYOUT.size, sum(r.length for r in records)), tuple(records))


def build(count: int, layout: VocabLayout = LAYOUT, seed: int = 0) -> tuple[list[EncodedDocument], bytes]:
    rng = np.random.default_rng(seed)
    documents = [document(rng) for _ in range(count)]
    builder = ShardBuilder(layout)
    for i, each in enumerate(documents):
        builder.add(f"k{i}#0", each, {"input": f"k{i}", "caption": "größe \udce9"})
    return documents, builder.to_bytes(HEAD)


THIRTY = build(30)[1]


@pytest.mark.parametrize("count", [0, 1, 512, 1300])
def test_round_trip(tmp_path: Path, count: int) -> None:
    documents, data = build(count)
    (tmp_path / "s.arrow").write_bytes(data)
    shard = Shard(tmp_path / "s.arrow")
    assert shard.head == HEAD
    assert len(shard) == count
    np.testing.assert_array_equal(shard.lengths, [len(d.tokens) for d in documents])
    for i in {0, count // 2, count - 1} & set(range(count)):
        row = shard[i]
        assert (row.key, row.meta) == (f"k{i}#0", {"input": f"k{i}", "caption": "größe \udce9"})
        np.testing.assert_array_equal(row.tokens, documents[i].tokens)
        np.testing.assert_array_equal(row.target_mask, documents[i].target_mask)
        assert shard.segments(i) == list(documents[i].segments)
    with pytest.raises(IndexError):
        shard[count]


def test_equal_contents_give_equal_bytes() -> None:
    assert build(700)[1] == build(700)[1]
    assert build(700)[1] != build(700, seed=1)[1]


def test_wide_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    assert token_type(LAYOUT) == pa.uint16()
    wide = VocabLayout(LAYOUT.text, (MediaEntry(Modality.IMAGE, "i", "bb", (2**17,)),), 16)
    assert token_type(wide) == pa.uint32()
    builder = ShardBuilder(wide)
    builder.add("k", EncodedDocument(np.array([1, 100_000]), (SegmentRecord(Modality.TEXT, 2, (2,), True),)), {})
    (tmp_path / "s.arrow").write_bytes(builder.to_bytes(ShardHead(wide, {}, {}, (0, 1))))
    np.testing.assert_array_equal(Shard(tmp_path / "s.arrow")[0].tokens, [1, 100_000])


def test_other_tools_read_it(tmp_path: Path) -> None:
    documents, data = build(20)
    (tmp_path / "s.arrow").write_bytes(data)
    table = pa.ipc.open_file(tmp_path / "s.arrow").read_all()
    assert table.column_names == ["key", "tokens", "seg_modality", "seg_length", "seg_shape", "seg_target", "meta"]
    assert table["tokens"][7].as_py() == documents[7].tokens.tolist()
    assert table.schema.metadata[b"mmtp.layout_hash"] == f'"{LAYOUT.hash}"'.encode()


@given(seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_damage_is_an_error_never_a_crash(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = bytearray(THIRTY)
    for _ in range(rng.integers(1, 4)):
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path = tmp_path_factory.mktemp("shard") / "s.arrow"
    path.write_bytes(data if rng.integers(3) else data[: rng.integers(len(data))])
    found = None
    try:
        for row in Shard(path):
            assert row.tokens.shape == row.target_mask.shape
    except DataError as error:
        found = str(error)
    assert found is None or str(path) in found  # bits that break no structure are the business of hashes


def test_hash_finds_a_flipped_bit(tmp_path: Path) -> None:
    _, data = build(10)
    path = tmp_path / "shard-00003.arrow"
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 4
    path.write_bytes(data)
    check_hash(path, digest(data))
    path.write_bytes(flipped)
    with pytest.raises(DataError) as caught:
        check_hash(path, digest(data))
    what = f"its hash is {digest(bytes(flipped))[:8]}…, {digest(data)[:8]}… was written"
    assert str(caught.value) == f"{path}: is damaged ({what}); delete it and run the same mmtp tokenize again: only this shard is made anew"


def test_strangers_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "s.arrow"
    with pytest.raises(DataError, match=r"s\.arrow: no such shard"):
        Shard(path)
    path.write_bytes(b"no arrow")
    with pytest.raises(DataError, match=r"s\.arrow: is damaged"):
        Shard(path)
    with pa.ipc.new_file(path, pa.schema([("a", pa.int8())])):
        pass
    with pytest.raises(DataError, match=r"s\.arrow: is an Arrow file, but no shard of mmtp"):
        Shard(path)
    newer = pa.ipc.open_file(build(1)[1]).schema.with_metadata({"mmtp.format": "2"})
    with pa.ipc.new_file(path, newer):
        pass
    with pytest.raises(DataError, match=r"s\.arrow: has format 2, this mmtp reads 1; update mmtp"):
        Shard(path)


def test_config_hash_ignores_the_order_of_keys() -> None:
    assert config_hash({"a": 1, "b": [2]}) == config_hash({"b": [2], "a": 1}) != config_hash({"a": 1, "b": [3]})


def test_features_come_back_in_half_precision(tmp_path):
    layout = VocabLayout(TextEntry("t", 300, "aa"), (MediaEntry(Modality.IMAGE, "vit", "bb"),), 16)
    segments = [Segment(Modality.IMAGE, features=torch.randn(h, w, 5).half()) for h, w in ((2, 3), (1, 1))]
    documents = [encode_document(layout, pieces) for pieces in (segments, [], segments[1:])]
    builder = ShardBuilder(layout)
    for i, each in enumerate(documents):
        builder.add(f"k{i}#0", each, {})
    (tmp_path / "f.arrow").write_bytes(builder.to_bytes(HEAD))
    shard = Shard(tmp_path / "f.arrow")
    for row, each in zip(shard, documents, strict=True):
        assert np.array_equal(row.tokens, each.tokens)
        assert row.features is None if each.features is None else np.array_equal(row.features, each.features.numpy())
    assert [None if row.features is None else row.features.shape for row in shard] == [(7, 5), None, (1, 5)]


def test_features_that_do_not_fit_their_places_are_damage(tmp_path):
    layout = VocabLayout(None, (MediaEntry(Modality.IMAGE, "vit", "bb"),), 16)
    document = encode_document(layout, [Segment(Modality.IMAGE, features=torch.zeros(1, 3, 4).half())])
    builder = ShardBuilder(layout)
    builder.add("k#0", replace(document, features=torch.zeros(2, 5).half()), {})
    (tmp_path / "f.arrow").write_bytes(builder.to_bytes(HEAD))
    with pytest.raises(DataError, match="row 0: it has 3 <feature> tokens, and 10 numbers for them"):
        Shard(tmp_path / "f.arrow")[0]
