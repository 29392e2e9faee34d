"""Training of unified models: packed streams in, the loss over all modalities and offsets out."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmtp.config import Config, ConfigError, from_dict
from mmtp.data.loader import PackedBatches, ShardDataset, joined_layout
from mmtp.hub import from_pretrained, read_config, save_pretrained
from mmtp.models.embed import codebook_embeddings
from mmtp.models.heads.base import BELOW
from mmtp.models.loss import LossConfig, LossOutput
from mmtp.models.presets import preset
from mmtp.models.unified import UnifiedModel
from mmtp.nn.block import Block
from mmtp.stream.vocab import MediaEntry, VocabLayout, VocabMismatch
from mmtp.train.distill import TaughtBatch, TaughtBatches, Teachers
from mmtp.train.distributed import World, joined, processes, rank, whole_state
from mmtp.train.log import RunLog
from mmtp.train.losses.teachers import TeachersConfig
from mmtp.train.losses.uncertainty import Uncertainty
from mmtp.train.memory import available_memory, check_memory, estimate_memory, recompute_blocks, surely_fits
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
class ModelChoice(Config):
    """Which model is trained.

    Attributes:
        preset: a named size (see :mod:`mmtp.models.presets`); empty where training goes on from ``start``.
        start: a saved model to go on from, over the same tokenizers as far as both know them. Media of the shards that are new to it join
            its vocabulary, untrained; media that only it knows stay as they are. Where the shards hold continuous features and the model
            reads none, it gets an untrained projection for them.
        backbone: values of the backbone that differ from the preset's.
        head: a head's configuration (``type`` and values) in place of the preset's or of ``start``'s. Beside ``start`` the new head
            begins untrained, the rest keeps what it has learnt: so draft heads are added to a model that has none.
        connector: a connector's configuration (``type`` and values) in place of the preset's: how the vectors of a continuous tokenizer are
            read. One that joins cells or resamples needs shards of ``mmtp tokenize --merge`` or ``--queries``.
        flow: configuration of the head that writes vectors (``type`` and values), for data whose vectors are drawn.
        tie_embeddings: whether embedding and unembedding are one table; None leaves it to the preset. Untied, the embeddings of codes
            keep the nearness that ``codebook_init`` gives them: every step of a softmax moves all rows of a tied table.
        train: ``head`` freezes everything but the head (frozen-backbone heads as in Medusa-1, arXiv 2401.10774, section 2.2), ``features``
            everything but the projection of continuous features (feature alignment, the first stage of LLaVA, arXiv 2304.08485,
            section 4.2).
        codebook_init: let the embeddings of codes (beside ``start``: of media that are new to it) start from the codebooks of their
            tokenizers, so that codes which look alike begin alike; needs the tokenizers that the shards name (zoo entries, or folders of
            that name).
        dropout: share of what every block that trains adds to the residual stream that is left out in a step, against learning few data by
            heart.
        activation_checkpointing: let every block keep its input alone for the backward pass, and compute the rest once more there: less
            memory, a third more arithmetic, the same gradients.
        attention: ``sdpa``, or ``flex``: FlexAttention in the backbone, which skips what the documents of a packed row have nothing to do
            with; on accelerators.
        compile: let torch.compile fuse the forward and backward pass; needs a C++ compiler and a minute, and rounds differently.
    """

    preset: str = ""
    start: str = ""
    backbone: dict[str, Any] = field(default_factory=dict)
    head: dict[str, Any] = field(default_factory=dict)
    connector: dict[str, Any] = field(default_factory=dict)
    flow: dict[str, Any] = field(default_factory=dict)
    tie_embeddings: bool | None = None
    train: Literal["all", "head", "features"] = "all"
    codebook_init: bool = False
    dropout: float = 0.0
    activation_checkpointing: bool = False
    attention: Literal["sdpa", "flex"] = "sdpa"
    compile: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model: dropout {self.dropout:g} is a share; at least 0 and less than 1 is wanted")

    def layout(self, found: VocabLayout) -> VocabLayout:
        """The model's vocabulary.

        Args:
            found: that over the shards.

        Raises:
            VocabMismatch: ``start`` was trained over another tokenizer of one kind; names both.
        """
        return VocabLayout.joined({self.start: read_config(self.start).layout, "the shards": found}) if self.start else found

    def config(self, layout: VocabLayout, feature_width: int = 0) -> UnifiedModel.Config:
        """The model's configuration over a vocabulary.

        Args:
            layout: see :meth:`layout`.
            feature_width: width of the continuous features that they hold; 0 for none.

        Raises:
            ConfigError: neither or both of ``preset`` and ``start`` are given, or an override does not fit.
        """
        if bool(self.preset) == bool(self.start):
            raise ConfigError("model: give either 'preset' or 'start'")
        if self.start:
            return self._started(layout, feature_width)
        data = preset(self.preset, layout).to_dict()
        data["backbone"] |= self.backbone
        data["head"] = self.head or data["head"]
        data["connector"] = self.connector or data["connector"]
        data["flow"] = self.flow or None
        data["feature_width"] = feature_width
        if self.tie_embeddings is not None:
            data["tie_embeddings"] = self.tie_embeddings
        return UnifiedModel.Config.from_dict(data, "model")

    def model(self, layout: VocabLayout, feature_width: int = 0) -> UnifiedModel:
        """The model of :meth:`config`, with the weights that it starts from.

        Raises:
            ConfigError: a choice does not fit, or there is nothing to train.
        """
        config = self.config(layout, feature_width)
        if self.start:
            model = from_pretrained(self.start)
            fresh = ("head.",) if self.head else ()
            fresh += ("embedding.features.",) if config.feature_width != model.config.feature_width else ()
            known = model.config.layout
            model = rebuilt(model, config, fresh) if fresh or config.layout != known else model
            if self.codebook_init:
                start_from_codebooks(model, [entry for entry in config.layout.media if entry not in known.media])
        else:
            model = config.build()
            if self.codebook_init:
                start_from_codebooks(model, config.layout.media)
        if self.train == "head":
            if not model.head.mtp_depth:
                raise ConfigError("model: train = 'head', but this head has nothing to learn; give 'head' a type that drafts")
            model.requires_grad_(False)
            model.head.requires_grad_(True)
        if self.train == "features":
            if model.embedding.features is None:
                raise ConfigError(
                    "model: train = 'features', but the shards hold no continuous features; tokenize with a continuous tokenizer"
                )
            model.requires_grad_(False)
            model.embedding.features.requires_grad_(True)
        for block in model.modules():
            if isinstance(block, Block) and next(block.parameters()).requires_grad:
                block.dropout = self.dropout
        model.flex_attention = self.attention == "flex"
        return model

    def _started(self, layout: VocabLayout, feature_width: int) -> UnifiedModel.Config:
        """The saved model's configuration, with a new head, new media or a new connector where they are wanted."""
        if self.backbone or self.flow or self.tie_embeddings is not None:
            raise ConfigError(f"model: 'backbone', 'flow' and 'tie_embeddings' belong to a preset; {self.start} has its own")
        known: UnifiedModel.Config = read_config(self.start)
        changes: dict[str, Any] = {"layout": layout.to_dict()} | ({"head": self.head} if self.head else {})
        if feature_width and not known.feature_width:
            changes |= {"feature_width": feature_width} | ({"connector": self.connector} if self.connector else {})
        elif self.connector:
            raise ConfigError(f"model: 'connector' is for shards with vectors and a model that reads none yet; {self.start} has its own")
        return UnifiedModel.Config.from_dict(known.to_dict() | changes, "model")


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


