import json

import pytest
import torch

from mmtp.data.encode import TokenizeConfig
from mmtp.data.errors import DataError
from mmtp.data.job import tokenize
from mmtp.data.loader import ShardDataset
from mmtp.data.media import encode_png
from mmtp.data.pairs import PairBatches
from mmtp.testing.fakes import BlockTokenizer
from mmtp.tokenizers.text import TextTokenizer

COLOURS = {"red": (1.0, 0.0, 0.0), "blue": (0.0, 0.0, 1.0), "green": (0.0, 1.0, 0.0)}


@pytest.fixture
def source(tmp_path):
    """Six coloured pictures with a caption, a question whose answer they differ in and one that all answer alike."""
    folder = tmp_path / "source"
    folder.mkdir()
    for i in range(6):
        name, colour = list(COLOURS.items())[i % 3]
        (folder / f"{i}.png").write_bytes(encode_png(torch.tensor(colour)[:, None, None].expand(3, 16, 16)))
        labels = {"caption": f"a {name} square", "questions": [["what shape?", "square"], ["what color?", name]]}
        (folder / f"{i}.json").write_text(json.dumps(labels))
    return folder


def entries(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_rejected_for_others_of_the_same_question(script, source, tmp_path):
    script.main([str(source), str(tmp_path / "out"), "--task", "vqa"])
    chosen, rejected = (entries(tmp_path / "out" / f"{name}.jsonl") for name in ("chosen", "rejected"))
    assert len(chosen) == 6
    for good, bad in zip(chosen, rejected, strict=True):
        assert (good["key"], good["image"]) == (bad["key"], bad["image"])
        ((question, answer),), ((same, other),) = good["questions"], bad["questions"]
        assert question == same == "what color?"
        assert answer != other and other in COLOURS


def test_pictures_are_rejected_for_those_of_other_captions(script, source, tmp_path):
    script.main([str(source), str(tmp_path / "out"), "--task", "draw", "--pictures", "5"])
    chosen, rejected = (entries(tmp_path / "out" / f"{name}.jsonl") for name in ("chosen", "rejected"))
    captions = {entry["image"]: entry["caption"] for entry in chosen}
    assert len(captions) == 5
    for good, bad in zip(chosen, rejected, strict=True):
        assert (good["key"], good["caption"]) == (bad["key"], bad["caption"])
        assert captions[bad["image"]] != good["caption"]


@pytest.mark.usefixtures("block_registered")
@pytest.mark.parametrize("task", ["vqa", "draw"])
def test_manifests_become_data_sets_whose_pairs_share_their_prompts(script, source, tmp_path, task):
    script.main([str(source), str(tmp_path / "out"), "--task", task])
    block, text = BlockTokenizer(BlockTokenizer.Config()), TextTokenizer.train(["what color? red blue green", "draw a square"], 280)
    for name in ("chosen", "rejected"):
        config = TokenizeConfig(tasks=(task,), max_dim=8)
        tokenize(tmp_path / "out" / f"{name}.jsonl", tmp_path / name, tokenizer=block, text=text, config=config)
    batches = PairBatches([ShardDataset(tmp_path / "chosen")], [ShardDataset(tmp_path / "rejected")], pairs=6, budget=128)
    assert len(batches) == 6
    batch = batches.batch(0)
    for pair in range(6):
        good, bad = (batch.rows.tokens[batch.documents == 2 * pair + i] for i in (0, 1))
        assert not torch.equal(good, bad)


def test_pictures_without_labels_are_refused(script, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.png").write_bytes(encode_png(torch.zeros(3, 8, 8)))
    with pytest.raises(DataError, match="gives no pairs for draw"):
        script.main([str(tmp_path / "source"), str(tmp_path / "out"), "--task", "draw"])
