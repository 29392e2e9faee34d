import re
from pathlib import Path

import numpy as np
import pytest
import torch

from mmtp import hub
from mmtp.cli import USER_ERROR, run
from mmtp.data.loader import ShardDataset
from mmtp.models.unified import UnifiedModel
from tests.models.common import BACKBONE, model


@pytest.fixture
def shards(photos: Path, tmp_path: Path, saved: dict[str, str], capsys: pytest.CaptureFixture) -> Path:
    out = tmp_path / "tokens"
    command = ["tokenize", str(photos), "--out", str(out), "--tokenizer", saved["image"], "--text", saved["text"], "--workers", "1"]
    assert run([*command, "--task", "caption"]) == 0
    capsys.readouterr()
    return out


def test_counts_are_kept_with_the_model(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    layout, folder = ShardDataset(shards).layout, tmp_path / "model"
    torch.manual_seed(0)
    net = UnifiedModel.Config(layout=layout, backbone=BACKBONE).build().eval()
    hub.save_pretrained(net, folder)
    assert hub.from_pretrained(folder).ngrams is None
    assert run(["bench", "decode", str(folder), "--data", str(shards), "--prompts", "1", "--drafts", "ngrams"]) == USER_ERROR
    assert "drafts by n-grams: the model has none" in capsys.readouterr().err
    assert run(["ngrams", str(folder), "--data", str(shards), "--order", "4"]) == 0
    assert re.search(r"model/ngrams\.safetensors: [\d,]+ contexts, [\d,]+ n-grams, [\d,]+ bytes", capsys.readouterr().out)
    again = hub.from_pretrained(folder)
    assert again.ngrams.order == 4
    tokens = next(iter(ShardDataset(shards))).tokens
    words = tokens[-5:]  # the last of the caption
    followers, probabilities = again.ngrams.predict(words[:-2].tolist())
    assert followers[probabilities.argmax()] == words[-2] and probabilities.max() == pytest.approx(1.0)
    decode = ["bench", "decode", str(folder), "--data", str(shards), "--prompts", "1", "--repeats", "1", "--temperature", "1"]
    assert all(run([*decode, *way]) == 0 for way in ([], ["--drafts", "ngrams"]))
    # Weights that are saved in its place do not keep them; the model does.
    copy = hub.save_pretrained(again, tmp_path / "copy")
    assert np.array_equal(hub.from_pretrained(copy).ngrams.counts, again.ngrams.counts)
    assert hub.from_pretrained(hub.save_pretrained(net, copy)).ngrams is None


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("nothing", "is no folder of a saved model, and counts are kept in one"),
        ("tokenizer", "is no model but a tokenizer, which drafts nothing"),
        ("other", "but 'words' .* is wanted, as in the vocabulary"),
        ("order", "order 1: at least 2 is wanted"),
    ],
)
def test_wrong_requests_are_one_line(
    shards: Path, tmp_path: Path, saved: dict[str, str], kind: str, words: str, capsys: pytest.CaptureFixture
) -> None:
    fitting = UnifiedModel.Config(layout=ShardDataset(shards).layout, backbone=BACKBONE).build()
    folders = {
        "nothing": tmp_path,
        "tokenizer": Path(saved["image"]),
        "other": hub.save_pretrained(model(depth=0), tmp_path / "other"),
        "order": hub.save_pretrained(fitting, tmp_path / "fitting"),
    }
    assert run(["ngrams", str(folders[kind]), "--data", str(shards), "--order", "1"]) == USER_ERROR
    error = capsys.readouterr().err
    assert re.search(words, error) and error.splitlines()[-1].startswith("mmtp: error: ")