def rebuilt(model: UnifiedModel, config: UnifiedModel.Config, fresh: tuple[str, ...]) -> UnifiedModel:
    """The same model by another configuration: with another head, further media, or a connector, which begin untrained.

    Args:
        model: whose weights are taken over.
        config: of the new model, whose vocabulary knows the tokenizers of the old one.
        fresh: how the names of the weights begin that are not taken over.

    Raises:
        ConfigError: the head that is kept was made for fewer media.
    """
    other = config.build()
    state, used = other.state_dict(), model.config.layout.used
    ids = torch.from_numpy(config.layout.ids_of(model.config.layout)[:used])
    for name, value in model.state_dict().items():
        if name.startswith(fresh):
            continue
        if name in ("embedding.table.weight", "unembedding.weight") and config.layout != model.config.layout:
            state[name][ids] = value[:used]
        elif state[name].shape != value.shape:
            raise ConfigError(f"model: {name} of the model's head is for fewer media; give 'head', which then begins untrained")
        else:
            state[name] = value
    other.load_state_dict(state)
    return other


UNTIED_STD = 0.3
"""Of the embeddings that start from codebooks, where they are no unembeddings: steps of AdamW are of one size whatever the row's,
and what many codes have in common should not be lost to the noise of few occurrences."""


@torch.no_grad()
def start_from_codebooks(model: UnifiedModel, media: Iterable[MediaEntry]) -> None:
    """Sets the embeddings and unembeddings of codes from their tokenizers' codebooks.

    Args:
        model: over these media and others.
        media: whose codes begin anew.

    Raises:
        VocabMismatch: a tokenizer of that name is not the one that the vocabulary was made with.
    """
    layout = model.config.layout
    for entry in media:
        if entry.continuous:
            continue
        tokenizer = from_pretrained(entry.name)
        if (found := tokenizer.spec.fingerprint) != entry.fingerprint:
            raise VocabMismatch(f"{entry.name!r}: its fingerprint is {found}, but the shards were made with {entry.fingerprint}")
        for k in range(len(entry.codebook_sizes)):
            rows = slice(*layout.code_range(entry.modality, k))
            vectors = tokenizer.codebook_vectors(k)
            model.unembedding.weight[rows] = codebook_embeddings(vectors, model.unembedding.weight.shape[1])
            if not model.config.tie_embeddings:
                model.embedding.table.weight[rows] = codebook_embeddings(vectors, model.config.backbone.width, UNTIED_STD)


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
            for block in (part for part in model.modules() if isinstance(part, Block)):
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
    taught = TaughtBatches(batches, loss.distill) if loss.distill else None
    width = feature_width(datasets)
    config = choice.config(batches.layout, width)
    if config.flow is not None and processes() > 1:
        raise ConfigError("model: flow heads are trained by one process; their error is not yet that of the whole batch")
    with joined(recipe.run.parallel) as world:
        if choice.attention == "flex" and world.device.type == "cpu":
            raise ConfigError("model: attention = 'flex' is for accelerators (FlexAttention has no backward pass on a CPU); leave it out")
        available = available_memory(world.device)
        if not surely_fits(config, recipe.run.batch * data.budget, available):
            estimate = estimate_memory(
                config,
                recipe.optim,
                recipe.run,
                budget=data.budget,
                world_size=world.size,
                recompute=choice.activation_checkpointing,
                head_only=choice.train == "head",
                detach=loss.detach,
                chunk_rows=loss.chunk_rows,
            )
            check_memory(estimate, available)
        torch.manual_seed(recipe.run.seed)
        model = choice.model(batches.layout, width)
        if choice.activation_checkpointing:
            recompute_blocks(model)
        if world.size == 1:
            model.to(world.device)
        if taught:
            task: ModelTask = DistillTask(model, taught, loss, recipe.optim, choice.compile, world)
        elif loss.uncertainty_lr:
            task = UncertaintyTask(model, batches, loss, recipe.optim, choice.compile, world)
        else:
            task = ModelTask(model, batches, loss, choice.compile, world)
        trainer = Trainer(task, recipe.optim, recipe.run, folder, progress=progress, world=world)
        result: Any = trainer.fit()
        if world.size > 1:
            result = gather(result, world)
        if world.main:
            save_pretrained(result, folder / "result")
        world.wait()
    return folder / "result"


def gather(model: UnifiedModel, world: World) -> UnifiedModel:
    """A divided model with weights that are whole, in host memory, to be saved; every process must ask for it, the main one gets them."""
    state = whole_state(model, world)
    with torch.device("meta"):
        shell = UnifiedModel(model.config)
    shell.load_state_dict(state, strict=world.main, assign=True)
    return shell
