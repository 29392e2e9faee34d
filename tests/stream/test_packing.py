"""Packing loses nothing, mixes nothing, and gives the same rows every time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtp.stream.grammar import GrammarError, StreamGrammar
from mmtp.stream.packing import PackDocument, PackingError, collate, collate_rows, pack
from mmtp.stream.vocab import MediaEntry, TextEntry, VocabLayout
from mmtp.types import Modality

LAYOUT = VocabLayout(TextEntry("bpe", 20), (MediaEntry(Modality.IMAGE, "pictures", "", (8,)), MediaEntry(Modality.IMAGE, "patches")), 4)
GRAMMAR = StreamGrammar(LAYOUT)
QUICK = settings(max_examples=80, deadline=None)


@QUICK
@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 100), st.integers(1, 8))
def test_every_document_stands_once_in_a_bin_that_holds_it(lengths, budget, max_open):
    bins = pack(lengths, budget, max_open)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert all(members == sorted(members) and 0 < sum(lengths[i] for i in members) <= budget for members in bins)
    assert [members[0] for members in bins] == sorted(members[0] for members in bins)
    assert pack(np.array(lengths, dtype=np.int64), budget, max_open) == bins


@QUICK
@given(st.lists(st.integers(1, 40), max_size=40), st.integers(40, 100))
def test_first_fit_takes_the_first_bin_with_room(lengths, budget):
    room, expected = [], []
    for index, length in enumerate(lengths):
        chosen = next((b for b, free in enumerate(room) if free >= length), None)
        if chosen is None:
            chosen = len(room)
            room.append(budget)
            expected.append([])
        room[chosen] -= length
        expected[chosen].append(index)
    assert pack(lengths, budget, max_open=len(lengths) + 1) == expected


def test_the_fullest_bin_is_closed_when_too_many_are_open():
    assert pack([6, 7, 8, 4, 3], 10, max_open=2) == [[0, 3], [1], [2], [4]]
    assert pack([6, 7, 8, 4, 3], 10, max_open=3) == [[0, 3], [1, 4], [2]]


@pytest.mark.parametrize(("length", "message"), [(11, "document 1: 11 tokens; 1 to 10 fit"), (0, "document 1: 0 tokens")])
def test_documents_that_fit_no_row_are_refused(length, message):
    with pytest.raises(PackingError, match=message):
        pack([3, length], 10)


def document(text: int, picture: bool, seed: int, features: bool = False) -> PackDocument:
    rng = np.random.default_rng(seed)
    lo, hi = LAYOUT.text_range
    tokens = [1, *rng.integers(lo, hi, text)]
    vectors = None
    if picture:
        tokens += [7, LAYOUT.dim(2), LAYOUT.dim(2), *rng.integers(*LAYOUT.code_range(Modality.IMAGE), 4), 8]
    if features:
        tokens += [13, LAYOUT.dim(1), LAYOUT.dim(3), 15, 15, 15, 14]
        vectors = torch.from_numpy(rng.standard_normal((3, 5)))
    tokens = np.array([*tokens, 2], dtype=np.int64)
    return PackDocument(tokens, rng.random(len(tokens)) < 0.5, vectors)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.booleans(), st.integers(0, 99), st.booleans()), min_size=1, max_size=12), st.integers(32, 64)
)
def test_rows_give_back_their_documents(parts, budget):
    documents = [document(*part) for part in parts]
    batch = collate(documents, GRAMMAR, budget)
    bins = pack([len(d.tokens) for d in documents], budget)
    assert batch.tokens.shape == (len(bins), budget)
    vectors = []
    for row, members in enumerate(bins):
        ids = batch.document_ids[row]
        used = sum(len(documents[i].tokens) for i in members)
        assert (ids[:used].diff() >= 0).all() and (ids[:used] >= 0).all() and (ids[used:] == -1).all()
        assert (batch.tokens[row, used:] == 0).all() and not batch.loss_mask[row, used:].any()
        assert (batch.slots[row, used:] == LAYOUT.slot_index["done"]).all()
        for d, i in enumerate(members):
            here = ids == d
            info = GRAMMAR.analyse(documents[i].tokens)
            np.testing.assert_array_equal(batch.tokens[row, here], documents[i].tokens)
            np.testing.assert_array_equal(batch.loss_mask[row, here], documents[i].target_mask)
            np.testing.assert_array_equal(batch.positions[row, here], info.positions)
            np.testing.assert_array_equal(batch.slots[row, here], info.slots)
            vectors += [documents[i].features] if documents[i].features is not None else []
    if not vectors:
        assert batch.features is None and batch.feature_index is None
        return
    assert (batch.tokens.reshape(-1)[batch.feature_index] == 15).all()
    torch.testing.assert_close(batch.features, torch.cat(vectors), rtol=0, atol=0)


def test_plain_tuples_are_documents():
    tokens = np.array([1, 40, 2], dtype=np.uint16)
    batch = collate([(tokens, np.array([False, True, True]))], GRAMMAR, 4)
    assert batch.tokens.tolist() == [[1, 40, 2, 0]]
    assert batch.document_ids.tolist() == [[0, 0, 0, -1]]
    assert batch.loss_mask.tolist() == [[False, True, True, False]]


def test_what_does_not_fit_is_refused():
    good = document(3, True, 0)
    with pytest.raises(PackingError, match="row 0: its documents have more than 20 tokens"):
        collate_rows([[good, good]], GRAMMAR, 20)
    with pytest.raises(PackingError, match="row 0, document 0: 13 tokens, but a target mask of 12"):
        collate_rows([[(good.tokens, good.target_mask[1:])]], GRAMMAR, 20)
    featured = document(0, False, 0, features=True)
    with pytest.raises(PackingError, match="3 <feature> tokens, but 0 feature vectors"):
        collate_rows([[(featured.tokens, featured.target_mask)]], GRAMMAR, 20)
    with pytest.raises(GrammarError, match=r"offset 12: .* expected, found the end of the stream"):
        collate_rows([[(good.tokens[:-1], good.target_mask[:-1])]], GRAMMAR, 20)
