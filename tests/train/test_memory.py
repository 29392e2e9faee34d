import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmtp.models.backbone import BackboneConfig
from mmtp.models.heads.sequential import SequentialHead
from mmtp.models.loss import LossConfig
from mmtp.models.unified import UnifiedModel
from mmtp.nn.memory import PeakMemory
from mmtp.train.distributed import ParallelConfig
from mmtp.train.memory import (
    MemoryEstimate,
    OutOfMemory,
    available_memory,
    check_host,
    check_memory,
    estimate_memory,
    recompute_blocks,
    surely_fits,
)
from mmtp.train.trainer import OptimConfig, RunConfig, Trainer
from tests.models.common import LAYOUT, VECTORS, batch, model

TINY = UnifiedModel.Config(
    layout=LAYOUT,
    backbone=BackboneConfig(width=64, depth=2, num_heads=2, num_kv_heads=1, head_dim=32, mlp_width=128),
    head=SequentialHead.Config(mtp_depth=2),
)
SMALL = replace(TINY, backbone=BackboneConfig(width=256, depth=6, num_heads=4, num_kv_heads=2, head_dim=64, mlp_width=704))
MIXED = replace(
    SMALL,
    layout=VECTORS,
    feature_width=16,
    backbone=replace(SMALL.backbone, depth=4, modality_specific="all", cross_attention_every=2),
)
OPTIM = OptimConfig(ema=0.9)


class SameRows:
    """A task that trains a model on the same rows at every step."""

    def __init__(self, module: UnifiedModel, rows: int, budget: int) -> None:
        self.module = module
        packed = batch(rows * 4, budget)
        self.rows = replace(packed, **{name: value[:rows] for name, value in vars(packed).items() if isinstance(value, torch.Tensor)})

    def batch(self, step):
        return self.rows

    def loss(self, batch, step):
        return self.module.loss(batch, LossConfig()).total, {}

    def preview(self, module, log, step):
        raise AssertionError("no preview was asked for")


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("config", "rows", "precision"),
    [(TINY, 4, "float32"), (TINY, 2, "bfloat16"), (SMALL, 2, "float32"), (MIXED, 2, "float32")],
)
def test_the_estimate_is_what_training_takes(
    config: UnifiedModel.Config, rows: int, precision: str, recompute: bool, tmp_path: Path
) -> None:
    run = RunConfig(steps=2, batch=rows, precision=precision)
    with PeakMemory() as memory:
        built = config.build()
        if recompute:
            recompute_blocks(built)
        Trainer(SameRows(built, rows, 128), OPTIM, run, tmp_path, progress=False).fit()
    estimate = estimate_memory(config, OPTIM, run, budget=128, recompute=recompute)
    assert memory.peak / 1.3 < estimate.total < memory.peak * 1.3, f"{memory.peak / 2**20:.1f} MiB measured, {estimate}"


def test_recomputed_blocks_have_the_same_gradients_and_take_less() -> None:
    found = []
    for recompute in (False, True):
        net, packed = model(2), batch(8, 160)
        if recompute:
            recompute_blocks(net)
        with PeakMemory() as memory:
            net.loss(packed, LossConfig(detach=False)).total.backward()
        found.append((memory.peak, [p.grad for p in net.parameters()]))
    (most, plain), (less, again) = found
    assert less < 0.6 * most
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_processes_divide_what_can_be_divided() -> None:
    run = RunConfig(steps=1, batch=8)
    one = estimate_memory(SMALL, OPTIM, replace(run, batch=1), budget=64)
    eight = estimate_memory(SMALL, OPTIM, run, budget=64, world_size=8)
    assert [getattr(one, name) // 8 for name in ("weights", "gradients", "optimizer", "average")] == [
        eight.weights,
        eight.gradients,
        eight.optimizer,
        eight.average,
    ]
    assert one.gathered == 0 < eight.gathered
    groups = estimate_memory(SMALL, OPTIM, replace(run, parallel=ParallelConfig(replicate=2)), budget=64, world_size=8)
    assert groups.weights == 2 * eight.weights


def test_what_muon_and_a_frozen_backbone_save() -> None:
    run = RunConfig(steps=1, batch=1)
    plain, muon = (estimate_memory(TINY, OptimConfig(muon_lr=rate), run, budget=64) for rate in (0.0, 1.0))
    frozen = estimate_memory(TINY, OptimConfig(), run, budget=64, head_only=True)
    assert plain.optimizer == 2 * plain.weights and plain.average == 0
    assert plain.weights < muon.optimizer < plain.optimizer
    assert frozen.gradients < 0.7 * plain.gradients and frozen.weights == plain.weights


def test_what_does_not_fit_is_said_in_one_line_with_the_arithmetic() -> None:
    gib = 2**30
    estimate = MemoryEstimate(weights=10 * gib, gathered=0, gradients=10 * gib, optimizer=20 * gib, average=0, activations=5 * gib)
    check_memory(estimate, 45 * gib)
    with pytest.warns(UserWarning, match="about weights 10 .* = 45 GiB, and 40 GiB are free"):
        check_memory(estimate, 40 * gib)
    line = r"needs about weights 10 \+ gradients 10 \+ optimizer 20 \+ activations 5 = 45 GiB, and 30 GiB are free; lower run.batch"
    with pytest.raises(OutOfMemory, match=line) as error:
        check_memory(estimate, 30 * gib)
    assert "\n" not in str(error.value)


def test_a_host_that_cannot_hold_the_model_whole_is_told() -> None:
    check_host(2**28, 2**30)
    with pytest.raises(OutOfMemory, match="the main process first holds the whole model in host memory, 2 GiB, and 1 GiB are free"):
        check_host(2**29, 2**30)


def test_small_models_need_no_measurement() -> None:
    assert surely_fits(TINY, 1024, 2**31)
    assert not surely_fits(TINY, 1024, 2**20)
    assert re.fullmatch(r"\d+", str(available_memory(torch.device("cpu"))))
