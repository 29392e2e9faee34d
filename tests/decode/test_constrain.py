import json
import re
import sys
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtp.decode.constrain import AnswerState, Constrainer, Constraint, ConstraintError
from mmtp.decode.draft_model import ModelDrafts
from mmtp.decode.drafts import HeadDrafts
from mmtp.decode.engine import Engine
from mmtp.decode.lookup import LookupDrafts
from mmtp.decode.sample import Sampling
from mmtp.models.heads.base import FORCED, HeadConfig
from mmtp.models.heads.next import NextHead
from mmtp.models.heads.parallel import ParallelHead
from mmtp.models.heads.sequential import SequentialHead
from mmtp.models.heads.synchronized import SynchronizedHead
from mmtp.models.loss import LossConfig
from mmtp.models.unified import UnifiedModel
from mmtp.stream.grammar import GrammarError, StreamGrammar
from mmtp.stream.packing import collate
from mmtp.stream.template import Turn, encode_document, text_segment
from mmtp.stream.vocab import MediaEntry, Special, TextEntry, VocabLayout
from mmtp.tokenizers.text import TextTokenizer
from mmtp.types import Modality
from tests.models.common import BACKBONE

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "blue", "green"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 20},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["colour", "count", "tags"],
    "additionalProperties": False,
}
PATTERN = r"[a-c]{2,5}(-[0-9]{3})?|é+!"  # \d is any digit of Unicode, of which Python may know fewer
ANSWERS = [json.dumps({"colour": c, "count": n, "tags": [n > 3]}) for c, n in (("red", 1), ("blue", 12), ("green", 7))]
WORDS = TextTokenizer.train(ANSWERS * 4, 300)
LAYOUT = VocabLayout(TextEntry("words", 300), (MediaEntry(Modality.IMAGE, "pictures", codebook_sizes=(40,)),), 16)
GRAMMAR = StreamGrammar(LAYOUT)
CONSTRAINER = Constrainer(LAYOUT, WORDS.token_bytes, WORDS.encode_bytes)
SCHEMED, MATCHED, CHOSEN = CONSTRAINER.json_schema(SCHEMA), CONSTRAINER.regex(PATTERN), CONSTRAINER.choices(["yes", "no", "no way", ""])
ASKED = [Special.BOS, Special.USER, 40, 41, Special.END, Special.ASSISTANT]
OPEN = [Special.BOS, 40]  # outside of turns


def meets(constraint: Constraint, text: str) -> bool:
    """By the standard library and by hand, not by what made it."""
    if constraint is MATCHED:
        return re.fullmatch(PATTERN, text) is not None
    if constraint is CHOSEN:
        return text in ("yes", "no", "no way", "")
    value = json.loads(text)
    assert json.dumps(value) == text or "-0" in text or "\\" in text
    return (
        list(value) == ["colour", "count", "tags"]
        and value["colour"] in ("red", "blue", "green")
        and 0 <= value["count"] <= 20
        and len(value["tags"]) <= 2
        and all(type(tag) is bool for tag in value["tags"])
    )


def words(tokens: list[int]) -> str:
    return WORDS.decode_bytes(t - LAYOUT.text_range[0] for t in tokens).decode()


def model(head: HeadConfig, steps: int = 0) -> UnifiedModel:
    """One that has learnt a few answers where it had the time, so that drafts stand often but not always."""
    torch.manual_seed(0)
    net = UnifiedModel.Config(layout=LAYOUT, backbone=BACKBONE, head=head).build()
    torch.nn.init.normal_(net.embedding.table.weight, std=0.3)
    question = Turn("user", (text_segment(WORDS.encode_text, "what", target=False),))
    documents = [encode_document(LAYOUT, (question, Turn("assistant", (text_segment(WORDS.encode_text, a, True),)))) for a in ANSWERS]
    packed = collate([(d.tokens, d.target_mask) for d in documents], GRAMMAR, 120)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        net.loss(packed, LossConfig(mtp_weight=1.0, detach=False)).total.backward()
        optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def trained() -> UnifiedModel:
    return model(SequentialHead.Config(mtp_depth=3), steps=20)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.0, 1.0, 1.7]), st.sampled_from([0, 2]), st.sampled_from([ASKED, OPEN]), st.integers(0, 40))
