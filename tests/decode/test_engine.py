import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtp.decode.engine import DecodeError, Engine
from mmtp.decode.sample import Sampling, choose
from mmtp.models.heads.base import BELOW
from mmtp.models.heads.synchronized import SynchronizedHead
from mmtp.models.loss import LossConfig
from mmtp.models.unified import UnifiedModel
from mmtp.stream.grammar import GrammarError
from mmtp.stream.packing import collate
from mmtp.stream.vocab import Special
from mmtp.types import Batch
from tests.models.common import BACKBONE, GRAMMAR, LAYOUT, document, model

PICTURE = [Special.BOS, Special.USER, 40, 41, Special.END, Special.ASSISTANT, Special.BOI, LAYOUT.dim(5), LAYOUT.dim(6)]
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
    info = GRAMMAR.analyse(torch.tensor(tokens))
    shape = (1, len(tokens))
    packed = Batch(
        tokens=torch.tensor([tokens]),
        positions=torch.from_numpy(info.positions).long()[None],
        document_ids=torch.zeros(shape, dtype=torch.long),
        slots=torch.from_numpy(info.slots).long()[None],
        loss_mask=torch.ones(shape, dtype=torch.bool),
    )
    with torch.no_grad():
        return net(packed)[0][0, -1] @ net.unembedding.weight[ids].T


def reference(net: UnifiedModel, prefix: list[int], sampling: Sampling, limit: int) -> list[int]:
    """Decoding as on a blackboard: the whole stream through the training path for every token, twice where it is guided."""
    from mmtp.decode.sample import Noise

    tokens, noise = list(prefix), Noise(sampling.seed)
    for _ in range(limit):
        state = GRAMMAR.begin(tokens)
        slot = LAYOUT.slots[state.slot]
        if state.done:
            break
        if slot.forced is not None:
            tokens.append(slot.forced)
            continue
        ids = torch.tensor([i for lo, hi in slot.generable for i in range(lo, hi)])
        logits = next_logits(net, tokens, ids)
        if sampling.guidance != 1 and state.in_span:
            opened = len(tokens) - 1 - tokens[::-1].index(Special.BOI)
            alone = next_logits(net, [Special.BOS, *tokens[opened:]], ids)
            logits = alone + sampling.guidance * (logits - alone)
        tokens.append(int(ids[choose(logits[None], sampling, noise, [len(tokens)])[0]]))
    return tokens


@pytest.mark.parametrize("prefix", [PICTURE, TEXT], ids=["picture", "text"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_plain_and_speculative_equal_the_blackboard(trained: UnifiedModel, prefix: list[int], temperature: float, guidance: float) -> None:
    sampling = Sampling(temperature=temperature, guidance=guidance, seed=5)
    wanted = reference(trained, prefix, sampling, 40)
    for exact in (False, True):
        engine = Engine(trained, exact=exact)
        assert engine.generate(prefix, sampling, 40, speculative=False).tokens == wanted
        assert engine.generate(prefix, sampling, 40, speculative=True).tokens == wanted


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
    engine = Engine(trained, exact=True)
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
    engine = Engine(trained)
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
    engine = Engine(vertical, exact=True)
    prefix = PICTURE if seed % 2 else TEXT
    plain, fast = (engine.generate(prefix, sampling, limit, speculative) for speculative in (False, True))
    assert fast.tokens == plain.tokens


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_rows_are_drafted_from_those_above_them(vertical: UnifiedModel, guidance: float) -> None:
    tokens = document(2, grid=(5, 6))[0].tolist()
    prefix, sampling = tokens[: tokens.index(Special.BOI)], Sampling(temperature=0.0, guidance=guidance)
    engine = Engine(vertical, exact=True)
    fast = engine.generate(prefix, sampling, 34)
    assert fast.tokens == reference(vertical, prefix, sampling, 34)
    drafted, accepted = (counter["image", BELOW] for counter in (fast.stats.drafted, fast.stats.accepted))
    assert 0 < accepted <= drafted
    assert 1 + vertical.head.mtp_depth < max(fast.stats.per_pass) <= 1 + vertical.head.mtp_depth + vertical.head.vertical


def test_rows_of_a_batch_draft_from_their_own_pictures(vertical: UnifiedModel) -> None:
    engine, prefixes = Engine(vertical, exact=True), [PICTURE, TEXT, PICTURE[:7]]
    samplings = [Sampling(seed=4, temperature=0.5), Sampling(seed=5), Sampling(seed=6, guidance=2.0)]
    together = engine.generate_batch(prefixes, samplings, 40)
    for prefix, sampling, row in zip(prefixes, samplings, together, strict=True):
        assert row.tokens == engine.generate(prefix, sampling, 40, speculative=False).tokens


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


def test_half_precision_decodes() -> None:
    net = model(depth=2).eval().to(torch.bfloat16)
    tokens = Engine(net).generate(PICTURE, Sampling(seed=1), 50, stop=(Special.END,)).tokens
    GRAMMAR.analyse(torch.tensor(tokens))
