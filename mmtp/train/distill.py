"""What teachers have said, beside the packed batches of a model; and the part of its loss that comes of it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmtp.data.loader import PackedBatches
from mmtp.data.teacher_cache import PictureCache, WordCache, open_caches
from mmtp.models.loss import LossConfig
from mmtp.stream.vocab import VocabLayout
from mmtp.train.losses.divergence import language_divergence
from mmtp.train.losses.teachers import FeatureReader, TeacherBalance, TeachersConfig, feature_statistics, with_gradient
from mmtp.train.losses.terms import Term
from mmtp.types import Batch


class Seen(NamedTuple):
    """What the visual teacher sees.

    Attributes:
        places: flat index (row * s + position) of codes of pictures.
        features: of the cell in which each stands.
    """

    places: Int[Tensor, " n"]
    features: Float[Tensor, "n c"]


class Said(NamedTuple):
    """What the language teacher expects.

    Attributes:
        places: flat index of text tokens.
        ids: local ids of those that it finds most probable there.
        log_probs: logarithms of their probabilities.
    """

    places: Int[Tensor, " n"]
    ids: Int[Tensor, "n k"]
    log_probs: Float[Tensor, "n k"]


class TaughtBatch(NamedTuple):
    """Packed rows, and what teachers have said of their documents.

    Attributes:
        rows: as without teachers.
        seen: None without a visual teacher.
        said: None without a language teacher.
    """

    rows: Batch
    seen: Seen | None
    said: Said | None

    def to(self, device: torch.device) -> "TaughtBatch":
        seen = Seen(*(value.to(device) for value in self.seen)) if self.seen else None
        said = Said(*(value.to(device) for value in self.said)) if self.said else None
        return TaughtBatch(self.rows.to(device), seen, said)


class TaughtBatches:
    """The batches of training with what teachers have said: as those, a function of the step and of nothing else.

    Args:
        batches: packed documents.
        config: which teachers.

    Raises:
        DataError: a teacher was not asked about a data set, or about other data.
    """

    def __init__(self, batches: PackedBatches, config: TeachersConfig) -> None:
        self.batches = batches
        self.pictures = open_caches(PictureCache, batches.datasets, config.image.teacher) if config.image else None
        self.words = open_caches(WordCache, batches.datasets, config.text.teacher) if config.text else None

    def batch(self, step: int) -> TaughtBatch:
        """The rows of a step, with what teachers have said of the documents in them.

        Raises:
            DataError: a file is damaged, or has no entry for a document: names the document.
        """
        rows, placed = self.batches.batch(step), list(self.batches.placed(step))
        seen = said = None
        if self.pictures:
            views = [(self.pictures[number].features(index), start) for number, index, start in placed]
            seen = Seen(_joined([places + start for (places, _), start in views]), _joined([found for (_, found), _ in views]).float())
        if self.words:
            heard = [(self.words[number].distributions(index), start) for number, index, start in placed]
            ids = _joined([found.ids.astype(np.int64) for found, _ in heard])
            log_probs = _joined([found.log_probs for found, _ in heard]).float()
            said = Said(_joined([found.offsets + start for found, start in heard]), ids, log_probs)
        return TaughtBatch(rows, seen, said)


class Teachers(nn.Module):
    """What learns or remembers something while a model listens: the adapter of the visual teacher, and the balance of both.

    Args:
        config: weights.
        width: of the model's states.
        batches: which know the moments of features.
    """

    def __init__(self, config: TeachersConfig, width: int, batches: TaughtBatches) -> None:
        super().__init__()
        self.config = config
        self.reader: FeatureReader | None = None
        if config.image and batches.pictures:
            records = [record for cache in batches.pictures for record in cache.records.values()]
            statistics = feature_statistics(records, batches.pictures[0].head.width)
            self.reader = FeatureReader(config.image, width, statistics)
        self.balance = TeacherBalance(config, [name for name in ("image", "text") if getattr(config, name)])

    def forward(
        self, states: Float[Tensor, "b s d"], unembedding: Float[Tensor, "v d"], batch: TaughtBatch, layout: VocabLayout, loss: LossConfig
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """The teachers' part of the loss of a model, which moves the model and not the adapter; and numbers for the log.

        The visual teacher is heard at every code of a picture. Nothing needs to be masked for that: a causal state at a cell has not seen
        the cells that follow, and has to foresee what the teacher, which has seen all of the picture, makes of this one.

        Args:
            states: of the model, after the final norm.
            unembedding: one row per vocabulary id.
            batch: what the states were computed for.
            layout: gives each slot's legal ids.
            loss: how many rows of logits are in memory at a time.
        """
        inputs = [states, unembedding] if unembedding.requires_grad else [states]
        leaves = [value.detach().requires_grad_() for value in inputs]
        own, table = leaves[0], leaves[-1] if unembedding.requires_grad else unembedding
        terms: dict[str, Term] = {}
        numbers = {}
        if self.reader and self.config.image and batch.seen and len(batch.seen.places):
            error, cosine = self.reader(own.flatten(0, 1)[batch.seen.places], batch.seen.features)
            terms["image"] = Term(self.config.image.weight, error)
            numbers["distill.image.cosine"] = cosine.item()
        if self.config.text and batch.said and len(batch.said.places):
            value = language_divergence(own, table, batch.rows, layout, *batch.said, self.config.text.beta, loss.chunk_rows)
            terms["text"] = Term(self.config.text.weight, value)
        value, gradients, found = self.balance(terms, *leaves)
        return with_gradient(value, inputs, gradients), numbers | found


def _joined(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts))
