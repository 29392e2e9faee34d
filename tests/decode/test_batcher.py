"""Rows that come and go: each gets what it would get alone."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import pytest
import torch

from mmtp.decode.batcher import SHARED, Batcher
from mmtp.decode.cache import KVCache
from mmtp.decode.draft_model import ModelDrafts
from mmtp.decode.drafts import HeadDrafts
from mmtp.decode.engine import DecodeError, Engine
from mmtp.decode.jacobi import JacobiDrafts
from mmtp.decode.rows import Request
from mmtp.decode.sample import Sampling, SamplingError
from mmtp.models.heads.next import NextHead
from mmtp.models.heads.sequential import SequentialHead
from mmtp.models.heads.synchronized import SynchronizedHead
from mmtp.models.unified import UnifiedModel
from mmtp.stream.grammar import GrammarError
from mmtp.stream.vocab import Special
from mmtp.testing.traffic import Traffic, stir, trace
from mmtp.types import Modality
from tests.models import test_next_scale
from tests.models.common import BACKBONE, GRAMMAR, LAYOUT, as_read, asked, model, opened, reader
from tests.models.test_writing import BLOCK, FLOW, PROMPT, WIDTH, writer
from tests.models.test_writing import LAYOUT as LAYOUT_OF_VECTORS

WORDS = [Special.BOS, Special.USER, *range(40, 80)]
PICTURE = [*WORDS, Special.END, Special.ASSISTANT, Special.BOI, LAYOUT.dim(3), LAYOUT.dim(4)]
REJECTING = Sampling(verification="rejection", temperature=2.0)


@pytest.fixture(scope="module")
def net() -> UnifiedModel:
    """One that drafts rows of pictures as well."""
    torch.manual_seed(0)
    head = SynchronizedHead.Config(mtp_depth=2, vertical=4)
    built = UnifiedModel.Config(layout=LAYOUT, backbone=BACKBONE, head=head).build().eval()
    torch.nn.init.normal_(built.embedding.table.weight, std=0.3)
    return built


@pytest.fixture(scope="module")
def engine(net: UnifiedModel) -> Engine:
    return Engine(net, exact=True, draft_cost=0)


def run(batcher: Batcher) -> list[int]:
    """Until nothing is left to do; in which order rows ended."""
    return [row.number for _ in iter(lambda: batcher.busy, False) for row in batcher.step()]


def request(prefix: list[int], limit: int = 20, **changes: object) -> Request:
    return Request(prefix=prefix, sampling=Sampling(**changes), max_new_tokens=limit)


def test_lanes_are_given_to_who_comes_next(engine: Engine) -> None:
    batcher = engine.batcher(max_lanes=3, context=100)
    limits = [9, 2, 30, 1, 5, 3]
    rows = [batcher.submit(request(WORDS[: 5 + i], limit, temperature=0.0)) for i, limit in enumerate(limits)]
    rows.append(batcher.submit(request(PICTURE, 8, guidance=2.0)))  # needs two lanes, and so waits longer than it would for one
    seen = 0
    while batcher.busy:
        batcher.step()
        used = sum(len(row.lanes) for row in rows if not row.done and len(row.tokens) > row.prompt_length)
        seen = max(seen, used)
        assert used <= 3
    assert seen == 3
    for row, limit in zip(rows, [*limits, 8], strict=True):
        assert len(row.generation.new_tokens) == limit or row.tokens[-1] == Special.EOS
    assert batcher.cache.storage.shape[2] == 3


def test_variants_of_a_prompt_read_it_once(engine: Engine) -> None:
    batcher = engine.batcher(max_lanes=8)
    asked = [request(WORDS, 12, seed=seed) for seed in range(5)]
    rows = [batcher.submit(one) for one in asked]
    run(batcher)
    assert batcher.copied_tokens == 4 * (len(WORDS) - engine.model.head.mtp_depth)
    for one, row in zip(asked, rows, strict=True):
        assert row.tokens == engine.generate(one.prefix, one.sampling, 12).tokens
    again = batcher.submit(asked[0])  # long after the others are gone
    run(batcher)
    assert batcher.copied_tokens == 5 * (len(WORDS) - engine.model.head.mtp_depth)
    assert again.tokens == rows[0].tokens


def test_a_prompt_is_copied_whole_from_a_row_that_drafted_little() -> None:
    net = model(depth=3).eval()
    stir(net)
    engine = Engine(net, exact=True, draft_cost=0, drafts=HeadDrafts())
    batcher, asked = engine.batcher(max_lanes=1, kept=1), request(WORDS, 30, verification="rejection", temperature=1.7)
    for one in (request(WORDS, 2), asked):  # the first has room for no draft
        row = batcher.submit(one)
        run(batcher)
    assert batcher.copied_tokens == len(WORDS) - 3
    assert row.tokens == engine.generate(WORDS, asked.sampling, 30).tokens


@pytest.mark.parametrize("sampling", [Sampling(seed=4), replace(REJECTING, seed=4)], ids=["coupling", "rejection"])
def test_a_conversation_goes_on_where_it_was(engine: Engine, sampling: Sampling) -> None:
    batcher = engine.batcher(max_lanes=2, context=400)
    first = batcher.submit(Request(prefix=WORDS, sampling=sampling, max_new_tokens=40))
    run(batcher)
    longer = [*first.tokens, *range(40, 50)]
    GRAMMAR.begin(longer)
    before = batcher.copied_tokens
    second = batcher.submit(Request(prefix=longer, sampling=sampling, max_new_tokens=20))
    run(batcher)
    # Of an answer that was drafted, rejection shares nothing: the head has seen drafts there that did not stand.
    alike = len(WORDS) if sampling.rejects else len(first.tokens)
    assert alike - 3 <= batcher.copied_tokens - before <= alike
    alone = engine.generate(longer, sampling, 20)
    assert second.tokens == alone.tokens


def test_what_one_row_has_written_and_another_read_is_shared_no_further_by_rejection(engine: Engine) -> None:
    batcher = engine.batcher(max_lanes=1, kept=3, context=400)
    first = batcher.submit(request(WORDS, 40, seed=4))
    run(batcher)
    longer = [*first.tokens, *range(40, 50)]
    copied = []
    for sampling in (Sampling(seed=5), replace(REJECTING, seed=6)):
        before = batcher.copied_tokens
        row = batcher.submit(Request(prefix=longer, sampling=sampling, max_new_tokens=20))
        run(batcher)
        copied.append(batcher.copied_tokens - before)
        assert row.tokens == engine.generate(longer, sampling, 20).tokens
    assert copied[1] <= len(WORDS) < copied[0]


def test_what_is_oldest_makes_room(engine: Engine) -> None:
    batcher = engine.batcher(max_lanes=1, kept=1, context=100)
    prompts = [[Special.BOS, Special.USER, *range(start, start + 38)] for start in (40, 41, 42)]
    copied = []
    for i in (0, 1, 0, 2, 0, 1):  # the second leaves when the third comes, for the first was used in between
        batcher.submit(request(prompts[i], 3))
        before = batcher.copied_tokens
        run(batcher)
        copied.append(batcher.copied_tokens > before)
    assert copied == [False, False, True, False, True, False]


def test_nothing_is_shared_where_vectors_differ_or_a_span_would_be_cut() -> None:
    net = writer().eval()
    engine = Engine(net, exact=True)
    size = LAYOUT_OF_VECTORS.text_range[0]
    span = [Special.BOF, LAYOUT_OF_VECTORS.dim(2), LAYOUT_OF_VECTORS.dim(3), *[Special.FEATURE] * 6, Special.EOF]
    prefix = [Special.BOS, Special.USER, *range(size, size + 40), *span, size, size + 1]
    opened = prefix.index(Special.BOF) + 3
    with torch.no_grad():
        one, other = (net.embedding.connect(torch.randn(6, WIDTH)) for _ in range(2))
    batcher, copied, rows = engine.batcher(max_lanes=1, kept=3), [], []
    asked = [(one, prefix), (one.clone(), prefix), (other, prefix), (one, [*prefix[:-2], size + 5, size + 6])]
    for vectors, tokens in asked:
        before = batcher.copied_tokens
        rows.append(batcher.submit(Request(prefix=tokens, vectors=vectors, max_new_tokens=12)))
        run(batcher)
        copied.append(batcher.copied_tokens - before)
    assert copied == [0, len(prefix) - 1, opened, len(prefix) - 2]
    for (vectors, tokens), row in zip(asked, rows, strict=True):
        assert row.tokens == engine.generate(tokens, None, 12, vectors=vectors).tokens
    assert rows[0].alike(rows[1], opened + 2) == opened  # positions of a span see each other, so that no part of it can do without the rest


@pytest.mark.parametrize("flow", ["token", "block"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_rows_that_write_vectors_come_and_go(flow: str, guidance: float) -> None:
    net = writer(flow=FLOW if flow == "token" else BLOCK).eval()
    for parameter in net.flow.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    engine = Engine(net, exact=True)
    batcher = engine.batcher(max_lanes=4, context=64, shared=2)
    prompts = [PROMPT, PROMPT[:-3], PROMPT, PROMPT[:-1], PROMPT[:5]]
    asked = [Request(prefix=p, sampling=Sampling(seed=i, guidance=guidance), max_new_tokens=8 + i) for i, p in enumerate(prompts)]
    rows = []
    for one in asked:
        rows.append(batcher.submit(one))
        batcher.step()
    run(batcher)
    for one, row in zip(asked, rows, strict=True):
        alone = engine.generate(one.prefix, one.sampling, one.max_new_tokens)
        assert row.tokens == alone.tokens
        assert (row.generation.vectors is None) == (alone.vectors is None)
        if alone.vectors is not None:
            assert torch.equal(row.generation.vectors, alone.vectors)


def test_each_bad_request_has_its_error_and_touches_no_other(engine: Engine) -> None:
    batcher = engine.batcher(max_lanes=2, context=64)
    good = batcher.submit(request(WORDS, 20))
    batcher.step()
    beyond = LAYOUT.size + 7
    for make, error, message in (
        (lambda: request([]), DecodeError, "row 1: the prefix is empty"),
        (lambda: request([Special.BOS, *[40] * 70]), DecodeError, "row 1: a prefix of 71 tokens leaves no room in a context of 64"),
        (lambda: request([Special.BOS, Special.USER, Special.EOI]), GrammarError, "offset 2"),
        (lambda: request([Special.BOS, beyond]), GrammarError, f"offset 1: .*{beyond}"),
        (lambda: request([Special.BOS, -3]), GrammarError, "offset 1: .*-3"),
        (lambda: request(WORDS, -1), DecodeError, "row 1: max_new_tokens -1"),
        (lambda: request(WORDS, temperature=-0.5), SamplingError, "temperature -0.5"),
    ):
        with pytest.raises(error, match=message):
            batcher.submit(make())
        batcher.step()
    run(batcher)
    assert good.tokens == engine.generate(WORDS, Sampling(), 20).tokens
    with pytest.raises(DecodeError, match="row 0: guidance takes two lanes, and max_lanes is 1"):
        engine.batcher(max_lanes=1).submit(request(WORDS, guidance=2.0))
    with pytest.raises(DecodeError, match="max_lanes 0: 1 or more"):
        engine.batcher(max_lanes=0)


def test_the_context_ends_a_row_as_the_limit_does(engine: Engine) -> None:
    batcher = engine.batcher(context=50)
    row = batcher.submit(request(WORDS, 500))
    run(batcher)
    assert len(row.tokens) == 50 and row.generation.cut
    assert row.tokens == engine.generate(WORDS, Sampling(), 8).tokens


def test_cancelled_rows_leave_at_once(engine: Engine) -> None:
    batcher = engine.batcher(max_lanes=2, context=100)
    rows = [batcher.submit(request(WORDS[: 4 + i], 40, seed=i, temperature=0.0)) for i in range(4)]
    batcher.step()
    batcher.cancel(rows[0])
    batcher.cancel(rows[3])  # before it had a lane
    ended = run(batcher)
    assert sorted(ended) == [1, 2]
    for i in (0, 3):
        with pytest.raises(DecodeError, match=f"row {i}: was cancelled after {len(rows[i].tokens) - 4 - i} new tokens"):
            rows[i].generation  # noqa: B018
    batcher.cancel(rows[1])  # has ended, and stays as it is
    for i in (1, 2):
        assert rows[i].generation.tokens == engine.generate(WORDS[: 4 + i], Sampling(seed=i, temperature=0.0), 40).tokens


def test_a_stream_tells_tokens_as_they_settle(engine: Engine) -> None:
    asked = request(PICTURE, 30, seed=2)
    pieces = list(engine.stream(asked))
    *before, last = pieces
    assert [token for piece in pieces for token in piece.tokens] == last.generation.new_tokens
    assert len(pieces) > 5 and all(piece.tokens and piece.generation is None for piece in before)
    assert last.generation.tokens == engine.generate(asked.prefix, asked.sampling, 30).tokens
    with pytest.raises(DecodeError, match="the prefix is empty"):
        engine.stream(request([]))


def test_streams_go_on_beside_each_other_and_one_that_is_closed_ends_its_row(engine: Engine) -> None:
    batcher = engine.batcher(context=100)
    asked = [request(WORDS[: 4 + i], 30, seed=i, temperature=0.0) for i in range(3)]
    rows = [batcher.submit(one) for one in asked]
    streams = [batcher.stream(row) for row in rows]
    never = batcher.submit(asked[1])
    batcher.stream(never).close()
    assert never.cancelled
    next(streams[1])
    streams[1].close()
    assert rows[1].cancelled and not rows[0].cancelled
    got = {0: [], 2: []}
    for pieces in zip_longest(streams[0], streams[2]):
        for number, piece in zip(got, pieces, strict=True):
            got[number] += piece.tokens if piece else []
    for number, tokens in got.items():
        assert tokens == engine.generate(asked[number].prefix, asked[number].sampling, 30).new_tokens


def test_the_batch_of_an_engine_takes_turns(engine: Engine) -> None:
    prefixes, samplings = [WORDS[: 4 + i] for i in range(6)], [Sampling(seed=i, guidance=2.0 if i == 2 else 1.0) for i in range(6)]
    together, few = (engine.generate_batch(prefixes, samplings, 15, max_lanes=lanes) for lanes in (None, 2))
    assert [row.tokens for row in together] == [row.tokens for row in few]


WHOLE = 1 << 20
LONG = [Special.BOS, Special.USER, *(40 + i * i % 40 for i in range(300)), Special.END, Special.ASSISTANT]


def drafting(way: str, chunk: int, window: int = 0, **changes: object) -> Engine:
    """An engine over a model whose every token hangs on all that it sees before it."""
    heads = {"sequential": SequentialHead.Config(mtp_depth=3), "synchronized": SynchronizedHead.Config(mtp_depth=2, vertical=4)}
    torch.manual_seed(0)
    backbone = replace(BACKBONE, window=window)
    net = replace(model(depth=0).config, backbone=backbone, head=heads.get(way, NextHead.Config())).build().eval()
    stir(net)
    return Engine(net, exact=True, draft_cost=0, drafts=ModelDrafts(net, 2) if way == "model" else HeadDrafts(), chunk=chunk, **changes)


@pytest.mark.parametrize(("way", "chunk"), [("sequential", 7), ("synchronized", 30), ("model", 20)])
def test_prompts_in_chunks_are_prompts_read_at_once(way: str, chunk: int) -> None:
    found = trace(drafting(way, chunk), Traffic(GRAMMAR, chunk, max_new_tokens=12), 24, max_lanes=5, alone=drafting(way, WHOLE))
    assert not found.unequal and found.copied_tokens and found.ended + found.cancelled + found.refused == 24


@pytest.mark.parametrize("way", ["sequential", "synchronized"])
@pytest.mark.parametrize("compiled", [False, True])
def test_chunks_leave_the_same_bits(way: str, compiled: bool) -> None:
    """Of the backbone and of the head, whose deeper offsets look beyond an anchor."""
    held = []
    code = LAYOUT.code_range(Modality.IMAGE)[0]
    picture = [*WORDS, Special.END, Special.ASSISTANT, Special.BOI, LAYOUT.dim(6), LAYOUT.dim(7), *(code + i % 40 for i in range(31))]
    for chunk in (WHOLE, 100, 13, 4):
        batcher = drafting(way, chunk, compile=compiled).batcher(max_lanes=4, context=400)
        rows = [batcher.submit(one) for one in (request(picture, 30, guidance=2.0), request(LONG, 30), request(WORDS, 30))]
        lengths = {row: [len(lane.tokens) for lane in row.lanes] for row in rows}
        found = {}
        while len(found) < len(rows):
            batcher.step()
            for row in rows:
                if row not in found and len(row.tokens) > row.prompt_length:
                    ends = zip(row.lanes, lengths[row], strict=True)
                    caches = (batcher.cache, batcher.drafter.cache)
                    found[row] = [cache.storage[:, :, lane.index, :, :end].clone() for lane, end in ends for cache in caches]
        held.append([each for row in rows for each in found[row]])
    for other in held[1:]:
        assert all(map(torch.equal, other, held[0]))


def test_passes_are_no_wider_than_a_chunk_and_nobody_waits(net: UnifiedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    batcher, seen, begin = Engine(net, chunk=24).batcher(max_lanes=4, context=400), [], KVCache.begin

    def listen(cache: KVCache, width: int, *more: Sequence[int] | None) -> torch.Tensor:
        seen.extend([width * len(cache.lengths)] if cache is batcher.cache else [])
        return begin(cache, width, *more)

    monkeypatch.setattr(KVCache, "begin", listen)
    early = batcher.submit(request(WORDS[:20], 60, seed=1, temperature=0.0))
    batcher.step()
    long = batcher.submit(request(LONG, 10))
    late = batcher.submit(request(WORDS[:9], 4))
    steps = 0
    while long.reading or len(long.tokens) == long.prompt_length:
        before = len(early.tokens)
        batcher.step()
        assert early.done or len(early.tokens) > before
        steps += 1
    assert steps >= len(LONG) // 24 and late.done
    assert max(seen) <= 24
    run(batcher)
    for row, one in ((early, request(WORDS[:20], 60, seed=1, temperature=0.0)), (long, request(LONG, 10)), (late, request(WORDS[:9], 4))):
        assert row.tokens == Engine(net, chunk=WHOLE).generate(one.prefix, one.sampling, one.max_new_tokens).tokens


@pytest.mark.parametrize(
    ("changes", "hybrid"), [({"compile": True}, True), ({"drafts": JacobiDrafts()}, True), ({}, False), ({"exact": True}, False)]
)
def test_prompts_are_read_in_the_passes_of_rows_that_run(
    net: UnifiedModel, changes: dict[str, Any], hybrid: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no pass pads rows to a chunk: one of the head does in torch, one that is exact too."""
    engine = Engine(net, chunk=24, **changes)
    batcher, seen, begin = engine.batcher(max_lanes=4, context=400), [], KVCache.begin

    def listen(cache: KVCache, width: int, *more: Sequence[int] | None) -> torch.Tensor:
        seen.extend([len(cache.lengths)] if cache is batcher.cache else [])
        return begin(cache, width, *more)

    monkeypatch.setattr(KVCache, "begin", listen)
    asked = [request(WORDS[:20], 200, temperature=0.0), request(LONG, 9, seed=1), request(PICTURE, 30, seed=2, guidance=2.0)]
    rows = [batcher.submit(asked[0])]
    batcher.step()
    rows += [batcher.submit(one) for one in asked[1:]]
    seen.clear()
    passes = []
    while any(len(row.tokens) == row.prompt_length for row in rows):
        before = len(rows[0].tokens)
        batcher.step()
        passes.append(len(seen))
        assert len(rows[0].tokens) > before
        seen.clear()
    assert len(passes) > 5 and set(passes) == {1 if hybrid else 2}
    run(batcher)
    for row, one in zip(rows, asked, strict=True):
        assert row.tokens == engine.generate(one.prefix, one.sampling, one.max_new_tokens).tokens