@pytest.mark.parametrize("constraint", [SCHEMED, MATCHED, CHOSEN], ids=["json", "regex", "choices"])
def test_speculation_never_changes_a_constrained_answer(
    trained: UnifiedModel, constraint: Constraint, seed: int, temperature: float, top_k: int, prefix: list[int], limit: int
) -> None:
    engine, sampling = Engine(trained, exact=True), Sampling(temperature=temperature, top_k=top_k, seed=seed)
    plain, fast = (engine.generate(prefix, sampling, limit, speculative, constraint=constraint) for speculative in (False, True))
    assert fast.tokens == plain.tokens and fast.cut == plain.cut and not fast.failure
    assert fast.stats.passes <= plain.stats.passes
    if plain.cut:
        assert len(plain.new_tokens) == limit
    else:
        *answer, closer = plain.new_tokens
        assert closer == (Special.END if prefix is ASKED else Special.EOS)
        assert meets(constraint, words(answer))


@pytest.mark.parametrize("head", [NextHead.Config(), ParallelHead.Config(mtp_depth=2), SynchronizedHead.Config(mtp_depth=2, vertical=4)])
def test_every_head_writes_what_plain_decoding_writes(head: HeadConfig) -> None:
    engine = Engine(model(head), exact=True)
    for seed, temperature in ((0, 0.0), (1, 1.0)):
        sampling = Sampling(seed=seed, temperature=temperature)
        plain, fast = (engine.generate(ASKED, sampling, 60, speculative, constraint=SCHEMED) for speculative in (False, True))
        assert fast.tokens == plain.tokens
        assert fast.stats.passes < plain.stats.passes
        if isinstance(head, NextHead.Config):
            assert fast.stats.accepted == fast.stats.drafted and list(fast.stats.drafted) == [("text", FORCED)]


@pytest.mark.parametrize("way", ["lookup", "model"])
def test_drafts_from_elsewhere_keep_to_the_constraint(trained: UnifiedModel, way: str) -> None:
    drafts = LookupDrafts() if way == "lookup" else ModelDrafts(trained, 3)
    accepted = 0
    for seed, constraint in product(range(4), (SCHEMED, MATCHED, CHOSEN)):
        sampling = Sampling(seed=seed)
        plain = Engine(trained, exact=True).generate(ASKED, sampling, 40, False, constraint=constraint)
        fast = Engine(trained, exact=True, draft_cost=0, drafts=drafts).generate(ASKED, sampling, 40, constraint=constraint)
        assert fast.tokens == plain.tokens
        accepted += sum(n for (_, offset), n in fast.stats.accepted.items() if offset != FORCED)
    assert accepted > 0


@pytest.mark.parametrize("constraint", [SCHEMED, MATCHED, CHOSEN], ids=["json", "regex", "choices"])
def test_what_rejection_leaves_meets_the_constraint(trained: UnifiedModel, constraint: Constraint) -> None:
    for seed in range(6):
        found = Engine(trained).generate(ASKED, Sampling(seed=seed, verification="rejection"), 60, constraint=constraint)
        assert found.cut or meets(constraint, words(found.new_tokens[:-1]))


