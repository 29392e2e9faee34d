"""How probable held-out streams are to a model: cross-entropy by medium, and how far its drafts agree with it."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmtp.data.loader import PackedBatches, ShardDataset
from mmtp.eval.report import Table
from mmtp.models.heads.base import offset_name
from mmtp.models.loss import LossConfig
from mmtp.models.unified import UnifiedModel
from mmtp.types import Modality

BUDGET = 1024
Key = tuple[Modality, int]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Likelihood:
    """Sums over all targets of held-out documents, by (modality, offset) as in :class:`mmtp.models.loss.LossOutput`.

    Attributes:
        nats: cross-entropy.
        targets: how many.
        correct: targets that were the most probable legal id.
        chance: what guessing evenly among the legal ids would cost.
        overlap: of drafts, 1 - TV from the model's own distribution behind the same tokens: what rejection sampling accepts at
            temperature 1 (Leviathan et al., arXiv 2211.17192, theorem 3.5).
        documents: how many.
    """

    nats: Mapping[Key, float]
    targets: Mapping[Key, int]
    correct: Mapping[Key, int]
    chance: Mapping[Key, float]
    overlap: Mapping[Key, float]
    documents: int

    def mean(self, offset: int = 0) -> float:
        """Nats per target of an offset, over all media."""
        return sum(self.nats[key] for key in self.targets if key[1] == offset) / sum(n for (_, k), n in self.targets.items() if k == offset)

    def table(self, caption: str = "") -> Table:
        rows = []
        for key, count in sorted(self.targets.items()):
            share = f"{100 * self.nats[key] / self.chance[key]:.1f} %"
            agreed = f"{100 * self.overlap[key] / count:.1f} %" if key in self.overlap else None
            right = f"{100 * self.correct[key] / count:.1f} %"
            rows.append([_name(key), f"{count:,}", f"{self.nats[key] / count:.3f}", share, right, agreed])
        return Table(["targets", "number", "nats", "of an even guess", "most probable", "draft accepted"], rows, caption)

    def to_dict(self) -> dict[str, Any]:
        """Means in plain values."""
        sums = {"nats": self.nats, "accuracy": self.correct, "acceptance": self.overlap}
        means = {
            _name(key): {"targets": n} | {name: some[key] / n for name, some in sums.items() if key in some}
            for key, n in sorted(self.targets.items())
        }
        return {"documents": self.documents, "targets": means}


@torch.no_grad()
def evaluate_likelihood(
    model: UnifiedModel, datasets: Sequence[ShardDataset], *, inputs: tuple[str, ...] = (), progress: Progress | None = None
) -> Likelihood:
    """Reads every document once.

    Args:
        model: in evaluation mode.
        datasets: data sets of ``mmtp tokenize`` whose tokenizers the model knows.
        inputs: media that are predicted where they are input as well; the others are predicted as the shards say.
        progress: called with rows read and all.

    Raises:
        DataError: a shard is damaged.
        VocabMismatch: the shards are of other tokenizers.
    """
    model.requires_grad_(False)
    known = [dataset.over(model.config.layout) for dataset in datasets]
    longest = max(int(dataset.lengths.max()) for dataset in known)
    # One row a step: an epoch of whole rows then has every document once.
    batches = PackedBatches(known, rows=1, budget=max(BUDGET, longest), layout=model.config.layout)
    found: dict[str, Counter[Key]] = {name: Counter() for name in ("sums", "counts", "correct", "chance", "overlap")}
    documents = sum(map(len, known))
    for step in range(steps := batches.steps_per_epoch):
        output = model.loss(batches.batch(step), LossConfig(inputs=inputs, mtp_distill=1.0))
        for name, total in found.items():
            total.update(getattr(output, name))
        if progress is not None:
            progress(step + 1, steps)
    return Likelihood(found["sums"], found["counts"], found["correct"], found["chance"], found["overlap"], documents)


def _name(key: Key) -> str:
    modality, offset = key
    return f"{modality} {offset_name(offset)}" if offset else str(modality)
