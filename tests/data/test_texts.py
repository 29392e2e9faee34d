import io
import json
import sys
import tarfile
import types

import pytest

from mmtp.data.errors import DataError
from mmtp.data.texts import read_texts


@pytest.mark.parametrize("ending", ["png", "flac"])
def test_captions_tags_and_questions_of_an_archive(tmp_path, ending):
    labels = {"caption": "a red door", "tags": ["door", "red"], "questions": [["is it open?", "no"]]}
    with tarfile.open(tmp_path / "some.tar", "w") as archive:
        for name, data in ((f"0.{ending}", b"x"), ("0.json", json.dumps(labels).encode()), (f"1.{ending}", b"x"), ("1.json", b"{")):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    texts = list(read_texts("some.tar", tmp_path, "draw {caption}"))
    assert texts == ["draw a red door", "door, red", "is it open? no"]


def test_an_archive_without_media(tmp_path):
    with tarfile.open(tmp_path / "some.tar", "w") as archive:
        entry = tarfile.TarInfo("0.json")
        entry.size = 2
        archive.addfile(entry, io.BytesIO(b"{}"))
    with pytest.raises(DataError, match=r"some\.tar: holds neither pictures nor sounds"):
        list(read_texts("some.tar", tmp_path))


def test_paragraphs_of_a_module(monkeypatch):
    module = types.ModuleType("some_manual")
    module.topics = {"a": "first\n\nsecond", "b": 3}
    module._private = {"c": "no"}
    monkeypatch.setitem(sys.modules, "some_manual", module)
    assert list(read_texts("python:some_manual")) == ["first", "second"]


def test_a_module_that_is_not_there():
    with pytest.raises(DataError, match="python:no_such_manual: no such module"):
        list(read_texts("python:no_such_manual"))
