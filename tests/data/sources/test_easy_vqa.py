from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtp.data.errors import DataError
from mmtp.data.media import decode_image, to_uint8
from mmtp.data.sources import open_source
from mmtp.data.sources.easy_vqa import COLOURS, SHAPES, determine
from mmtp.types import Modality

RGB = {
    "black": (0, 0, 0), "blue": (0, 0, 255), "brown": (165, 42, 42), "gray": (128, 128, 128),
    "green": (0, 255, 0), "red": (255, 0, 0), "teal": (0, 128, 128), "yellow": (255, 255, 0),
}  # fmt: skip


@pytest.mark.parametrize(("split", "pictures", "questions"), [("train", 4000, 38575), ("test", 1000, 9673)])
def test_whole_split(split: str, pictures: int, questions: int) -> None:
    source = open_source(f"easy-vqa:{split}")
    items = source.items()
    assert len(items) == pictures
    samples = [source.read(item) for item in items]
    assert sum(len(s.labels["questions"]) for s in samples) == questions
    captions = Counter(s.labels.get("caption") for s in samples)
    assert set(captions) - {None} == {f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES}
    assert captions[None] == {"train": 422, "test": 112}[split]


def test_colours_that_questions_tell_are_those_of_the_pictures() -> None:
    source = open_source("easy-vqa:test")
    checked = 0
    for item in source.items()[::12]:
        sample = source.read(item)
        if colour := sample.labels.get("color"):
            pixels = to_uint8(decode_image(sample.media)).reshape(-1, 3)
            common = [tuple(map(int, c)) for c, _ in Counter(map(tuple, pixels)).most_common(2)]
            assert RGB[colour] in common
            checked += 1
    assert checked > 60


@pytest.mark.parametrize(
    ("questions", "colour", "shape"),
    [
        ([["what color is the circle?", "blue"]], "blue", "circle"),
        ([["what is the red shape?", "triangle"]], "red", "triangle"),
        ([["is there a teal shape?", "yes"], ["is no circle present?", "no"]], "teal", "circle"),
        ([["does the image not contain a circle?", "yes"], ["is a triangle present?", "no"]], None, "rectangle"),
        ([["is there a red shape?", "no"]], None, None),
        ([["is there a red shape?", "yes"], ["is there not a red shape?", "yes"]], None, None),
        ([["what color is the shape?", "red"], ["what color is the shape?", "blue"]], None, None),
        ([], None, None),
    ],
)
def test_determine(questions: list[list[str]], colour: str | None, shape: str | None) -> None:
    assert determine(questions, COLOURS) == colour
    assert determine(questions, SHAPES) == shape


@given(st.sampled_from(COLOURS), st.data())
@settings(max_examples=50, deadline=None)
def test_true_answers_never_mislead(colour: str, data: st.DataObject) -> None:
    asked = data.draw(st.lists(st.tuples(st.sampled_from(COLOURS), st.booleans()), max_size=12))
    questions = [[f"is there {'not ' * negated}a {c} shape?", "yes" if (c == colour) != negated else "no"] for c, negated in asked]
    found = determine(questions, COLOURS)
    known = colour in {c for c, _ in asked} or len({c for c, _ in asked} - {colour}) == len(COLOURS) - 1
    assert found == (colour if known else None)


def test_wrong_split_and_modality() -> None:
    with pytest.raises(DataError, match="easy-vqa has no split 'val'; it has train and test"):
        open_source("easy-vqa:val")
    with pytest.raises(DataError, match="easy-vqa holds pictures, no audio"):
        open_source("easy-vqa", Modality.AUDIO)


def test_items_do_not_depend_on_the_file_system() -> None:
    items = open_source("easy-vqa").items()
    assert [item.key for item in items[:3]] == ["train/0", "train/1", "train/2"]
    assert {item.stamp for item in items} == {"1.0"}
    assert np.all(np.array([item.size for item in items]) > 0)
