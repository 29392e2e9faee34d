import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture(scope="module")
def prepare(script):
    return script


def picture(path: Path, colour: tuple[int, ...], side: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGBA", (side, side), colour).save(path)


@pytest.fixture
def packages(prepare, tmp_path):
    """Packages that stand there already, so that nothing is downloaded: two emoji in two styles, one drawing."""
    found = prepare.Packages(tmp_path / "packages")
    for name, version in prepare.NPM.items():
        (found.folder / f"{name.replace('/', '-').lstrip('@')}-{version}" / "package").mkdir(parents=True)
    base = found.npm("emojibase-data")
    (base / "meta").mkdir()
    (base / "en").mkdir()
    (base / "meta/groups.json").write_text(json.dumps({"groups": {"0": "smileys"}}))
    (base / "en/messages.json").write_text(json.dumps({"groups": [{"key": "smileys", "message": "smileys"}]}))
    entries = [
        {"hexcode": "2764-FE0F", "label": "red heart", "tags": ["love"], "group": 0},
        {"hexcode": "1F600", "label": "grinning face", "group": 0},
        {"hexcode": "1F1E6", "label": "regional indicator A"},
    ]
    (base / "en/data.json").write_text(json.dumps(entries))
    (found.npm("@lobehub/fluent-emoji-3d") / "assets").mkdir()
    picture(found.npm("emoji-datasource-google") / "img/google/64/2764-fe0f.png", (255, 0, 0, 255))
    picture(found.npm("emoji-datasource-google") / "img/google/64/1f1e6.png", (0, 0, 255, 255))
    picture(found.npm("emoji-datasource-twitter") / "img/twitter/64/2764.png", (255, 0, 0, 255))
    picture(found.npm("emoji-datasource-twitter") / "img/twitter/64/1f600.png", (255, 255, 0, 255))
    picture(found.folder / "openclipart-png/usr/share/openclipart/png/animals/cat.png", (0, 0, 0, 0), 200)
    drawing = found.folder / "openclipart-svg/usr/share/openclipart/svg/animals/cat.svg"
    drawing.parent.mkdir(parents=True)
    drawing.write_text(
        '<svg xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"><cc:Work>'
        "<dc:title> A  cat </dc:title><dc:subject><li>animal</li><li>pet</li><li>animal</li></dc:subject></cc:Work></svg>"
    )
    return found


def test_emoji_of_all_styles_share_a_concept(prepare, packages):
    samples = list(prepare.emoji(packages))
    assert {s.key for s in samples} == {"2764_noto", "2764_twemoji", "1f600_twemoji"}
    assert {s.concept for s in samples} == {"2764", "1f600"}
    assert samples[0].labels["caption"] == "red heart" and samples[0].labels["group"] == "smileys"


def test_a_drawing_stands_on_white_with_the_labels_of_its_metadata(prepare, packages):
    (sample,) = prepare.clipart(packages)
    assert sample.labels == {"caption": "A cat", "tags": ["animal", "pet"], "path": "animals/cat"}
    with Image.open(io.BytesIO(sample.medium)) as shown:
        assert shown.size == (prepare.CLIPART_SIDE,) * 2 and shown.convert("RGB").getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize("data", [b"", b"<svg>", b"<svg/>", b"\xff\xfe"])
def test_a_drawing_without_labels_has_none(prepare, data):
    assert prepare.svg_labels(data) == ("", [])


def test_wide_pictures_are_centred(prepare):
    square = prepare.on_white(Image.new("RGB", (40, 10), "red"), 20)
    assert [square.getpixel((10, y)) for y in (2, 10, 18)] == [(255, 255, 255), (255, 0, 0), (255, 255, 255)]


def test_splits_keep_concepts_together_in_about_the_wanted_shares(prepare):
    splits = [prepare.split_of(f"concept {i}", 10, 20) for i in range(3000)]
    assert splits == [prepare.split_of(f"concept {i}", 10, 20) for i in range(3000)]
    assert 0.08 < splits.count("val") / 3000 < 0.12 and 0.17 < splits.count("test") / 3000 < 0.23


def test_archives_read_as_sources_and_are_equal_every_time(prepare, packages, tmp_path):
    from mmtp.data.sources import open_source

    written = []
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        counts = prepare.write_splits(tmp_path / run, "emoji", prepare.emoji(packages), 0, 0)
        written.append((tmp_path / run / "emoji-train.tar").read_bytes())
    assert counts == {"train": 3} and written[0] == written[1]
    source = open_source(str(tmp_path / "a" / "emoji-train.tar"))
    assert [source.read(item).labels["caption"] for item in source.items()] == ["red heart", "red heart", "grinning face"]


def test_a_set_that_fails_leaves_no_archive(prepare, tmp_path):
    def samples():
        yield prepare.Sample("a", "png", b"x", {}, "a")
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        prepare.write_splits(tmp_path, "emoji", samples(), 5, 5)
    assert list(tmp_path.iterdir()) == []


def test_transcripts_are_read(prepare):
    text = "; remark\nhello: Hello.\nbeep: [a tone]\nnothing:\ndigits/1: one: a number\n"
    assert prepare.prompt_texts(text) == {"hello": "Hello.", "digits/1": "one: a number"}
    assert prepare.festival_texts('( ru_0001 "Слово." )\nnoise\n') == {"ru_0001": "Слово."}


def test_unknown_sets_and_missing_programs_are_one_line(prepare, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", str(tmp_path), "--only", "emojis"])
    with pytest.raises(SystemExit):
        prepare.main()
    assert "no set 'emojis'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no-such-program is not installed"):
        prepare.run(["no-such-program"], tmp_path)
    with pytest.raises(SystemExit, match="false: no message"):
        prepare.run(["false"], tmp_path)


def test_archives_have_plain_members(prepare, tmp_path):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        prepare.add_sample(archive, prepare.Sample("k", "png", b"abc", {"caption": "é"}, "k"))
    data.seek(0)
    with tarfile.open(fileobj=data) as archive:
        assert [(m.name, m.size, m.mtime, m.uid) for m in archive] == [
            ("k.png", 3, 0, 0),
            ("k.json", 17, 0, 0),
        ]
