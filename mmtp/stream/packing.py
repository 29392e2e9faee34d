"""Documents into rows of a fixed token budget, and rows into what a model reads.

Rows never mix documents: ``document_ids`` tells them apart, and attention does not cross from one to another.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.vocab import Special
from mmtp.types import Batch, MmtpError


class PackingError(MmtpError):
    """A document that fits no row, or whose parts do not fit each other."""


class PackDocument(NamedTuple):
    """What packing needs of a document; a plain tuple does as well.

    Attributes:
        tokens: vocabulary ids of the whole document.
        target_mask: whether training predicts each token.
        features: vectors of all continuous spans, if there are any.
        feature_grids: extent of every such span's grid of vectors; None: that of its ``<feature>`` tokens, one vector each.
    """

    tokens: Integer[np.ndarray, " s"]
    target_mask: Bool[np.ndarray, " s"]
    features: Float[Tensor, "n d"] | None = None
    feature_grids: Int[np.ndarray, "spans axes"] | None = None


def pack(lengths: Iterable[int] | Integer[np.ndarray, " n"], budget: int, max_open: int = 64) -> list[list[int]]:
    """Packs documents into bins, first-fit in the given order.

    At most ``max_open`` bins are looked at for a document: when one more is opened, the fullest is closed. So the work is
    O(documents x ``max_open``), and the result depends on nothing but the arguments.

    Args:
        lengths: tokens of every document.
        budget: tokens that a bin holds.
        max_open: bins kept open.

    Returns:
        Indices of the documents of every bin; bins in the order in which they were opened.

    Raises:
        PackingError: a document that is empty or longer than the budget.
    """
    bins: list[list[int]] = []
    room: dict[int, int] = {}  # of every open bin, oldest first
    for index, length in enumerate(lengths):
        length = int(length)
        if not 0 < length <= budget:
            raise PackingError(f"document {index}: {length} tokens; 1 to {budget} fit into a row")
        chosen = next((b for b, free in room.items() if free >= length), None)
        if chosen is None:
            if len(room) == max_open:
                del room[min(room, key=room.__getitem__)]
            chosen = len(bins)
            bins.append([])
            room[chosen] = budget
        bins[chosen].append(index)
        room[chosen] -= length
        if not room[chosen]:
            del room[chosen]
    return bins


def collate(documents: Sequence[tuple[Any, ...]], grammar: StreamGrammar, budget: int) -> Batch:
    """Packs documents into as few rows as first-fit finds and builds the batch.

    Args:
        documents: (tokens, target mask[, features[, grids of features]]) of every document.
        grammar: of the model's vocabulary.
        budget: tokens per row.

    Raises:
        GrammarError: a document that breaks the grammar or has not ended.
        PackingError: a document that fits no row.
    """
    bins = pack([len(document[0]) for document in documents], budget)
    return collate_rows([[documents[i] for i in row] for row in bins], grammar, budget)


def collate_rows(rows: Sequence[Sequence[tuple[Any, ...]]], grammar: StreamGrammar, budget: int) -> Batch:
    """Builds the batch of rows that are packed already; ``budget`` tokens per row, padded at the end.

    Raises:
        GrammarError: a document that breaks the grammar or has not ended.
        PackingError: a row beyond the budget, or features that do not fit the document's placeholders.
    """
    shape = (len(rows), budget)
    tokens = np.full(shape, Special.PAD, dtype=np.int64)
    positions = np.zeros((*shape, 3), dtype=np.int64)
    document_ids = np.full(shape, -1, dtype=np.int64)
    slots = np.full(shape, grammar.done, dtype=np.int64)
    loss_mask = np.zeros(shape, dtype=bool)
    features, grids = [], []
    for r, row in enumerate(rows):
        start = 0
        for d, document in enumerate(row):
            ids, mask, vectors, extents = PackDocument(*document)
            end = start + len(ids)
            if end > budget:
                raise PackingError(f"row {r}: its documents have more than {budget} tokens together")
            if len(mask) != len(ids):
                raise PackingError(f"row {r}, document {d}: {len(ids)} tokens, but a target mask of {len(mask)}")
            info = grammar.analyse(ids, complete=True)
            own = np.array([span.grid for span in info.spans if span.continuous], dtype=np.int64).reshape(-1, 2)
            extents = own if extents is None else extents
            if len(extents) != len(own):
                raise PackingError(f"row {r}, document {d}: {len(own)} continuous spans, but {len(extents)} grids of features")
            _check_features(ids, extents, vectors, f"row {r}, document {d}")
            if vectors is not None:
                features.append(vectors)
                grids.append(extents)
            tokens[r, start:end] = ids
            positions[r, start:end] = info.positions
            document_ids[r, start:end] = d
            slots[r, start:end] = info.slots
            loss_mask[r, start:end] = mask
            start = end
    return Batch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        document_ids=torch.from_numpy(document_ids),
        slots=torch.from_numpy(slots),
        loss_mask=torch.from_numpy(loss_mask),
        features=torch.cat(features) if features else None,
        feature_index=torch.from_numpy(np.flatnonzero(tokens == Special.FEATURE)) if features else None,
        feature_grids=torch.from_numpy(np.concatenate(grids)) if features else None,
    )


def _check_features(ids: np.ndarray, grids: np.ndarray, vectors: Tensor | None, where: str) -> None:
    wanted = int(grids.prod(1).sum())
    given = 0 if vectors is None else len(vectors)
    if wanted != given:
        places = int((np.asarray(ids) == Special.FEATURE).sum())
        raise PackingError(f"{where}: {places} <feature> tokens, but {given} feature vectors, {wanted} wanted")
