"""All drafts of a row in one call, beside the same by torch."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmtp.nn import native, refinement
from mmtp.nn.native import NativeError, panels
from mmtp.nn.refinement import Place, Refinement

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
        places.append(Place(states, 20 + k, 30 + k, panels(table.bfloat16()), torch.arange(LOGITS.start, LOGITS.stop), noise, 2.5))
    places[5] = places[5]._replace(read=-1)  # so that one has read the token that will stand there
    found, _ = refine(list(before), 15, 16, places, temperature, **cuts)
    places[5] = places[5]._replace(read=found[4])
    found, last = refine(list(before), 15, 16, places, temperature, **cuts)
    wanted, newest, second = [], 15, 16
    for place in places:
        if place.states and place.read == newest:
            before, draft = torch.stack(list(place.states)), place.chosen
        else:
            told = (
                torch.stack(list(place.states)) if place.states else before,
                weights["embedding"][[place.read if place.states else second] * branches],
                before,
                weights["embedding"][[newest] * branches],
            )
            up = torch.cat([F.rms_norm(each, (WIDTH,), eps=1e-6) for each in told], 1) @ weights["told"].T
            gate, value = (up + weights["kind"][int(bool(place.states))]).chunk(2, 1)
            before = told[0] + (F.silu(gate) * value) @ weights["outward"].T
            logits = F.rms_norm(before, (WIDTH,), weights["last_norm"], 1e-5) @ table.T
            logits = logits[0] if branches == 1 else logits[1] + place.weight * (logits[0] - logits[1])
            scores = logits / (temperature or 1)
            if temperature:
                scores = torch.where(cut(scores, **{"top_k": 0, "top_p": 1.0, "min_p": 0.0} | cuts), scores + place.noise, float("-inf"))
            draft = LOGITS.start + int(scores.argmax())
        wanted.append(draft)
        newest, second = draft, newest
    assert found == wanted and found[5] == places[5].chosen
    torch.testing.assert_close(last, before, rtol=1e-4, atol=1e-4)


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
