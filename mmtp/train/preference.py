"""Preference learning: of two answers to one prompt the better becomes more probable, beside a frozen reference (DPO).

Answers may be words, pictures or sounds, for all are tokens: the log-probability of an answer is the sum over its targets of what the
model gives them among the ids that the grammar allows. Draft heads are left as they are; they follow in a stage of their own.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmtp.config import Config, ConfigError, from_dict
from mmtp.data.loader import ShardDataset, joined_layout
from mmtp.data.pairs import PairBatch, PairBatches
from mmtp.hub import from_pretrained, save_pretrained
from mmtp.models.loss import check_modalities, plan_targets
from mmtp.models.unified import UnifiedModel
from mmtp.train.log import RunLog
from mmtp.train.model_choice import ModelChoice
from mmtp.train.model_trainer import feature_width
from mmtp.train.recipe import Recipe
from mmtp.train.trainer import Trainer
from mmtp.types import Modality

MODALITIES = list(Modality)


@dataclass(frozen=True, kw_only=True)
class PreferenceData(Config):
    """``[data]`` of preference learning.

    Attributes:
        chosen: data sets of ``mmtp tokenize``, relative to the data root; they may hold different media.
        rejected: as many; the documents of each are paired by key with those of ``chosen`` at its place.
        budget: tokens per packed row; ``run.batch`` is the number of pairs.
    """

    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    budget: int = 512


@dataclass(frozen=True, kw_only=True)
class PreferenceLossConfig(Config):
    """``[loss]`` of preference learning.

    Attributes:
        beta: how much a nat beside the reference is worth; the smaller, the further the model may move from it.
        modality_weights: of each modality's targets in the log-probability of an answer; 1 where none is given.
        reference: a saved model; empty takes the model that training starts from.
        chunk_rows: rows whose logits are in memory at a time.
    """

    beta: float = 0.1
    modality_weights: dict[str, float] = field(default_factory=dict)
    reference: str = ""
    chunk_rows: int = 1024

    def __post_init__(self) -> None:
        check_modalities(self.modality_weights)
        if self.beta <= 0:
            raise ConfigError(f"loss: beta {self.beta:g}: above 0 is wanted")


class Comparison(NamedTuple):
    """What a model and the reference give the targets of documents, summed by document and modality.

    Attributes:
        own: log-probabilities of the model, in nats.
        reference: those of the reference.
        divergence: KL of the model's next-token distributions from the reference's, in nats.
        counts: targets that leave a choice.
    """

    own: Float[Tensor, "n m"]
    reference: Float[Tensor, "n m"]
    divergence: Float[Tensor, "n m"]
    counts: Float[Tensor, "n m"]


def compare(model: UnifiedModel, reference: UnifiedModel, batch: PairBatch, chunk_rows: int = 1024) -> Comparison:
    """Sums over the documents of a batch; ``own`` has a gradient.

    Logits are made a chunk of rows at a time, and again in the backward pass, so that those of one chunk are ever in memory.
    """
    (states,) = model(batch.rows, drafts=False)
    with torch.no_grad():
        (others,) = reference(batch.rows, drafts=False)
    flat, other_flat, documents = states.flatten(0, 1), others.flatten(0, 1), batch.documents.flatten()
    sums = [torch.zeros(2 * batch.count, len(MODALITIES), device=flat.device) for _ in Comparison._fields]
    for item in plan_targets(batch.rows, model.config.layout):
        weight, other_weight = (torch.cat([net.unembedding.weight[low:high] for low, high in item.ranges]) for net in (model, reference))
        for start in range(0, len(item.rows), chunk_rows):
            rows, targets = item.rows[start : start + chunk_rows], item.targets[start : start + chunk_rows]
            found = checkpoint(_score, flat[rows], weight, other_flat[rows], other_weight, targets, use_reentrant=False)
            place = documents[rows], torch.full_like(rows, item.modality.index)
            for i, values in enumerate((*found, torch.ones_like(found[0]))):
                sums[i] = sums[i].index_put(place, values, accumulate=True)
    return Comparison(*sums)


def _score(x: Tensor, weight: Tensor, other_x: Tensor, other_weight: Tensor, targets: Int[Tensor, " n"]) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the targets under both models, and the divergence of the first from the second."""
    own = F.linear(x, weight).float().log_softmax(1)
    with torch.no_grad():
        other = F.linear(other_x, other_weight).float().log_softmax(1)
        divergence = F.kl_div(other, own, reduction="none", log_target=True).sum(1)
    return own.gather(1, targets[:, None])[:, 0], other.gather(1, targets[:, None])[:, 0], divergence