@pytest.mark.parametrize("exact", [False, True])
def test_a_chunk_that_does_not_fit_behind_the_longest_row_is_read_by_itself(net: UnifiedModel, exact: bool) -> None:
    engine, taken = Engine(net, compile=True, exact=exact), set()
    batcher = engine.batcher(max_lanes=2, context=300)
    asked = [request(LONG[:270], 30, temperature=0.0), request([*WORDS, *range(41, 80)], 9, seed=1)]
    rows = [batcher.submit(asked[0])]
    while len(rows[0].tokens) < 285:
        batcher.step()
    rows.append(batcher.submit(asked[1]))
    focus = batcher.cache.focus
    batcher.cache.focus = lambda first, count: (taken.add((first, count)), focus(first, count))[1]
    run(batcher)
    assert (1, 1) in taken
    for row, one in zip(rows, asked, strict=True):
        assert row.tokens == engine.generate(one.prefix, one.sampling, one.max_new_tokens).tokens


def test_rows_that_sample_alike_learn_together_how_many_drafts_pay(net: UnifiedModel) -> None:
    engine = Engine(net)
    batcher = engine.batcher(max_lanes=4, context=100)
    kinds = [{"temperature": 0.5}, {"temperature": 0.7}, {"per_modality": {"image": {"top_k": 5}}}, {"verification": "rejection"}]
    rows = [[batcher.submit(request(WORDS, 3, seed=seed, **kind)) for seed in range(2)] for kind in kinds]
    learnt = [[row.pace.experience for row in pair if row.pace is not None] for pair in rows]
    assert [one is other for one, other in learnt] == [True, True, True, False]
    assert len({id(one) for one, _ in learnt}) == 4 and len(engine.experiences) == 3
    run(batcher)
    assert all(row.done for pair in rows for row in pair)
    # The next batch of the engine goes on from there, that of another one does not.
    again, anew = (each.batcher(context=100).submit(request(WORDS, 3, **kinds[0])) for each in (engine, Engine(net)))
    assert again.pace.experience is learnt[0][0] is not anew.pace.experience


