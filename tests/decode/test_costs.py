"""What drafts cost: by the sizes of model and head alone."""

from dataclasses import replace

import pytest

from mmtp.decode.costs import BY_CALLS, COMPILED, Costs
from mmtp.hub import from_pretrained
from mmtp.models.heads.base import HeadConfig
from mmtp.models.heads.depth import DepthHead
from mmtp.models.heads.parallel import ParallelHead
from mmtp.models.heads.sequential import SequentialHead
from mmtp.models.heads.shared import SharedHead
from mmtp.models.heads.synchronized import SynchronizedHead
from tests.models.common import BACKBONE, model


def step(head: HeadConfig, depth: int = 8) -> float:
    return BY_CALLS.head_step(replace(model(depth=1).config, backbone=replace(BACKBONE, depth=depth), head=head).build())


@pytest.mark.parametrize("kind", [SequentialHead, SharedHead, SynchronizedHead, ParallelHead, DepthHead])
def test_a_step_of_a_head_costs_the_same_however_far_it_drafts(kind: type) -> None:
    assert step(kind.Config(mtp_depth=1)) == pytest.approx(step(kind.Config(mtp_depth=4)), rel=0.02)
    assert step(kind.Config(mtp_depth=2), depth=4) > step(kind.Config(mtp_depth=2), depth=16)


def test_a_pass_of_the_model_costs_one() -> None:
    large, small = (replace(model(depth=0).config, backbone=replace(BACKBONE, depth=depth)).build() for depth in (6, 2))
    assert BY_CALLS.passes_of(large, large) == COMPILED.passes_of(large, large) == 1.0
    assert COMPILED.passes_of(small, large) == pytest.approx(1 / 3, rel=0.01)
    assert Costs(start=2.0, several=0.0, lane=0.0, token=0.0, draft=0.1, draft_by_calls=0.5).passes_of(small, large) == pytest.approx(
        4 / 8, rel=0.01
    )


@pytest.mark.parametrize("name", ["emoji-s", "omni-s", "vqa-s"])
def test_the_zoos_heads_are_told_as_dear_as_they_were_measured(name: str) -> None:
    assert 0.25 < BY_CALLS.head_step(from_pretrained(name)) < 0.30


def test_a_rows_part_of_a_pass_is_the_smaller_the_more_lanes_share_it() -> None:
    costs = Costs(start=1.0, several=0.3, lane=0.05, token=0.15, draft=0.1, draft_by_calls=0.5)
    assert costs.price() == pytest.approx((0.5, 0.15, 1))
    # Eight lanes of a token cost 1 + 7 · 0.2 passes; of eight with two tokens each, 0.3 + 8 · 0.2 more; with three, 8 · 0.15 more again.
    assert costs.price(8) == pytest.approx((1.9 / 2.4, 1.2 / 2.4, 8 / 2.4))
