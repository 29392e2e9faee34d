"""Drafts carried from the pass before: they go on with codes, and change nothing."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtp.decode.drafts import HeadDrafts
from mmtp.decode.engine import Engine
from mmtp.decode.jacobi import JacobiDrafts
from mmtp.decode.lookup import LookupDrafts
from mmtp.decode.rows import Choice, Request, Row
from mmtp.decode.sample import Draft, Sampling
from mmtp.models.heads.base import CARRIED, FORCED, NEARBY
from mmtp.models.unified import UnifiedModel
from mmtp.stream.vocab import MediaEntry, Special
from mmtp.types import Modality
from tests.models.common import GRAMMAR, LAYOUT, model

# Behind such weights the distribution at a place hangs little on the tokens before it, as it does within a surface of a picture.
FLAT = 0.1
CODE = LAYOUT.code_range(Modality.IMAGE, 0)[0]
PICTURE = [Special.BOS, Special.USER, 40, 41, Special.END, Special.ASSISTANT, Special.BOI, LAYOUT.dim(3), LAYOUT.dim(4)]
TEXT = [Special.BOS, Special.USER, *[40, 41, 42, 43] * 3, Special.END, Special.ASSISTANT, 40, 41]


@pytest.fixture(scope="module")
def net() -> UnifiedModel:
    return model(depth=2).eval()


@settings(max_examples=4, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([JacobiDrafts(max_drafts=5), JacobiDrafts(first=HeadDrafts()), JacobiDrafts(max_drafts=4, first=LookupDrafts())]),
    st.sampled_from([0.0, 0.7, 1.5]),
    st.sampled_from([1.0, 2.0]),
    st.sampled_from([None, 0.0, 0.2]),
)
def test_coupled_output_is_that_of_plain_decoding(
    net: UnifiedModel, seed: int, drafts: JacobiDrafts, temperature: float, guidance: float, cost: float | None
) -> None:
    engine = Engine(net, exact=True, drafts=drafts, draft_cost=cost)
    common = Sampling(temperature=temperature, guidance=guidance, top_k=5, repetition_penalty=1.2)
    samplings = [replace(common, seed=seed + i) for i in range(3)]
    prefixes = [PICTURE, TEXT[:8], [*PICTURE, CODE]]
    plain, fast = (engine.generate_batch(prefixes, samplings, 18, speculative) for speculative in (False, True))
    assert [row.tokens for row in fast] == [row.tokens for row in plain]
    assert engine.generate(PICTURE, samplings[0], 18).tokens == plain[0].tokens


def test_what_was_chosen_behind_a_refused_draft_often_stands() -> None:
    net = model(depth=0, tie_embeddings=False).eval()
    torch.nn.init.normal_(net.unembedding.weight, std=FLAT)
    engine, drafted, stood = Engine(net, draft_cost=0, drafts=JacobiDrafts()), Counter[tuple[str, int]](), Counter[tuple[str, int]]()
    rows = engine.generate_batch([PICTURE] * 12, [Sampling(seed=seed) for seed in range(12)], 15)
    for row in rows:
        drafted.update(row.stats.drafted)
        stood.update(row.stats.accepted)
    assert {offset for _, offset in drafted} == {CARRIED, NEARBY, FORCED}
    assert stood["image", CARRIED] > 0.2 * drafted["image", CARRIED]
    assert sum(row.stats.generated for row in rows) > 1.5 * sum(row.stats.passes for row in rows)


def test_codes_that_alternate_between_codebooks_are_drafted_by_those_of_their_own() -> None:
    layout = replace(LAYOUT, media=(MediaEntry(Modality.AUDIO, "sounds", codebook_sizes=(20, 30)),))
    net = replace(model(depth=0).config, layout=layout, tie_embeddings=False).build().eval()
    torch.nn.init.normal_(net.unembedding.weight, std=FLAT)
    engine = Engine(net, exact=True, draft_cost=0, drafts=JacobiDrafts(max_drafts=6))
    samplings = [Sampling(seed=seed) for seed in range(4)]
    prefixes = [[Special.BOS, Special.BOA]] * 4
    plain, fast = (engine.generate_batch(prefixes, samplings, 20, speculative) for speculative in (False, True))
    assert [row.tokens for row in fast] == [row.tokens for row in plain]
    assert sum(row.stats.accepted["audio", CARRIED] + row.stats.accepted["audio", NEARBY] for row in fast) > 0


def _row(prefix: list[int], judged: list[tuple[int, int]], verification: str = "coupling") -> Row:
    """A row whose last pass chose tokens at some places, each drawn of a distribution of its own where rejection judges."""
    row = Row(GRAMMAR, Request(prefix=prefix, sampling=Sampling(verification=verification), max_new_tokens=30))
    row.index = 0
    slot = GRAMMAR.begin(PICTURE).slot
    of = torch.full((40,), 1 / 40) if verification == "rejection" else None
    row.judged = [(Choice(row, column, slot, place), Draft(token, of)) for column, (place, token) in enumerate(judged)]
    return row


def test_places_are_drafted_by_what_was_chosen_there_and_else_by_the_nearest(net: UnifiedModel) -> None:
    chooser, end = Engine(net).chooser, len(PICTURE)
    states = torch.randn(1, 4, net.config.backbone.width)
    drafter = JacobiDrafts(max_drafts=5).begin(chooser, 1, 100)
    row = _row([*PICTURE, CODE], [(end, CODE), (end + 1, CODE + 7), (end + 2, CODE + 9)])
    drafter.propose([row], [row], states, [1], 0)
    assert row.drafts[:2] == [CODE + 7, CODE + 9] and row.offsets == [CARRIED, CARRIED, NEARBY, NEARBY, NEARBY]
    nearest = [Choice(row, 2, row.state.slot, end + j) for j in (3, 4, 5)]
    assert row.drafts[2:] == [choice.token for choice in chooser.pick(states, nearest)]

    rejecting = _row([*PICTURE, CODE], [(end, CODE), (end + 1, CODE + 7), (end + 2, CODE + 9)], "rejection")
    drafter.propose([rejecting], [rejecting], states, [1], 0)
    assert rejecting.offsets == row.offsets and rejecting.drafts[:2] == [CODE + 7, CODE + 9]
    assert rejecting.proposals[:2] == [choice for _, choice in rejecting.judged[1:]]
    logits = net.backbone.norm(states[0, 2]) @ net.unembedding.weight[CODE : CODE + 40].T
    for draft in rejecting.proposals[2:]:
        torch.testing.assert_close(draft.probabilities, logits.softmax(0))

    last = _row([*PICTURE, *[CODE] * 11], [(end + 10, CODE), (end + 11, CODE + 3)])
    drafter.propose([last], [last], states, [1], 0)
    assert last.drafts == [CODE + 3, Special.EOI] and last.offsets == [CARRIED, FORCED]  # text is left to others

    fresh = _row(PICTURE, [])
    drafter.propose([fresh], [fresh], states, [1], 0)
    assert fresh.drafts == []


def test_at_least_one_draft_is_wanted() -> None:
    with pytest.raises(ValueError, match="max_drafts 0: at least 1"):
        JacobiDrafts(max_drafts=0)
