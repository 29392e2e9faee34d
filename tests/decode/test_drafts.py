"""Drafts from elsewhere: whoever proposes, the output is that of plain decoding."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtp.decode.cache import KVCache
from mmtp.decode.chooser import Chooser
from mmtp.decode.draft_model import ModelDrafts
from mmtp.decode.drafts import Drafts, HeadDrafts, KeepsNothing
from mmtp.decode.engine import DecodeError, Engine
from mmtp.decode.jacobi import JacobiDrafts
from mmtp.decode.lookup import LookupDrafts
from mmtp.decode.refined import RefinedDrafts
from mmtp.decode.rows import Lane, Request, Row
from mmtp.decode.sample import Draft, Sampling, warp
from mmtp.decode.step import Step
from mmtp.eval.drafts import spoiled
from mmtp.models.heads.base import CARRIED
from mmtp.models.unified import UnifiedModel
from mmtp.stream.vocab import Special, TextEntry, VocabLayout, VocabMismatch
from tests.models.common import BACKBONE, GRAMMAR, LAYOUT, model
from tests.models.test_refiner import random_refiner

PICTURE = [Special.BOS, Special.USER, 40, 41, Special.END, Special.ASSISTANT, Special.BOI, LAYOUT.dim(3), LAYOUT.dim(4)]
# Words that repeat, so that there is something to look up.
TEXT = [Special.BOS, Special.USER, *[40, 41, 42, 43] * 3, Special.END, Special.ASSISTANT, 40, 41]


@pytest.fixture(scope="module")
def large() -> UnifiedModel:
    """Without a head; its next token depends on the last one most, so that streams come to repeat."""
    net = model(depth=0, tie_embeddings=False).eval()
    torch.nn.init.normal_(net.unembedding.weight, std=0.6)
    net.refiner = random_refiner(scale=0.05)
    return net


@pytest.fixture(scope="module")
def small(large: UnifiedModel) -> UnifiedModel:
    """Half the large one's blocks, and near to it, so that its drafts are often right but not always."""
    config = replace(large.config, backbone=replace(BACKBONE, depth=1))
    net = config.build().eval()
    net.load_state_dict(large.state_dict(), strict=False)
    with torch.no_grad():
        net.unembedding.weight += 0.15 * torch.randn(LAYOUT.size, BACKBONE.width, generator=torch.Generator().manual_seed(1))
    return net


@pytest.fixture(params=["lookup", "model", "jacobi", "refined"])
def drafts(request: pytest.FixtureRequest, small: UnifiedModel) -> Drafts:
    ways = {
        "lookup": LookupDrafts(max_drafts=3),
        "model": ModelDrafts(small, max_drafts=3),
        "jacobi": JacobiDrafts(max_drafts=3),
        "refined": RefinedDrafts(max_drafts=3),
    }
    return ways[request.param]


def test_every_way_of_drafting_keeps_the_protocol(drafts: Drafts, large: UnifiedModel) -> None:
    assert all(isinstance(way, Drafts) for way in (drafts, HeadDrafts()))
    assert HeadDrafts().length(large) == 0 and drafts.length(large) == 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_coupled_output_is_that_of_plain_decoding(large: UnifiedModel, drafts: Drafts, temperature: float, guidance: float) -> None:
    engine = Engine(large, exact=True, draft_cost=0, drafts=drafts)
    samplings = [Sampling(seed=seed, temperature=temperature, guidance=guidance, repetition_penalty=0.9) for seed in range(3)]
    prefixes = [PICTURE, TEXT, TEXT[:7]]
    plain, fast = (engine.generate_batch(prefixes, samplings, 40, speculative) for speculative in (False, True))
    assert [row.tokens for row in fast] == [row.tokens for row in plain]
    accepted, drafted = (
        sum(sum(counts.values()) for counts in each) for each in zip(*((r.stats.accepted, r.stats.drafted) for r in fast), strict=True)
    )
    assert 0 < accepted < drafted
    if temperature == 0:
        assert sum(row.stats.passes for row in fast) < sum(row.stats.passes for row in plain)


