import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtp.data.encode import TokenizeConfig
from mmtp.data.errors import DataError
from mmtp.data.job import tokenize
from mmtp.data.loader import PackedBatches, ShardDataset, open_rows
from mmtp.data.manifest import MANIFEST, Manifest, ShardRecord
from mmtp.data.plan import Plan
from mmtp.data.shards import ShardBuilder, ShardHead
from mmtp.data.storage import Journal, digest
from mmtp.stream.template import EncodedDocument, SegmentRecord, encode_document
from mmtp.stream.vocab import MediaEntry, Special, TextEntry, VocabLayout, VocabMismatch
from mmtp.types import Modality, Segment

LAYOUT = VocabLayout(TextEntry("t", 300, "aa"), (), 16)


def write_dataset(folder: Path, documents: list[EncodedDocument], layout: VocabLayout, shard_rows: int = 40) -> ShardDataset:
    folder.mkdir(parents=True)
    plan = Plan("documents", pa.table({"key": [str(i) for i in range(len(documents))]}), shard_rows)
    records = []
    for shard in range(plan.num_shards):
        lo, hi = plan.range(shard)
        builder = ShardBuilder(layout)
        for i in range(lo, hi):
            builder.add(str(i), documents[i], {"input": i})
        data = builder.to_bytes(ShardHead(layout, {}, {}, (lo, hi)))
        (folder / f"shard-{shard:05d}.arrow").write_bytes(data)
        records.append(ShardRecord(shard, digest(data), len(data), hi - lo, hi - lo, builder.num_tokens))
        Journal(folder / "journal.jsonl").append(vars(records[-1]))
    Manifest.of(plan, {}, {}, layout).finished(records, b"").write(folder)
    return ShardDataset(folder)


def text_dataset(folder: Path, lengths: list[int], layout: VocabLayout = LAYOUT, shard_rows: int = 40, broken: int = -1) -> ShardDataset:
    """A data set of text documents of given lengths; the first token of each tells which it is."""
    documents = []
    for i, length in enumerate(lengths):
        words = np.full(length - 2, 32 + i % 300)
        tokens = np.array([Special.BOS, *words, Special.EOI if i == broken else Special.EOS])
        documents.append(EncodedDocument(tokens, (SegmentRecord(Modality.TEXT, length, (1,), True),)))
    return write_dataset(folder, documents, layout, shard_rows)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    lengths = np.random.default_rng(0).integers(3, 60, 500).tolist()
    return text_dataset(tmp_path_factory.mktemp("data") / "d", lengths)


def test_random_access(dataset: ShardDataset) -> None:
    assert len(dataset) == 500 == len(dataset.lengths)
    for i in (0, 39, 40, 499, -1):
        row = dataset[i]
        assert row.key == str(i % 500)
        assert (len(row.tokens), int(row.tokens[1])) == (dataset.lengths[i], 32 + i % 500 % 300)
    assert [row.key for row in dataset[10:40:15]] == ["10", "25"]
    assert sum(1 for _ in dataset) == 500
    for i in (500, -501):
        with pytest.raises(IndexError):
            dataset[i]


def test_data_sets_travel_to_worker_processes(dataset: ShardDataset) -> None:
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.fingerprint == dataset.fingerprint
    loader = torch.utils.data.DataLoader(copy, batch_size=4, collate_fn=lambda rows: [row.key for row in rows])
    assert next(iter(loader)) == ["0", "1", "2", "3"]


def test_flipped_bit_stops_reading_with_one_line(tmp_path: Path) -> None:
    dataset = text_dataset(tmp_path / "d", [10] * 100)
    path = tmp_path / "d/shard-00001.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert ShardDataset(tmp_path / "d")[0].key == "0"
    with pytest.raises(DataError, match=r"shard-00001\.arrow: is damaged \(its hash is .{8}…, .{8}… was written\); delete it"):
        ShardDataset(tmp_path / "d")[50]
    with pytest.raises(DataError, match=r"shard-00001\.arrow: is damaged"):
        PackedBatches(ShardDataset(dataset.folder), rows=4, budget=64).batch(0)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no dataset\.json, so it is no data set of mmtp"):
        ShardDataset(tmp_path)
    dataset = text_dataset(tmp_path / "d", [10] * 100)
    assert open_rows(dataset.folder)[0].fingerprint == dataset.fingerprint
    assert len(open_rows(dataset.folder / "shard-00002.arrow")[0]) == 20
    journal = tmp_path / "d/journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-3])
    with pytest.raises(DataError, match=r"2 of 3 shards are there, its journal is damaged; run the same mmtp tokenize again"):
        ShardDataset(tmp_path / "d")


