"""All drafts of a row in one call, beside the same by torch."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmtp.nn import native, refinement
from mmtp.nn.native import NativeError, pairs
from mmtp.nn.refinement import Place, Refinement, Trail

WIDTH, HIDDEN, IDS = 20, 9, 70  # none of them a multiple of a panel
LOGITS = range(13, 60)


@pytest.fixture
def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "told": (2 * HIDDEN, 4 * WIDTH),
        "kind": (2, 2 * HIDDEN),
        "outward": (WIDTH, HIDDEN),
        "embedding": (IDS, WIDTH),
        "last_norm": (WIDTH,),
    }
    drawn = {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: weight.bfloat16().float() for name, weight in drawn.items()}


def cut(scores: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Which ids the cuts leave, all of them of the whole distribution."""
    p = scores.softmax(0)
    above = torch.stack([p[p > each].sum() for each in p])
    more = torch.stack([(p > each).sum() for each in p])
    return (above < top_p) & (p >= min_p * p.max()) & ((more < top_k) if top_k else torch.ones_like(p, dtype=torch.bool))


def refined(weights: dict[str, Tensor], place: Place, before: Tensor, newest: int, second: int) -> tuple[Tensor, Tensor]:
    """The state of a place, and its logits; what goes into a product is of bfloat16, as weights are."""

    def rounded(x: Tensor) -> Tensor:
        return x.bfloat16().float()

    told = (
        torch.stack(list(place.states)) if place.states else before,
        weights["embedding"][[place.read if place.states else second] * len(before)],
        before,
        weights["embedding"][[newest] * len(before)],
    )
    up = rounded(torch.cat([F.rms_norm(each, (WIDTH,), eps=1e-6) for each in told], 1)) @ weights["told"].T
    gate, value = (up + weights["kind"][int(bool(place.states))]).chunk(2, 1)
    state = told[0] + rounded(F.silu(gate) * value) @ weights["outward"].T
    logits = rounded(F.rms_norm(state, (WIDTH,), weights["last_norm"], 1e-5)) @ weights["embedding"][LOGITS.start : LOGITS.stop].T
    return state, logits[0] if len(before) == 1 else logits[1] + place.weight * (logits[0] - logits[1])


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("cuts", [{}, {"top_k": 4}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 6, "top_p": 0.8}], ids=str)
def test_drafts_are_those_of_one_place_after_the_other(
    weights: dict[str, Tensor], branches: int, temperature: float, cuts: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(1)
    table = weights["embedding"][LOGITS.start : LOGITS.stop]
    refine = Refinement(**weights, eps=1e-6, last_eps=1e-5)
    before, places = torch.randn(branches, WIDTH, generator=generator), []
    for k in range(8):
        states = list(torch.randn(branches, WIDTH, generator=generator)) if k % 3 else []
        noise = torch.randn(len(LOGITS), generator=generator) if temperature else None
        ids = torch.arange(LOGITS.start, LOGITS.stop)
        places.append(Place(pairs(table), ids, 2.5, states, 20 + k, 17 + k, noise=noise))
    places[5] = places[5]._replace(read=0)  # so that one has read the token that will stand there
    ((found, _, _),) = refine([Trail(list(before), 15, 16, places, temperature, **cuts)])
    places[5] = places[5]._replace(read=found[4])
    trail = Trail(list(before), 15, 16, places, temperature, **cuts)
    ((found, drawn_of, last),) = refine([trail])
    # Rows that are drafted together are so as alone, whoever drafts them.
    others = [trail._replace(newest=20 + i, places=places[i:]) for i in range(5)]
    for alone, together in zip([refine([other])[0] for other in (*others, trail)], refine([*others, trail], threads=2), strict=True):
        assert alone.tokens == together.tokens
        torch.testing.assert_close(alone.before, together.before, rtol=0, atol=0)
    wanted, newest, second = [], 15, 16
    for place in places:
        if place.states and place.read == newest:
            before, draft = torch.stack(list(place.states)), LOGITS.start + place.chosen
        else:
            before, logits = refined(weights, place, before, newest, second)
            scores = logits / (temperature or 1)
            if temperature:
                scores = torch.where(cut(scores, **{"top_k": 0, "top_p": 1.0, "min_p": 0.0} | cuts), scores + place.noise, float("-inf"))
            draft = LOGITS.start + int(scores.argmax())
        wanted.append(draft)
        newest, second = draft, newest
    assert found == wanted and found[5] == LOGITS.start + places[5].chosen and drawn_of == [None] * len(places)
    torch.testing.assert_close(last, before, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("cuts", [{}, {"top_k": 4}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 6, "top_p": 0.8}], ids=str)
def test_samples_keep_what_was_chosen_where_they_can(weights: dict[str, Tensor], branches: int, cuts: dict[str, Any]) -> None:
    """One place, by many numbers: each draft is what the maximal coupling of both distributions makes of these numbers."""
    generator = torch.Generator().manual_seed(2)
    ids, table = torch.arange(LOGITS.start, LOGITS.stop), pairs(weights["embedding"][LOGITS.start : LOGITS.stop])
    refine, before = Refinement(**weights, eps=1e-6, last_eps=1e-5), torch.randn(branches, WIDTH, generator=generator)
    states = list(torch.randn(branches, WIDTH, generator=generator))
    place = Place(table, ids, 1.5, states, 20)
    logits = refined(weights, place, before, 15, 16)[1] / 0.8
    q = torch.where(cut(logits, **{"top_k": 0, "top_p": 1.0, "min_p": 0.0} | cuts), logits, float("-inf")).softmax(0)
    earlier, kept, drawn = (torch.randn(len(ids), generator=generator) + logits).softmax(0), 0, 0
    for chosen in (int(q.argmax()), int(earlier.argmax()), 0, 11):
        for keep, draw in torch.rand(12, 2, generator=generator).tolist():
            for of in (earlier, None):
                asked = place._replace(chosen=chosen, drawn_of=of, uniforms=(keep, draw))
                (((found,), (probabilities,), _),) = refine([Trail(list(before), 15, 16, [asked], 0.8, **cuts)])
                torch.testing.assert_close(probabilities, q, rtol=1e-4, atol=1e-6)
                if of is not None and keep * of[chosen] < q[chosen]:
                    wanted, kept = chosen, kept + 1
                else:
                    weight = q if of is None else (q - of).clamp(min=0)
                    sums = weight.double().cumsum(0)
                    wanted, drawn = int(torch.searchsorted(sums, draw * sums[-1], right=True)), drawn + (of is not None)
                assert found == LOGITS.start + wanted
    assert kept > 3 and drawn > 3
    # Of the same distribution, whatever was chosen is kept.
    same = place._replace(chosen=int(q.argmax()), drawn_of=q, uniforms=(0.999, 0.5))
    ((found, _, _),) = refine([Trail(list(before), 15, 16, [same], 0.8, **cuts)])
    (found,) = found
    assert found == LOGITS.start + int(q.argmax())


def test_structures_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(mmtp_refine_layout=type("Function", (), {"__call__": lambda self: 1})())
    monkeypatch.setattr(refinement, "library", lambda: library)
    with pytest.raises(NativeError, match=r"native\.cpp: is of another version of mmtp than this process runs"):
        refinement._kernel.__wrapped__()


def test_without_a_compiler_it_is_not_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.usable()

    def none() -> None:
        raise NativeError("no compiler")

    monkeypatch.setattr(native, "library", none)
    assert not native.usable.__wrapped__()
