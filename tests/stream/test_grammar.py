"""Both forms of the grammar, on every kind of span, on legal and on broken streams."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtp.stream.grammar import GrammarError, GrammarState, StreamGrammar
from mmtp.stream.vocab import MediaEntry, Special, TextEntry, VocabLayout
from mmtp.types import Modality

# beartype draws a random item of each list that it checks; the strategies below build objects of the library, so hypothesis sees it.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the .random. module inside strategies")

QUICK = settings(max_examples=40, deadline=None)


def layout_of(
    image_k: int = 1, image_delays: tuple[int, ...] = (), audio_delays: tuple[int, ...] = (0,), features: Modality = Modality.IMAGE
) -> VocabLayout:
    return VocabLayout(
        TextEntry("bpe", 20),
        (
            MediaEntry(Modality.IMAGE, "pictures", "", (7, 5, 3)[:image_k], image_delays),
            MediaEntry(features, "patches"),
            MediaEntry(Modality.AUDIO, "sounds", "", (6,) * len(audio_delays), audio_delays),
            MediaEntry(Modality.VIDEO, "films", "", (4, 4)),
        ),
        max_dim=5,
    )


def delays(num_codebooks: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(0, 4), min_size=num_codebooks - 1, max_size=num_codebooks - 1).map(lambda d: (0, *d))


@st.composite
def layouts(draw: st.DrawFn) -> VocabLayout:
    k = draw(st.integers(1, 3))
    features = draw(st.sampled_from([Modality.IMAGE, Modality.AUDIO]))
    return layout_of(k, draw(delays(k)), draw(st.integers(1, 3).flatmap(delays)), features)


def naive_order(lags: tuple[int, ...], frames: int) -> list[tuple[int, int]]:
    """(frame, codebook) in stream order, from the definition."""
    steps = range(frames + max(lags))
    return [(s - d, k) for s in steps for k, d in enumerate(lags) if 0 <= s - d < frames]


@st.composite
def spans(draw: st.DrawFn, layout: VocabLayout) -> list[int]:
    kind = draw(st.sampled_from(["image", "audio", "video", "feature"]))
    dim = layout.dim_range[0] - 1
    if kind == "feature":
        h, w = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        return [Special.BOF, dim + h, dim + w, *[Special.FEATURE] * (h * w), Special.EOF]
    modality = Modality(kind)
    opener, closer = {"image": (7, 8), "audio": (9, 10), "video": (11, 12)}[kind]
    axes = {"image": 2, "audio": 1, "video": 3}[kind]
    grid = [draw(st.integers(1, 6 if kind == "audio" else 3)) for _ in range(axes)]
    body = []
    for _, k in naive_order(layout.entry(modality).delays, int(np.prod(grid))):
        lo, hi = layout.code_range(modality, k)
        body.append(draw(st.integers(lo, hi - 1)))
    return [opener, *([] if kind == "audio" else [dim + n for n in grid]), *body, closer]


@st.composite
def streams(draw: st.DrawFn, layout: VocabLayout) -> list[int]:
    lo, hi = layout.text_range

    def run() -> list[int]:
        parts = draw(st.lists(st.one_of(st.integers(lo, hi - 1).map(lambda t: [t]), spans(layout)), max_size=3))
        return [token for part in parts for token in part]

    out = [int(Special.BOS), *run()]
    for role in draw(st.lists(st.sampled_from([Special.USER, Special.ASSISTANT, Special.SYSTEM]), max_size=3)):
        out += [role, *run(), Special.END, *run()]
    return [int(t) for t in out] + [int(Special.EOS)] + [int(Special.PAD)] * draw(st.integers(0, 2))


@st.composite
def layout_and_stream(draw: st.DrawFn) -> tuple[VocabLayout, list[int]]:
    layout = draw(layouts())
    return layout, draw(streams(layout))


def array(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, dtype=np.int64)


def refusal(call: Callable[[], object]) -> tuple[int, str] | None:
    """Where and how a stream is refused, if it is."""
    try:
        call()
    except GrammarError as error:
        return error.offset, str(error)
    return None


def check_agreement(grammar: StreamGrammar, tokens: list[int]) -> None:
    """Both forms say the same of every token."""
    info = grammar.analyse(array(tokens))
    state = grammar.begin()
    for i, token in enumerate(tokens):
        slot = grammar.layout.slots[state.slot]
        before = (state.position, state.coordinate, state.codebook)
        assert state.offset == i
        assert state.slot == info.slots[i]
        assert state.modality.index == info.modality[i]
        assert token in slot
        assert state.push(token) == tuple(info.positions[i])
        if "boundary" not in slot.name or token in range(*grammar.layout.code_range(Modality.AUDIO, 0)):
            assert before == (tuple(info.positions[i]), tuple(info.coordinates[i]), info.codebook[i])
    assert state.done == info.complete


@QUICK
@given(layout_and_stream(), st.randoms())
def test_both_forms_agree_on_legal_streams_and_their_prefixes(case, random):
    layout, tokens = case
    grammar = StreamGrammar(layout)
    check_agreement(grammar, tokens)
    assert grammar.analyse(array(tokens), complete=True).complete
    cut = random.randrange(len(tokens))
    check_agreement(grammar, tokens[:cut])


@settings(max_examples=120, deadline=None)
@given(layout_and_stream(), st.data())
def test_both_forms_refuse_a_corrupted_stream_at_the_same_place(case, data):
    layout, tokens = case
    grammar = StreamGrammar(layout)
    tokens = list(tokens)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(tokens) - 1))
        what = data.draw(st.sampled_from(["set", "drop", "insert", "repeat"]))
        token = data.draw(st.integers(-1, layout.size))
        if what == "set":
            tokens[at] = token
        elif what == "insert":
            tokens.insert(at, token)
        elif what == "repeat":
            tokens.insert(at, tokens[at])
        elif len(tokens) > 1:
            del tokens[at]
    refused = refusal(lambda: grammar.analyse(array(tokens)))
    assert refused == refusal(lambda: grammar.begin(tokens))
    check_agreement(grammar, tokens[: refused[0]] if refused else tokens)


@QUICK
@given(layout_and_stream(), st.data())
def test_whatever_the_slots_allow_can_be_written_and_ends(case, data):
    """A walk that only asks the state what is legal never gets stuck: the automaton has no dead end."""
    grammar = StreamGrammar(case[0])
    state, tokens = grammar.begin(), []
    for _ in range(60):
        lo, hi = data.draw(st.sampled_from(grammar.layout.slots[state.slot].ranges))
        tokens.append(data.draw(st.integers(lo, hi - 1)))
        state.push(tokens[-1])
    check_agreement(grammar, tokens)


@QUICK
@given(layout_and_stream())
def test_spans_give_back_their_codes(case):
    layout, tokens = case
    grammar = StreamGrammar(layout)
    openers = [i for i, t in enumerate(tokens) if t in (7, 9, 11, 13)]
    found = grammar.spans(array(tokens))
    assert [span.start for span in found] == openers
    for span in found:
        assert tokens[span.end - 1] == tokens[span.start] + 1
        if span.continuous:
            assert set(tokens[span.body]) == {Special.FEATURE}
            continue
        codes = grammar.codes(array(tokens), span)
        assert codes.shape[1:] == span.grid
        flat = codes.reshape(len(codes), -1)
        order = naive_order(layout.entry(span.modality).delays, flat.shape[1])
        assert [flat[k, t] + layout.code_range(span.modality, k)[0] for t, k in order] == tokens[span.body]


@QUICK
@given(layout_and_stream(), st.data())
def test_a_copy_goes_its_own_way(case, data):
    layout, tokens = case
    grammar = StreamGrammar(layout)
    cut = data.draw(st.integers(0, len(tokens) - 1))
    state = grammar.begin(tokens[:cut])
    before = {name: getattr(state, name) for name in GrammarState.__slots__}
    copy = state.copy()
    assert {name: getattr(copy, name) for name in GrammarState.__slots__} == before
    for token in tokens[cut:]:
        copy.push(token)
    assert copy.done
    assert {name: getattr(state, name) for name in GrammarState.__slots__} == before


@QUICK
@given(layout_and_stream(), st.data())
def test_a_refused_token_leaves_the_state_as_it_was(case, data):
    layout, tokens = case
    grammar = StreamGrammar(layout)
    state = grammar.begin(tokens[: data.draw(st.integers(0, len(tokens) - 1))])
    wrong = data.draw(st.integers(-1, layout.size).filter(lambda t: t not in layout.slots[state.slot]))
    before = {name: getattr(state, name) for name in GrammarState.__slots__}
    with pytest.raises(GrammarError):
        state.push(wrong)
    assert {name: getattr(state, name) for name in GrammarState.__slots__} == before


def names(grammar: StreamGrammar, tokens: list[int]) -> list[str]:
    return [grammar.layout.slots[s].name for s in grammar.analyse(array(tokens)).slots]


def test_positions_and_slots_of_a_picture():
    grammar = StreamGrammar(layout_of(2))
    layout = grammar.layout
    a, b = layout.code_range(Modality.IMAGE, 0)[0], layout.code_range(Modality.IMAGE, 1)[0]
    tokens = [1, 40, 7, layout.dim(2), layout.dim(3), *[a, b] * 6, 8, 41, 2]
    info = grammar.analyse(array(tokens), complete=True)
    cells = [(0, r, c) for r in range(2) for c in range(3) for _ in range(2)]
    expected = [(p, p, p) for p in range(5)] + [(5, 5 + r, 5 + c) for _, r, c in cells] + [(8,) * 3, (9,) * 3, (10,) * 3]
    assert info.positions.tolist() == [list(p) for p in expected]
    assert info.coordinates[5:17].tolist() == [list(c) for c in cells]
    assert (info.coordinates[:5] == -1).all() and (info.coordinates[17:] == -1).all()
    assert info.codebook.tolist() == [-1] * 5 + [0, 1] * 6 + [-1] * 3
    assert names(grammar, tokens) == [
        "start", "doc", "doc", "dim", "dim", *["image.codes.0", "image.codes.1"] * 6, "image.end", "doc", "doc",
    ]  # fmt: skip
    assert info.modality[5] == Modality.IMAGE.index and info.modality[2] == Modality.TEXT.index
    (span,) = info.spans
    assert (span.modality, span.start, span.end, span.grid) == (Modality.IMAGE, 2, 18, (2, 3))


def test_positions_of_a_film():
    grammar = StreamGrammar(layout_of())
    layout = grammar.layout
    codes = [layout.code_range(Modality.VIDEO, k)[0] for k in (0, 1)]
    tokens = [1, 11, layout.dim(2), layout.dim(1), layout.dim(3), *codes * 6, 12, 2]
    info = grammar.analyse(array(tokens), complete=True)
    assert info.positions[5:17:2].tolist() == [[5 + t, 5, 5 + c] for t in range(2) for c in range(3)]
    assert info.coordinates[6:17:2].tolist() == [[t, 0, c] for t in range(2) for c in range(3)]
    assert info.positions[17:].tolist() == [[8, 8, 8], [9, 9, 9]]


def test_sound_without_delays_may_end_after_any_frame():
    grammar = StreamGrammar(layout_of(audio_delays=(0, 0)))
    a, b = (grammar.layout.code_range(Modality.AUDIO, k)[0] for k in (0, 1))
    tokens = [1, 9, a, b, a, b, 10, 2]
    assert names(grammar, tokens) == [
        "start", "doc", "audio.codes.0", "audio.codes.1", "audio.boundary.0", "audio.codes.1", "audio.boundary.0", "doc",
    ]  # fmt: skip
    assert grammar.analyse(array(tokens)).positions[:, 0].tolist() == [0, 1, 2, 2, 3, 3, 4, 5]


def test_delayed_sound_ends_by_its_ramp_down():
    grammar = StreamGrammar(layout_of(audio_delays=(0, 1, 2)))
    a, b, c = (grammar.layout.code_range(Modality.AUDIO, k)[0] for k in range(3))
    tokens = [1, 9, a, a, b, a, b, c, b, c, c, 10, 2]
    assert names(grammar, tokens)[2:] == [
        "audio.codes.0", "audio.boundary.1", "audio.codes.1", "audio.boundary.1", "audio.codes.1", "audio.codes.2",
        "audio.boundary.1", "audio.codes.2", "audio.codes.2", "audio.end", "doc",
    ]  # fmt: skip
    info = grammar.analyse(array(tokens), complete=True)
    assert (info.positions[2:11, 0] - 2).tolist() == [0, 1, 0, 2, 1, 0, 2, 1, 2]
    assert info.positions[11].tolist() == [5, 5, 5]
    assert info.spans[0].grid == (3,)
    with pytest.raises(GrammarError, match="offset 7: audio code of codebook 2 expected, found <eoa>"):
        grammar.analyse(np.array([*tokens[:7], 10]))


def test_a_sound_has_at_least_one_frame():
    with pytest.raises(GrammarError, match="offset 2: audio code of codebook 0 expected, found <eoa>"):
        StreamGrammar(layout_of()).analyse(np.array([1, 9, 10, 2]))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([40], "offset 0: <bos> expected, found 40 (text 8)"),
        ([1, 6], "offset 1: text, <boi>, <boa>, <bov>, <user>, <assistant>, <system>, <eos> or <bof> expected, found <end>"),
        ([1, 3, 4], "offset 2: text, <boi>, <boa>, <bov>, <end> or <bof> expected, found <assistant>"),
        ([1, 7, 40], "offset 2: <dim 1> to <dim 5> expected, found 40 (text 8)"),
        ([1, 7, 52, 52, 52], "offset 4: image code of codebook 0 expected, found <dim 1>"),
        ([1, 7, 52, 52, 57, 57], "offset 5: <eoi> expected, found 57 (image code 0 of codebook 0)"),
        ([1, 13, 52, 52, 15, 8], "offset 5: <eof> expected, found <eoi>"),
        ([1, 2, 40], "offset 2: <pad> expected, found 40 (text 8)"),
        ([1, 20], "found reserved id 20"),
        ([1, 127], "found id 127, which no tokenizer of this vocabulary uses"),
    ],
)
def test_messages_name_offset_and_expectation(tokens, message):
    grammar = StreamGrammar(layout_of())
    for call in (lambda: grammar.analyse(array(tokens)), lambda: grammar.begin(tokens)):
        with pytest.raises(GrammarError) as caught:
            call()
        assert message in str(caught.value)
        assert caught.value.offset == len(tokens) - 1


@pytest.mark.parametrize(
    ("tokens", "expected"), [([1, 40], "<eos>"), ([1, 7, 52], "<dim 1>"), ([1, 7, 52, 52, 57], "<eoi>"), ([], "<bos>")]
)
def test_an_unfinished_document_is_refused_where_a_whole_one_is_wanted(tokens, expected):
    grammar = StreamGrammar(layout_of())
    assert not grammar.analyse(array(tokens)).complete
    with pytest.raises(GrammarError, match=rf"offset {len(tokens)}: .*{expected}.* expected, found the end of the stream"):
        grammar.analyse(array(tokens), complete=True)


def test_tokens_may_be_tensors_or_small_integers():
    grammar = StreamGrammar(layout_of())
    tokens = [1, 40, 7, 52, 52, 57, 8, 2]
    wanted = grammar.analyse(array(tokens))
    for other in (torch.tensor(tokens), np.array(tokens, dtype=np.uint16)):
        info = grammar.analyse(other)
        np.testing.assert_array_equal(info.positions, wanted.positions)
        np.testing.assert_array_equal(info.slots, wanted.slots)


def test_spans_that_the_vocabulary_lacks_are_illegal():
    grammar = StreamGrammar(VocabLayout(TextEntry("bpe", 20)))
    for opener in (Special.BOI, Special.BOA, Special.BOV, Special.BOF):
        with pytest.raises(GrammarError, match="offset 1"):
            grammar.begin([1, opener])


def test_features_of_sound_lie_on_time_and_columns():
    layout = layout_of(features=Modality.AUDIO)
    dim = layout.dim_range[0] - 1
    tokens = [1, Special.BOF, dim + 2, dim + 3, *[Special.FEATURE] * 6, Special.EOF, 2]
    info = StreamGrammar(layout).analyse(np.array(tokens), complete=True)
    assert info.coordinates[4:10].tolist() == [[t, 0, f] for t in range(2) for f in range(3)]
    assert info.positions[4:10].tolist() == [[4 + t, 4, 4 + f] for t in range(2) for f in range(3)]
    assert info.positions[10].tolist() == [7, 7, 7]
    assert {int(m) for m in info.modality[4:11]} == {Modality.AUDIO.index}


def test_a_state_knows_its_span_and_how_far_it_is() -> None:
    layout = layout_of(image_k=2)
    grammar = StreamGrammar(layout)
    state = grammar.begin([Special.BOS, Special.BOI])
    assert (state.span_modality, state.modality, state.progress(), state.grid) == (Modality.IMAGE, Modality.TEXT, 0.0, ())
    for extent in (1, 3):
        state.push(layout.dim(extent))
    assert state.grid == (1, 3)
    seen = []
    for _ in range(3):
        for k in range(2):
            seen.append(state.progress())
            assert state.progress(4 - len(seen)) == pytest.approx(0.5 * (3 // 2))  # the fourth code, from wherever
            state.push(layout.code_range(Modality.IMAGE, k)[0])
    assert seen == [0, 0, 0.5, 0.5, 1, 1] and state.progress() == 1.0
    state.push(Special.EOI)
    assert (state.span_modality, state.progress(), state.grid) == (Modality.TEXT, 0.0, ())
    assert grammar.begin([Special.BOS, Special.BOA, layout.code_range(Modality.AUDIO)[0]]).progress() == 0.0
