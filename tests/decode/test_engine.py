from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtp.decode.costs import BY_CALLS
from mmtp.decode.drafts import HeadDrafts
from mmtp.decode.engine import DecodeError, Engine, Request
from mmtp.decode.pace import Pace
from mmtp.decode.rows import Row
from mmtp.decode.sample import Noise, Sampling, choose, warp
from mmtp.models.heads.base import BELOW
from mmtp.models.heads.sequential import SequentialHead
from mmtp.models.heads.synchronized import SynchronizedHead
from mmtp.models.loss import LossConfig
from mmtp.models.unified import UnifiedModel
from mmtp.stream.grammar import GrammarError, StreamGrammar
from mmtp.stream.packing import PackDocument, collate
from mmtp.stream.vocab import Special
from mmtp.types import Batch, Modality
from tests.models.common import BACKBONE, GRAMMAR, LAYOUT, VECTORS, as_read, asked, document, model, opened, reader

PICTURE = [Special.BOS, Special.USER, 40, 41, Special.END, Special.ASSISTANT, Special.BOI, LAYOUT.dim(5), LAYOUT.dim(6)]
ROW = [*PICTURE[:7], LAYOUT.dim(4), LAYOUT.dim(5), *(LAYOUT.code_range(Modality.IMAGE)[0] + code for code in range(5))]
TEXT = [Special.BOS, Special.USER, 40, 41, 50, Special.END, Special.ASSISTANT]


def taught(net: UnifiedModel) -> UnifiedModel:
    """The model after it has learnt a few documents, so that drafts are accepted often but not always."""
    packed = collate([document(i, grid=(5, 6)) for i in range(6)], GRAMMAR, 150)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        net.loss(packed, LossConfig(mtp_weight=1.0, detach=False)).total.backward()
        optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def trained() -> UnifiedModel:
    return taught(model(depth=3))


@pytest.fixture(scope="module")
def vertical() -> UnifiedModel:
    """One that drafts rows of pictures as well."""
    torch.manual_seed(0)
    head = SynchronizedHead.Config(mtp_depth=2, vertical=4)
    net = UnifiedModel.Config(layout=LAYOUT, backbone=BACKBONE, head=head).build()
    torch.nn.init.normal_(net.embedding.table.weight, std=0.3)
    return taught(net)


def next_logits(net: UnifiedModel, tokens: list[int], ids: torch.Tensor) -> torch.Tensor:
    """Logits of the next token by the training path."""
    with torch.no_grad():
        return net(as_read(tokens))[0][0, -1] @ net.unembedding.weight[ids].T


