from pathlib import Path

import pytest
from PIL import Image

from mmtp.cli import USER_ERROR, run


@pytest.fixture
def folder(photos: Path, tmp_path: Path, saved: dict[str, str], capsys: pytest.CaptureFixture) -> Path:
    options = ["--tokenizer", saved["image"], "--text", saved["text"], "--task", "draw", "--workers", "1"]
    assert run(["tokenize", str(photos), "--out", str(tmp_path / "tokens"), *options]) == 0
    capsys.readouterr()
    return tmp_path / "tokens"


@pytest.mark.parametrize("what", ["", "shard-00000.arrow"])
def test_streams_become_files(what: str, folder: Path, tmp_path: Path, saved: dict[str, str], capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "files"
    options = ["--limit", "3", "--tokenizer", saved["image"], "--tokenizer", saved["text"]]
    assert run(["decode", str(folder / what), "--out", str(out), *options]) == 0
    assert capsys.readouterr().out == f"{out}: 3 documents, 3 pictures, 0 sounds\n"
    assert sorted(p.name for p in out.iterdir()) == ["0.png", "1.png", "2.png", "contact-sheet.png", "documents.txt"]
    with Image.open(out / "1.png") as picture:
        assert picture.size == (24, 40)
    assert (out / "documents.txt").read_text().split("\n\n")[1] == "# 1.png#0\nuser: draw a red circle\nassistant: <image 5x3>"


def test_unknown_tokenizer_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(["decode", str(folder), "--out", str(tmp_path / "files")]) == USER_ERROR
    assert capsys.readouterr().err == "mmtp: error: tokenizer 'txt' is not in the zoo; name its folder with --tokenizer\n"
