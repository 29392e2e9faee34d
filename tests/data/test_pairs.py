from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from mmtp.data.errors import DataError
from mmtp.data.loader import ShardDataset
from mmtp.data.manifest import Manifest, ShardRecord
from mmtp.data.pairs import PairBatches
from mmtp.data.plan import Plan
from mmtp.data.shards import ShardBuilder, ShardHead
from mmtp.data.storage import Journal, digest
from mmtp.stream.template import Turn, encode_document
from mmtp.stream.vocab import MediaEntry, TextEntry, VocabLayout, VocabMismatch
from mmtp.types import Modality, Segment

LAYOUT = VocabLayout(TextEntry("t", 300, "aa"), (MediaEntry(Modality.IMAGE, "vit"),), 16)


def conversation(layout: VocabLayout, question: list[int], answer: list[int], features: torch.Tensor | None = None):
    """A question with a picture's vectors or without, and an answer, which is the target."""
    picture = () if features is None else (Segment(Modality.IMAGE, features=features, target=False),)
    words = Segment(Modality.TEXT, torch.tensor(question), target=False)
    answered = Segment(Modality.TEXT, torch.tensor(answer))
    return encode_document(layout, (Turn("user", (*picture, words)), Turn("assistant", (answered,))))


def dataset(folder: Path, documents: dict, layout: VocabLayout = LAYOUT) -> ShardDataset:
    """A data set of one shard per three documents, by key."""
    folder.mkdir(parents=True)
    plan = Plan("documents", pa.table({"key": list(documents)}), 3)
    records = []
    for shard in range(plan.num_shards):
        builder = ShardBuilder(layout)
        lo, hi = plan.range(shard)
        for key in list(documents)[lo:hi]:
            builder.add(key, documents[key], {"input": key})
        data = builder.to_bytes(ShardHead(layout, {}, {}, (lo, hi)))
        (folder / f"shard-{shard:05d}.arrow").write_bytes(data)
        records.append(ShardRecord(shard, digest(data), len(data), hi - lo, hi - lo, builder.num_tokens))
        Journal(folder / "journal.jsonl").append(vars(records[-1]))
    Manifest.of(plan, {}, {}, layout).finished(records, b"").write(folder)
    return ShardDataset(folder)


@pytest.fixture
def both(tmp_path: Path) -> tuple[ShardDataset, ShardDataset]:
    """Ten pairs; in another order in the second, which lacks one and has one more."""
    chosen = {f"k{i}": conversation(LAYOUT, [i, i], [100 + i] * (1 + i % 3)) for i in range(11)}
    rejected = {f"k{i}": conversation(LAYOUT, [i, i], [200 + i] * (1 + i % 4)) for i in reversed(range(12)) if i != 10}
    return dataset(tmp_path / "chosen", chosen), dataset(tmp_path / "rejected", rejected)


def test_pairs_by_key_each_once_an_epoch(both: tuple[ShardDataset, ShardDataset]) -> None:
    batches = PairBatches([both[0]], [both[1]], pairs=4, budget=24, seed=1)
    assert len(batches) == 10
    seen = []
    for step in range(5):  # two epochs
        batch = batches.batch(step)
        assert batch.count == 4
        assert batch.documents.unique().tolist() == list(range(-1, 8))
        assert torch.equal(batch.documents == -1, batch.rows.document_ids == -1)
        for pair in range(4):
            good, bad = (batch.rows.tokens[batch.documents == 2 * pair + i].tolist() for i in (0, 1))
            which = good[2] - LAYOUT.text_range[0]
            assert good == conversation(LAYOUT, [which] * 2, [100 + which] * (1 + which % 3)).tokens.tolist()
            assert bad == conversation(LAYOUT, [which] * 2, [200 + which] * (1 + which % 4)).tokens.tolist()
            seen.append(which)
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert (batches.epoch(2), batches.epoch(3)) == (0, 1)


def test_a_batch_depends_on_the_step_alone(both: tuple[ShardDataset, ShardDataset]) -> None:
    one, other = (PairBatches([both[0]], [both[1]], pairs=3, budget=24, seed=5) for _ in range(2))
    one.batch(0)
    assert torch.equal(one.batch(4).rows.tokens, other.batch(4).rows.tokens)
    assert one.fingerprint == other.fingerprint != PairBatches([both[0]], [both[1]], pairs=3, budget=24, seed=6).fingerprint


@pytest.mark.parametrize(
    ("question", "offset"),
    [([1, 2, 4], 4), ([1, 2], 4), ([1, 2, 3, 4], 5)],
)
def test_prompts_that_differ_are_named(tmp_path: Path, question: list[int], offset: int) -> None:
    good = dataset(tmp_path / "good", {"a": conversation(LAYOUT, [1, 2, 3], [9])})
    bad = dataset(tmp_path / "bad", {"a": conversation(LAYOUT, question, [9])})
    words = rf"bad/shard-00000\.arrow: row 0 \(a\): its prompt differs from that of .*good/shard-00000\.arrow: row 0 at offset {offset};"
    with pytest.raises(DataError, match=words):
        PairBatches([good], [bad], pairs=1, budget=64).batch(0)


def test_vectors_that_differ_are_named(tmp_path: Path) -> None:
    vectors = torch.arange(12.0).view(2, 2, 3)
    other = vectors.clone()
    other[1, 0] += 1
    good = dataset(tmp_path / "good", {"a": conversation(LAYOUT, [1], [9], vectors)})
    same = dataset(tmp_path / "same", {"a": conversation(LAYOUT, [1], [8], vectors)})
    bad = dataset(tmp_path / "bad", {"a": conversation(LAYOUT, [1], [8], other)})
    batch = PairBatches([good], [same], pairs=1, budget=64).batch(0)
    assert np.array_equal(batch.rows.features, torch.cat([vectors, vectors]).view(8, 3))
    with pytest.raises(DataError, match="at offset 7;"):  # <bos> <user> <bof> two dims, two vectors
        PairBatches([good], [bad], pairs=1, budget=64).batch(0)


def test_what_does_not_fit_is_refused(tmp_path: Path, both: tuple[ShardDataset, ShardDataset]) -> None:
    strangers = dataset(tmp_path / "strangers", {"x": conversation(LAYOUT, [1], [2])})
    with pytest.raises(DataError, match="no document of one has the key of one of the other"):
        PairBatches([both[0]], [strangers], pairs=1, budget=64)
    with pytest.raises(DataError, match=r"shard-0000\d\.arrow: row \d: has \d+ tokens, and a row holds 9; raise the token budget"):
        PairBatches([both[0]], [both[1]], pairs=1, budget=9)
    with pytest.raises(DataError, match="1 data sets of chosen and 0 of rejected"):
        PairBatches([both[0]], [], pairs=1, budget=64)
    layout = VocabLayout(TextEntry("t", 301, "bb"), (), 16)
    other = dataset(tmp_path / "other", {"k1": conversation(layout, [1], [2])}, layout)
    with pytest.raises(VocabMismatch):
        PairBatches([both[0]], [other], pairs=1, budget=64)
