import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtp.hub import from_pretrained
from mmtp.tokenizers.align import shared_boundaries, shared_tokens
from mmtp.tokenizers.text import TextTokenizer

SMALL = TextTokenizer.train(["what color is the shape?", "a blue circle", "größer als je zuvor", "红色的圆"] * 4, 300)


@pytest.fixture(scope="module")
def large() -> TextTokenizer:
    return from_pretrained("text-bpe-4k")


def starts(pieces: list[bytes]) -> list[int]:
    return np.cumsum([0, *map(len, pieces)])[:-1].tolist()


@given(st.text(max_size=60) | st.sampled_from(["what color is the blue circle?", "größer 红色 🙂 als"]))
def test_shared_boundaries_are_all_places_at_which_both_have_read_the_same(large: TextTokenizer, text: str) -> None:
    a, b = (tokenizer.pieces(tokenizer.encode_text(text)) for tokenizer in (large, SMALL))
    first, second = shared_boundaries(a, b)
    for i, j in zip(first, second, strict=True):
        assert b"".join(a[:i]) == b"".join(b[:j])
    assert sorted(set(starts(a)) & set(starts(b))) == [starts(a)[i] for i in first]
    assert (np.diff(first) > 0).all() and (np.diff(second) > 0).all()
    if text:
        assert (first[0], second[0]) == (0, 0)


@given(st.text(max_size=60))
def test_a_tokenizer_shares_every_boundary_with_itself(text: str) -> None:
    pieces = SMALL.pieces(SMALL.encode_text(text))
    for indices in shared_boundaries(pieces, pieces):
        np.testing.assert_array_equal(indices, np.arange(len(pieces)))


def test_bytes_within_a_letter_are_boundaries_as_well() -> None:
    first, second = shared_boundaries([b"\xc3", b"\xbc", b"x"], [b"\xc3", b"\xbcx"])
    assert (first.tolist(), second.tolist()) == ([0, 1], [0, 1])


def test_another_text_shares_nothing() -> None:
    assert all(len(indices) == 0 for indices in shared_boundaries([b"a", b"B"], [b"a", b"b"]))
    assert all(len(indices) == 0 for indices in shared_boundaries([b"a"], [b"a", b"b"]))


def test_tokens_in_common_have_equal_bytes(large: TextTokenizer) -> None:
    ours, theirs = (ids.tolist() for ids in shared_tokens(large.vocabulary, SMALL.vocabulary))
    assert large.pieces(ours) == SMALL.pieces(theirs)
    assert set(large.pieces(ours)) == large.vocabulary.keys() & SMALL.vocabulary.keys()
    assert ours == sorted(ours) and len(ours) > 256
    assert all(len(ids) == 0 for ids in shared_tokens({b"a": 1}, {b"b": 1}))