def rows_of(batches: PackedBatches, steps: range) -> list[list[int]]:
    return [row for step in steps for row in batches.documents(step)]


@given(
    rows=st.integers(1, 7),
    budget=st.integers(60, 200),
    window=st.integers(1, 700),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=25, deadline=None)
def test_every_epoch_has_every_document_once(dataset: ShardDataset, rows: int, budget: int, window: int, seed: int) -> None:
    batches = PackedBatches(dataset, rows=rows, budget=budget, window=window, seed=seed)
    stream: list[int] = []
    step = 0
    while len(stream) < 1200:
        for row in batches.documents(step):
            assert sum(dataset.lengths[row]) <= budget
            stream += row
        step += 1
    assert set(Counter(stream[:500]).values()) == {1}
    assert set(Counter(stream[500:1000]).values()) == {1}
    assert stream[:500] != stream[500:1000]
    assert batches.epoch(0) == 0
    assert batches.epoch(step - 1) == 2 or len(stream) - len(batches.documents(step - 1)) < 1001
    # Any step, in any order, from scratch: what a process does that was killed.
    for late in (step - 1, 0, step // 2):
        fresh = PackedBatches(dataset, rows=rows, budget=budget, window=window, seed=seed)
        assert fresh.documents(late) == batches.documents(late)


def test_batches_hold_the_documents_whole(dataset: ShardDataset) -> None:
    batches = PackedBatches(dataset, rows=4, budget=128)
    batch = batches.batch(3)
    assert batch.tokens.shape == (4, 128)
    for r, row in enumerate(batches.documents(3)):
        tokens = np.concatenate([dataset[i].tokens for i in row])
        np.testing.assert_array_equal(batch.tokens[r, : len(tokens)], tokens)
        assert batch.tokens[r, len(tokens) :].eq(Special.PAD).all()
        ids = np.repeat(np.arange(len(row)), dataset.lengths[row])
        np.testing.assert_array_equal(batch.document_ids[r, : len(tokens)], ids)
    assert batch.meta == {"step": 3, "epoch": 0}


def test_processes_share_a_batch(dataset: ShardDataset) -> None:
    whole = PackedBatches(dataset, rows=6, budget=128).batch(5)
    for world in (2, 3, 6):
        parts = [PackedBatches(dataset, rows=6, budget=128, world_size=world, rank=rank).batch(5) for rank in range(world)]
        assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)


def test_stream_is_the_batches_in_order(dataset: ShardDataset) -> None:
    batches = PackedBatches(dataset, rows=3, budget=100)
    stream = batches.stream(start=4)
    found = [next(stream) for _ in range(5)]
    stream.close()
    assert [batch.meta["step"] for batch in found] == [4, 5, 6, 7, 8]
    assert all(torch.equal(batch.tokens, batches.batch(batch.meta["step"]).tokens) for batch in found)


def test_seed_and_data_decide_the_order(dataset: ShardDataset, tmp_path: Path) -> None:
    same = PackedBatches(dataset, rows=4, budget=128, seed=1)
    other = PackedBatches(dataset, rows=4, budget=128, seed=2)
    assert same.documents(0) != other.documents(0)
    assert same.fingerprint != other.fingerprint
    changed = text_dataset(tmp_path / "d", dataset.lengths.tolist()[::-1])
    assert PackedBatches(changed, rows=4, budget=128, seed=1).fingerprint != same.fingerprint


def test_steps_per_epoch(dataset: ShardDataset) -> None:
    batches = PackedBatches(dataset, rows=4, budget=128, window=100)
    assert batches.epoch(batches.steps_per_epoch - 1) == 0
    assert batches.epoch(batches.steps_per_epoch) == 1


def test_data_sets_end_to_end_and_by_weight(dataset: ShardDataset, tmp_path: Path) -> None:
    small = text_dataset(tmp_path / "small", [20] * 50)
    ends = PackedBatches([dataset, small], rows=4, budget=128)
    stream = [i for row in rows_of(ends, range(ends.steps_per_epoch)) for i in row][:550]
    assert Counter(stream) == Counter(range(550))
    mixed = PackedBatches([dataset, small], rows=4, budget=128, weights=[1.0, 1.0])
    stream = [i for row in rows_of(mixed, range(400)) for i in row]
    for epoch in range(4):
        drawn = Counter(i >= 500 for i in stream[550 * epoch : 550 * (epoch + 1)])
        assert drawn == {True: 275, False: 275}
    # The larger one is passed through before any of it comes again.
    assert set(Counter([i for i in stream[: 550 * 3] if i < 500]).values()) == {1, 2}
    counts = Counter(i for i in stream[: 550 * 2] if i >= 500)
    assert set(counts.values()) == {11}
    batch = mixed.batch(0)
    assert batch.tokens.shape == (4, 128)


