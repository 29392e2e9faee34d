import pytest

from mmtp.data.errors import DataError, DecodeError
from mmtp.data.labels import captions, check_wording, questions, timed, word

FOX = {"caption": "fox", "style": "noto", "tags": ["animal", "face"], "year": 2016}


def test_wordings_put_labels_together():
    assert word("{caption}, {style} style", FOX) == "fox, noto style"
    assert word("{caption} ({tags}) of {year}", FOX) == "fox (animal, face) of 2016"


def test_a_wording_whose_label_is_missing_or_empty_says_nothing():
    assert word("{caption} in {place}", FOX) is None
    assert captions({**FOX, "tags": []}, ("{caption}", "{caption} ({tags})")) == ["fox"]
    assert captions({}) == []


def test_wordings_that_come_out_alike_count_once():
    assert captions(FOX, ("{caption}", "{style}", "{caption}")) == ["fox", "noto"]


def test_braces_in_labels_are_no_labels():
    assert word("{caption}!", {"caption": "{style}", "style": "x"}) == "{style}!"


@pytest.mark.parametrize("labels", [{"caption": 7}, {"caption": ["a"]}, {"caption": {"a": 1}}])
def test_captions_are_strings(labels):
    with pytest.raises(DecodeError, match="caption: a string is wanted"):
        captions(labels)


@pytest.mark.parametrize("wording", ["", "a fox", "{}", "{caption", "{caption} {a-b}"])
def test_wordings_without_labels_are_refused(wording):
    with pytest.raises(DataError, match="write labels in braces"):
        check_wording(wording)


@pytest.mark.parametrize("found", [7, ["a"], [["a"]], [["a", 1]]])
def test_questions_of_another_form(found):
    with pytest.raises(DecodeError, match=r"questions: a list of \[question, answer\] is wanted"):
        questions({"questions": found})


def test_words_have_their_seconds():
    assert timed({"timed": [["press", 0], ["one", 0.25]]}) == (("press", 0.0), ("one", 0.25))
    assert timed({"text": "press one"}) == ()


@pytest.mark.parametrize(
    "found", [7, ["a"], [["a", "b"]], [["a", 0, 1]], [[0, "a"]], [["a", 0], ["b", float("nan")]], [["a", 0], ["b", float("inf")]]]
)
def test_words_without_seconds_are_refused(found):
    with pytest.raises(DecodeError, match=r"timed: a list of \[words, seconds\] is wanted"):
        timed({"timed": found})


@pytest.mark.parametrize("seconds", [(0.1, 0.2), (0, 0.5, 0.5), (0, 2, 1)])
def test_words_are_in_order(seconds):
    with pytest.raises(DecodeError, match="timed: seconds begin at 0 and go up"):
        timed({"timed": [["a", second] for second in seconds]})
