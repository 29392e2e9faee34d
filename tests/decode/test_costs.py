"""What drafts cost: by the sizes of model and head alone."""

from dataclasses import replace

import pytest
import torch

from mmtp.decode.costs import BY_CALLS, COMPILED, Costs
from mmtp.hub import from_pretrained
from mmtp.models.heads.base import HeadConfig
from mmtp.models.heads.depth import DepthHead
from mmtp.models.heads.parallel import ParallelHead
from mmtp.models.heads.sequential import SequentialHead
from mmtp.models.heads.shared import SharedHead
from mmtp.models.heads.synchronized import SynchronizedHead
from mmtp.models.unified import UnifiedModel
from mmtp.nn import native
from mmtp.testing.decoders import LAYOUT, SIZES
from tests.models.common import BACKBONE, model


def step(head: HeadConfig, depth: int = 8) -> float:
    net = replace(model(depth=1).config, backbone=replace(BACKBONE, depth=depth), head=head).build()
    return BY_CALLS.costs(net).head_step(net)


@pytest.mark.parametrize("kind", [SequentialHead, SharedHead, SynchronizedHead, ParallelHead, DepthHead])
def test_a_step_of_a_head_costs_the_same_however_far_it_drafts(kind: type) -> None:
    assert step(kind.Config(mtp_depth=1)) == pytest.approx(step(kind.Config(mtp_depth=4)), rel=0.02)
    assert step(kind.Config(mtp_depth=2), depth=4) > step(kind.Config(mtp_depth=2), depth=16)


def test_a_pass_of_the_model_costs_one() -> None:
    large, small = (replace(model(depth=0).config, backbone=replace(BACKBONE, depth=depth)).build() for depth in (6, 2))
    for way in (BY_CALLS, COMPILED):
        assert way.costs(large).passes_of(large, large) == 1.0
    assert COMPILED.costs(large).passes_of(small, large) == pytest.approx(1 / 3, rel=0.01)
    assert replace(BY_CALLS.costs(large), start=2.0).passes_of(small, large) == pytest.approx(4 / 8, rel=0.01)


@pytest.mark.parametrize("name", ["emoji-s", "omni-s", "vqa-s"])
def test_the_zoos_heads_are_told_as_dear_as_they_were_measured(name: str) -> None:
    net = from_pretrained(name)
    assert 0.25 < BY_CALLS.costs(net).head_step(net) < 0.30


def test_a_rows_part_of_a_pass_is_the_smaller_the_more_lanes_share_it() -> None:
    costs = Costs(fixed=0.8, several=0.3, lane=0.05, drafted=0.05, token=0.15, read=0.0, multiply=0.0)
    assert costs.round() == pytest.approx(1)
    assert costs.price().verifying[:3] == pytest.approx((0.5, 0.15, 0.15)) and costs.price().alone == 1
    # Eight lanes of a token cost 1 + 7 · 0.2 passes; of eight with two tokens each, 0.3 + 8 · 0.2 more; with three, 8 · 0.15 more again.
    assert costs.price(8).verifying[:3] == pytest.approx((1.9 / 2.4, 1.2 / 2.4, 1.2 / 2.4))
    assert costs.price(8).alone == pytest.approx(8 / 2.4)
    assert costs.price().next(10**6) == costs.price().verifying[-1]


def test_tokens_cost_nothing_before_they_take_longer_than_the_weights_to_be_read() -> None:
    costs = Costs(fixed=0, several=0, lane=0, token=0, read=1.0, multiply=0.1, overlap=50)
    assert costs.price().verifying[:8] == pytest.approx([0] * 8, abs=1e-3)
    assert costs.price().verifying[10:12] == pytest.approx([0.1, 0.1], abs=1e-2)
    in_turn = replace(costs, overlap=1).price()
    assert in_turn.verifying[:12] == pytest.approx([0.1 / 1.1] * 12)


# Rounds with eight drafts in rounds with none, as `scripts/bench_rounds.py SIZE` measured them: of one row, and of eight.
MEASURED = {
    ("small", "float32"): ((1.50, 2.97), (2.07, 6.28)),
    ("small", "bfloat16"): ((1.53, 2.75), (2.63, 6.04)),
    ("medium", "float32"): ((1.48, 3.23), (1.54, 6.56)),
    ("medium", "bfloat16"): ((1.46, 2.93), (1.95, 6.41)),
    ("350m", "float32"): ((1.60, 4.08), (1.13, 5.43)),
    ("350m", "bfloat16"): ((1.43, 3.58), (1.11, 5.19)),
}


@pytest.mark.parametrize(("size", "precision"), MEASURED)
def test_rounds_of_models_of_any_size_cost_about_what_was_measured(size: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "exact", lambda weight: weight.dtype == torch.bfloat16)  # here they are no numbers
    with torch.device("meta"):
        net = UnifiedModel.Config(layout=LAYOUT, backbone=SIZES[size]).build().to(getattr(torch, precision))
    for way, measured in zip((BY_CALLS, COMPILED), MEASURED[size, precision], strict=True):
        costs = way.costs(net)
        for rows, ratio in zip((1, 8), measured, strict=True):
            assert costs.round(rows, 8) / costs.round(rows, 0) == pytest.approx(ratio, rel=0.25)
