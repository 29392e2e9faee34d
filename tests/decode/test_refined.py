"""Drafts by the refiner: what they start from, that they change nothing, and that one call makes what many make."""

from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtp.decode.by_medium import DraftsByMedium
from mmtp.decode.constrain import Constrainer
from mmtp.decode.drafts import Drafts, HeadDrafts
from mmtp.decode.engine import Engine
from mmtp.decode.jacobi import JacobiDrafts
from mmtp.decode.ngrams import NGramDrafts
from mmtp.decode.refined import RefinedDrafts
from mmtp.decode.rows import Choice, DecodeError, Request, Row
from mmtp.decode.sample import Draft, Noise, Sampling, Uniforms
from mmtp.models.heads.base import CARRIED, FORCED, NEARBY
from mmtp.models.refiner import Refiner
from mmtp.models.unified import UnifiedModel
from mmtp.nn import native
from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.ngrams import NGrams
from mmtp.stream.vocab import MediaEntry, Special
from mmtp.types import Modality
from tests.models.common import GRAMMAR, LAYOUT, model
from tests.models.test_refiner import random_refiner

CODE = LAYOUT.code_range(Modality.IMAGE, 0)[0]
PICTURE = [Special.BOS, Special.USER, 40, 41, Special.END, Special.ASSISTANT, Special.BOI, LAYOUT.dim(3), LAYOUT.dim(4)]
TEXT = [Special.BOS, Special.USER, *[40, 41, 42, 43] * 3, Special.END, Special.ASSISTANT, 40, 41]


def refining(scale: float = 0.1) -> UnifiedModel:
    """A model with a refiner, whose embeddings, too, are exact in bfloat16, in which compiled drafts read them."""
    net = model(depth=0).eval()
    with torch.no_grad():
        net.embedding.table.weight.copy_(net.embedding.table.weight.bfloat16())
    net.refiner = random_refiner(scale=scale)
    return net


@pytest.fixture(scope="module")
def net() -> UnifiedModel:
    return refining()


