import json
import os
from pathlib import Path

import pytest

from mmtp.data.errors import DataError, DecodeError, Reason
from mmtp.data.sources import open_source
from mmtp.types import Modality


def reason(source, item) -> tuple[Reason, str]:
    with pytest.raises(DecodeError) as caught:
        source.read(item)
    return caught.value.reason, str(caught.value)


def test_items_are_the_media_below_sorted_by_path(pictures: Path) -> None:
    items = open_source(pictures).items()
    assert [item.key for item in items] == sorted(str(p.relative_to(pictures)) for p in pictures.rglob("*.png"))
    assert items[0].size == (pictures / "a/00.png").stat().st_size


def test_labels_stand_beside(pictures: Path) -> None:
    source = open_source(pictures)
    sample = source.read(source.items()[1])
    assert sample.key == "a/02.png"
    assert sample.media == (pictures / "a/02.png").read_bytes()
    assert sample.labels["caption"] == "a red circle"
    assert sample.labels["questions"] == [["is there a circle?", "yes"], ["what color is the shape?", "red"], ["is there a circle?", "no"]]


def test_missing_changed_and_bad_labels(pictures: Path) -> None:
    source = open_source(pictures)
    items = {item.key: item for item in source.items()}
    assert reason(source, items["b/gone.png"]) == (Reason.MISSING, "no such file")
    (pictures / "a/00.png").write_bytes(b"another")
    assert reason(source, items["a/00.png"]) == (Reason.CHANGED, "the file has changed since the plan was made")
    (pictures / "a/02.png").unlink()
    assert reason(source, items["a/02.png"])[0] is Reason.MISSING
    (pictures / "a/04.json").write_text("{")
    assert reason(source, items["a/04.png"])[0] is Reason.BAD_LABELS
    (pictures / "a/06.json").write_text("[1]")
    assert reason(source, items["a/06.png"]) == (Reason.BAD_LABELS, "06.json: an object is wanted, list given")


def test_only_the_wanted_medium_counts(pictures: Path) -> None:
    (pictures / "tone.WAV").write_bytes(b"RIFF")
    assert [item.key for item in open_source(pictures, Modality.AUDIO).items()] == ["tone.WAV"]


def test_empty_folder_and_no_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no image files \(avif, bmp"):
        open_source(tmp_path)
    with pytest.raises(DataError, match=r"no such file or folder; a source is a folder, \*\.jsonl, "):
        open_source(tmp_path / "nothing")
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match=r"notes.md: cannot be read as a source"):
        open_source(tmp_path / "notes.md")


@pytest.fixture
def manifest(pictures: Path) -> Path:
    lines = [
        {"file_name": "a/00.png", "caption": "one"},
        {"image": "a/02.png", "key": "second", "question": "is it red?", "answer": "yes"},
        {"caption": "names nothing"},
        {"path": "a/99.png", "text": "gone"},
        {"path": "a/00.png"},
        {"path": "a"},
    ]
    path = pictures / "list.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\nno json\n\n")
    return path


def test_manifest(manifest: Path, pictures: Path) -> None:
    source = open_source(manifest)
    items = source.items()
    assert [item.key for item in items] == ["a/00.png", "second", "line 3", "a/99.png", "a/00.png~2", "a", "line 7"]
    assert source.read(items[0]).labels == {"caption": "one"}
    second = source.read(items[1])
    assert second.media == (pictures / "a/02.png").read_bytes()
    assert second.labels["questions"] == [["is it red?", "yes"]]
    found = reason(source, items[2])
    assert found == (Reason.BAD_LABELS, "list.jsonl line 3: names no file; one of file_name, path, image, audio, video is wanted")
    assert reason(source, items[3]) == (Reason.MISSING, "no such file")
    assert reason(source, items[5]) == (Reason.UNREADABLE, "cannot be read (Is a directory)")
    assert reason(source, items[6])[0] is Reason.BAD_LABELS
    assert reason(source, items[6])[1].startswith("list.jsonl line 7: no JSON (")


def test_changed_manifest_is_refused(manifest: Path) -> None:
    source = open_source(manifest)
    items = source.items()
    manifest.write_text(json.dumps({"path": "b/01.png"}) + "\n" + manifest.read_text())
    with pytest.raises((DataError, DecodeError)):
        source.read(items[0])


def test_two_reads_of_a_folder_agree(pictures: Path) -> None:
    assert open_source(pictures).items() == open_source(os.path.relpath(pictures)).items()