@pytest.mark.parametrize("compiled", [False, True])
def test_lanes_with_tokens_of_any_number_share_a_pass_without_padding(
    net: UnifiedModel, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, ragged, begin = Engine(net, compile=compiled, draft_cost=0), [], KVCache.begin

    def listen(cache: KVCache, width: int, *more: Sequence[int] | None) -> torch.Tensor:
        mask = begin(cache, width, *more)
        ragged.append(cache.ragged is not None)
        return mask

    monkeypatch.setattr(KVCache, "begin", listen)
    prefixes, samplings = [WORDS, PICTURE, WORDS[:9], PICTURE], [Sampling(seed=seed, temperature=0.7) for seed in range(4)]
    together = engine.generate_batch(prefixes, samplings, 20)
    assert sum(ragged) > 5
    for prefix, sampling, row in zip(prefixes, samplings, together, strict=True):
        assert engine.generate(prefix, sampling, 20, speculative=False).tokens == row.tokens


def test_a_row_that_is_cancelled_within_its_prompt_leaves_what_it_has_read(net: UnifiedModel) -> None:
    batcher = Engine(net, exact=True, chunk=40).batcher(max_lanes=2, context=400, kept=1)
    rows = [batcher.submit(request(LONG, 10)), batcher.submit(request(WORDS, 30))]
    for _ in range(3):
        batcher.step()
    assert rows[0].reading
    batcher.cancel(rows[0])
    again = batcher.submit(request(LONG, 10))
    before = batcher.copied_tokens
    run(batcher)
    assert 40 <= batcher.copied_tokens - before <= 120
    whole = Engine(net, exact=True, chunk=WHOLE)
    assert again.tokens == whole.generate(LONG, Sampling(), 10).tokens
    assert rows[1].tokens == whole.generate(WORDS, Sampling(), 30).tokens


def test_variants_of_a_long_prompt_wait_for_the_one_that_reads_it_and_others_pass_them_by(net: UnifiedModel) -> None:
    batcher = Engine(net, exact=True, chunk=64).batcher(max_lanes=4, context=400)
    rows = [batcher.submit(request(LONG, 5, seed=seed)) for seed in range(3)]
    short = batcher.submit(request(WORDS[:8], 3))
    batcher.step()
    batcher.step()
    assert short.done and rows[0].reading
    run(batcher)
    assert batcher.copied_tokens >= 2 * (len(LONG) - net.head.mtp_depth - SHARED)


@pytest.mark.parametrize("chunk", [1, 3, 5, 8])
@pytest.mark.parametrize("exact", [False, True])
def test_vectors_in_chunks(chunk: int, exact: bool) -> None:
    """Those that see each other, those that cross-attention reads, and those that a model writes."""
    documents = [asked(3, pictures=2), asked(4, pictures=3)]
    crossing = opened(reader()).eval()
    for weight in (crossing.embedding.features.layers[0].weight, *(block.out.weight for block in crossing.backbone.cross)):
        torch.nn.init.normal_(weight, std=0.3)
    standing, near = reader(backbone=BACKBONE).eval(), reader(backbone=replace(BACKBONE, window=3)).eval()
    stir(standing)
    stir(near)
    for net in (crossing, standing, near):
        with torch.no_grad():
            vectors = [net.embedding.connect(document.features, torch.from_numpy(document.feature_grids)) for document in documents]
        prompts = [document.tokens.tolist()[:-2] for document in documents]
        samplings = [Sampling(seed=1), Sampling(seed=2, verification="rejection" if exact else "coupling")]
        parts, whole = (Engine(net, exact=exact, chunk=n).generate_batch(prompts, samplings, 8, vectors=vectors) for n in (chunk, WHOLE))
        assert [row.tokens for row in parts] == [row.tokens for row in whole]
    writing = writer(flow=BLOCK).eval()
    parts, whole = (Engine(writing, exact=exact, chunk=n).generate(PROMPT, Sampling(guidance=2.0), 9) for n in (chunk, WHOLE))
    assert parts.tokens == whole.tokens and torch.allclose(parts.vectors, whole.vectors, atol=1e-5)


@pytest.mark.parametrize("known", [0, 3, 8])
def test_scales_after_chunks(known: int) -> None:
    net = test_next_scale.writer(depth=2).eval()
    layout = test_next_scale.LAYOUT
    opening = [Special.BOI, layout.dim(1), layout.dim(test_next_scale.CELLS), *(test_next_scale.FIRST + i for i in range(known))]
    prompt = [Special.BOS, Special.USER, *range(35, 60), Special.END, Special.ASSISTANT, *opening]
    sampling = Sampling(guidance=2.0, seed=3)
    parts, whole = (Engine(net, exact=True, chunk=chunk).generate(prompt, sampling, 30) for chunk in (5, WHOLE))
    assert parts.tokens == whole.tokens


def test_a_chunk_is_of_something(net: UnifiedModel) -> None:
    with pytest.raises(DecodeError, match="chunk 0: 1 or more is wanted"):
        Engine(net, chunk=0)


@pytest.mark.parametrize("way", ["sequential", "model"])
def test_rows_with_a_window_come_and_go_at_any_length(way: str) -> None:
    traffic, alone = Traffic(GRAMMAR, 3, longest=1800, max_new_tokens=12), drafting(way, WHOLE, window=40)
    found = trace(drafting(way, 100, window=40), traffic, 8, max_lanes=3, context=2200, kept=2, alone=alone)
    assert not found.unequal and found.ended + found.cancelled + found.refused == 8


@pytest.mark.parametrize("way", ["sequential", "synchronized", "model"])
def test_of_a_window_what_is_still_held_is_shared(way: str) -> None:
    words = [Special.BOS, Special.USER, *(40 + i * i % 40 for i in range(1100))]
    batcher = drafting(way, 100, window=40).batcher(max_lanes=1, kept=2, context=1400)
    copied, rows = [], []
    asked = [request(words, 6), request([*words, *range(40, 60)], 6), request([*words[:400], *range(40, 60)], 6)]
    for one in asked:
        before = batcher.copied_tokens
        rows.append(batcher.submit(one))
        run(batcher)
        copied.append(batcher.copied_tokens - before)
    assert any(batcher.cache.oldest(lane) for lane in range(3)) and copied[0] == copied[2] == 0 and len(words) - 4 < copied[1] <= len(words)
    for one, row in zip(asked, rows, strict=True):
        assert row.tokens == drafting(way, WHOLE, window=40).generate(one.prefix, one.sampling, 6).tokens


@pytest.mark.parametrize("way", ["sequential", "synchronized"])
@pytest.mark.parametrize("changes", [{}, {"exact": True}, {"compile": True}, {"cache": "int8"}], ids=str)
def test_a_window_keeps_memory_flat_and_gives_what_training_sees(way: str, changes: dict[str, object]) -> None:
    net, block = drafting(way, 64, window=50).model, 512 if "exact" in changes else 64
    prompt = [*LONG[:-2], *LONG[2:-2] * (3 if block == 512 else 0), *LONG[-2:], Special.BOI, LAYOUT.dim(16), LAYOUT.dim(16)]
    engine, sampling = Engine(net, chunk=64, **changes), Sampling(temperature=0.0)
    for tokens, speculative in ((prompt, True), (prompt, False)):
        batcher = engine.batcher(max_lanes=1, context=3000, speculative=speculative)
        row = batcher.submit(Request(prefix=tokens, sampling=sampling, max_new_tokens=250))
        run(batcher)
        assert batcher.cache.capacity <= max(256, 50 + 64 + 2 * block) < len(row.tokens)
        if not changes.get("cache"):
            codes = seen_in_training(net, row.tokens)[len(tokens) - 1 : -1]
            assert codes == row.tokens[len(tokens) :]
        if speculative:
            fast = row.tokens
    assert row.tokens == fast


def seen_in_training(net: UnifiedModel, tokens: list[int]) -> list[int]:
    """The most probable code behind every place, by the training path."""
    low, high = LAYOUT.code_range(Modality.IMAGE)
    with torch.no_grad():
        return ((net(as_read(tokens))[0][0] @ net.unembedding.weight[low:high].T).argmax(-1) + low).tolist()
