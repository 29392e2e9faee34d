"""Counts of text: beside a count by hand, over any documents, and through a file."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmtp.stream.ngrams import NGramError, NGrams
from mmtp.stream.template import Turn, encode_document
from mmtp.stream.vocab import Special, TextEntry, VocabLayout, VocabMismatch
from mmtp.types import Modality, Segment
from tests.models.common import LAYOUT, document

FIRST = LAYOUT.text_range[0]


def texts(*words: list[int]) -> list[np.ndarray]:
    """Documents outside of turns."""
    return [np.array([Special.BOS, *(FIRST + word for word in each), Special.EOS]) for each in words]


def predicted(counted: NGrams, context: Sequence[int]) -> dict[int, float]:
    tokens, probabilities = counted.predict(context)
    return dict(zip(tokens.tolist(), probabilities.tolist(), strict=True))


def test_shorter_contexts_have_the_weight_of_witten_and_bell() -> None:
    counted = NGrams.count(texts([1, 2, 3], [1, 2, 4], [5, 2, 4], [6, 2, 4]), LAYOUT, order=3)
    # After 2: 3 once and 4 three times. After 1 2: each once, two different ones, so half of it is the shorter context's.
    assert predicted(counted, [FIRST + 9, FIRST + 2]) == pytest.approx({FIRST + 3: 1 / 4, FIRST + 4: 3 / 4})
    assert predicted(counted, [FIRST + 1, FIRST + 2]) == pytest.approx({FIRST + 3: (1 + 2 * 1 / 4) / 4, FIRST + 4: (1 + 2 * 3 / 4) / 4})
    assert predicted(counted, [FIRST + 5, FIRST + 2]) == pytest.approx({FIRST + 3: (1 / 4) / 2, FIRST + 4: (1 + 3 / 4) / 2})
    assert predicted(counted, [FIRST + 7]) == predicted(counted, []) == {}


def test_equal_texts_count_once_and_codes_are_left_out() -> None:
    word, other = (Segment(Modality.TEXT, torch.tensor(ids)) for ids in ([1, 2], [3]))
    pictures = [Segment(Modality.IMAGE, torch.full((1, 2, 2), code)) for code in (4, 7)]
    streams = [encode_document(LAYOUT, (Turn("assistant", (word, picture, other)),)).tokens for picture in pictures]
    counted = NGrams.count([*streams, streams[0]], LAYOUT, order=8)
    assert counted.counts.max() == 1
    (code, _), dim = LAYOUT.code_range(Modality.IMAGE), LAYOUT.dim(2)
    assert not set(range(code, LAYOUT.size)) & set(counted.followers.tolist())
    # What follows the picture is known by the words before it.
    assert max(predicted(counted, [FIRST + 1, FIRST + 2, Special.BOI, dim, dim]).items(), key=lambda pair: pair[1])[0] in (
        FIRST + 3,
        Special.EOI,
    )


@given(st.integers(2, 5), st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=12), min_size=1, max_size=6))
def test_every_count_is_that_of_a_loop(order: int, words: list[list[int]]) -> None:
    documents = texts(*words)
    counted = NGrams.count(documents, LAYOUT, order)
    expected: dict[tuple[int, ...], Counter[int]] = {}
    for tokens in {tuple(each.tolist()) for each in documents}:
        for i in range(1, len(tokens)):
            for length in range(1, min(order, i + 1)):
                expected.setdefault(tokens[i - length : i], Counter())[tokens[i]] += 1
    assert len(counted.keys) == len(expected)
    for context, followers in expected.items():
        probabilities: dict[int, float] = {}
        for length in range(1, len(context) + 1):
            after = expected[context[-length:]]
            seen, different = sum(after.values()), len(after) if length > 1 else 0
            probabilities = {t: (after[t] + different * probabilities.get(t, 0)) / (seen + different) for t in after | probabilities}
        found = predicted(counted, context)
        assert found == pytest.approx(probabilities) and set(found) >= set(followers) and sum(found.values()) == pytest.approx(1)


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    documents = [document(seed)[0] for seed in range(5)]
    counted, path = NGrams.count(documents, LAYOUT), tmp_path / "ngrams.safetensors"
    counted.save(path)
    read = NGrams.load(path, LAYOUT)
    assert read.order == counted.order == 6
    for tokens in documents:
        assert predicted(read, tokens[:4].tolist()) == predicted(counted, tokens[:4].tolist()) != {}
    with pytest.raises(VocabMismatch, match=r"ngrams\.safetensors: was counted over another vocabulary .* mmtp ngrams"):
        NGrams.load(path, VocabLayout(TextEntry("words", 51), LAYOUT.media, 16))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(NGramError, match=r"ngrams\.safetensors: is damaged \(.*mmtp ngrams"):
        NGrams.load(path, LAYOUT)


def test_wrong_requests_are_named() -> None:
    with pytest.raises(NGramError, match="order 1: at least 2 is wanted"):
        NGrams.count(texts([1, 2]), LAYOUT, order=1)
    with pytest.raises(NGramError, match="no text to count"):
        NGrams.count([np.array([Special.BOS])], LAYOUT)


def test_answers_are_kept_up_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmtp.stream.ngrams.MOST_KEPT", 3)
    documents = [document(seed)[0] for seed in range(3)]
    counted, fresh = (NGrams.count(documents, LAYOUT) for _ in range(2))
    for _ in range(2):
        for end in range(1, 8):
            fresh._found.clear()
            assert predicted(counted, documents[0][:end].tolist()) == predicted(fresh, documents[0][:end].tolist())
            assert len(counted._found) <= 3
