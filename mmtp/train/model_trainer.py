"""Training of unified models: packed streams in, the loss over all modalities and offsets out."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmtp.config import Config, ConfigError, from_dict
from mmtp.data.loader import PackedBatches, ShardDataset, joined_layout
from mmtp.hub import save_pretrained
from mmtp.models.heads.base import BELOW
from mmtp.models.loss import LossConfig, LossOutput
from mmtp.models.unified import UnifiedModel
from mmtp.nn.block import Layer
from mmtp.nn.memory import without_weights
from mmtp.train.distill import TaughtBatch, TaughtBatches, Teachers
from mmtp.train.distributed import World, joined, processes, rank, whole_state
from mmtp.train.log import RunLog
from mmtp.train.losses.teachers import TeachersConfig
from mmtp.train.losses.uncertainty import Uncertainty
from mmtp.train.memory import available_memory, check_host, check_memory, estimate_memory, host_memory, recompute_blocks, surely_fits
from mmtp.train.model_choice import ModelChoice
from mmtp.train.recipe import Recipe
from mmtp.train.trainer import OptimConfig, Trainer
from mmtp.types import Batch, Modality


@dataclass(frozen=True, kw_only=True)
class ModelData(Config):
    """What a model is trained on.

    Attributes:
        shards: data sets of ``mmtp tokenize``, relative to the data root. They may hold different media: the model's vocabulary is that
            over all their tokenizers, of which there may be one of a kind.
        weights: part of the documents that comes from each; empty takes all documents of all.
        budget: tokens per packed row; ``run.batch`` is the number of rows.
    """

    shards: tuple[str, ...]
    weights: tuple[float, ...] = ()
    budget: int = 512


@dataclass(frozen=True, kw_only=True)
class ModelLossConfig(LossConfig):
    """``[loss]`` of a model: that of the data, and what frozen teachers add to it.

    Attributes:
        distill: the teachers; None for none.
    """

    distill: TeachersConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distill and self.uncertainty_lr:
            raise ConfigError("loss: uncertainty_lr learns weights of the data's loss beside fixed ones; leave it out, or 'distill'")


class ModelTask:
    """The unified model as the loop sees it.

    Args:
        model: to train.
        batches: packed batches by step.
        loss: weights of the loss's parts.
        compiled: run the forward pass through torch.compile; block by block where its weights are gathered block by block.
        world: the processes that share every batch.
    """

    def __init__(
        self, model: UnifiedModel, batches: PackedBatches, loss: LossConfig, compiled: bool = False, world: World | None = None
    ) -> None:
        self.module: nn.Module = model
        self.model, self.batches, self.config = model, batches, loss
        self.world = world or World(next(model.parameters()).device)
        if compiled and self.world.size > 1:
            for block in (part for part in model.modules() if isinstance(part, Layer)):
                block.forward = torch.compile(block.forward, dynamic=False)  # type: ignore[method-assign]
        elif compiled:
            model.compute_states = torch.compile(model.compute_states, dynamic=False)  # type: ignore[method-assign]

    def batch(self, step: int) -> Batch:
        return self.batches.batch(step).to(self.world.device)

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
        output = self.model.loss(batch, self.config, self.world.group)
        return output.total, self.numbers(output, batch)

    def numbers(self, output: LossOutput, batch: Batch) -> dict[str, float]:
        """For the log."""
        tokens = self.world.size * self.world.mean(float((batch.document_ids >= 0).sum()))
        return metrics(output) | {"tokens": tokens, "epoch": float(batch.meta["epoch"])}

    def preview(self, module: nn.Module, log: RunLog, step: int) -> None:
        """Models show themselves through ``mmtp eval`` and ``mmtp generate``; a preview would need their tokenizers."""


class UncertaintyTask(ModelTask):
    """The same with learned factors of the modalities' weights, which are a criterion's parameters: of the result they are no part.

    Args:
        model: to train.
        batches: packed batches by step.
        loss: weights of the loss's parts, and the rate of the factors.
        optim: of the model; the factors follow its schedule.
        compiled: run the forward pass through torch.compile.
        world: the processes that share every batch; all come to the same factors, for losses are those of the whole batch.
    """

    def __init__(
        self,
        model: UnifiedModel,
        batches: PackedBatches,
        loss: LossConfig,
        optim: OptimConfig,
        compiled: bool = False,
        world: World | None = None,
    ) -> None:
        super().__init__(model, batches, loss, compiled, world)
        self.criterion = Uncertainty().to(self.world.device)
        self.criterion_optim = OptimConfig(lr=loss.uncertainty_lr, betas=optim.betas, clip=math.inf)
        self._losses: dict[Modality, float] = {}

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
        fixed = self.config.modality_weights
        weights = {str(modality): fixed.get(modality, 1.0) * factor for modality, factor in self.criterion.factors().items()}
        output = self.model.loss(batch, replace(self.config, modality_weights=weights), self.world.group)
        self._losses = defaultdict(float)
        for (modality, offset), total in output.sums.items():
            self._losses[modality] += self.config.offset_weight(offset) * total / output.counts[modality, offset]
        return output.total, self.numbers(output, batch) | {f"{modality}.weight": weights[modality] for modality in self._losses}

    def criterion_loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, float]] | None:
        return self.criterion(self._losses, self.config.modality_weights), {}


class DistillTask(ModelTask):
    """The same with frozen teachers, whose adapter is a criterion's parameters: of the result it is no part.

    The model moves against the data's loss and the teachers' together; the adapter follows, on the states of the same step.

    Args:
        model: to train.
        batches: packed batches by step, with what teachers have said.
        loss: weights of the loss's parts, teachers among them.
        optim: of the model; the adapter follows its schedule.
        compiled: run the forward pass through torch.compile.
        world: a single process.
    """

    def __init__(
        self,
        model: UnifiedModel,
        batches: TaughtBatches,
        loss: ModelLossConfig,
        optim: OptimConfig,
        compiled: bool = False,
        world: World | None = None,
    ) -> None:
        assert loss.distill is not None
        super().__init__(model, batches.batches, loss, compiled, world)
        self.taught = batches
        self.criterion = Teachers(loss.distill, model.config.backbone.width, batches).to(self.world.device)
        rate = loss.distill.image.lr if loss.distill.image else optim.lr
        self.criterion_optim = OptimConfig(lr=rate, betas=optim.betas, clip=optim.clip)
        self._states = torch.zeros(0)

    def batch(self, step: int) -> Any:
        return self.taught.batch(step).to(self.world.device)

    def loss(self, batch: Any, step: int) -> tuple[Tensor, dict[str, float]]:
        output = self.model.loss(batch.rows, self.config)
        assert output.states is not None
        self._states = output.states.detach()
        said, numbers = self.criterion(output.states, self.model.unembedding.weight, batch, self.model.config.layout, self.config)
        return output.total + said, self.numbers(output, batch.rows) | numbers

    def criterion_loss(self, batch: TaughtBatch, step: int) -> tuple[Tensor, dict[str, float]] | None:
        if not batch.seen or not len(batch.seen.places):
            return None
        assert self.criterion.reader is not None
        return self.criterion.reader(self._states.flatten(0, 1)[batch.seen.places], batch.seen.features)[0], {}


def metrics(output: LossOutput) -> dict[str, float]:
    """Mean cross-entropy in nats, its share of an even guess's, top-1 accuracy and norm of the gradient, by modality and draft offset.

    Of drafts that are distilled, ``kl`` from the model's own distribution and ``acceptance``, their mean overlap with it, as well; and
    the errors of vectors that the model writes.
    """
    found = {}
    for (modality, offset), count in sorted(output.counts.items()):
        name = f"{modality}" if offset == 0 else f"{modality}.below" if offset == BELOW else f"{modality}+{offset}"
        found[name] = output.sums[modality, offset] / count
        found[f"{name}.share"] = output.sums[modality, offset] / output.chance[modality, offset]
        found[f"{name}.accuracy"] = output.correct[modality, offset] / count
        if (modality, offset) in output.divergence:
            found[f"{name}.kl"] = output.divergence[modality, offset] / count
            found[f"{name}.acceptance"] = output.overlap[modality, offset] / count
        if (modality, offset) in output.grads:
            found[f"{name}.grad"] = output.grads[modality, offset]
    for modality, error in output.flow.items():
        found[f"{modality}.flow"] = error
    return found


def feature_width(datasets: Sequence[ShardDataset]) -> int:
    """Width of the continuous features of data sets, which share a tokenizer of them; 0 where they hold none."""
    return next((width for dataset in datasets if (width := dataset.feature_width)), 0)


def train_model(recipe: Recipe, folder: Path, *, data_root: Path, progress: bool = True) -> Path:
    """Trains a unified model as a recipe says; see :func:`mmtp.train.recipe.run_recipe`."""
    data = ModelData.from_dict(recipe.data, "data")
    choice = ModelChoice.from_dict(recipe.model, "model")
    loss = from_dict(ModelLossConfig, recipe.loss, "loss")
    if loss.distill and choice.train == "head":
        raise ConfigError("loss.distill: teachers speak to the backbone, and train = 'head' freezes it; leave out one of the two")
    if loss.distill and processes() > 1:
        raise ConfigError(
            "loss.distill: models with teachers are trained by one process; their losses are not yet those of the whole batch"
        )
    datasets = [ShardDataset(data_root / path) for path in data.shards]
    batches = PackedBatches(
        datasets,
        rows=recipe.run.batch,
        budget=data.budget,
        seed=recipe.run.seed,
        weights=data.weights or None,
        world_size=processes(),
        rank=rank(),
        layout=choice.layout(joined_layout(datasets)),
    )
    width = feature_width(datasets)
    config = choice.config(batches.layout, width)
    if config.flow is not None and processes() > 1:
        raise ConfigError("model: flow heads are trained by one process; their error is not yet that of the whole batch")
    if config.next_scale is not None and loss.distill and loss.distill.image:
        raise ConfigError(
            "loss.distill.image: a visual teacher speaks to states behind codes, and next_scale learns from queries; leave out one"
        )
    taught = TaughtBatches(batches, loss.distill) if loss.distill else None
    with joined(recipe.run.parallel) as world:
        if choice.attention == "flex" and world.device.type == "cpu":
            raise ConfigError("model: attention = 'flex' is for accelerators (FlexAttention has no backward pass on a CPU); leave it out")
        available = available_memory(world.device)
        places = data.budget * (1 if config.next_scale is None else 2)  # a row has at most one query for each of its tokens
        if not surely_fits(config, recipe.run.batch * places, available):
            estimate = estimate_memory(
                config,
                recipe.optim,
                recipe.run,
                budget=places,
                world_size=world.size,
                recompute=choice.activation_checkpointing,
                head_only=choice.train == "head",
                detach=loss.detach,
                chunk_rows=loss.chunk_rows,
            )
            check_memory(estimate, available)
        divided = world.size > 1

        def start() -> UnifiedModel:
            if divided:
                check_host(model.num_parameters(), host_memory())
            torch.manual_seed(recipe.run.seed)
            return choice.model(batches.layout, width)

        model = choice.outline(batches.layout, width) if divided else start().to(world.device)
        if choice.activation_checkpointing:
            recompute_blocks(model)
        if taught:
            task: ModelTask = DistillTask(model, taught, loss, recipe.optim, choice.compile, world)
        elif loss.uncertainty_lr:
            task = UncertaintyTask(model, batches, loss, recipe.optim, choice.compile, world)
        else:
            task = ModelTask(model, batches, loss, choice.compile, world)
        trainer = Trainer(task, recipe.optim, recipe.run, folder, progress=progress, world=world, start=start if divided else None)
        result: Any = trainer.fit()
        if divided:
            result = gather(result, world)
        if world.main:
            save_pretrained(result, folder / "result")
        world.wait()
    return folder / "result"


def gather(model: UnifiedModel, world: World) -> UnifiedModel:
    """A divided model with weights that are whole, in host memory, to be saved; every process must ask for it, the main one gets them."""
    state = whole_state(model, world)
    with without_weights():
        shell = UnifiedModel(model.config)
    shell.load_state_dict(state, strict=world.main, assign=True)
    return shell