def test_wrong_requests(dataset: ShardDataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"6 rows over 4 processes \(rank 0\): the number of processes must divide the rows"):
        PackedBatches(dataset, rows=6, budget=128, world_size=4)
    with pytest.raises(DataError, match=r"has 59 tokens, and a row holds 50 \(\d+ documents are too long\); raise the token budget"):
        PackedBatches(dataset, rows=6, budget=50)
    with pytest.raises(DataError, match=r"weights \[1\.0, 2\.0\]: one of at least 0 for each of 1 data sets is wanted"):
        PackedBatches(dataset, rows=6, budget=128, weights=[1.0, 2.0])
    stranger = text_dataset(tmp_path / "d", [10], VocabLayout(TextEntry("t", 300, "bb"), (), 16))
    with pytest.raises(VocabMismatch, match=r"text tokenizer is .*bb.*, but .*aa.* is wanted"):
        PackedBatches([dataset, stranger], rows=6, budget=128)
    with pytest.raises(VocabMismatch, match="has tokenizers or dims that the vocabulary lacks"):
        PackedBatches(dataset, rows=6, budget=128, layout=VocabLayout(LAYOUT.text, (), 15))


def test_data_sets_of_different_media_are_read_by_one_vocabulary(tmp_path: Path) -> None:
    """Sound stands behind pictures in it, so its ids move."""
    media = {name: MediaEntry(Modality(name), name, "", (size,)) for name, size in (("image", 40), ("audio", 30))}
    datasets, said = [], []
    for name, entry in media.items():
        layout = VocabLayout(LAYOUT.text, (entry,), 16)
        grid = (2, 3) if name == "image" else (6,)
        words = Segment(Modality.TEXT, torch.arange(5))
        documents = [encode_document(layout, (words, Segment(entry.modality, torch.full((1, *grid), i)))) for i in range(30)]
        datasets.append(write_dataset(tmp_path / name, documents, layout))
        said.append([[layout.describe(token) for token in document.tokens.tolist()] for document in documents])
    batches = PackedBatches(datasets, rows=4, budget=64)
    joined = VocabLayout(LAYOUT.text, tuple(media.values()), 16)
    assert batches.layout == joined
    seen = 0
    for step in range(2):
        batch = batches.batch(step)
        for row, members in enumerate(batches.documents(step)):
            for number, index in enumerate(members):
                tokens = batch.tokens[row][batch.document_ids[row] == number]
                assert [joined.describe(token) for token in tokens.tolist()] == said[index // 30][index % 30]
                seen += 1
    assert seen > 20
    copy = pickle.loads(pickle.dumps(datasets[1].over(joined)))
    assert copy[3].tokens.tolist() == datasets[1].over(joined)[3].tokens.tolist() != datasets[1][3].tokens.tolist()
    assert copy.fingerprint == datasets[1].fingerprint


def test_a_stream_that_breaks_the_grammar_is_named(tmp_path: Path) -> None:
    dataset = text_dataset(tmp_path / "d", [10] * 90, broken=44)
    batches = PackedBatches(dataset, rows=30, budget=64)
    with pytest.raises(DataError, match=r"shard-00001\.arrow: row 4 \(44\): offset 9: .* expected, found <eoi>; make the data set anew"):
        batches.batch(0)


def test_what_tokenize_writes_is_what_batches_read(pictures: Path, tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    config = TokenizeConfig(tasks=("vqa", "draw"), shard_inputs=7)
    tokenize(pictures, tmp_path / "out", tokenizer=tokenizers["image"], text=tokenizers["text"], config=config)
    dataset = ShardDataset(tmp_path / "out")
    batches = PackedBatches(dataset, rows=4, budget=96)
    targets = sum(int(batches.batch(step).loss_mask.sum()) for step in range(batches.steps_per_epoch))
    assert targets >= sum(int(row.target_mask.sum()) for row in dataset)
    assert (tmp_path / "out" / MANIFEST).exists()
