from pathlib import Path

import pytest

from mmtp.cli import USER_ERROR, run


@pytest.fixture
def folder(photos: Path, tmp_path: Path, saved: dict[str, str], capsys: pytest.CaptureFixture) -> Path:
    options = ["--tokenizer", saved["image"], "--text", saved["text"], "--task", "draw", "--workers", "1", "--size", "16"]
    assert run(["tokenize", str(photos), "--out", str(tmp_path / "tokens"), *options]) == 0
    capsys.readouterr()
    return tmp_path / "tokens"


def shown(what: str, capsys: pytest.CaptureFixture, *options: str) -> str:
    assert run(["inspect", what, *options]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_a_data_set(folder: Path, saved: dict[str, str], capsys: pytest.CaptureFixture) -> None:
    text = shown(str(folder), capsys, "--row", "2", "--tokenizer", saved["text"])
    for words in (
        "inputs 6 = 5 ok + 1 quarantined empty 1",
        "tasks ['draw']",
        "32 to 311 text txt",
        "image codebook 0 img",
        "documents 5 tokens",
        "2.png#0:",
        "0 <bos> 1 <user> 2-",
        "x text: 'draw a red circle'",
        "yes <boi>",
        "yes <dim 2>",
        "yes 4 x image code",
        "yes <eos>",
    ):
        assert words in text, text


def test_a_shard_and_a_row_that_is_not_there(folder: Path, capsys: pytest.CaptureFixture) -> None:
    text = shown(str(folder / "shard-00000.arrow"), capsys)
    assert "inputs 0 to 5, 1 quarantined" in text
    assert "0.png#0" in text
    assert run(["inspect", str(folder), "--row", "5"]) == USER_ERROR
    assert capsys.readouterr().err == "mmtp: error: row 5: there are documents 0 to 4\n"


def test_a_saved_tokenizer(saved: dict[str, str], capsys: pytest.CaptureFixture) -> None:
    text = shown(saved["image"], capsys)
    assert "type image-conv" in text
    assert "parameters all" in text
    assert "encoder" in text


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(["inspect", str(tmp_path)]) == USER_ERROR
    assert capsys.readouterr().err == f"mmtp: error: {tmp_path}: has no dataset.json, so it is no data set of mmtp\n"
    assert run(["inspect", "image-fsq-nothing"]) == USER_ERROR
    assert "image-fsq-nothing: no such path or zoo entry" in capsys.readouterr().err