def test_rows_of_a_batch_have_constraints_of_their_own(trained: UnifiedModel) -> None:
    engine = Engine(trained, exact=True)
    constraints = [SCHEMED, None, MATCHED, CHOSEN, None, SCHEMED]
    prefixes = [ASKED, ASKED, OPEN, ASKED, [*ASKED, Special.BOI, LAYOUT.dim(4), LAYOUT.dim(5)], OPEN]
    samplings = [Sampling(seed=i, temperature=0.0 if i == 5 else 1.0, guidance=2.0 if i == 4 else 1.0) for i in range(6)]
    for speculative in (False, True):
        together = engine.generate_batch(prefixes, samplings, 45, speculative, stop=(Special.END,), constraints=constraints)
        for prefix, sampling, constraint, row in zip(prefixes, samplings, constraints, together, strict=True):
            alone = engine.generate(prefix, sampling, 45, not speculative, stop=(Special.END,), constraint=constraint)
            assert row.tokens == alone.tokens
            assert constraint is None or row.cut or meets(constraint, words(row.new_tokens[:-1]))


def test_forced_tokens_are_drafts_that_cost_no_head(trained: UnifiedModel) -> None:
    longer = "an answer about which there is no choice at all"
    for exact in (False, True):
        engine = Engine(trained, exact=exact, draft_cost=0, drafts=HeadDrafts())
        plain, fast = (engine.generate(ASKED, None, 90, way, constraint=CONSTRAINER.choices([longer])) for way in (False, True))
        assert fast.tokens == plain.tokens and words(fast.new_tokens[:-1]) == longer
        assert fast.stats.accepted == fast.stats.drafted
        assert max(fast.stats.per_pass) == (4 if exact else 4 + 16)
        assert bool(fast.stats.drafted["text", FORCED]) != exact  # in exact mode the head's drafts fill the window


def test_every_choice_comes_with_some_seed(trained: UnifiedModel) -> None:
    samplings = [Sampling(seed=seed, temperature=3.0) for seed in range(40)]
    rows = Engine(trained).generate_batch([ASKED] * 40, samplings, 9, constraints=[CHOSEN] * 40)
    assert {words(row.new_tokens[:-1]) for row in rows} == {"yes", "no", "no way", ""}


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_going_back_is_as_if_never_gone(data: st.DataObject) -> None:
    """States of one request, in whatever order they are asked, allow what a fresh parser allows after the same tokens."""
    constraint = data.draw(st.sampled_from([SCHEMED, MATCHED, CHOSEN]))
    states = [(AnswerState(GRAMMAR.begin(ASKED), constraint.follow()), [])]
    for _ in range(12):
        state, path = data.draw(st.sampled_from([pair for pair in states if not pair[0].done] or states[:1]))
        token = data.draw(st.sampled_from(state.legal.nonzero().flatten().tolist()))
        after = state.copy()
        assert after.push(token) == (len(ASKED) + len(path),) * 3
        states.append((after, [*path, token]))
    for state, path in states:
        fresh = AnswerState(GRAMMAR.begin(ASKED), constraint.follow())
        for token in path:
            fresh.push(token)
        assert torch.equal(fresh.legal, state.legal) and fresh.forced == state.forced and fresh.done == state.done


def test_what_the_constraint_forbids_is_refused_and_changes_nothing() -> None:
    state = AnswerState(GRAMMAR.begin(ASKED), CHOSEN.follow())
    before = state.legal.clone()
    for token in (Special.BOI, Special.EOS, 0, LAYOUT.text_range[0] + WORDS.encode_text("x")[0], LAYOUT.dim(1), LAYOUT.size - 1):
        with pytest.raises(GrammarError, match="offset 6: what the constraint allows expected"):
            state.push(int(token))
    assert torch.equal(state.legal, before)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), min_size=1, max_size=5))
def test_choices_are_taken_as_they_stand(options: list[str]) -> None:
    constraint = CONSTRAINER.choices(options)
    for option in options:
        state = AnswerState(GRAMMAR.begin(ASKED), constraint.follow())
        for token in WORDS.encode_text(option):
            state.push(token + LAYOUT.text_range[0])
        state.push(Special.END)
        assert state.done and not state.failure


