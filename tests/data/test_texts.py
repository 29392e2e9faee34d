import io
import json
import sys
import tarfile
import types

import pytest

from mmtp.data.errors import DataError
from mmtp.data.texts import read_texts
from mmtp.types import Modality


def test_captions_tags_and_questions_of_an_archive(tmp_path):
    labels = {"caption": "a red door", "tags": ["door", "red"], "questions": [["is it open?", "no"]]}
    with tarfile.open(tmp_path / "some.tar", "w") as archive:
        for name, data in (("0.png", b"x"), ("0.json", json.dumps(labels).encode()), ("1.png", b"x")):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    texts = list(read_texts("some.tar", tmp_path, Modality.IMAGE, "draw {caption}"))
    assert texts == ["draw a red door", "door, red", "is it open? no"]


def test_paragraphs_of_a_module(monkeypatch):
    module = types.ModuleType("some_manual")
    module.topics = {"a": "first\n\nsecond", "b": 3}
    module._private = {"c": "no"}
    monkeypatch.setitem(sys.modules, "some_manual", module)
    assert list(read_texts("python:some_manual")) == ["first", "second"]


def test_a_module_that_is_not_there():
    with pytest.raises(DataError, match="python:no_such_manual: no such module"):
        list(read_texts("python:no_such_manual"))
