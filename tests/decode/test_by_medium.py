"""Drafts by medium: the head sleeps while codes are drafted without it, and nothing of that shows in any output."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtp.decode import drafts as drafts_module
from mmtp.decode.by_medium import DraftsByMedium
from mmtp.decode.chooser import Chooser
from mmtp.decode.drafts import Drafts, HeadDrafter, HeadDrafts
from mmtp.decode.engine import Engine
from mmtp.decode.lookup import LookupDrafts
from mmtp.decode.rows import Request, Row
from mmtp.decode.sample import Sampling
from mmtp.models.heads.base import BELOW, CARRIED, FORCED, NEARBY, HeadConfig
from mmtp.models.heads.depth import DepthHead
from mmtp.models.heads.parallel import ParallelHead
from mmtp.models.heads.sequential import SequentialHead
from mmtp.models.heads.synchronized import SynchronizedHead
from mmtp.models.unified import UnifiedModel
from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.packing import PackDocument
from mmtp.stream.template import Turn, encode_document
from mmtp.stream.vocab import Special
from mmtp.testing.traffic import stir
from mmtp.types import Modality, Segment
from tests.models.common import BACKBONE, GRAMMAR, LAYOUT, VECTORS, model

TEXT = [Special.BOS, Special.USER, *range(40, 60), Special.END, Special.ASSISTANT, 40, 41]
CODE = LAYOUT.code_range(Modality.IMAGE)[0]
PICTURE = [*TEXT, Special.BOI, LAYOUT.dim(3), LAYOUT.dim(4), *range(CODE, CODE + 5)]
PREFIXES = [PICTURE, TEXT, TEXT[:9], PICTURE[:-3]]
HEADS: list[HeadConfig] = [
    SequentialHead.Config(mtp_depth=3),
    SynchronizedHead.Config(mtp_depth=2, vertical=3),
    ParallelHead.Config(mtp_depth=2),
    DepthHead.Config(mtp_depth=2),
]
KINDS = ["sequential", "synchronized", "parallel", "depth"]


def build(head: HeadConfig, **changes: object) -> UnifiedModel:
    """A model that goes from words to pictures and back: what it writes hangs on all before, and its spans are short."""
    torch.manual_seed(0)
    net = UnifiedModel.Config(**{"layout": LAYOUT, "backbone": BACKBONE, "head": head, **changes}).build().eval()
    stir(net)
    return net


@pytest.fixture(scope="module", params=HEADS, ids=KINDS)
def net(request: pytest.FixtureRequest) -> UnifiedModel:
    return build(request.param)


@pytest.mark.parametrize("verification", ["coupling", "rejection"])
def test_compiled_in_bfloat16_rows_are_what_they_are_alone_and_plainly(net: UnifiedModel, verification: str) -> None:
    half = copy.deepcopy(net).bfloat16()
    engine = Engine(half, draft_cost=0, compile=True)
    samplings = [Sampling(seed=i, guidance=1.0 + i % 2, verification=verification) for i in range(4)]
    fast = engine.generate_batch(PREFIXES, samplings, 30, max_lanes=6)
    assert sum(row.stats.drafted.total() for row in fast)
    alone = [engine.generate(prefix, sampling, 30).tokens for prefix, sampling in zip(PREFIXES, samplings, strict=True)]
    assert [row.tokens for row in fast] == alone
    if verification == "coupling":
        plain = engine.generate_batch(PREFIXES, samplings, 30, speculative=False, max_lanes=3)
        assert [row.tokens for row in plain] == alone


@settings(max_examples=2, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([0.0, 1.0, 1.7]),
    st.sampled_from([1.0, 2.0]),
    st.sampled_from([None, 0.0, 0.3]),
    st.integers(0, 20),
)
def test_coupled_output_is_that_of_plain_decoding(
    net: UnifiedModel, seed: int, temperature: float, guidance: float, cost: float | None, waiting: int
) -> None:
    compiled = not net.backbone.uncompiled
    for way in ({}, {"exact": True}, {"compile": compiled}, {"exact": True, "compile": compiled}):
        engine = Engine(net, draft_cost=cost, **way)
        assert engine.drafts == DraftsByMedium()
        samplings = [Sampling(seed=seed + i, temperature=temperature, guidance=guidance) for i in range(4)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(drafts_module, "WAITING", waiting)
            plain, fast = (engine.generate_batch(PREFIXES, samplings, 40, speculative, max_lanes=6) for speculative in (False, True))
        assert [row.tokens for row in fast] == [row.tokens for row in plain]


@settings(max_examples=2, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1.0, 2.0]), st.sampled_from([None, 0.0, 0.3]), st.integers(0, 20))
def test_rejection_hangs_on_no_other_row_and_not_on_when_the_head_reads(
    net: UnifiedModel, seed: int, guidance: float, cost: float | None, waiting: int
) -> None:
    engine = Engine(net, exact=True, draft_cost=cost)
    samplings = [Sampling(seed=seed + i, guidance=guidance, temperature=1.7, verification="rejection") for i in range(4)]
    alone = [engine.generate(prefix, sampling, 40).tokens for prefix, sampling in zip(PREFIXES, samplings, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafts_module, "WAITING", waiting)
        batcher = engine.batcher(max_lanes=4, kept=2, context=100, shared=8)  # rows copy from each other, and take each other's lanes
        rows = [
            batcher.submit(Request(prefix=prefix, sampling=sampling, max_new_tokens=40))
            for prefix, sampling in zip(PREFIXES, samplings, strict=True)
        ]
        while batcher.busy:
            batcher.step()
    assert [row.tokens for row in rows] == alone
    assert batcher.copied_tokens > 0 or guidance != 1


def test_words_are_drafted_by_the_head_and_codes_by_the_pass_before() -> None:
    net, found = build(SynchronizedHead.Config(mtp_depth=3, vertical=3)), set()
    for seed in range(4):
        found |= set(Engine(net, draft_cost=0).generate(PICTURE, Sampling(seed=seed), 60).stats.drafted)
    assert {("text", 1), ("text", 2), ("image", CARRIED), ("image", NEARBY), ("image", FORCED)} <= found
    assert not found & {("image", 1), ("image", BELOW), ("text", CARRIED), ("text", NEARBY)}


def test_what_has_no_head_drafts_codes_alone() -> None:
    net = model(depth=0).eval()
    words = replace(net.config.layout, media=())
    assert [DraftsByMedium().length(replace(net.config, layout=layout).build()) for layout in (LAYOUT, words)] == [12, 0]
    engine = Engine(net, exact=True, draft_cost=0)
    plain, fast = (engine.generate(PICTURE, Sampling(seed=1), 60, speculative) for speculative in (False, True))
    assert fast.tokens == plain.tokens
    assert fast.stats.drafted["image", NEARBY] and {offset for _, offset in fast.stats.drafted} <= {CARRIED, NEARBY, FORCED}


def test_other_ways_may_draft_either() -> None:
    net = build(HEADS[0])
    for ways in (DraftsByMedium(text=LookupDrafts(max_drafts=3)), DraftsByMedium(codes=HeadDrafts())):
        engine = Engine(net, exact=True, draft_cost=0, drafts=ways)
        samplings = [Sampling(seed=seed, guidance=1.0 + seed % 2) for seed in range(4)]
        plain, fast = (engine.generate_batch(PREFIXES, samplings, 40, speculative) for speculative in (False, True))
        assert [row.tokens for row in fast] == [row.tokens for row in plain]
        assert sum(row.stats.accepted.total() for row in fast)


def walk(net: UnifiedModel, drafts: Drafts, encoded: PackDocument, stops: Sequence[int], vectors: torch.Tensor) -> tuple[Row, Any]:
    """A row that reads a stream in pieces, with states that hang on their places alone, and its drafter; drafts are those at its end."""
    tokens = encoded.tokens.tolist()
    row = Row(StreamGrammar(VECTORS), Request(prefix=tokens[: stops[0] + 1], sampling=Sampling(temperature=0.0), vectors=vectors))
    row.index = 0
    drafter = drafts.begin(Chooser(net), 2, 200)
    drafter.focus(0, 1)
    states = torch.randn(1, len(tokens), BACKBONE.width, generator=torch.Generator().manual_seed(1))
    for first, end in pairwise([0, *stops]):
        for token in tokens[len(row.tokens) : end + 1]:
            row.push(token)
        row.forget_drafts()
        with torch.inference_mode():
            drafter.propose([row], [row], states[:, first:end], [end - first], 0)
    return row, drafter


@pytest.mark.parametrize("continuous", ["placeholder", "embeddings", "masked"])
@pytest.mark.parametrize("head", HEADS, ids=KINDS)
@pytest.mark.parametrize("waiting", [4, 512])
def test_a_head_that_slept_drafts_as_one_that_did_not(head: Any, continuous: str, waiting: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads nothing while codes are written, a piece at a time where more wait than may, and then knows what one knows that reads
    the whole stream at once.
    """
    net = build(replace(head, continuous=continuous), layout=VECTORS, feature_width=5)
    picture = Segment(Modality.IMAGE, features=torch.randn(2, 3, 5), target=False)
    words, codes = Segment(Modality.TEXT, torch.arange(6), target=False), Segment(Modality.IMAGE, torch.arange(12).view(1, 3, 4))
    encoded = encode_document(VECTORS, (Turn("user", (picture, words)), Turn("assistant", (codes, words))))
    tokens, vectors = encoded.tokens.tolist(), torch.randn(6, BACKBONE.width)
    inside, closed = tokens.index(Special.BOI) + 4, tokens.index(Special.EOI)
    stops = [inside, inside + 3, inside + 4, closed - 1, closed, closed + 3]
    calls: list[int] = []
    for name in ("draft", "below"):
        if hasattr(net.head, name):
            monkeypatch.setattr(net.head, name, partial(_counted, getattr(net.head, name), calls))
    wide, drafter = walk(net, HeadDrafts(), encoded, stops[-1:], vectors)
    monkeypatch.setattr(drafts_module, "WAITING", waiting)
    calls.clear()
    for i in range(1, len(stops)):
        row, slept = walk(net, DraftsByMedium(text=HeadDrafts()), encoded, stops[:i], vectors)
        assert set(row.offsets) <= {FORCED}  # there was no pass before that chose any code
        assert slept.held(0) == stops[i - 1]
        assert (slept.text.waiting.count(0) <= waiting) if net.head.num_caches else not slept.text.waiting.count(0)
    assert bool(calls) == (waiting < inside and net.head.num_caches > 0)
    row, slept = walk(net, DraftsByMedium(text=HeadDrafts()), encoded, stops, vectors)
    assert row.drafts and row.drafts == wide.drafts and row.offsets == wide.offsets
    text, known = slept.text, stops[-1] - net.head.mtp_depth
    assert isinstance(text, HeadDrafter) and text.held(0) == drafter.held(0) == stops[-1] and not text.waiting.count(0)
    torch.testing.assert_close(text.cache.storage[:, :, 0, :, :known], drafter.cache.storage[:, :, 0, :, :known], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(text._below[0, :known], drafter._below[0, :known], atol=1e-5, rtol=1e-4)


def _counted(call: Callable[..., Any], calls: list[int], *given: Any) -> Any:
    calls.append(1)
    return call(*given)


def test_what_waits_is_copied_and_exchanged_with_what_was_read() -> None:
    net = build(HEADS[0])
    drafter = HeadDrafts().begin(Chooser(net), 3, 200)
    row = Row(GRAMMAR, Request(prefix=TEXT))
    row.index, states = 0, torch.randn(1, len(TEXT), BACKBONE.width)
    drafter.focus(0, 1)
    with torch.inference_mode():
        drafter.propose([row], [row], states[:, :10], [10], 0)
        drafter.propose([], [row], states[:, 10:15], [5], 0)
        for length, read, waiting in ((12, 10, 2), (15, 10, 5), (7, 7, 0)):
            drafter.copy(0, 1, length)
            assert (drafter.held(1), drafter.cache.held(1), drafter.waiting.count(1)) == (length, read, waiting)
            assert torch.equal(drafter.cache.storage[:, :, 1, :, :read], drafter.cache.storage[:, :, 0, :, :read])
        drafter.copy(0, 1, 12)
        drafter.swap(1, 2)
        assert [drafter.held(lane) for lane in range(3)] == [15, 0, 12]
        assert torch.equal(drafter.waiting.take(2, 2), states[0, 10:12])
        drafter.restart(0)
        assert drafter.held(0) == 0
