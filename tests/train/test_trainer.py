import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mmtp.train import checkpoint
from mmtp.train.trainer import Average, OptimConfig, RunConfig, Trainer, TrainError, build_optimizers, hidden_matrices

TINY = Path(__file__).with_name("tiny.py")
_SPEC = importlib.util.spec_from_file_location("tiny", TINY)
tiny = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tiny)


def losses(folder: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records}


def test_it_learns_and_keeps_the_average(tmp_path):
    trainer = tiny.train(tmp_path, 120)
    history = losses(tmp_path)
    assert list(history) == list(range(1, 121))
    assert history[120] < 0.5 * history[1]
    assert trainer.result is not trainer.task.module
    assert not torch.equal(trainer.result[0].weight, trainer.task.module[0].weight)
    assert (tmp_path / "tensorboard").is_dir()


def test_stopped_and_continued_equals_uninterrupted(tmp_path):
    tiny.train(tmp_path / "whole", 20)
    stopped = tmp_path / "stopped"
    trainer = Trainer(tiny.TinyTask(), tiny.OPTIM, RunConfig(steps=20, batch=8, log_every=1, checkpoint_every=5), stopped, progress=False)
    trainer.task.poison_at = 13
    with pytest.raises(TrainError, match="step 13"):
        trainer.fit()
    second = tiny.train(stopped, 20)
    assert losses(stopped) == losses(tmp_path / "whole")
    whole = torch.load(tmp_path / "whole/checkpoints/step-00000020.pt", weights_only=True)
    for name, tensor in second.result.state_dict().items():
        assert torch.equal(tensor, whole["average"][name])


@pytest.mark.parametrize(("name", "task"), [("task", tiny.TinyTask), ("contest", tiny.TinyContest)])
def test_killed_and_continued_equals_uninterrupted(tmp_path, name, task):
    whole = tiny.train(tmp_path / "whole", 60, task=task)
    killed = tmp_path / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, str(TINY), str(killed), "60", name], env=environment)
    try:
        deadline = time.monotonic() + 120
        while not (killed / "checkpoints/step-00000010.pt").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.05)  # some steps beyond the checkpoint, which must be done again
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert max(losses(killed)) < 60
    again = tiny.train(killed, 60, task=task)
    assert losses(killed) == losses(tmp_path / "whole")
    if name == "contest":
        states = (again.task.criterion.state_dict(), whole.task.criterion.state_dict())
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])
        assert states[0]["seen"] == 56


def test_a_criterion_learns_beside_the_module_from_its_first_loss_on(tmp_path):
    start = {name: value.clone() for name, value in tiny.TinyContest().criterion.state_dict().items()}
    early = tiny.train(tmp_path / "early", 4, task=tiny.TinyContest).task.criterion.state_dict()
    assert all(torch.equal(early[name], value) for name, value in start.items())
    trainer = tiny.train(tmp_path / "run", 6, task=tiny.TinyContest)
    assert not torch.equal(trainer.task.criterion[0].weight, start["0.weight"])
    assert [optimizer.defaults["betas"] for optimizer in trainer.criterion_optimizers] == [(0.5, 0.9)]
    records = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert ["critic" in record for record in records] == [False] * 4 + [True] * 2


def test_a_loss_that_is_not_finite_stops_with_one_line(tmp_path):
    trainer = Trainer(tiny.TinyTask(), tiny.OPTIM, RunConfig(steps=9, batch=8, checkpoint_every=3), tmp_path, progress=False)
    trainer.task.poison_at = 4
    with pytest.raises(TrainError, match=r"^step 4: the loss is nan; lower optim\.lr \(now 0\.01\)") as error:
        trainer.fit()
    assert "\n" not in str(error.value)
    assert checkpoint.latest_checkpoint(tmp_path / "checkpoints").name == "step-00000003.pt"


def test_a_criterion_that_is_not_finite_stops_too(tmp_path, monkeypatch):
    poisoned = staticmethod(lambda batch, step: (torch.tensor(float("inf"), requires_grad=True), {}))
    monkeypatch.setattr(tiny.TinyContest, "criterion_loss", poisoned)
    with pytest.raises(TrainError, match=r"^step 0: the criterion's loss is inf; lower its lr \(now 0\.03\)"):
        tiny.train(tmp_path, 3, task=tiny.TinyContest)