@pytest.fixture(params=["one call", "by calls"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "by calls":
        monkeypatch.setattr(native, "usable", lambda: False)
    else:
        assert native.usable()
    return request.param


@settings(max_examples=6, deadline=None)
@given(
    st.integers(0, 2**32),
    st.booleans(),
    st.sampled_from([0.0, 0.7, 1.5]),
    st.sampled_from([1.0, 2.0]),
    st.sampled_from([None, 0.0, 0.2]),
    st.sampled_from([{"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.05}, {}]),
)
def test_coupled_output_is_that_of_plain_decoding(
    net: UnifiedModel, seed: int, one_call: bool, temperature: float, guidance: float, cost: float | None, cuts: dict[str, float]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if not one_call:
            patch.setattr(native, "usable", lambda: False)
        engine = Engine(net, exact=True, drafts=RefinedDrafts(max_drafts=5), draft_cost=cost)
        common = Sampling(temperature=temperature, guidance=guidance, repetition_penalty=1.2, **cuts)
        samplings = [replace(common, seed=seed + i) for i in range(3)]
        prefixes = [PICTURE, TEXT[:8], [*PICTURE, CODE]]
        plain, fast = (engine.generate_batch(prefixes, samplings, 18, speculative) for speculative in (False, True))
        assert [row.tokens for row in fast] == [row.tokens for row in plain]
        assert engine.generate(PICTURE, samplings[0], 18).tokens == plain[0].tokens


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("cuts", [{}, {"top_k": 6}, {"top_p": 0.7}, {"min_p": 0.1}], ids=str)
def test_one_call_makes_the_drafts_of_many(
    net: UnifiedModel, guidance: float, cuts: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stats(temperature: float) -> list[tuple[Counter, Counter]]:
        samplings = [Sampling(seed=seed, temperature=temperature, guidance=guidance, **cuts) for seed in range(8)]
        rows = Engine(net, draft_cost=0, drafts=RefinedDrafts(max_drafts=6)).generate_batch([PICTURE] * 8, samplings, 14)
        return [(row.stats.drafted, row.stats.accepted) for row in rows]

    at_once = [stats(temperature) for temperature in (0.0, 1.0)]
    monkeypatch.setattr(native, "usable", lambda: False)
    assert at_once == [stats(temperature) for temperature in (0.0, 1.0)]
    found = sum((drafted for way in at_once for drafted, _ in way), Counter())
    assert found["image", CARRIED] > 20 and found["image", NEARBY] > 20 and found["image", FORCED]


def _row(net: UnifiedModel, judged: list[tuple[int, int, int | None]], verification: str = "coupling", length: int = 1) -> Row:
    """A row whose last pass chose tokens at some places, after drafts."""
    prefix = [*PICTURE, *[CODE] * length]
    row = Row(GRAMMAR, Request(prefix=prefix, sampling=Sampling(seed=3, verification=verification), max_new_tokens=30))
    row.index = 0
    slot = GRAMMAR.begin(PICTURE).slot
    of = torch.full((40,), 1 / 40) if verification == "rejection" else None
    row.judged = [
        (Choice(row, column, slot, place, draft=None if draft is None else Draft(draft)), Draft(token, of))
        for column, (place, token, draft) in enumerate(judged)
    ]
    return row


def test_states_that_have_read_another_token_are_told_the_true_one(kernels: str) -> None:
    net, end = refining(scale=0.3), len(PICTURE)
    chooser = Engine(net).chooser
    states = torch.randn(1, 4, net.config.backbone.width)
    drafter = RefinedDrafts(max_drafts=3).begin(chooser, 1, 100)
    # The draft CODE + 5 was refused, CODE chosen; behind it CODE + 7 was drafted and CODE + 9 chosen.
    row = _row(net, [(end, CODE, CODE + 5), (end + 1, CODE + 7, CODE + 8), (end + 2, CODE + 9, None)])
    drafter.propose([row], [row], states, [1], 0)
    assert row.offsets == [CARRIED, CARRIED, NEARBY]
    embedded, before = net.embedding.table.weight, states[0, 0]
    second, newest = CODE, CODE
    for place, left, read in ((end + 1, 1, CODE + 5), (end + 2, 2, CODE + 8), (end + 3, None, None)):
        state = before if left is None else states[0, left]
        told = second if read is None else read
        before = net.refiner(state[None], embedded[[told]], before[None], embedded[[newest]], torch.tensor([left is not None]))[0]
        scores = net.unembedding.weight[CODE : CODE + 40] @ net.backbone.norm(before) + row.noise.at(place, 40)
        second, newest = newest, CODE + int(scores.argmax())
        assert row.drafts[place - end - 1] == newest


def test_what_has_read_the_true_token_is_drafted_as_it_is(kernels: str) -> None:
    net, end = refining(scale=5.0).requires_grad_(False), len(PICTURE)  # such a refiner would change everything
    chooser = Engine(net).chooser
    states = torch.randn(1, 4, net.config.backbone.width)
    drafter = RefinedDrafts(max_drafts=2).begin(chooser, 1, 100)
    judged = [(end, CODE, CODE), (end + 1, CODE + 7, CODE + 7), (end + 2, CODE + 9, None)]
    row = _row(net, judged)
    drafter.propose([row], [row], states, [1], 0)
    assert row.offsets == [CARRIED, CARRIED]
    if kernels == "one call":
        assert row.drafts == [CODE + 7, CODE + 9]  # the choices themselves
    logits = net.backbone.norm(states[0, 1:]) @ net.unembedding.weight[CODE : CODE + 40].T
    rejecting = _row(net, judged, "rejection")
    rejecting.judged[1:] = [
        (choice, Draft(chosen.token, p)) for (choice, chosen), p in zip(rejecting.judged[1:], logits.softmax(1), strict=False)
    ]
    drafter.propose([rejecting], [rejecting], states, [1], 4)
    assert rejecting.drafts == [CODE + 7, CODE + 9]
    for draft, p in zip(rejecting.proposals, logits.softmax(1), strict=False):
        torch.testing.assert_close(draft.probabilities, p)


def test_rejection_makes_of_what_was_chosen_a_sample_of_what_is_refined(kernels: str) -> None:
    """Kept with probability min(1, q / p) of both distributions there, over many rounds."""
    net, end, kept, expected = refining(scale=0.3).requires_grad_(False), len(PICTURE), 0, 0.0
    chooser, generator = Engine(net).chooser, torch.Generator().manual_seed(0)
    drafter = RefinedDrafts(max_drafts=1).begin(chooser, 1, 100)
    for seed in range(60):
        states = torch.randn(1, 2, net.config.backbone.width, generator=generator)
        row = _row(net, [(end, CODE, CODE + 5), (end + 1, CODE + 7, None)], "rejection")
        row.noise = Noise(seed)
        chosen = row.judged[1][1]
        drafter.propose([row], [row], states, [1], 0)
        ((draft,), embedded) = row.proposals, net.embedding.table.weight
        state = net.refiner(states[0, 1:], embedded[[CODE + 5]], states[0, :1], embedded[[CODE]], torch.tensor([True]))[0]
        q = (net.unembedding.weight[CODE : CODE + 40] @ net.backbone.norm(state)).softmax(0)
        torch.testing.assert_close(draft.probabilities, q, rtol=0.05, atol=1e-4)
        chance = min(1.0, float(q[7] / chosen.probabilities[7]))
        assert (draft.token == CODE + 7) == (row.noise.uniforms(end + 1, end + 1).keep < chance)
        kept, expected = kept + (draft.token == CODE + 7), expected + chance
    assert 0 < kept < 60 and abs(kept - expected) < 12


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("drafts", "again"), [(RefinedDrafts(max_drafts=5), False), (JacobiDrafts(max_drafts=5), False), (JacobiDrafts(max_drafts=5), True)]
)
def test_drafts_that_are_kept_from_round_to_round_leave_the_distribution(
    drafts: Drafts, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last three of five codes of four kinds, of many seeds, beside what the model says of all 1,024 streams. Noise that is used in a
    second round shows.
    """
    layout = replace(LAYOUT, media=(MediaEntry(Modality.IMAGE, "few", codebook_sizes=(4,)),))
    net = replace(model(depth=0).config, layout=layout, tie_embeddings=False).build().eval()
    torch.nn.init.normal_(net.embedding.table.weight, std=1.0)
    torch.nn.init.normal_(net.unembedding.weight, std=0.15)
    net.refiner = random_refiner(scale=0.3)
    code, length, count = layout.code_range(Modality.IMAGE, 0)[0], 5, 3000
    prefix = [*PICTURE[:-2], layout.dim(3), layout.dim(4)]
    if again:
        monkeypatch.setattr(Noise, "uniforms", lambda self, place, begun: Uniforms(*self._generator.at(2, place).random(4).tolist()))
    engine = Engine(net, draft_cost=0, drafts=drafts)
    samplings = [Sampling(seed=seed, verification="rejection") for seed in range(count)]
    rows = engine.generate_batch([prefix] * count, samplings, length, max_lanes=250)
    assert sum((row.stats.accepted for row in rows), Counter())["image", CARRIED] > count / 10
    streams = torch.cartesian_prod(*[torch.arange(4)] * length)
    info = StreamGrammar(layout).analyse(torch.tensor([*prefix, *[code] * length]))
    tokens = torch.cat([torch.tensor(prefix).expand(len(streams), -1), streams + code], 1)
    positions = torch.from_numpy(info.positions).long().expand(len(streams), -1, -1)
    mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril().expand(len(streams), 1, -1, -1)
    with torch.no_grad():
        states = net.backbone.norm(net.backbone(net.embed(tokens), positions, mask))
        logits = states[:, len(prefix) - 1 : -1] @ net.unembedding.weight[code : code + 4].T
    chance = logits.log_softmax(2).gather(2, streams.unsqueeze(2)).sum((1, 2)).exp()
    places = torch.tensor([16, 4, 1])
    wanted = torch.zeros(64).index_add(0, (streams[:, -3:] * places).sum(1), chance) * count
    found = ((torch.tensor([row.new_tokens[-3:] for row in rows]) - code) * places).sum(1).bincount(minlength=64)
    deviation = float(((found - wanted) ** 2 / wanted).sum())
    assert (deviation < 103.4) != again  # 63 degrees of freedom: p < 0.001 above


def test_a_span_ends_with_what_the_grammar_forces(net: UnifiedModel, kernels: str) -> None:
    chooser, end = Engine(net).chooser, len(PICTURE)
    states = torch.randn(1, 4, net.config.backbone.width)
    drafter = RefinedDrafts().begin(chooser, 1, 100)
    last = _row(net, [(end + 10, CODE, CODE + 1), (end + 11, CODE + 3, None)], length=11)
    drafter.propose([last], [last], states, [1], 0)
    assert last.drafts[1:] == [Special.EOI] and last.offsets == [CARRIED, FORCED]  # text is left to others
    fresh = _row(net, [])
    drafter.propose([fresh], [fresh], states, [1], 0)
    assert fresh.drafts == []


def test_codes_of_several_codebooks_are_drafted_each_by_its_own(kernels: str) -> None:
    layout = replace(LAYOUT, media=(MediaEntry(Modality.AUDIO, "sounds", codebook_sizes=(20, 30)),))
    net = replace(model(depth=0).config, layout=layout, tie_embeddings=False).build().eval()
    torch.nn.init.normal_(net.unembedding.weight, std=0.1)
    net.refiner = Refiner.begin(net.config.backbone.width, 16)
    net.refiner.media = frozenset({Modality.AUDIO})
    engine = Engine(net, exact=True, draft_cost=0, drafts=RefinedDrafts(max_drafts=6))
    samplings = [Sampling(seed=seed) for seed in range(4)]
    prefixes = [[Special.BOS, Special.BOA]] * 4
    plain, fast = (engine.generate_batch(prefixes, samplings, 20, speculative) for speculative in (False, True))
    assert [row.tokens for row in fast] == [row.tokens for row in plain]
    assert sum(row.stats.accepted["audio", CARRIED] + row.stats.accepted["audio", NEARBY] for row in fast) > 0


def test_codes_are_refined_by_default_where_there_is_a_refiner(net: UnifiedModel) -> None:
    bare = model(depth=0).eval()
    for (each, way), compiled in product(((net, RefinedDrafts()), (bare, JacobiDrafts())), (False, True)):
        named = Engine(each, draft_cost=0, drafts=DraftsByMedium(codes=way), compile=compiled).generate(PICTURE, Sampling(), 14)
        default = Engine(each, draft_cost=0, compile=compiled).generate(PICTURE, Sampling(), 14)
        assert default.stats.drafted == named.stats.drafted and default.stats.drafted.total()
    with pytest.raises(DecodeError, match=r"drafts by a refiner: the model has none; make one with mmtp refiner"):
        Engine(bare, drafts=RefinedDrafts())


def test_words_are_refined_where_it_has_learnt_them(kernels: str) -> None:
    net = refining()
    counted = replace(net.config).build().eval()
    for drafted, media in (({"image"}, {"image"}), ({"text"}, {"text"}), ({"text", "image"}, {"text", "image"})):
        net.refiner.media = frozenset(media)
        engine = Engine(net, exact=True, draft_cost=0, drafts=RefinedDrafts(max_drafts=5))
        samplings = [Sampling(seed=seed, repetition_penalty=1.3, guidance=2.0) for seed in range(4)]
        prefixes = [PICTURE, TEXT, TEXT[:8], TEXT]
        plain, fast = (engine.generate_batch(prefixes, samplings, 24, speculative) for speculative in (False, True))
        assert [row.tokens for row in fast] == [row.tokens for row in plain]
        kinds = sum((row.stats.drafted for row in fast), Counter())
        assert {medium for medium, offset in kinds if offset != FORCED} == drafted
        ways = DraftsByMedium()._text(net), DraftsByMedium()._codes(net)
        assert [isinstance(way, RefinedDrafts) for way in ways] == ["text" in media, "image" in media]
    assert isinstance(DraftsByMedium()._text(counted), HeadDrafts)
    net.ngrams = NGrams.count([np.array(TEXT)], LAYOUT)
    assert isinstance(DraftsByMedium()._text(net), NGramDrafts)


def test_constrained_answers_are_refined_by_what_they_allow() -> None:
    pytest.importorskip("llguidance")
    net = refining()
    net.refiner.media = frozenset({"text"})
    compiler = Constrainer(LAYOUT, {i: bytes([97 + i]) for i in range(50)}, lambda data: [byte - 97 for byte in data])
    engine = Engine(net, exact=True, draft_cost=0, drafts=RefinedDrafts(max_drafts=4))
    for pattern in ("[a-f]{3,12}", "(ab|cd){2,6}"):
        constraint = compiler.regex(pattern)
        plain, fast = (
            engine.generate(TEXT[:-2], Sampling(seed=5), 20, speculative, constraint=constraint) for speculative in (False, True)
        )
        assert fast.tokens == plain.tokens and fast.stats.drafted.total()


def test_at_least_one_draft_is_wanted() -> None:
    with pytest.raises(ValueError, match="max_drafts 0: at least 1"):
        RefinedDrafts(max_drafts=0)