def guided_logits(net: UnifiedModel, tokens: list[int], ids: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The same, mixed with those of the span alone where it is guided."""
    logits = next_logits(net, tokens, ids)
    if not sampling.guided or not GRAMMAR.begin(tokens).in_span:
        return logits
    opened = len(tokens) - 1 - tokens[::-1].index(Special.BOI)
    alone, own, done = next_logits(net, [Special.BOS, *tokens[opened:]], ids), sampling.of("image"), len(tokens) - opened - 3
    rows, columns = (token - LAYOUT.dim_range[0] + 1 for token in [*tokens, 0, 0][opened + 1 : opened + 3])
    progress = done / max(1, rows * columns - 1) if done > 0 else 0.0
    weight = own.guidance + progress * ((own.guidance if own.guidance_end is None else own.guidance_end) - own.guidance)
    return alone + weight * (logits - alone)


def reference(net: UnifiedModel, prefix: list[int], sampling: Sampling, limit: int) -> list[int]:
    """Decoding as on a blackboard: the whole stream through the training path for every token, twice where it is guided."""
    tokens, noise = list(prefix), Noise(sampling.seed)
    for _ in range(limit):
        state = GRAMMAR.begin(tokens)
        slot, own = LAYOUT.slots[state.slot], sampling.of(state.modality)
        if state.done:
            break
        if slot.forced is not None:
            tokens.append(slot.forced)
            continue
        ids = torch.tensor([i for lo, hi in slot.generable for i in range(lo, hi)])
        logits = guided_logits(net, tokens, ids, sampling)
        logits = torch.where(
            torch.tensor([i in tokens and LAYOUT.text_range[0] <= i < LAYOUT.text_range[1] for i in ids.tolist()]),
            torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty),
            logits,
        )
        tokens.append(int(ids[choose(logits[None], own, noise, [len(tokens)])[0].token]))
    return tokens


@pytest.mark.parametrize("prefix", [PICTURE, TEXT], ids=["picture", "text"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_plain_and_speculative_equal_the_blackboard(trained: UnifiedModel, prefix: list[int], temperature: float, guidance: float) -> None:
    sampling = Sampling(temperature=temperature, guidance=guidance, seed=5)
    wanted = reference(trained, prefix, sampling, 40)
    for way in ({}, {"exact": True}, {"compile": True}, {"exact": True, "compile": True}):
        engine = Engine(trained, **way)
        assert engine.generate(prefix, sampling, 40, speculative=False).tokens == wanted
        assert engine.generate(prefix, sampling, 40, speculative=True).tokens == wanted


MIXED = {"text": {"temperature": 0.0}, "image": {"temperature": 1.5, "min_p": 0.02, "guidance": 1.0, "guidance_end": 4.0}}


@pytest.mark.parametrize("prefix", [PICTURE, TEXT], ids=["picture", "text"])
def test_settings_of_media_schedule_and_penalty_equal_the_blackboard(trained: UnifiedModel, prefix: list[int]) -> None:
    sampling = Sampling(seed=5, repetition_penalty=0.2, per_modality=MIXED)
    wanted = reference(trained, prefix, sampling, 44)
    for speculative in (False, True):
        assert Engine(trained, exact=True).generate(prefix, sampling, 44, speculative).tokens == wanted
    for other in (replace(sampling, repetition_penalty=1.0), replace(sampling, per_modality={})):
        assert Engine(trained, exact=True).generate(prefix, other, 44).tokens != wanted


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    st.sampled_from([0, 1, 3]),
    st.sampled_from([1.0, 0.8]),
    st.sampled_from([1.0, 0.0, 1.5, 4.0]),
    st.integers(0, 45),
)
def test_speculation_never_changes_the_output(
    trained: UnifiedModel, seed: int, temperature: float, top_k: int, top_p: float, guidance: float, limit: int
) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, guidance=guidance, seed=seed)
    engine = Engine(trained, exact=True, draft_cost=0, drafts=HeadDrafts())
    prefix = PICTURE if seed % 2 else TEXT
    plain = engine.generate(prefix, sampling, limit, speculative=False, stop=(Special.END,))
    fast = engine.generate(prefix, sampling, limit, speculative=True, stop=(Special.END,))
    assert fast.tokens == plain.tokens
    assert fast.stats.passes <= plain.stats.passes
    assert len(fast.new_tokens) <= limit


def test_guidance_starts_anew_with_every_picture(trained: UnifiedModel) -> None:
    sampling = Sampling(seed=2, guidance=3.0, temperature=2.0)
    wanted = reference(trained, PICTURE, sampling, 120)
    assert wanted.count(Special.BOI) == 2  # the second is opened after the first, whose keys the branch must not see
    assert wanted != reference(trained, PICTURE, Sampling(seed=2, temperature=2.0), 120)
    for speculative in (False, True):
        assert Engine(trained, exact=True).generate(PICTURE, sampling, 120, speculative).tokens == wanted


def test_drafts_are_accepted_and_save_passes(trained: UnifiedModel) -> None:
    tokens, _ = document(2, grid=(5, 6))
    at = tokens.tolist().index(Special.ASSISTANT) + 1
    engine = Engine(trained, draft_cost=0, drafts=HeadDrafts())
    plain = engine.generate(tokens[:at].tolist(), Sampling(temperature=0.0), 60, speculative=False)
    fast = engine.generate(tokens[:at].tolist(), Sampling(temperature=0.0), 60)
    assert fast.tokens == plain.tokens
    assert plain.stats.per_pass == [1] * len(plain.new_tokens)
    assert fast.stats.generated == len(fast.new_tokens) and 1 < max(fast.stats.per_pass) <= 1 + trained.head.mtp_depth
    assert fast.stats.passes < 0.7 * plain.stats.passes
    accepted, drafted = fast.stats.accepted, fast.stats.drafted
    assert all(accepted[key] <= drafted[key] for key in drafted)
    assert sum(accepted.values()) + fast.stats.passes == fast.stats.generated


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.0, 1.0, 1.5]), st.sampled_from([1.0, 2.0]), st.integers(0, 60))
def test_drafts_of_the_row_above_never_change_the_output(
    vertical: UnifiedModel, seed: int, temperature: float, guidance: float, limit: int
) -> None:
    sampling = Sampling(temperature=temperature, guidance=guidance, seed=seed)
    engine = Engine(vertical, exact=True, draft_cost=0, drafts=HeadDrafts())
    prefix = PICTURE if seed % 2 else TEXT
    plain, fast = (engine.generate(prefix, sampling, limit, speculative) for speculative in (False, True))
    assert fast.tokens == plain.tokens


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_rows_are_drafted_from_those_above_them(vertical: UnifiedModel, guidance: float) -> None:
    tokens = document(2, grid=(5, 6))[0].tolist()
    prefix, sampling = tokens[: tokens.index(Special.BOI)], Sampling(temperature=0.0, guidance=guidance)
    engine = Engine(vertical, exact=True, draft_cost=0, drafts=HeadDrafts())
    fast = engine.generate(prefix, sampling, 34)
    assert fast.tokens == reference(vertical, prefix, sampling, 34)
    drafted, accepted = (counter["image", BELOW] for counter in (fast.stats.drafted, fast.stats.accepted))
    assert 0 < accepted <= drafted
    assert 1 + vertical.head.mtp_depth < max(fast.stats.per_pass) <= 1 + vertical.head.mtp_depth + vertical.head.vertical


def test_a_cost_of_drafts_changes_their_number_alone(vertical: UnifiedModel) -> None:
    sampling = Sampling(seed=3, guidance=2.0)
    rows = [Engine(vertical, exact=True, drafts=HeadDrafts(), draft_cost=cost).generate(PICTURE, sampling, 40) for cost in (0, 0.4, 1.5)]
    assert rows[0].tokens == rows[1].tokens == rows[2].tokens
    assert rows[0].stats.drafted.total() > rows[1].stats.drafted.total() > rows[2].stats.drafted.total() == 0


def test_rows_of_a_batch_draft_from_their_own_pictures(vertical: UnifiedModel) -> None:
    engine, prefixes = Engine(vertical, exact=True, draft_cost=0, drafts=HeadDrafts()), [PICTURE, TEXT, PICTURE[:7]]
    samplings = [Sampling(seed=4, temperature=0.5), Sampling(seed=5), Sampling(seed=6, guidance=2.0)]
    together = engine.generate_batch(prefixes, samplings, 40)
    for prefix, sampling, row in zip(prefixes, samplings, together, strict=True):
        assert row.tokens == engine.generate(prefix, sampling, 40, speculative=False).tokens


def sampled(net: UnifiedModel, prefix: list[int], sampling: Sampling, count: int, length: int) -> Counter[tuple[int, ...]]:
    """How often each continuation comes, over so many seeds, with drafts of every offset that the head has."""
    engine, found, accepted, drafted = (
        Engine(net, draft_cost=0, drafts=HeadDrafts()),
        Counter[tuple[int, ...]](),
        Counter[int](),
        Counter[int](),
    )
    for start in range(0, count, 400):
        samplings = [replace(sampling, seed=start + i) for i in range(min(400, count - start))]
        rows = engine.generate_batch([prefix] * len(samplings), samplings, length)
        found.update(tuple(row.new_tokens) for row in rows)
        for row in rows:
            accepted.update({offset: number for (_, offset), number in row.stats.accepted.items()})
            drafted.update({offset: number for (_, offset), number in row.stats.drafted.items()})
    assert accepted[1] and accepted[2]
    assert drafted[BELOW] or not isinstance(net.head, SynchronizedHead)  # whether any stands hangs on the machine's rounding in training
    return found


def probabilities(net: UnifiedModel, prefix: list[int], sampling: Sampling, length: int) -> dict[tuple[int, ...], float]:
    """Of every continuation of so many tokens."""
    found = {(): 1.0}
    for _ in range(length):
        longer = {}
        for tokens, probability in found.items():
            stream = [*prefix, *tokens]
            ids = torch.tensor([i for lo, hi in LAYOUT.slots[GRAMMAR.begin(stream).slot].generable for i in range(lo, hi)])
            logits = guided_logits(net, stream, ids, sampling)
            for i, p in zip(ids.tolist(), warp(logits[None], sampling).softmax(1)[0].tolist(), strict=True):
                if p > 0:
                    longer[*tokens, i] = probability * p
        found = longer
    return found


def deviation(found: Counter[tuple[int, ...]], wanted: dict[tuple[int, ...], float]) -> float:
    """Chi-square of the last two tokens over its 0.999 quantile (Wilson and Hilferty 1931); rare pairs count as one."""
    assert set(found) <= set(wanted)
    seen, expected = Counter[tuple[int, ...]](), Counter[tuple[int, ...]]()
    for tokens, p in wanted.items():
        seen[tokens[-2:]] += found[tokens]
        expected[tokens[-2:]] += p * sum(found.values())
    common = [pair for pair, number in expected.items() if number >= 8]
    cells = [(seen[pair], expected[pair]) for pair in common]
    rest = seen.total() - sum(s for s, _ in cells), expected.total() - sum(e for _, e in cells)
    cells += [rest] if rest[1] >= 8 else []
    freedom = len(cells) - 1
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    return sum((s - e) ** 2 / e for s, e in cells) / quantile


REJECTION = Sampling(verification="rejection", top_k=3, temperature=5.0)  # so that drafts are often refused


@pytest.mark.parametrize("place", ["text", "guided rows"])
def test_rejection_samples_from_the_models_distribution(
    trained: UnifiedModel, vertical: UnifiedModel, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, prefix, guidance, length = (trained, TEXT, 1.0, 4) if place == "text" else (vertical, ROW, 2.0, 6)
    # Drafts of the row above follow two others: cooler, so that these stand often enough.
    sampling = replace(REJECTION, guidance=guidance, temperature=5.0 if place == "text" else 2.5)
    wanted = probabilities(net, prefix, sampling, length)
    assert deviation(sampled(net, prefix, sampling, 400, length), wanted) < 1
    if place == "text":  # Where a sample of p, not of the residual, takes the place of a refused draft, it shows at once.
        monkeypatch.setattr("mmtp.nn.native.usable", lambda: False)
        monkeypatch.setattr("mmtp.decode.sample._residual", lambda p, drawn: p)
        assert deviation(sampled(net, prefix, sampling, 400, length), wanted) > 1.5


@settings(max_examples=3, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.7, 1.5]), st.sampled_from([1.0, 2.0]))
def test_rejection_does_not_depend_on_the_batch(vertical: UnifiedModel, seed: int, temperature: float, guidance: float) -> None:
    engine, prefixes = Engine(vertical, exact=True, draft_cost=0, drafts=HeadDrafts()), [PICTURE, TEXT, PICTURE[:7]]
    samplings = [Sampling(seed=seed + i, temperature=temperature, guidance=guidance, verification="rejection") for i in range(3)]
    together = engine.generate_batch(prefixes, samplings, 40)
    for prefix, sampling, row in zip(prefixes, samplings, together, strict=True):
        alone = engine.generate(prefix, sampling, 40)
        assert alone.tokens == row.tokens and alone.stats.accepted == row.stats.accepted
        if temperature == 0:
            assert row.tokens == engine.generate(prefix, Sampling(temperature=0.0, guidance=guidance), 40, speculative=False).tokens


@pytest.mark.parametrize("verification", ["coupling", "rejection"])
def test_drafts_are_reckoned_by_the_lanes_of_the_pass_or_where_rejection_judges_of_the_row(verification: str) -> None:
    def wanted(guidance: float, prefix: list[int], lanes: int) -> int:
        sampling = Sampling(guidance=guidance, verification=verification)
        row = Row(GRAMMAR, Request(prefix=prefix, sampling=sampling, max_new_tokens=60), pace=Pace(BY_CALLS.costs(model())))
        row.share_pass(lanes)
        return row.wanted(60)

    inside = [*PICTURE, *[LAYOUT.code_range(Modality.IMAGE, 0)[0]] * 2]
    alone, together = wanted(1.0, inside, 1), wanted(1.0, inside, 8)
    guided = wanted(2.0, inside, 2)
    assert guided < alone  # the branch reads as many
    if verification == "coupling":
        assert together < guided
    else:
        assert together == alone and wanted(2.0, inside, 8) == guided
        assert wanted(2.0, TEXT, 8) == wanted(1.0, TEXT, 1)  # outside of spans the branch rests


def test_the_grammar_holds_whatever_the_model_says() -> None:
    net = model(depth=2).eval()  # untrained: it would write anything
    for seed in range(8):
        tokens = Engine(net).generate([Special.BOS], Sampling(seed=seed, temperature=3.0), 120).tokens
        GRAMMAR.analyse(torch.tensor(tokens))


def test_rows_of_a_batch_equal_their_solo_runs(trained: UnifiedModel) -> None:
    prefixes = [PICTURE, TEXT, TEXT[:3], [Special.BOS], PICTURE[:7]]
    samplings = [Sampling(seed=i, temperature=t, guidance=w) for i, (t, w) in enumerate([(1.0, 2.0), (0, 1), (0.7, 3.0), (1, 1), (0, 1.5)])]
    engine = Engine(trained, exact=True)
    for speculative in (False, True):
        together = engine.generate_batch(prefixes, samplings, 50, speculative, stop=(Special.END,))
        for prefix, sampling, row in zip(prefixes, samplings, together, strict=True):
            assert row.tokens == engine.generate(prefix, sampling, 50, not speculative, stop=(Special.END,)).tokens


def test_a_broken_prefix_is_refused_by_offset(trained: UnifiedModel) -> None:
    with pytest.raises(GrammarError, match="offset 2"):
        Engine(trained).generate([Special.BOS, Special.USER, Special.EOI])
    with pytest.raises(DecodeError, match="row 0: the prefix is empty"):
        Engine(trained).generate([])
    with pytest.raises(DecodeError, match="max_new_tokens -1"):
        Engine(trained).generate(TEXT, max_new_tokens=-1)


@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
def test_a_cache_of_fewer_bits_gives_the_same_with_drafts_and_without(vertical: UnifiedModel, cache: str) -> None:
    engine, samplings = (
        Engine(vertical, exact=True, draft_cost=0, drafts=HeadDrafts(), cache=cache),
        [Sampling(seed=seed) for seed in range(3)],
    )
    prefixes = [PICTURE, TEXT, PICTURE[:7]]
    fast = engine.generate_batch(prefixes, samplings, 30)
    assert [row.tokens for row in fast] == [row.tokens for row in engine.generate_batch(prefixes, samplings, 30, speculative=False)]
    assert fast[0].tokens == engine.generate(PICTURE, samplings[0], 30).tokens
    assert max(row.stats.tokens_per_pass for row in fast) > 1


def test_refuses_a_cache_of_another_kind(trained: UnifiedModel) -> None:
    with pytest.raises(DecodeError, match="cache 'int4': one of None, bfloat16, int8 is wanted"):
        Engine(trained, cache="int4")


def test_half_precision_decodes() -> None:
    net = model(depth=2).eval().to(torch.bfloat16)
    tokens = Engine(net).generate(PICTURE, Sampling(seed=1), 50, stop=(Special.END,)).tokens
    GRAMMAR.analyse(torch.tensor(tokens))


@pytest.fixture(scope="module")
def own_weights() -> UnifiedModel:
    """One whose media have weights of their own."""
    torch.manual_seed(0)
    backbone = replace(BACKBONE, modality_specific="all")
    net = UnifiedModel.Config(layout=LAYOUT, backbone=backbone, head=SequentialHead.Config(mtp_depth=3)).build()
    torch.nn.init.normal_(net.embedding.table.weight, std=0.3)
    return taught(net)


@pytest.mark.parametrize("prefix", [PICTURE, TEXT], ids=["picture", "text"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_media_with_weights_of_their_own_decode_as_on_the_blackboard(own_weights: UnifiedModel, prefix: list[int], guidance: float) -> None:
    sampling = Sampling(guidance=guidance, seed=5)
    wanted = reference(own_weights, prefix, sampling, 44)
    for exact in (False, True):
        for speculative in (False, True):
            assert Engine(own_weights, exact=exact).generate(prefix, sampling, 44, speculative).tokens == wanted


@settings(max_examples=3, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.0, 1.0]), st.integers(20, 45))
def test_rows_of_mixed_media_equal_their_solo_runs(own_weights: UnifiedModel, seed: int, temperature: float, limit: int) -> None:
    prefixes, engine = [PICTURE, TEXT, PICTURE[:7]], Engine(own_weights, exact=True)
    samplings = [Sampling(seed=seed + i, temperature=temperature) for i in range(3)]
    together = engine.generate_batch(prefixes, samplings, limit)
    for prefix, sampling, row in zip(prefixes, samplings, together, strict=True):
        assert row.tokens == engine.generate(prefix, sampling, limit, speculative=False).tokens


def written(net: UnifiedModel, prompt: PackDocument, tokens: list[int], sampling: Sampling, limit: int) -> list[int]:
    """Decoding of a prompt with vectors as on a blackboard."""
    grammar, noise, tokens = StreamGrammar(VECTORS), Noise(sampling.seed), list(tokens)
    for _ in range(limit):
        state = grammar.begin(tokens)
        slot = VECTORS.slots[state.slot]
        if state.done:
            break
        if slot.forced is not None:
            tokens.append(slot.forced)
            continue
        stream, info = torch.tensor([tokens]), grammar.analyse(torch.tensor(tokens))
        packed = Batch(
            tokens=stream,
            positions=torch.from_numpy(info.positions).long()[None],
            document_ids=torch.zeros_like(stream),
            slots=torch.from_numpy(info.slots).long()[None],
            loss_mask=torch.zeros_like(stream, dtype=torch.bool),
            features=prompt.features,
            feature_index=(stream[0] == Special.FEATURE).nonzero()[:, 0],
            feature_grids=torch.from_numpy(prompt.feature_grids),
        )
        ids = torch.tensor([i for lo, hi in slot.generable for i in range(lo, hi)])
        with torch.no_grad():
            logits = net(packed, drafts=False)[0][0, -1] @ net.unembedding.weight[ids].T
        tokens.append(int(ids[choose(logits[None], sampling.of(state.modality), noise, [len(tokens)])[0].token]))
    return tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_vectors_that_cross_attention_reads_decode_as_on_the_blackboard(temperature: float) -> None:
    net = opened(reader()).eval()
    for weight in (net.embedding.features.layers[0].weight, *(block.out.weight for block in net.backbone.cross)):
        torch.nn.init.normal_(weight, std=0.3)
    documents = [asked(3, pictures=2), asked(4)]
    prompts = [[*document.tokens.tolist()[: document.tokens.tolist().index(Special.ASSISTANT) + 1]] for document in documents]
    with torch.no_grad():
        vectors = [net.embedding.connect(document.features, torch.from_numpy(document.feature_grids)) for document in documents]
    samplings = [Sampling(seed=seed, temperature=temperature) for seed in range(3)]
    wanted = [written(net, *each, 16) for each in zip(documents, prompts, samplings, strict=False)]
    assert wanted[0][len(prompts[0]) :] != wanted[1][len(prompts[1]) :]
    for exact in (False, True):
        for speculative in (False, True):
            engine = Engine(net, exact=exact)
            rows = engine.generate_batch([*prompts, TEXT], samplings, 16, speculative, vectors=[*vectors, None])
            assert [row.tokens for row in rows[:2]] == wanted
            assert rows[2].tokens == engine.generate(TEXT, samplings[2], 16, not speculative).tokens
            assert engine.generate(prompts[1], samplings[1], 16, speculative, vectors=vectors[1]).tokens == wanted[1]


@pytest.mark.parametrize(
    ("changes", "cache", "said"),
    [
        ({"modality_specific": "norms"}, None, "modality_specific = 'norms'"),
        ({"cross_attention_every": 1}, None, "cross-attention"),
        ({}, "int8", "not in int8"),
    ],
)
def test_says_what_is_not_compiled(changes: dict[str, object], cache: str | None, said: str) -> None:
    config = UnifiedModel.Config(layout=LAYOUT, backbone=replace(BACKBONE, **changes), feature_width=4 if changes else 0)
    with pytest.raises(DecodeError, match=said):
        Engine(config.build().eval(), cache=cache, compile=True)


def test_compiles_without_being_asked_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiles(cache: str | None = None, dtype: torch.dtype = torch.float32, **changes: object) -> bool:
        net = UnifiedModel.Config(layout=LAYOUT, backbone=replace(BACKBONE, **changes)).build().eval().to(dtype)
        return Engine(net, cache=cache, compile=None).chooser.compiled

    assert compiles()
    assert not Engine(UnifiedModel.Config(layout=LAYOUT, backbone=BACKBONE).build().eval()).chooser.compiled
    assert compiles(dtype=torch.bfloat16)
    assert not compiles(cache="int8") and not compiles(dtype=torch.float64) and not compiles(modality_specific="norms")
    monkeypatch.setattr("mmtp.decode.chooser.usable", lambda: False)
    assert not compiles()


def test_the_first_tokens_are_timed_by_themselves():
    ticks = iter(range(10**6))
    engine = Engine(model(), clock=lambda: float(next(ticks)))
    one, several = (engine.generate(TEXT, Sampling(), most).stats for most in (1, 20))
    assert 0 < one.first <= one.seconds and one.first == several.first < several.seconds


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize(
    "cuts", [{}, {"top_k": 12}, {"top_p": 0.7}, {"top_k": 12, "top_p": 0.7}, {"min_p": 0.05}, {"repetition_penalty": 1.5}], ids=str
)
def test_compiled_output_is_that_of_calls_however_tokens_are_cut(cuts: dict[str, Any], guidance: float) -> None:
    net = model(depth=2).eval()
    by_calls, compiled = Engine(net, draft_cost=0), Engine(net, draft_cost=0, compile=True)
    sampling, prefixes = [Sampling(seed=seed, guidance=guidance, **cuts) for seed in range(3)], [PICTURE, TEXT, PICTURE[:6]]
    alone = [compiled.generate(prefix, each, 30).tokens for prefix, each in zip(prefixes, sampling, strict=True)]
    assert alone == [by_calls.generate(prefix, each, 30).tokens for prefix, each in zip(prefixes, sampling, strict=True)]
    assert alone == [compiled.generate(prefix, each, 30, speculative=False).tokens for prefix, each in zip(prefixes, sampling, strict=True)]
    assert alone == [row.tokens for row in compiled.generate_batch(prefixes, sampling, 30)]
