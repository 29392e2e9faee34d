import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmtp.cli import USER_ERROR, run
from mmtp.data.video import decode_video, encode_video
from mmtp.hub import save_pretrained
from mmtp.tokenizers.video.conv import ConvVideoTokenizer


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
    assert capsys.readouterr().out == f"{out}: 3 documents, 3 pictures, 0 videos, 0 sounds\n"
    assert sorted(p.name for p in out.iterdir()) == ["0.png", "1.png", "2.png", "contact-sheet.png", "documents.txt"]
    with Image.open(out / "1.png") as picture:
        assert picture.size == (24, 40)
    assert (out / "documents.txt").read_text().split("\n\n")[1] == "# 1.png#0\nuser: draw a red circle\nassistant: <image 5x3>"


def test_unknown_tokenizer_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(["decode", str(folder), "--out", str(tmp_path / "files")]) == USER_ERROR
    assert capsys.readouterr().err == "mmtp: error: tokenizer 'txt' is not in the zoo; name its folder with --tokenizer\n"


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """A film, an animation and a picture in a tar, and a file that is no film."""
    root = tmp_path / "films"
    root.mkdir()
    frames = torch.rand(3, 6, 10, 12)
    (root / "a.mp4").write_bytes(encode_video(frames, 25))
    (root / "b.gif").write_bytes(encode_video(frames[:, :3], 10, "gif"))
    (root / "c.mp4").write_text("this is no film")
    Image.new("RGB", (12, 10), "red").save(root / "d.webp")
    with tarfile.open(tmp_path / "films.tar", "w") as archive:
        for path in sorted(root.iterdir()):
            archive.add(path, path.name)
    return root


@pytest.mark.parametrize("packed", [False, True])
def test_videos_become_streams_and_videos(packed: bool, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("av")
    config = ConvVideoTokenizer.Config(patch=2, widths=(4, 4), time_strides=(2,), encoder_blocks=(0, 0), decoder_blocks=(0, 0))
    tokenizer = str(save_pretrained(config.build(), tmp_path / "vid"))
    source, tokens, out = str(films) + (".tar" if packed else ""), str(tmp_path / "tokens"), tmp_path / "files"
    assert run(["tokenize", source, "--out", tokens, "--tokenizer", tokenizer, "--workers", "1"]) == 0
    assert "3 ok, 1 quarantined (not-media 1)" in capsys.readouterr().out
    assert run(["decode", tokens, "--out", str(out), "--tokenizer", tokenizer]) == 0
    assert capsys.readouterr().out == f"{out}: 3 documents, 0 pictures, 3 videos, 0 sounds\n"
    videos = {name: decode_video((out / f"{name}.mp4").read_bytes()) for name in "abd"}
    assert {name: (tuple(v.frames.shape), v.frame_rate) for name, v in videos.items()} == {
        "a": ((3, 6, 10, 12), pytest.approx(25)),
        "b": ((3, 3, 10, 12), pytest.approx(10)),
        "d": ((3, 1, 10, 12), pytest.approx(10)),
    }
    words = (out / "documents.txt").read_text()
    assert "<video 4x3x3>" in words and "<video 2x3x3>" in words and "<video 1x3x3>" in words
    assert run(["eval", "tokenizer", tokenizer, "--data", source, "--json", str(tmp_path / "figures.json")]) == 0
    assert '"videos": 3.0' in (tmp_path / "figures.json").read_text()
    assert run(["decode", tokens, "--out", str(out), "--tokenizer", tokenizer, "--video", "gif", "--limit", "1"]) == 0
    assert decode_video((out / "a.gif").read_bytes()).frames.shape == (3, 6, 10, 12)
