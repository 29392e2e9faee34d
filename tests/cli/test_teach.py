import re
from pathlib import Path

import pytest

from mmtp.cli import USER_ERROR, run


@pytest.fixture
def shards(photos: Path, tmp_path: Path, saved: dict[str, str], capsys: pytest.CaptureFixture) -> Path:
    out = tmp_path / "tokens"
    command = ["tokenize", str(photos), "--out", str(out), "--tokenizer", saved["image"], "--text", saved["text"], "--workers", "1"]
    assert run([*command, "--task", "draw"]) == 0
    capsys.readouterr()
    return out


def test_a_teacher_is_asked_once(shards: Path, saved: dict[str, str], capsys: pytest.CaptureFixture) -> None:
    command = ["teach", str(shards), "--teacher", f"tokenizer:{saved['image']}", "--tokenizer", saved["image"], "--size"]
    assert run([*command, "0"]) == 0
    line = r"teachers/img: 5 asked about, 75 of 75 positions answered, [\d,]+ bytes, \d+\.\d s\n"
    assert re.search(line, capsys.readouterr().out)
    written = {path: path.stat().st_mtime_ns for path in (shards / "teachers" / "img").glob("*.arrow")}
    assert run([*command, "0"]) == 0
    assert re.search(line, capsys.readouterr().out)
    assert {path: path.stat().st_mtime_ns for path in written} == written and len(written) == 1
    assert run(["verify", str(shards)]) == 0
    assert run([*command, "16"]) == USER_ERROR
    assert "teachers/img: was made by a teacher with fingerprint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ("smollm3", "network 'smollm3' is none of 'efficientnet-lite0', 'efficientnet-lite2' and 'timm:NAME'; of language, 'smollm2' and"),
        ("tokenizer:nowhere", "nowhere: no such path or zoo entry"),
        ("transformers:nowhere", "teacher 'transformers:nowhere': cannot be loaded as a causal language model of transformers"),
    ],
)
def test_wrong_requests_are_one_line(shards: Path, saved: dict[str, str], teacher: str, words: str, capsys: pytest.CaptureFixture) -> None:
    names = ["--tokenizer", saved["image"], "--tokenizer", saved["text"]]
    assert run(["teach", str(shards), "--teacher", teacher, *names]) == USER_ERROR
    error = capsys.readouterr().err
    assert words in error and error.splitlines()[-1].startswith("mmtp: error: ")
