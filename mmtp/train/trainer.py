"""The one training loop: tokenizers and models are tasks that it optimises.

A task's batch is a pure function of the step, and a checkpoint holds everything else that decides what comes next (weights,
optimizers, average, random states, what the loss itself has learnt). So a run that was killed at any point and started again
gives, on one machine, the same losses bit for bit as a run that was not.
"""

import copy
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from mmtp.config import Config, ConfigError
from mmtp.train.checkpoint import CheckpointError, ShardedCheckpoints, latest_checkpoint, load_checkpoint, load_sharded, save_checkpoint
from mmtp.train.distributed import ParallelConfig, World, local, lost_process, whole
from mmtp.train.log import RunLog
from mmtp.train.muon import Muon
from mmtp.types import MmtpError


class TrainError(MmtpError):
    """A run that cannot go on: names the step and what to do."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Config):
    """AdamW, Muon for hidden matrices if wanted, and the schedule: linear warm-up, flat, then cosine down to ``final`` of the rates.

    Attributes:
        lr: greatest learning rate.
        muon_lr: greatest learning rate of Muon (orthogonalised momentum; Liu et al. 2025, arXiv 2502.16982, whose scaling makes rates
            comparable to AdamW's), which then trains the weights of hidden linear layers; 0 leaves all to AdamW.
        betas: AdamW's decay rates.
        weight_decay: on matrices and kernels only, never on norms and biases.
        warmup: steps of warm-up.
        flat: share of the run after which the rate begins to fall.
        final: share of ``lr`` at the end.
        clip: greatest norm of the gradient.
        ema: decay of the moving average of weights that is kept as the result; 0 keeps the weights themselves.
    """

    lr: float = 1e-3
    muon_lr: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup: int = 50
    flat: float = 0.3
    final: float = 0.02
    clip: float = 1.0
    ema: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """How long a run is and what it leaves behind.

    Attributes:
        steps: optimizer steps.
        batch: samples per step (what a sample is, the task says), over all processes.
        seed: decides weights, data order and every other draw.
        precision: arithmetic of the forward pass; weights stay float32. ``auto``, of a recipe, is what is quicker on the machine where
            the run begins.
        max_minutes: ends the run earlier, by the clock. The schedule then follows the clock as well, so that the rate
            has come down when time is up; such a run is not repeatable to the bit.
        log_every: steps between records.
        checkpoint_every: steps between checkpoints.
        preview_every: steps between previews; 0 makes none.
        parallel: how several processes divide the model.
    """

    steps: int
    batch: int
    seed: int = 0
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    max_minutes: float | None = None
    log_every: int = 20
    checkpoint_every: int = 500
    preview_every: int = 0
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


@runtime_checkable
class Task(Protocol):
    """What the loop needs to know of what it trains."""

    module: nn.Module

    def batch(self, step: int) -> Any:
        """The batch of a step (from 0): a function of seed and step alone."""
        ...

    def loss(self, batch: Any, step: int) -> tuple[Tensor, dict[str, float]]:
        """Scalar loss, and numbers for the log (``tokens`` or ``samples`` among them become a rate per second)."""
        ...

    def preview(self, module: nn.Module, log: RunLog, step: int) -> None:
        """Leaves pictures, sounds or texts in ``log`` that show how far ``module`` (the average, if one is kept) has come."""
        ...


@runtime_checkable
class CriterionTask(Task, Protocol):
    """A task whose loss learns or remembers something itself: a discriminator, running norms of gradients.

    Attributes:
        criterion: holds it. Its parameters train with an optimizer of their own, and its state is part of every checkpoint; of the
            result it is none.
        criterion_optim: that optimizer; the schedule is the run's.
    """

    criterion: nn.Module
    criterion_optim: OptimConfig

    def criterion_loss(self, batch: Any, step: int) -> tuple[Tensor, dict[str, float]] | None:
        """Scalar loss of the criterion's parameters, asked for when the module has taken its step; None where they rest."""
        ...


class Average:
    """Exponential moving average of a module's weights, in a module of its own; buffers are copied."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        # Early on the average would be mostly the random start, so its memory grows with the run.
        decay = min(self.decay, (1 + step) / (10 + step))
        mine, theirs = ([local(p) for p in each.parameters()] for each in (self.module, module))
        torch._foreach_lerp_(mine, theirs, 1 - decay)
        for kept, current in zip(self.module.buffers(), module.buffers(), strict=True):
            kept.copy_(current)


class Trainer:
    """Runs a task to its end, from wherever its folder says it stands.

    Args:
        task: what to train.
        optim: optimizer and schedule.
        run: length, seed, precision, intervals.
        folder: receives ``log.jsonl``, TensorBoard files, ``checkpoints/`` and ``previews/``.
        progress: whether to show a bar.
        world: the processes of the run; among several, the task's module and its average are divided, and losses are means over them.
        start: among several processes, where the task's module was made :func:`~mmtp.nn.memory.without_weights`, gives it with those that
            training starts from; asked for in the main process alone, and in none where there is a checkpoint to go on from.
    """

    def __init__(
        self,
        task: Task,
        optim: OptimConfig,
        run: RunConfig,
        folder: Path,
        *,
        progress: bool = True,
        world: World | None = None,
        start: Callable[[], nn.Module] | None = None,
    ) -> None:
        if run.precision == "auto":
            raise ConfigError('run: precision = "auto" is decided where recipes are run; "float32" or "bfloat16" is wanted here')
        self.task, self.optim, self.run, self.folder = task, optim, run, Path(folder)
        self.progress = progress
        self.world, self.start = world or World(), start
        assert (start is None) == (self.world.size == 1), "weights to start from are for several processes, and these need them"
        self.average = Average(task.module, optim.ema) if optim.ema else None
        for module in (task.module, self.average.module) if self.average else (task.module,):
            self.world.shard(module, run.precision)
        self.optimizers = build_optimizers(task.module, optim)
        self.sharded = ShardedCheckpoints(self.folder / "checkpoints", self.world) if self.world.size > 1 else None
        self.learned = task if isinstance(task, CriterionTask) else None
        self.criterion_optimizers = build_optimizers(task.criterion, task.criterion_optim) if isinstance(task, CriterionTask) else []
        self.step = 0
        self.seconds = 0.0

    @property
    def result(self) -> nn.Module:
        """The average of weights where one is kept, else the module itself."""
        return self.average.module if self.average else self.task.module

    def fit(self) -> nn.Module:
        """Trains to the end and returns :attr:`result`.

        Raises:
            TrainError: the loss is not finite, or a file cannot be written (a full disk). Checkpoints already written stay.
        """
        try:
            if (path := latest_checkpoint(self.folder / "checkpoints")) is not None:
                self._restore(path)
            else:
                self._begin()
            self._run()
        except RuntimeError as error:
            if not lost_process(error):
                raise
            raise TrainError(
                f"step {self.step}: another process of this run is lost; run the same command again: it continues from the last checkpoint"
            ) from error
        return self.result

    def _begin(self) -> None:
        """The weights of step 0, where the task's module has none yet, and the random state."""
        if self.start is not None:
            self.world.fill(self.task.module, self.start)
            if self.average:
                self.average.module.load_state_dict(self.task.module.state_dict())
        torch.manual_seed(self.run.seed)

    def _run(self) -> None:
        self.task.module.train()
        try:
            with self._open_log() as log:
                while self.step < self.run.steps and not self._out_of_time():
                    self._advance(log)
                    if self.step % self.run.checkpoint_every == 0:
                        self._save()
                    if log and self.run.preview_every and self.step % self.run.preview_every == 0:
                        self._preview(log)
                self._save()
                if self.sharded:
                    self.sharded.wait()
        except OSError as error:
            raise TrainError(
                f"{error.filename or self.folder}: cannot be written ({error.strerror or error}) at step {self.step}; "
                "make room and run the same command again: it continues from the last checkpoint"
            ) from error

    def _open_log(self) -> AbstractContextManager[RunLog | None]:
        """The log, in the process that writes it."""
        if not self.world.main:
            return nullcontext()
        return RunLog(self.folder, total=self.run.steps, start=self.step, progress=self.progress)

    def _advance(self, log: RunLog | None) -> None:
        began = time.perf_counter()
        rate = self.rate()
        for optimizer in self.optimizers + self.criterion_optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * rate
        batch = self.task.batch(self.step)
        with self._autocast():
            loss, metrics = self.task.loss(batch, self.step)
        value, norm = self._descend(loss, self.task.module, self.optimizers, self.optim, "the loss", "optim.lr")
        if self.learned and self.criterion_optimizers:
            with self._autocast():
                found = self.learned.criterion_loss(batch, self.step)
            if found:
                optim, names = self.learned.criterion_optim, ("the criterion's loss", "its lr")
                self._descend(found[0], self.learned.criterion, self.criterion_optimizers, optim, *names)
                metrics = metrics | found[1]
        if self.average:
            self.average.update(self.task.module, self.step)
        self.step += 1
        if self.sharded:
            self.sharded.settle()
        self.seconds += self.world.mean(time.perf_counter() - began)
        record = {"loss": value, **metrics, "grad_norm": norm, "lr": self.optim.lr * rate}
        if log:
            log.update(self.step, record, write=self.step % self.run.log_every == 0, left=self._seconds_left(), done=self._done())

    def _descend(
        self, loss: Tensor, module: nn.Module, optimizers: list[torch.optim.Optimizer], optim: OptimConfig, name: str, rate: str
    ) -> tuple[float, float]:
        """One step of a module against its loss; gives the loss and the gradient's norm before it was clipped.

        Raises:
            TrainError: the loss is not finite; calls it ``name``, and its rate ``rate``.
        """
        value = self.world.mean(loss.item())
        if not math.isfinite(value):
            raise TrainError(
                f"step {self.step}: {name} is {value}; lower {rate} (now {optim.lr:g}) or optim.clip, "
                f"and remove {self.folder / 'checkpoints'} to start over"
            )
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = whole(nn.utils.clip_grad_norm_(module.parameters(), optim.clip))
        for optimizer in optimizers:
            optimizer.step()
        return value, norm.item()

    def _autocast(self) -> torch.autocast:
        device = next(self.task.module.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.run.precision == "bfloat16")

    def rate(self) -> float:
        """Share of the greatest learning rate at the present step."""
        if self.step < self.optim.warmup:
            return (self.step + 1) / self.optim.warmup
        done = self._done()
        if done <= self.optim.flat:
            return 1.0
        fall = min(1.0, (done - self.optim.flat) / (1 - self.optim.flat))
        return self.optim.final + (1 - self.optim.final) * 0.5 * (1 + math.cos(math.pi * fall))

    def _done(self) -> float:
        """Share of the run that lies behind, by steps or by the clock, whichever is further."""
        by_clock = self.seconds / (60 * self.run.max_minutes) if self.run.max_minutes else 0.0
        return max(self.step / self.run.steps, by_clock)

    def _seconds_left(self) -> float:
        done = self._done()
        return self.seconds * (1 - done) / done if done else math.inf

    def _out_of_time(self) -> bool:
        return self.run.max_minutes is not None and self.seconds >= 60 * self.run.max_minutes

    def _preview(self, log: RunLog) -> None:
        module = self.result
        training = module.training
        with torch.random.fork_rng(), torch.no_grad():
            self.task.preview(module.eval(), log, self.step)
        module.train(training)

    def _save(self) -> None:
        if self.sharded:
            self.sharded.save(self.step, self._sharded_state())
        else:
            save_checkpoint(self.folder / "checkpoints", self.step, self._state())

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "seconds": self.seconds,
            "module": self.task.module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "average": self.average.module.state_dict() if self.average else None,
            "criterion": self.learned.criterion.state_dict() if self.learned else {},
            "criterion_optimizers": [optimizer.state_dict() for optimizer in self.criterion_optimizers],
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def _sharded_state(self) -> dict[str, Any]:
        """What every process holds a share of, by names that do not depend on their number."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "module": self.task.module.state_dict(),
            "optimizers": get_optimizer_state_dict(self.task.module, self.optimizers),
            "average": self.average.module.state_dict() if self.average else {},
        }

    def _restore(self, path: Path) -> None:
        if path.is_dir():
            state = self._sharded_state()
            load_sharded(path, state)
            set_optimizer_state_dict(self.task.module, self.optimizers, state["optimizers"])
        elif self.sharded:
            raise CheckpointError(f"{path}: one process has written it, and one must go on from it; or give another folder")
        else:
            state = load_checkpoint(path)
            optimizers = self.optimizers + self.criterion_optimizers
            for optimizer, saved in zip(optimizers, state["optimizers"] + state.get("criterion_optimizers", []), strict=True):
                optimizer.load_state_dict(saved)
            torch.set_rng_state(state["rng"])
            if state["rng_cuda"] and torch.cuda.is_available():
                torch.cuda.set_rng_state_all(state["rng_cuda"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.task.module.load_state_dict(state["module"])
        if self.average:
            self.average.module.load_state_dict(state["average"])
        if self.learned:
            self.learned.criterion.load_state_dict(state.get("criterion", {}))


def build_optimizers(module: nn.Module, optim: OptimConfig) -> list[torch.optim.Optimizer]:
    """AdamW over all parameters that train, or over what Muon leaves to it."""
    matrices = hidden_matrices(module) if optim.muon_lr else []
    taken = set(map(id, matrices))
    rest = [p for p in module.parameters() if p.requires_grad and id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    found: list[torch.optim.Optimizer] = []
    if groups:
        found.append(torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas))
    if matrices:
        found.append(Muon(matrices, lr=optim.muon_lr, weight_decay=optim.weight_decay))
    return found


def hidden_matrices(module: nn.Module) -> list[nn.Parameter]:
    """Weights of linear layers between hidden states. Embeddings and unembeddings are none: their rows belong to single ids."""
    layers = (layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear) and name != "unembedding")
    return [weight for layer in layers for weight in layer.parameters(recurse=False) if weight.ndim == 2 and weight.requires_grad]
