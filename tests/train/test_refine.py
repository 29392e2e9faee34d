"""Refiners learn from rounds of decoding: what is noted of them, and that drafts then stand more often."""

import math

import pytest
import torch

from mmtp.decode.rows import Request
from mmtp.decode.sample import Sampling
from mmtp.models.refiner import Refiner
from mmtp.models.unified import UnifiedModel
from mmtp.stream.vocab import Special
from mmtp.train.refine import NONE, FitConfig, RefinerLoss, Rounds, collect, fit, overlaps
from mmtp.types import MmtpError, Modality
from tests.models.common import GRAMMAR, LAYOUT, model

CODE = LAYOUT.code_range(Modality.IMAGE, 0)[0]
PICTURE = [Special.BOS, Special.USER, 40, 41, Special.END, Special.ASSISTANT, Special.BOI, LAYOUT.dim(3), LAYOUT.dim(4)]


def requests(count: int, guidance: float = 1.0, first: int = 0) -> list[Request]:
    samplings = [Sampling(seed=first + seed, guidance=guidance) for seed in range(count)]
    return [Request(prefix=PICTURE, sampling=sampling, max_new_tokens=14) for sampling in samplings]


@pytest.fixture(scope="module")
def net() -> UnifiedModel:
    """One whose next code hangs on the last, as in a picture."""
    return model(depth=0).eval().requires_grad_(False)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_rounds_hold_what_was_left_and_what_proved_true(net: UnifiedModel, guidance: float) -> None:
    rounds, per_pass = collect(net, Refiner.begin(net.config.backbone.width, 8), requests(4, guidance))
    assert per_pass >= 1 and len(rounds) > 20
    known, left = rounds.target != NONE, rounds.left != NONE
    assert known[:, 0].all() and left.any() and not left.all()
    assert bool((rounds.tokens[:, 1:][known] >= LAYOUT.dim(1)).all())
    assert Modality.IMAGE in {LAYOUT.slots[slot].modality for slot in rounds.slots[known].unique().tolist()}
    # The first thing that is left is of a refused draft: it has read another token than the one that stands.
    first = left[:, 0]
    assert (rounds.read[:, 0][first] != rounds.tokens[:, 1][first]).all()
    if guidance != 1:
        return
    # What proved true is what one plain pass gives these places.
    for request in requests(4):
        tokens = torch.tensor(_written(net, request))
        states = _states(net, tokens)
        for place in range(len(PICTURE) + 2, len(tokens) - 2):
            same = (rounds.tokens[:, 0] == tokens[place - 2]) & (rounds.tokens[:, 1] == tokens[place - 1])
            found = rounds.states[rounds.target[same & known[:, 0], 0]].float()
            if len(found):
                assert (found - states[place - 1]).abs().amax(1).min() < 2e-2


def _written(net: UnifiedModel, request: Request) -> list[int]:
    from mmtp.decode.engine import Engine

    return Engine(net).generate(request.prefix, request.sampling, request.max_new_tokens, speculative=False).tokens


def _states(net: UnifiedModel, tokens: torch.Tensor) -> torch.Tensor:
    positions = torch.from_numpy(GRAMMAR.analyse(tokens).positions).long()[None]
    mask = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()[None, None]
    return net.backbone(net.embed(tokens[None]), positions, mask)[0]


def test_rounds_are_joined_with_their_states(net: UnifiedModel) -> None:
    refiner = Refiner.begin(net.config.backbone.width, 8)
    one, other = (collect(net, refiner, requests(2, first=first))[0] for first in (0, 10))
    both = one + other
    assert len(both) == len(one) + len(other)
    for name in ("before", "left", "target"):
        here, there = getattr(both, name)[len(one) :], getattr(other, name)
        assert torch.equal(here == NONE, there == NONE)
        assert torch.equal(both.states[here[here != NONE]], other.states[there[there != NONE]])


def test_drafts_stand_more_often_once_it_has_learnt(net: UnifiedModel) -> None:
    refiner = Refiner.begin(net.config.backbone.width, 32)
    rounds, before = collect(net, refiner, requests(48))
    learnt = list(fit(net, refiner, rounds, 150, FitConfig(batch=48, lr=5e-3, precision=torch.float32)))
    assert sum(overlap for _, overlap in learnt[-20:]) > 1.5 * sum(overlap for _, overlap in learnt[:20])
    assert sum(loss for loss, _ in learnt[-20:]) < sum(loss for loss, _ in learnt[:20])
    _, after = collect(net, refiner, requests(24, first=1000))
    assert after > 1.1 * before
    assert not any(weight.requires_grad for weight in refiner.parameters)


