import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmtp.data.encode import TokenizeConfig
from mmtp.data.errors import DataError
from mmtp.data.job import tokenize
from mmtp.data.loader import ShardDataset
from mmtp.data.manifest import shard_name
from mmtp.data.storage import Journal, digest
from mmtp.data.teacher_cache import (
    HEAD,
    JOURNAL,
    CacheHead,
    CacheRecord,
    PictureCache,
    WordCache,
    begin,
    cache_folder,
    open_caches,
    pictures,
    to_bytes,
)
from mmtp.stream.grammar import StreamGrammar
from mmtp.testing.fakes import BlockTokenizer
from mmtp.types import Modality


@pytest.fixture
def dataset(tmp_path: Path, block_registered: None) -> ShardDataset:
    """Ten pictures in three shards, some of them alike; three codebooks."""
    (tmp_path / "pictures").mkdir()
    for i in range(10):
        Image.new("RGB", (24, 8 + 8 * (i % 2)), ((i // 4) * 80, 255, 0)).save(tmp_path / "pictures" / f"{i}.png")
    tokenizer = BlockTokenizer(BlockTokenizer.Config())
    tokenize(tmp_path / "pictures", tmp_path / "shards", tokenizer=tokenizer, config=TokenizeConfig(max_dim=8, shard_inputs=4))
    return ShardDataset(tmp_path / "shards")


def made(dataset: ShardDataset, *, name: str = "eye", skip: str = "", changes: dict[str, str] | None = None) -> Path:
    """A cache in which the vectors of a picture are the shades of its cells."""
    folder, grammar = cache_folder(dataset.folder, name), StreamGrammar(dataset.layout)
    head = {"kind": "image", "teacher": name, "fingerprint": "f", "dataset": dataset.fingerprint, "width": 3} | (changes or {})
    begin(folder, CacheHead(**head))
    for number in range(dataset.manifest.shards):
        found = {p.key: p.codes for row in dataset.shard(number) for p in pictures(row.tokens, grammar) if p.key != skip}
        entries = {key: {"features": codes.reshape(3, -1).T.astype(np.float16)} for key, codes in found.items()}
        data = to_bytes(entries, PictureCache.columns(dataset.layout))
        (folder / shard_name(number)).write_bytes(data)
        Journal(folder / JOURNAL).append(asdict(CacheRecord(number, digest(data), len(data), len(entries), 1, 1)))
    return folder


def test_documents_find_what_was_said_of_their_pictures(dataset: ShardDataset) -> None:
    made(dataset)
    cache = PictureCache(dataset, "eye")
    assert sum(record.rows for record in cache.records.values()) < len(dataset)  # pictures alike are kept once
    first = [dataset.layout.code_range(Modality.IMAGE, k)[0] for k in range(3)]
    for index, row in enumerate(dataset):
        offsets, features = cache.features(index)
        rows = 1 + index % 2
        assert features.shape == (3 * rows * 3, 3) and features.dtype == np.float16
        shades = row.tokens[offsets].reshape(-1, 3) - first  # flat pattern: the codebooks of a cell stand side by side
        np.testing.assert_array_equal(features.reshape(-1, 3, 3), np.repeat(shades[:, None], 3, 1))


def test_equal_rows_give_equal_bytes(dataset: ShardDataset) -> None:
    folder = made(dataset)
    before = {path.name: path.read_bytes() for path in folder.glob("*.arrow")}
    made(dataset)
    assert {path.name: path.read_bytes() for path in folder.glob("*.arrow")} == before


def test_what_is_not_of_these_data_is_refused_by_name(dataset: ShardDataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"teachers/eye: no teacher has been asked; run: mmtp teach .*shards --teacher eye"):
        PictureCache(dataset, "eye")
    folder = made(dataset, name="other", changes={"dataset": "0123"})
    with pytest.raises(DataError, match=rf"other: belongs to data with fingerprint 0123, and .* has {dataset.fingerprint}; remove"):
        PictureCache(dataset, "other")
    with pytest.raises(DataError, match="other: belongs to data with fingerprint 0123, now "):
        begin(folder, CacheHead("image", "other", "f", dataset.fingerprint, 3))
    with pytest.raises(DataError, match="other: was made by a teacher with fingerprint f, now g; remove"):
        begin(folder, CacheHead("image", "other", "g", "0123", 3))
    made(dataset)
    with pytest.raises(DataError, match="eye: this teacher was asked about image, and is to teach text; name another"):
        WordCache(dataset, "eye")


def test_a_document_without_an_entry_is_refused(dataset: ShardDataset) -> None:
    (picture,) = pictures(dataset[5].tokens, StreamGrammar(dataset.layout))
    made(dataset, skip=picture.key)
    cache = PictureCache(dataset, "eye")
    assert len(cache.features(0)[0])
    with pytest.raises(DataError, match=r"eye: has no entry for .*shard-00001.arrow: row 1 \(5.png#0\); remove"):
        cache.features(5)


def test_a_changed_data_set_is_refused(dataset: ShardDataset, tmp_path: Path) -> None:
    folder = made(dataset)
    Image.new("RGB", (24, 8), (9, 9, 9)).save(tmp_path / "pictures" / "0.png")
    tokenizer = BlockTokenizer(BlockTokenizer.Config())
    tokenize(tmp_path / "pictures", tmp_path / "new", tokenizer=tokenizer, config=TokenizeConfig(max_dim=8, shard_inputs=4))
    cache_folder(tmp_path / "new", "eye").parent.mkdir()
    folder.rename(cache_folder(tmp_path / "new", "eye"))
    with pytest.raises(DataError, match="new/teachers/eye: belongs to data with fingerprint"):
        PictureCache(ShardDataset(tmp_path / "new"), "eye")


def test_unfinished_and_damaged_caches_are_refused(dataset: ShardDataset) -> None:
    folder = made(dataset)
    path = folder / shard_name(1)
    data = path.read_bytes()
    path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    cache = PictureCache(dataset, "eye")
    with pytest.raises(
        DataError, match=r"shard-00001.arrow: is damaged \(its hash is another than was written\); remove .*shard-00001.arrow and"
    ):
        cache.features(5)
    path.unlink()
    with pytest.raises(DataError, match="eye: 2 of 3 shards are there; run the same mmtp teach again"):
        PictureCache(dataset, "eye")
    head = json.loads((folder / HEAD).read_text())
    (folder / HEAD).write_text(json.dumps(head | {"format": 9}))
    with pytest.raises(DataError, match="teacher.json: has format 9, this mmtp reads 1; update mmtp"):
        PictureCache(dataset, "eye")
    (folder / HEAD).write_text("{")
    with pytest.raises(DataError, match=r"teacher.json: is damaged; remove .*eye and run mmtp teach again"):
        PictureCache(dataset, "eye")


def test_data_sets_must_have_one_teacher(dataset: ShardDataset, tmp_path: Path) -> None:
    made(dataset)
    shutil.copytree(dataset.folder, tmp_path / "copy")
    other = ShardDataset(tmp_path / "copy")
    assert len(open_caches(PictureCache, [dataset, other], "eye")) == 2
    head = json.loads((cache_folder(other.folder, "eye") / HEAD).read_text())
    (cache_folder(other.folder, "eye") / HEAD).write_text(json.dumps(head | {"fingerprint": "g"}))
    with pytest.raises(DataError, match=r"copy/teachers/eye: was made by another teacher, .* \(fingerprints g and f\)"):
        open_caches(PictureCache, [dataset, other], "eye")
