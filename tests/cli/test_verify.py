import re
from pathlib import Path

import pytest

from mmtp.cli import CHECK_FAILED, USER_ERROR, run


def test_sound_then_damaged(photos: Path, tmp_path: Path, saved: dict[str, str], capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "tokens"
    assert run(["tokenize", str(photos), "--out", str(out), "--tokenizer", saved["image"], "--workers", "1"]) == 0
    capsys.readouterr()
    assert run(["verify", str(out)]) == 0
    summary = r": sound: 5 files, [\d,]+ bytes; 6 inputs = 5 ok \+ 1 quarantined \(empty 1\); 5 documents, \d+ tokens\n"
    assert re.fullmatch(re.escape(str(out)) + summary, capsys.readouterr().out)
    path = out / "shard-00000.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert run(["verify", str(out)]) == CHECK_FAILED
    problem, last = capsys.readouterr().out.splitlines()
    assert problem.startswith(f"{path}: is damaged (its hash is ")
    assert problem.endswith("; delete it and run the same mmtp tokenize again: only this shard is made anew")
    assert last.startswith(f"{out}: 1 problem in 5 files, ")


def test_no_data_set(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(["verify", str(tmp_path)]) == USER_ERROR
    assert "has neither dataset.json nor a journal, so it is no data set of mmtp" in capsys.readouterr().err