def test_control_tokens_and_ids_without_bytes_are_part_of_no_answer() -> None:
    kept = {i: data for i, data in WORDS.token_bytes.items() if data not in (b"a", b"b")}
    constraint = Constrainer(LAYOUT, kept, WORDS.encode_bytes).regex("(?s:.)*")
    legal = AnswerState(GRAMMAR.begin(ASKED), constraint.follow()).legal
    left_out = set(WORDS.token_bytes) - set(kept)
    assert len(left_out) == 2 and not any(legal[LAYOUT.text_range[0] + i] for i in left_out)
    assert legal[: LAYOUT.text_range[0]].nonzero().flatten().tolist() == [Special.END]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: c.json_schema("nope"), "JSON schema: is none .Expecting value"),
        (lambda c: c.json_schema("[1]"), "JSON schema: is none"),
        (lambda c: c.json_schema({"type": {1, 2}}), "JSON schema: is none .Object of type set"),
        (lambda c: c.json_schema({"not": {"type": "string"}}), r'JSON schema: Unimplemented keys: \["not"\]'),
        (lambda c: c.json_schema({"type": "word"}), "JSON schema: Invalid type: word"),
        (lambda c: c.json_schema({"type": "string", "minLength": 3, "maxLength": 2}), "JSON schema: Unsatisfiable schema"),
        (lambda c: c.regex("a[b"), r"regex 'a\[b': unclosed character class$"),
        (lambda c: c.regex("(?=a)b"), r"regex '\(\?=a\)b': look-around.* is not supported$"),
        (lambda c: c.regex(r"[^\s\S]"), "regex .*: no text meets it$"),
        (lambda c: c.regex("\ud800"), "half a surrogate pair"),
        (lambda c: c.choices([]), "choices: at least one is wanted"),
        (lambda c: c.choices(["a", "\udc00"]), "half a surrogate pair"),
    ],
)
def test_what_cannot_be_met_is_one_line(make, message: str) -> None:
    with pytest.raises(ConstraintError, match=message) as caught:
        make(CONSTRAINER)
    assert "\n" not in str(caught.value)


def test_a_constraint_needs_text_its_vocabulary_and_its_library(trained: UnifiedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(trained)
    with pytest.raises(ConstraintError, match="row 0: JSON schema needs a prefix after which text may stand"):
        engine.generate([*ASKED, Special.BOI], constraint=SCHEMED)
    other = Constrainer(VocabLayout(LAYOUT.text), WORDS.token_bytes, WORDS.encode_bytes)
    with pytest.raises(ConstraintError, match="row 1: regex 'a' was compiled for another vocabulary"):
        engine.generate_batch([ASKED, ASKED], [Sampling()] * 2, constraints=[MATCHED, other.regex("a")])
    with pytest.raises(ConstraintError, match="this vocabulary has no text"):
        Constrainer(VocabLayout(None, LAYOUT.media), {}, list)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConstraintError, match=r"pip install 'mmtp\[constrain\]'"):
        Constrainer(LAYOUT, WORDS.token_bytes, WORDS.encode_bytes)


def test_a_row_whose_parser_gives_up_ends_alone(trained: UnifiedModel) -> None:
    """llguidance bounds its own work: what goes beyond ends the row, and the others go on."""
    import llguidance

    hard = r"(?:[a-z]{1,200}x){3}"
    limits = llguidance.LLParserLimits(max_lexer_states=8)
    grammar = llguidance.LLMatcher.grammar_from_regex(hard)
    strict = Constraint("regex of many states", LAYOUT, llguidance.LLMatcher(CONSTRAINER._tokenizer, grammar, log_level=0, limits=limits))
    engine = Engine(trained, exact=True)
    for speculative in (False, True):
        ended, other = engine.generate_batch([ASKED] * 2, [Sampling(seed=3)] * 2, 60, speculative, constraints=[strict, SCHEMED])
        assert "\n" not in ended.failure and ended.failure.startswith("regex of many states: ") and not ended.cut
        assert other.tokens == engine.generate(ASKED, Sampling(seed=3), 60, constraint=SCHEMED).tokens and not other.failure