def test_what_has_read_the_true_token_is_not_learnt(net: UnifiedModel) -> None:
    rounds, _ = collect(net, Refiner.begin(net.config.backbone.width, 8), requests(8))
    right = (rounds.left != NONE) & (rounds.read == rounds.tokens[:, 1:])
    assert (right & (rounds.target != NONE)).any()
    loss, refiner = RefinerLoss(net), Refiner(*(weight + 0.3 for weight in Refiner.begin(net.config.backbone.width, 8).parameters))
    states = loss.unroll(refiner, rounds, torch.arange(len(rounds)))
    assert torch.equal(states[right], rounds.states[rounds.left[right]].float())
    blind = Rounds(**{**vars(rounds), "target": torch.where(right, NONE, rounds.target)})
    for chosen in torch.arange(len(rounds)).split(16):
        assert torch.equal(loss(refiner, rounds, chosen)[0], loss(refiner, blind, chosen)[0])


def test_media_are_learnt_alike_however_many_rounds_each_has(net: UnifiedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [Request(prefix=[*PICTURE[:6], 42], sampling=Sampling(seed=seed), max_new_tokens=9) for seed in range(3)]
    refiner = Refiner.begin(net.config.backbone.width, 8)
    rounds, _ = collect(net, refiner, [*words, *requests(12)])
    groups = list(rounds.by_medium(LAYOUT).values())
    assert sorted(torch.cat(groups).tolist()) == list(range(len(rounds)))
    text, image = (
        next(group for group in groups if LAYOUT.slots[int(rounds.slots[group[0], 0])].modality is medium)
        for medium in (Modality.TEXT, Modality.IMAGE)
    )
    assert len(text) < len(image) / 2
    drawn, call = [], RefinerLoss.__call__
    monkeypatch.setattr(
        RefinerLoss, "__call__", lambda self, refiner, rounds, chosen: (drawn.append(chosen), call(self, refiner, rounds, chosen))[1]
    )
    list(fit(net, refiner, rounds, 3, FitConfig(batch=10)))
    for chosen in drawn:
        assert [int(torch.isin(chosen, group).sum()) for group in (text, image)] == [5, 5]


def test_words_are_learnt_where_they_are_written(net: UnifiedModel) -> None:
    words = [Special.BOS, Special.USER, 40, 41, Special.END, Special.ASSISTANT, 42]
    refiner = Refiner.begin(net.config.backbone.width, 8)
    with pytest.raises(MmtpError, match="nothing was written that a refiner could learn from"):
        collect(net, refiner, [Request(prefix=words, max_new_tokens=1)])
    rounds, _ = collect(net, refiner, [Request(prefix=words, sampling=Sampling(seed=seed), max_new_tokens=12) for seed in range(8)])
    assert not refiner.media
    list(fit(net, refiner, rounds, 2))
    assert Modality.TEXT in refiner.media


def test_overlap_is_measured_by_medium_and_on_what_was_not_learnt_too(net: UnifiedModel) -> None:
    refiner = Refiner.begin(net.config.backbone.width, 32)
    rounds, _ = collect(net, refiner, requests(12))
    others, _ = collect(net, refiner, requests(24, first=1000))
    before = overlaps(net, refiner, rounds), overlaps(net, refiner, others)
    for _ in fit(net, refiner, rounds, 400, FitConfig(batch=48, lr=5e-3, precision=torch.float32)):
        pass
    learnt, elsewhere = overlaps(net, refiner, rounds), overlaps(net, refiner, others)
    assert set(learnt) == {str(LAYOUT.slots[slot].modality) for slot in rounds.slots[:, 0].tolist()}
    for medium in learnt:
        assert before[1][medium] < elsewhere[medium] < learnt[medium] - 0.05 and before[0][medium] < learnt[medium]
    # Of places that have read the right token nothing is refined.
    right = Rounds(**{**vars(rounds), "left": torch.zeros_like(rounds.left), "read": rounds.tokens[:, 1:].clone()})
    assert all(math.isnan(share) for share in overlaps(net, refiner, right, most=20).values())
