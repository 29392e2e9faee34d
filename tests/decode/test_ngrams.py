"""Drafts by n-grams: equal output, the distribution they are drawn of, and where they stop."""

import numpy as np
import pytest
import torch

from mmtp.decode.by_medium import DraftsByMedium
from mmtp.decode.chooser import Chooser
from mmtp.decode.engine import DecodeError, Engine
from mmtp.decode.jacobi import JacobiDrafts
from mmtp.decode.ngrams import NGramDrafts
from mmtp.decode.rows import Request, Row
from mmtp.decode.sample import Sampling
from mmtp.models.unified import UnifiedModel
from mmtp.stream.ngrams import NGrams
from mmtp.stream.vocab import Special
from mmtp.types import Modality
from tests.models.common import GRAMMAR, LAYOUT, model

FIRST = LAYOUT.text_range[0]
PROMPT = [Special.BOS, Special.USER, FIRST + 3, FIRST + 4, Special.END, Special.ASSISTANT]
PREFIXES = [PROMPT, [*PROMPT, FIRST + 9], [*PROMPT, Special.BOI, LAYOUT.dim(3), LAYOUT.dim(4)]]


@pytest.fixture(scope="module")
def net() -> UnifiedModel:
    """A model with the counts of what it writes itself."""
    net = model(depth=0, tie_embeddings=False).eval()
    torch.nn.init.normal_(net.unembedding.weight, std=0.6)
    written = Engine(net).generate_batch(PREFIXES * 8, [Sampling(seed=100 + i) for i in range(24)], 40)
    net.ngrams = NGrams.count([np.array(row.tokens) for row in written], LAYOUT)
    return net


def row_of(sampling: Sampling, prefix: list[int] = PROMPT) -> Row:
    return Row(GRAMMAR, Request(prefix=prefix, sampling=sampling))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_coupled_output_is_that_of_plain_decoding(net: UnifiedModel, temperature: float, guidance: float) -> None:
    samplings = [Sampling(seed=seed, temperature=temperature, guidance=guidance, repetition_penalty=0.9) for seed in range(3)]
    for drafts in (NGramDrafts(), NGramDrafts(max_drafts=2), None):
        engine = Engine(net, exact=True, drafts=drafts, draft_cost=0)
        plain, fast = (engine.generate_batch(PREFIXES, samplings, 24, speculative) for speculative in (False, True))
        assert [row.tokens for row in fast] == [row.tokens for row in plain]
        accepted, drafted = (
            sum(count[key] for count in counts for key in count if key[0] == "text")
            for counts in ([row.stats.accepted for row in fast], [row.stats.drafted for row in fast])
        )
        assert 0 < accepted < drafted
        alone = [engine.generate(prefix, sampling, 24) for prefix, sampling in zip(PREFIXES, samplings, strict=True)]
        assert [row.tokens for row in alone] == [row.tokens for row in plain]


@pytest.mark.parametrize("verification", ["coupling", "rejection"])
def test_drafts_are_drawn_of_the_counts(net: UnifiedModel, verification: str) -> None:
    """The first draft of many seeds, by a chi-square test; and what rejection is told is the distribution it was drawn of."""
    assert net.ngrams is not None
    drafter = NGramDrafts(max_drafts=1, least_chance=0.0).begin(Chooser(net), 1, 100)
    expected, seen = dict(zip(*(each.tolist() for each in net.ngrams.predict(PROMPT)), strict=True)), dict[int, int]()
    count = 2000
    for seed in range(count):
        row = row_of(Sampling(seed=seed, verification=verification))
        drafter.propose([row], [row], torch.zeros(1, 1, 48), [0], 0)
        (draft,) = row.proposals
        seen[draft.token] = seen.get(draft.token, 0) + 1
        if verification == "rejection":
            told = drafter.chooser.logits.local(row.state.slot, draft.token)
            assert draft.probabilities is not None and draft.probabilities[told] == pytest.approx(expected[draft.token], rel=1e-4)
    assert set(seen) <= set(expected) and len(expected) > 2
    likely = {token: p for token, p in expected.items() if p * count >= 5}
    chi = sum((seen.get(token, 0) - count * p) ** 2 / (count * p) for token, p in likely.items())
    assert chi < 2 * len(likely) + 20


def test_rejection_keeps_the_distribution(net: UnifiedModel) -> None:
    """The first two tokens of many seeds, beside plain decoding's."""
    engine, count = Engine(net, drafts=NGramDrafts(), draft_cost=0), 800
    pairs = []
    for speculative in (True, False):
        samplings = [Sampling(seed=seed, verification="rejection", top_k=4) for seed in range(count)]
        rows = engine.generate_batch([PROMPT] * count, samplings, 3, speculative, max_lanes=64)
        pairs.append([tuple(row.tokens[len(PROMPT) : len(PROMPT) + 2]) for row in rows])
    kinds = [kind for kind in set(pairs[1]) if pairs[1].count(kind) >= 20]
    assert len(kinds) >= 3
    for kind in kinds:
        one, other = (each.count(kind) / count for each in pairs)
        assert abs(one - other) < 4.5 * (2 * other * (1 - other) / count) ** 0.5


def test_drafts_end_where_nothing_likely_is_known(net: UnifiedModel) -> None:
    assert net.ngrams is not None
    lengths = []
    for least in (0.0, 0.5, 1.0):
        drafter = NGramDrafts(max_drafts=12, least_chance=least).begin(Chooser(net), 1, 100)
        row = row_of(Sampling(temperature=0))
        drafter.propose([row], [row], torch.zeros(1, 1, 48), [0], 0)
        lengths.append(len(row.drafts))
        for place, token in enumerate(row.drafts):
            found = dict(zip(*(each.tolist() for each in net.ngrams.predict((PROMPT + row.drafts)[: len(PROMPT) + place])), strict=True))
            legal = {t: p for t, p in found.items() if LAYOUT.slots[row.draft_states[place].slot].generates(t)}
            assert token == max(legal, key=lambda t: legal[t]) or legal[token] == max(legal.values())
        assert all(LAYOUT.slots[state.slot].modality is Modality.TEXT for state in row.draft_states[:-1])
    assert lengths[0] > lengths[1] >= lengths[2]


def test_a_model_without_counts_is_told_how_to_get_some(net: UnifiedModel) -> None:
    bare = model(depth=2).eval()
    with pytest.raises(DecodeError, match="drafts by n-grams: the model has none; count those of its texts with mmtp ngrams"):
        Engine(bare, drafts=NGramDrafts())
    headless = model(depth=0).eval()
    lengths = [DraftsByMedium(codes=JacobiDrafts(max_drafts=1)).length(each) for each in (headless, bare, net)]
    assert lengths == [1, 2, NGramDrafts().max_drafts]  # of codes alone, of the head, of the counts
    for wrong in ({"max_drafts": 0}, {"least_chance": 1.5}):
        with pytest.raises(ValueError, match="is wanted"):
            NGramDrafts(**wrong)