def test_drafts_that_do_not_pay_are_not_made(large: UnifiedModel, drafts: Drafts) -> None:
    prefixes, samplings = [PICTURE, TEXT], [Sampling(seed=1, guidance=2.0), Sampling(seed=2)]
    runs = [Engine(large, exact=True, drafts=drafts, draft_cost=cost).generate_batch(prefixes, samplings, 40) for cost in (0, 0.8, 2.0)]
    plain = Engine(large, exact=True, draft_cost=0, drafts=drafts).generate_batch(prefixes, samplings, 40, speculative=False)
    for rows in runs:
        assert [row.tokens for row in rows] == [row.tokens for row in plain]
    many, some, none = (sum(sum(row.stats.drafted.values()) / row.stats.passes for row in rows) for rows in runs)
    assert many > some > none == 0
    rejecting = [replace(sampling, verification="rejection") for sampling in samplings]
    engine = Engine(large, exact=True, drafts=drafts, draft_cost=0.8)
    together = engine.generate_batch(prefixes, rejecting, 40)
    assert [row.tokens for row in together] == [engine.generate(p, s, 40).tokens for p, s in zip(prefixes, rejecting, strict=True)]


class Known(KeepsNothing):
    """Drafts by who has read the outcome, and tells it or something else. It is its own drafter."""

    making = 0.3

    def __init__(self, outcomes: Sequence[Sequence[int]], right: bool) -> None:
        self.outcomes, self.right = outcomes, right

    def length(self, model: Step) -> int:
        return 4

    def begin(self, chooser: Chooser, num_lanes: int, capacity: int, exact: bool = False) -> "Known":
        return self

    def propose(self, rows: list[Row], lanes: list[Lane], hidden: torch.Tensor, counts: list[int], least: int) -> None:
        for row in rows:
            outcome = next(tokens for tokens in self.outcomes if tokens[: row.prompt_length] == row.tokens[: row.prompt_length])
            for k, token in enumerate(outcome[len(row.tokens) : len(row.tokens) + 4]):
                legal = [i for lo, hi in LAYOUT.slots[row.draft_states[-1].slot].generable for i in range(lo, hi)]
                told = token if self.right else next((i for i in legal if i != token), None)
                if told is None or not row.wants(self.making) or not row.take_draft(Draft(told), k + 1, self.making):
                    break


@pytest.mark.parametrize("verification", ["coupling", "rejection"])
def test_by_default_what_stands_is_drafted_and_what_never_does_leaves_plain_passes(
    large: UnifiedModel, verification: Literal["coupling", "rejection"], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling, prefixes, most = Sampling(temperature=0.0, verification=verification), [[*TEXT, 40 + i] for i in range(3)], 100
    plain = [row.tokens for row in Engine(large).generate_batch(prefixes, [sampling] * 3, most, speculative=False)]
    assert all(len(tokens) > len(prefix) + 60 for tokens, prefix in zip(plain, prefixes, strict=True))
    begin, widths = KVCache.begin, list[int]()
    monkeypatch.setattr(KVCache, "begin", lambda cache, width, *more: (widths.append(width), begin(cache, width, *more))[1])
    for right in (True, False):
        engine = Engine(large, drafts=Known(plain, right))
        engine.chooser.costs = replace(engine.chooser.costs, fixed=2.0)  # as of ten blocks
        together = engine.generate_batch(prefixes, [sampling] * 3, most)
        for prefix, tokens, other in zip(prefixes, plain, together, strict=True):
            widths.clear()
            row = engine.generate(prefix, sampling, most)
            assert row.tokens == other.tokens == tokens
            if verification == "rejection":
                assert row.stats.drafted == other.stats.drafted  # decisions show in the output, and hang on nothing but the row
            if right:
                assert row.stats.tokens_per_pass > 4.5
            else:
                assert 1 <= sum(row.stats.drafted.values()) <= 16 and sum(width == 1 for width in widths) > len(widths) - 12


def test_a_head_that_drafts_nothing_right_is_soon_asked_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    net, steps = model(depth=2).eval(), list[int]()
    with spoiled(net):
        draft = net.head.draft
        monkeypatch.setattr(net.head, "draft", lambda depth, *given: (steps.append(depth), draft(depth, *given))[1])
        rows = Engine(net, draft_cost=0.5).generate_batch([TEXT] * 4, [Sampling(seed=seed) for seed in range(4)], 100, max_lanes=1)
    assert sum(row.stats.passes for row in rows) > 10 * len(steps) > 0


def test_text_is_looked_up_where_it_stood_last(large: UnifiedModel) -> None:
    fast = Engine(large, draft_cost=0, drafts=LookupDrafts(max_drafts=2)).generate(PICTURE, Sampling(seed=1), 15)
    assert {modality for modality, _ in fast.stats.drafted} <= {"text"}  # codes of pictures are not looked up
    engine = Engine(large, draft_cost=0, drafts=LookupDrafts(max_drafts=3, max_ngram=2))
    drafter = engine.drafts.begin(engine.chooser, 1, 100)
    row = Row(GRAMMAR, Request(prefix=[Special.BOS, Special.USER, 60, 61, 70, 65, 61, 70], max_new_tokens=20))
    row.index = 0
    drafter.propose([row], [row], torch.zeros(1, 1, 1), [1], 0)
    assert row.drafts == [65, 61, 70] and row.offsets == [1, 2, 3]
    row.forget_drafts()
    row.push(50)
    drafter.propose([row], [row], torch.zeros(1, 1, 1), [1], 0)
    assert row.drafts == []  # 50 is new
    row.push(50)
    drafter.propose([row], [row], torch.zeros(1, 1, 1), [1], 0)
    assert row.drafts == [50, 50, 50]  # a short period goes on


@settings(max_examples=2, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1.0, 2.0]))
def test_rejection_does_not_depend_on_the_batch(large: UnifiedModel, small: UnifiedModel, seed: int, guidance: float) -> None:
    for drafts in (LookupDrafts(max_drafts=3), ModelDrafts(small, max_drafts=3), JacobiDrafts(max_drafts=6), RefinedDrafts(max_drafts=6)):
        engine = Engine(large, exact=True, draft_cost=0, drafts=drafts)
        samplings = [Sampling(seed=seed + i, guidance=guidance, verification="rejection") for i in range(3)]
        together = engine.generate_batch([PICTURE, TEXT, TEXT[:7]], samplings, 30)
        for prefix, sampling, row in zip([PICTURE, TEXT, TEXT[:7]], samplings, together, strict=True):
            assert engine.generate(prefix, sampling, 30).tokens == row.tokens


