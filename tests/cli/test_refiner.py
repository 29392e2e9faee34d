import re
from pathlib import Path

import pytest
import torch

from mmtp import hub
from mmtp.cli import USER_ERROR, refiner, run
from mmtp.data.loader import ShardDataset
from mmtp.models.unified import UnifiedModel
from tests.models.common import BACKBONE


@pytest.fixture
def shards(photos: Path, tmp_path: Path, saved: dict[str, str], capsys: pytest.CaptureFixture) -> Path:
    out = tmp_path / "tokens"
    command = ["tokenize", str(photos), "--out", str(out), "--tokenizer", saved["image"], "--text", saved["text"], "--workers", "1"]
    assert run([*command, "--task", "caption", "--task", "draw"]) == 0
    capsys.readouterr()
    return out


def test_a_refiner_is_kept_with_the_model(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net, folder = UnifiedModel.Config(layout=ShardDataset(shards).layout, backbone=BACKBONE).build().eval(), tmp_path / "model"
    hub.save_pretrained(net, folder)
    decode = ["bench", "decode", str(folder), "--data", str(shards), "--prompts", "1", "--repeats", "1", "--temperature", "1"]
    assert run([*decode, "--drafts", "refined"]) == USER_ERROR
    assert "drafts by a refiner: the model has none; make one with mmtp refiner" in capsys.readouterr().err
    make = ["refiner", str(folder), "--data", str(shards), "--prompts", "1", "--turns", "2", "--steps", "3", "--hidden", "8"]
    assert run([*make, "--guidance", "1", "--guidance", "2", "--temperature", "1"]) == 0
    said = capsys.readouterr().out
    assert len(re.findall(r"turn \d: [\d,]+ rounds of \d+ prompts, [\d.]+ tokens per pass", said)) == 2
    both = r"(?:text|image) 0\.\d+, (?:text|image) 0\.\d+"
    assert len(re.findall(rf"turn \d: drafts overlap with the model, where they have learnt: {both}\n", said)) == 2
    assert re.search(r"model/refiner\.safetensors: [\d,]+ parameters, [\d,]+ bytes", said)
    made = hub.from_pretrained(folder).refiner
    assert made.outward.shape == (BACKBONE.width, 8) and made.outward.any()
    assert made.media == {"text", "image"}
    monkeypatch.setattr(refiner, "EVERY", 2)
    assert run(["2" if word == "1" else word for word in make] + ["--go-on", "--task", "draw"]) == 0
    assert re.search(r"where they have learnt: .*image 0\.\d+.*; where they have not: .*image 0\.\d+", capsys.readouterr().out)
    again = hub.from_pretrained(folder).refiner
    assert again.outward.shape == made.outward.shape and not torch.equal(again.outward, made.outward)
    assert run([*decode, "--drafts", "refined"]) == 0 and run(decode) == 0
    assert "carried" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("nothing", "is no folder of a saved model, and a refiner is kept in one"),
        ("tokenizer", "is no model but a tokenizer, which drafts nothing"),
        ("none", "--prompts, --turns, --steps and --hidden: at least 1"),
        ("new", "has no refiner to go on with; leave out --go-on"),
        ("task", "--task say: the data has caption, draw"),
    ],
)
def test_wrong_requests_are_one_line(
    shards: Path, tmp_path: Path, saved: dict[str, str], kind: str, words: str, capsys: pytest.CaptureFixture
) -> None:
    fitting = hub.save_pretrained(UnifiedModel.Config(layout=ShardDataset(shards).layout, backbone=BACKBONE).build(), tmp_path / "fitting")
    folders = {"nothing": tmp_path, "tokenizer": Path(saved["image"])}
    flags = {"none": ["--turns", "0"], "new": ["--go-on"], "task": ["--task", "draw", "--task", "say"]}
    assert run(["refiner", str(folders.get(kind, fitting)), "--data", str(shards), *flags.get(kind, [])]) == USER_ERROR
    error = capsys.readouterr().err
    assert re.search(words, error) and error.splitlines()[-1].startswith("mmtp: error: ")
