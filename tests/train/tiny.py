"""A task of a second, for tests of the loop; as a program it trains in a folder, so that a test can kill it."""

import sys
import time
from pathlib import Path

import torch
from torch import nn

from mmtp.train.trainer import OptimConfig, RunConfig, Trainer

OPTIM = OptimConfig(lr=1e-2, warmup=3, ema=0.9)


class TinyTask:
    """Fits a random linear map; dropout makes it depend on the random state."""

    def __init__(self, pause: float = 0.0) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.2), nn.GELU(), nn.Linear(16, 2))
        self.pause = pause
        self.poison_at = -1

    def batch(self, step):
        return torch.randn(8, 4, generator=torch.Generator().manual_seed(step))

    def loss(self, batch, step):
        time.sleep(self.pause)
        target = batch[:, :2] - batch[:, 2:]
        loss = (self.module(batch) - target).square().mean()
        return (loss * float("nan") if step == self.poison_at else loss), {"samples": 8.0}

    def preview(self, module, log, step):
        assert not module.training
        (log.previews / f"{step}.txt").write_text(str(torch.rand(()).item()))


class TinyContest(TinyTask):
    """The same against a critic with an optimizer of its own, which joins in at step 4."""

    criterion_optim = OptimConfig(lr=3e-2, betas=(0.5, 0.9), warmup=3)

    def __init__(self, pause: float = 0.0) -> None:
        super().__init__(pause)
        self.criterion = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 1))
        self.criterion.register_buffer("seen", torch.zeros(()))

    def loss(self, batch, step):
        loss, metrics = super().loss(batch, step)
        return loss - 0.1 * self.criterion(self.module(batch)).mean(), metrics

    def criterion_loss(self, batch, step):
        if step < 4:
            return None
        self.criterion.seen += 1
        real, fake = self.criterion(batch[:, :2] - batch[:, 2:]), self.criterion(self.module(batch).detach())
        return fake.tanh().mean() - real.tanh().mean() + 0 * self.criterion.seen, {"critic": real.mean().item()}


def train(folder: Path, steps: int, pause: float = 0.0, task: type = TinyTask, **run) -> Trainer:
    settings = {"log_every": 1, "checkpoint_every": 5} | run
    trainer = Trainer(task(pause), OPTIM, RunConfig(steps=steps, batch=8, **settings), folder, progress=False)
    trainer.fit()
    return trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), int(sys.argv[2]), pause=0.02, task={"task": TinyTask, "contest": TinyContest}[sys.argv[3]])