def test_a_full_disk_stops_with_one_line_and_loses_nothing(tmp_path, monkeypatch):
    real = os.fsync
    written = []

    def full(descriptor):
        written.append(descriptor)
        if len(written) > 2:  # the first checkpoint is one file and its folder
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(
        TrainError, match=r"step-00000010\.pt: cannot be written \(No space left on device\) at step 10; make room"
    ) as error:
        tiny.train(tmp_path, 20)
    assert "\n" not in str(error.value)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000005.pt"]
    monkeypatch.setattr(checkpoint.os, "fsync", real)
    tiny.train(tmp_path, 20)
    tiny.train(tmp_path / "whole", 20)
    assert losses(tmp_path) == losses(tmp_path / "whole")


def test_time_limit_ends_the_run_with_a_low_rate_and_a_checkpoint(tmp_path):
    trainer = tiny.train(tmp_path, 100_000, pause=0.002, max_minutes=0.5 / 60)
    assert 3 < trainer.step < 1000
    assert checkpoint.latest_checkpoint(tmp_path / "checkpoints").name == f"step-{trainer.step:08d}.pt"
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last["lr"] < 0.1 * tiny.OPTIM.lr
    assert tiny.train(tmp_path, 100_000, max_minutes=0.5 / 60).step == trainer.step


def test_previews_do_not_disturb_the_run(tmp_path):
    tiny.train(tmp_path / "without", 10)
    tiny.train(tmp_path / "with", 10, preview_every=4)
    assert sorted(p.name for p in (tmp_path / "with/previews").iterdir()) == ["4.txt", "8.txt"]
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


def test_schedule(tmp_path):
    optim = OptimConfig(warmup=10, flat=0.5, final=0.1)
    trainer = Trainer(tiny.TinyTask(), optim, RunConfig(steps=100, batch=1), tmp_path, progress=False)
    rates = []
    for trainer.step in range(101):
        rates.append(trainer.rate())
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10:51] == [1.0] * 41
    assert rates[75] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert sorted(rates[50:], reverse=True) == rates[50:]


def test_bfloat16_forward_keeps_float32_weights(tmp_path):
    trainer = tiny.train(tmp_path, 3, precision="bfloat16")
    assert {p.dtype for p in trainer.task.module.parameters()} == {torch.float32}


def test_weight_decay_spares_norms_and_biases():
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    module[0].weight.requires_grad_(True)
    (adamw,) = build_optimizers(module, OptimConfig(weight_decay=0.1))
    decayed, spared = adamw.param_groups
    assert [p.shape for p in decayed["params"]] == [(3, 3)]
    assert (decayed["weight_decay"], spared["weight_decay"], len(spared["params"])) == (0.1, 0.0, 3)


def test_muon_takes_the_hidden_matrices_only():
    module = torch.nn.ModuleDict({"table": torch.nn.Embedding(5, 4), "inner": torch.nn.Linear(4, 6), "unembedding": torch.nn.Linear(4, 5)})
    module["frozen"] = torch.nn.Linear(4, 4)
    module["frozen"].requires_grad_(False)
    adamw, muon = build_optimizers(module, OptimConfig(lr=1e-3, muon_lr=2e-3))
    assert [p is module["inner"].weight for p in muon.param_groups[0]["params"]] == [True]
    assert hidden_matrices(module)[0] is module["inner"].weight
    others = [p for group in adamw.param_groups for p in group["params"]]
    assert {tuple(p.shape) for p in others} == {(5, 4), (6,), (5,)} and len(others) == 4
    assert (adamw.defaults["lr"], muon.defaults["lr"]) == (1e-3, 2e-3)


def test_muon_learns_and_resumes_to_the_same_losses(tmp_path):
    optim = OptimConfig(lr=1e-2, muon_lr=1e-2, warmup=3)

    def run(folder: Path, poison_at: int = -1) -> None:
        trainer = Trainer(tiny.TinyTask(), optim, RunConfig(steps=60, batch=8, log_every=1, checkpoint_every=20), folder, progress=False)
        trainer.task.poison_at = poison_at
        trainer.fit()

    run(tmp_path / "whole")
    with pytest.raises(TrainError, match="step 33"):
        run(tmp_path / "stopped", poison_at=33)
    run(tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert losses(tmp_path / "whole")[60] < 0.6 * losses(tmp_path / "whole")[1]


def test_average_follows_early_and_smooths_later():
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    average = Average(module, 0.9)
    torch.nn.init.ones_(module.weight)
    average.update(module, 0)
    assert average.module.weight.item() == pytest.approx(0.9)
    torch.nn.init.zeros_(module.weight)
    average.update(module, 10_000)
    assert average.module.weight.item() == pytest.approx(0.81)