def test_rejection_keeps_the_distribution(large: UnifiedModel, drafts: Drafts) -> None:
    """Of the third token, after a first that is drafted for nothing and a second that is drafted; of the fourth where what was behind a
    draft that was refused is drafted again.
    """
    jacobi = isinstance(drafts, JacobiDrafts | RefinedDrafts)
    prefix, length, count = (PICTURE, 4, 500) if jacobi else (TEXT, 3, 600)
    sampling = Sampling(top_k=3, temperature=3.0, verification="rejection")
    wanted: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        longer = {}
        for tokens, probability in wanted.items():
            state = GRAMMAR.begin([*prefix, *tokens])
            ids = torch.tensor([i for lo, hi in LAYOUT.slots[state.slot].generable for i in range(lo, hi)])
            logits = _logits(large, [*prefix, *tokens])[ids]
            for i, p in zip(ids.tolist(), warp(logits[None], sampling)[0].softmax(0).tolist(), strict=True):
                if p > 0:
                    longer[*tokens, i] = probability * p
        wanted = longer
    engine = Engine(large, draft_cost=0, drafts=drafts)
    rows = engine.generate_batch([prefix] * count, [replace(sampling, seed=seed) for seed in range(count)], length, max_lanes=100)
    drafted = Counter[int]()
    for row in rows:
        drafted.update({offset: number for (_, offset), number in row.stats.drafted.items()})
    assert (drafted[CARRIED] if jacobi else drafted.total()) > 100
    found, expected = Counter(row.new_tokens[-1] for row in rows), Counter[int]()
    for tokens, p in wanted.items():
        expected[tokens[-1]] += p * count
    assert set(found) <= set(expected)
    cells = [(found[token], number) for token, number in expected.items() if number >= 5]
    freedom = len(cells)
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3  # p < 0.001 above (Wilson and Hilferty 1931)
    assert sum((seen - number) ** 2 / number for seen, number in cells) < quantile


def _logits(net: UnifiedModel, tokens: list[int]) -> torch.Tensor:
    positions = torch.from_numpy(GRAMMAR.analyse(torch.tensor(tokens)).positions).long()[None]
    mask = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        states = net.backbone(net.embed(torch.tensor([tokens])), positions, mask)
        return net.unembedding.weight @ net.backbone.norm(states)[0, -1]


def test_a_draft_costs_no_less_than_nothing(large: UnifiedModel) -> None:
    with pytest.raises(DecodeError, match="draft_cost -0.1: a number from 0 up"):
        Engine(large, draft_cost=-0.1)


def test_a_model_of_another_vocabulary_is_refused(large: UnifiedModel) -> None:
    layout = VocabLayout(TextEntry("other", 50), LAYOUT.media, LAYOUT.max_dim)
    other = UnifiedModel.Config(layout=layout, backbone=BACKBONE, head=large.config.head).build()
    with pytest.raises(VocabMismatch, match="the drafting model: text tokenizer is 'other'"):
        Engine(large, drafts=ModelDrafts(other))
