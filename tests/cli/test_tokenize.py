import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mmtp.cli import USER_ERROR, run
from mmtp.cli.tokenize import parse_size
from mmtp.data.loader import ShardDataset
from mmtp.types import MmtpError


def test_a_folder_becomes_a_data_set(photos: Path, tmp_path: Path, saved: dict[str, str], capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    command = ["tokenize", str(photos), "--tokenizer", saved["image"], "--text", saved["text"], "--out", str(out), "--workers", "1"]
    command += ["--task", "plain", "--task", "draw", "--size", "16x32"]
    assert run(command) == 0
    line = capsys.readouterr().out
    summary = r": 5 ok, 1 quarantined \(empty 1\); 10 documents, (\d+) tokens, ([\d,]+) bytes, \d+\.\d s\n"
    assert re.fullmatch(re.escape(str(out)) + summary, line)
    dataset = ShardDataset(out)
    assert dataset.manifest.config["size"] == [32, 16]
    assert {row.meta["task"] for row in dataset} == {"plain", "draw"}
    assert run(command) == 0
    assert ": 5 ok, 1 quarantined (empty 1); 10 documents, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source": "nowhere"}, "nowhere: no such file or folder; a source is a folder, *.jsonl, *.tar, *.parquet, hf:OWNER/NAME[:SPLIT]"),
        ({"--tokenizer": "image-fsq-f9"}, "image-fsq-f9: no such path or zoo entry"),
        ({"--size": "big"}, "--size big: write 64, or WIDTHxHEIGHT as in 96x64"),
        ({"--task": "draw"}, "tasks draw write words: name a text tokenizer (--text text-bpe-4k)"),
        ({"--shard-index": "3"}, "shard index 3 of 1: it must be from 0 to 0"),
        ({"--workers": "0"}, "workers: at least 1 is wanted, 0 given"),
    ],
)
def test_wrong_requests_are_one_line(
    change: dict[str, str], words: str, photos: Path, tmp_path: Path, saved: dict[str, str], capsys: pytest.CaptureFixture
) -> None:
    options = {"source": str(photos), "--tokenizer": saved["image"], "--out": str(tmp_path / "out"), "--workers": "1"} | change
    source = options.pop("source")
    assert run(["tokenize", source, *(word for option in options.items() for word in option)]) == USER_ERROR
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_sizes() -> None:
    assert parse_size("64") == (64, 64)
    assert parse_size("96x64") == (64, 96)
    for text in ("", "x", "64x", "64x64x3", "-4", "6.5"):
        with pytest.raises(MmtpError):
            parse_size(text)


def test_sounds_of_every_width_rate_and_number_of_channels(
    tmp_path: Path, recordings: dict[str, str], capsys: pytest.CaptureFixture
) -> None:
    folder, out = tmp_path / "wav", tmp_path / "out"
    folder.mkdir()
    lengths = {}
    for channels in range(1, 9):
        subtype = ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE")[channels % 6]
        for rate in (8000, 11_025, 44_100):
            tone = 0.4 * np.sin(np.arange(rate // 10) * 2 * np.pi * 300 / rate)
            name = f"{channels}-{rate}.wav"
            soundfile.write(folder / name, np.repeat(tone[:, None], channels, 1), rate, subtype=subtype)
            lengths[name] = -(-(rate // 10) * 8000 // rate)
    sounds = {"silence": [0.0] * 700, "one": [1.0], "nan": [0.0, np.nan], "infinite": [np.inf], "none": []}
    for name, sound in sounds.items():
        soundfile.write(folder / f"{name}.wav", np.asarray(sound), 8000, subtype="DOUBLE")
    lengths |= {"silence.wav": 700, "one.wav": 1}
    command = ["tokenize", str(folder), "--tokenizer", recordings["tokenizer"], "--out", str(out), "--workers", "1"]
    assert run(command) == 0
    assert ": 26 ok, 3 quarantined (empty 1, not-finite 2)" in capsys.readouterr().out
    assert {row.meta["input"]: row.meta["size"] for row in ShardDataset(out)} == {name: [length] for name, length in lengths.items()}
    quarantined = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert {entry["key"] for entry in quarantined} == {"nan.wav", "infinite.wav", "none.wav"}
    assert run(["decode", str(out), "--out", str(tmp_path / "back"), "--tokenizer", recordings["tokenizer"]]) == 0
    for name, length in lengths.items():
        assert soundfile.info(tmp_path / "back" / name).frames == length