def preference_loss(found: Comparison, config: PreferenceLossConfig) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """DPO's loss (Rafailov et al. 2023, arXiv 2305.18290, equation 7), and numbers for the log.

    With the reward r of an answer, ``beta`` times how much its log-probability exceeds the reference's, it is the mean of
    -log sigmoid(r(chosen) - r(rejected)).

    Args:
        found: of the documents of a :class:`~mmtp.data.pairs.PairBatch`.
        config: beta and weights.
    """
    weights = torch.tensor([config.modality_weights.get(modality, 1.0) for modality in MODALITIES], device=found.own.device)
    rewards = config.beta * ((found.own - found.reference) * weights).sum(1)
    chosen, rejected = rewards[0::2], rewards[1::2]
    margins = chosen - rejected
    metrics = {"chosen": chosen.mean().item(), "rejected": rejected.mean().item()}
    for name, pairs in _kinds(found.counts):
        metrics[f"{name}margin"] = margins[pairs].mean().item()
        metrics[f"{name}accuracy"] = (margins[pairs] > 0).float().mean().item()
        both = torch.cat((2 * pairs, 2 * pairs + 1))
        metrics[f"{name}kl"] = (found.divergence[both].sum() / found.counts[both].sum()).item()
    return -F.logsigmoid(margins).mean(), metrics


def _kinds(counts: Float[Tensor, "n m"]) -> Iterator[tuple[str, Int[Tensor, " p"]]]:
    """All pairs, then those of each modality: that of most targets of the chosen answer."""
    yield "", torch.arange(len(counts) // 2, device=counts.device)
    most = counts[0::2].argmax(1)
    for index in most.unique().tolist():
        yield f"{MODALITIES[index]}.", (most == index).nonzero()[:, 0]


class PreferenceTask:
    """A model beside its reference, as the loop sees it.

    Args:
        model: to train.
        reference: frozen; over the same vocabulary.
        batches: pairs by step.
        loss: beta and weights.
    """

    def __init__(self, model: UnifiedModel, reference: UnifiedModel, batches: PairBatches, loss: PreferenceLossConfig) -> None:
        self.module: nn.Module = model
        self.model, self.batches, self.config = model, batches, loss
        self.reference = reference.eval().requires_grad_(False)
        self.device = next(model.parameters()).device

    def batch(self, step: int) -> PairBatch:
        return self.batches.batch(step).to(self.device)

    def loss(self, batch: PairBatch, step: int) -> tuple[Tensor, dict[str, float]]:
        found = compare(self.model, self.reference, batch, self.config.chunk_rows)
        loss, metrics = preference_loss(found, self.config)
        return loss, metrics | {"samples": float(batch.count), "epoch": float(self.batches.epoch(step))}

    def preview(self, module: nn.Module, log: RunLog, step: int) -> None:
        """Models show themselves through ``mmtp eval`` and ``mmtp generate``; a preview would need their tokenizers."""


def train_preference(recipe: Recipe, folder: Path, *, data_root: Path, progress: bool = True) -> Path:
    """Trains a unified model on pairs as a recipe says; see :func:`mmtp.train.recipe.run_recipe`.

    Raises:
        ConfigError: the recipe asks for what this stage cannot do.
        VocabMismatch: model or data sets have different tokenizers of one kind, or the reference has another vocabulary than the model.
    """
    data = PreferenceData.from_dict(recipe.data, "data")
    choice = ModelChoice.from_dict(recipe.model, "model")
    loss = from_dict(PreferenceLossConfig, recipe.loss, "loss")
    if not choice.start:
        raise ConfigError("model: preferences are learnt by a model that can answer; give 'start', a saved one")
    if choice.train == "head" or choice.compile:
        raise ConfigError(
            "model: preferences move next-token predictions, over batches of changing shape; leave out train = 'head' and 'compile'"
        )
    chosen, rejected = ([ShardDataset(data_root / path) for path in paths] for paths in (data.chosen, data.rejected))
    layout = choice.layout(joined_layout([*chosen, *rejected]))
    batches = PairBatches(chosen, rejected, pairs=recipe.run.batch, budget=data.budget, seed=recipe.run.seed, layout=layout)
    torch.manual_seed(recipe.run.seed)
    model = choice.model(batches.layout, feature_width(chosen))
    reference = from_pretrained(loss.reference) if loss.reference else copy.deepcopy(model)
    batches.layout.check_same(reference.config.layout, loss.reference)
    if torch.cuda.is_available():
        model.to("cuda")
        reference.to("cuda")
    task = PreferenceTask(model, reference, batches, loss)
    result = Trainer(task, recipe.optim, recipe.run, folder, progress=progress).fit()
    return save_pretrained(result, folder / "result")  # type: ignore[arg-type]
