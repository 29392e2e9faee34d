"""Texts in parts, and words by turns with their sounds."""

import pytest
import torch

from mmtp.speaking import joined, parts
from mmtp.types import Modality, Segment


@pytest.mark.parametrize(
    ("text", "longest", "expected"),
    [
        ("a b c d", 0, ["a b c d"]),
        ("a  b c", 3, ["a  b c"]),
        ("a b c d", 3, ["a b", "c d"]),
        ("a b c d e", 2, ["a", "b c", "d e"]),
        ("", 2, [""]),
    ],
)
def test_parts_are_as_equal_as_they_come(text, longest, expected):
    assert parts(text, longest) == expected


def test_sounds_are_joined_if_all_are_there():
    one, two = (Segment(Modality.AUDIO, torch.full((2, length), length)) for length in (1, 3))
    whole = joined([one, two])
    assert whole is not None and whole.ids is not None and whole.ids.tolist() == [[1, 3, 3, 3]] * 2
    assert joined([one, None]) is None and joined([]) is None
