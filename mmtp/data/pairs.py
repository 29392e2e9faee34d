"""Pairs of documents of which one is preferred, and the batches of preference learning as a function of the step.

A pair is a document of one data set and the document of the same key of another: what ``mmtp tokenize`` makes of two manifests that give
the same inputs the same keys, with a better answer in the first. Both begin with the same prompt, and targets are the answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mmtp.data.errors import DataError
from mmtp.data.loader import ShardDataset, joined_layout
from mmtp.data.shards import Row, config_hash
from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.packing import PackDocument, collate_rows, pack
from mmtp.stream.vocab import Special, VocabLayout
from mmtp.types import Batch


@dataclass(frozen=True)
class PairBatch:
    """Packed pairs.

    Attributes:
        rows: as a model reads them.
        documents: number of every position's document; -1 on padding. Pair i is documents 2i (chosen) and 2i + 1 (rejected).
        count: pairs.
    """

    rows: Batch
    documents: Int[Tensor, "b s"]
    count: int

    def to(self, device: torch.device | str) -> "PairBatch":
        return replace(self, rows=self.rows.to(device), documents=self.documents.to(device))


def collate_pairs(pairs: Sequence[tuple[PackDocument, PackDocument]], grammar: StreamGrammar, budget: int) -> PairBatch:
    """Packs pairs (chosen, rejected) into as few rows of ``budget`` tokens as first-fit finds.

    Raises:
        GrammarError: a document that breaks the grammar or has not ended.
        PackingError: a document that fits no row.
    """
    documents = [document for pair in pairs for document in pair]
    bins = pack([len(document.tokens) for document in documents], budget)
    rows = collate_rows([[documents[i] for i in row] for row in bins], grammar, budget)
    numbers = torch.full((len(bins), max(map(len, bins)) + 1), -1)  # the last column is what a -1 of padding finds
    for row, members in enumerate(bins):
        numbers[row, : len(members)] = torch.tensor(members)
    return PairBatch(rows, numbers.gather(1, rows.document_ids % numbers.shape[1]), len(pairs))


class PairBatches:
    """The batches of preference learning: pairs in epochs, each a permutation of its own.

    Args:
        chosen: data sets of the preferred documents.
        rejected: as many data sets; the documents of each belong to those of ``chosen`` at its place, key by key. A document whose
            partner is missing (it went to quarantine) is left out.
        pairs: of a batch.
        budget: tokens per row.
        seed: of the order.
        layout: vocabulary of the batches, which knows all tokenizers; None takes that over the data sets.

    Raises:
        VocabMismatch: two data sets, or one and the layout, have different tokenizers of one kind.
        DataError: two data sets share no key, or a document is longer than a row.
    """

    def __init__(
        self,
        chosen: Sequence[ShardDataset],
        rejected: Sequence[ShardDataset],
        *,
        pairs: int,
        budget: int,
        seed: int = 0,
        layout: VocabLayout | None = None,
    ) -> None:
        if not chosen or len(chosen) != len(rejected):
            raise DataError(
                f"{len(chosen)} data sets of chosen and {len(rejected)} of rejected documents: as many, and one at least, are wanted"
            )
        self.size, self.budget, self.seed = pairs, budget, seed
        self.layout = layout or joined_layout([*chosen, *rejected])
        self.datasets = [(good.over(self.layout), bad.over(self.layout)) for good, bad in zip(chosen, rejected, strict=True)]
        self.grammar = StreamGrammar(self.layout)
        self._pairs = [(number, *rows) for number, (good, bad) in enumerate(self.datasets) for rows in _matched(good, bad)]
        for number, *rows in self._pairs:
            for dataset, row in zip(self.datasets[number], rows, strict=True):
                if (length := int(dataset.lengths[row])) > budget:
                    raise DataError(f"{dataset.where(row)}: has {length} tokens, and a row holds {budget}; raise the token budget")
        self._epoch: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=np.int64))

    def __len__(self) -> int:
        """Pairs in all."""
        return len(self._pairs)

    @cached_property
    def fingerprint(self) -> str:
        """Stands for the order of all batches."""
        data = [dataset.fingerprint for both in self.datasets for dataset in both]
        return config_hash({"data": data, "order": [self.size, self.budget, self.seed]})

    def batch(self, step: int) -> PairBatch:
        """The pairs of a step.

        Raises:
            DataError: a shard is damaged, or the prompts of a pair differ: names file, row, key and offset.
        """
        return collate_pairs([self._pair(step * self.size + i) for i in range(self.size)], self.grammar, self.budget)

    def epoch(self, step: int) -> int:
        """The epoch in which a step's batch begins."""
        return step * self.size // len(self)

    def _pair(self, place: int) -> tuple[PackDocument, PackDocument]:
        epoch, at = divmod(place, len(self))
        if self._epoch[0] != epoch:
            seeds = [self.seed, int(self.fingerprint, 16), epoch]
            self._epoch = epoch, np.random.Generator(np.random.PCG64(np.random.SeedSequence(seeds))).permutation(len(self))
        number, good_row, bad_row = self._pairs[self._epoch[1][at]]
        good, bad = self.datasets[number]
        first, second = good[good_row], bad[bad_row]
        if (offset := _difference(first, second)) is not None:
            raise DataError(
                f"{bad.where(bad_row)} ({second.key}): its prompt differs from that of {good.where(good_row)} at offset {offset}; "
                "chosen and rejected documents of one key must begin with the same prompt"
            )
        return first.packed(), second.packed()


def _matched(chosen: ShardDataset, rejected: ShardDataset) -> list[tuple[int, int]]:
    """Rows of equal keys, in the order of the chosen ones."""
    places = {key: row for row, key in enumerate(rejected.keys)}
    found = [(row, places[key]) for row, key in enumerate(chosen.keys) if key in places]
    if not found:
        raise DataError(f"{chosen.folder} and {rejected.folder}: no document of one has the key of one of the other")
    return found


def _difference(chosen: Row, rejected: Row) -> int | None:
    """First offset at which the prompts, which are what stands before the first target, differ; None where they are equal."""
    lengths = [int(row.target_mask.argmax()) if row.target_mask.any() else len(row.tokens) for row in (chosen, rejected)]
    both = min(lengths)
    unequal = np.flatnonzero(chosen.tokens[:both] != rejected.tokens[:both])
    if len(unequal):
        return int(unequal[0])
    if lengths[0] != lengths[1]:
        return both
    if chosen.features is not None and rejected.features is not None:
        places = np.flatnonzero(chosen.tokens[:both] == Special.FEATURE)
        apart = np.flatnonzero((chosen.features[: len(places)] != rejected.features[: len(places)]).any(1))
        return int(places[apart[0]]) if len(apart) else None
    return None
