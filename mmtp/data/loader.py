"""Data sets of shards as sequences of documents, and the batches of training as a function of the step.

Nothing here has a state that must be saved: the batch of a step depends on the data's fingerprint, the seed, the step, rows and
token budget, and nothing else. So training goes on exactly where it stopped, on any number of processes that divides the rows.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from mmtp.data.errors import DataError
from mmtp.data.manifest import Manifest, ShardRecord, Totals, read_journals
from mmtp.data.shards import Row, Shard, check_hash, config_hash
from mmtp.stream.grammar import GrammarError, StreamGrammar
from mmtp.stream.packing import PackDocument, collate_rows, pack
from mmtp.stream.vocab import VocabLayout, VocabMismatch
from mmtp.types import Batch

WINDOW = 4096
"""Documents that are packed together: as many as give dense rows, as few as make finding one's place again cheap."""


class ShardDataset(Sequence):  # not Sequence[Row]: checkers of types would read a row to look at it
    """A finished data set of ``mmtp tokenize``: ``len``, ``[i]``, through memory maps.

    torch's DataLoader, Grain and torchtitan read it as they read any sequence.

    Args:
        folder: of the data set.
        check: compare each shard with its hash when it is first read.
        layout: read the documents as ids of this vocabulary, which knows the data set's tokenizers; None takes the data set's own.

    Raises:
        DataError: it is no data set, unfinished or damaged.
        VocabMismatch: the layout lacks a tokenizer of the data set.
    """

    def __init__(self, folder: str | Path, check: bool = True, layout: VocabLayout | None = None) -> None:
        self.folder = Path(folder)
        self.check = check
        self.manifest = Manifest.read(self.folder)
        self.layout = layout or self.manifest.layout
        if VocabLayout.joined({"the vocabulary": self.layout, str(folder): self.manifest.layout}) != self.layout:
            raise VocabMismatch(f"{folder}: has tokenizers or dims that the vocabulary lacks, which it is to be read by")
        self._ids = None if self.layout == self.manifest.layout else self.layout.ids_of(self.manifest.layout)
        self._records = _all_records(self.folder, self.manifest)
        self._starts = np.cumsum([0, *(record.rows for record in self._records)])
        self._shards: dict[int, Shard] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: Any) -> Any:
        """The document of a row.

        Raises:
            DataError: its shard is damaged.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number, place = self.locate(index)
        row = self.shard(number)[place]
        return row if self._ids is None else replace(row, tokens=self._ids[row.tokens])

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "check": self.check, "layout": self.layout}  # memory maps do not travel; workers open their own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def locate(self, index: int) -> tuple[int, int]:
        """Shard, and row within it, of a document."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.folder}: row {index} of {len(self)}")
        index %= len(self)
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return number, index - int(self._starts[number])

    def where(self, index: int) -> str:
        """A document's place in words, for messages."""
        number, row = self.locate(index)
        return f"{self.folder / self._records[number].file}: row {row}"

    @cached_property
    def lengths(self) -> Int[np.ndarray, " n"]:
        """Tokens of every document; reads offsets only."""
        parts = [Shard(self.folder / record.file).lengths for record in self._records]
        lengths = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
        if len(lengths) != len(self) or int(lengths.sum()) != self.manifest.totals.tokens:
            raise DataError(f"{self.folder}: shards are damaged; mmtp verify {self.folder} names them")
        return lengths

    @cached_property
    def keys(self) -> list[str]:
        """Names of every document; reads that column only."""
        return [key for number in range(len(self._records)) for key in self.shard(number).keys]

    def over(self, layout: VocabLayout) -> "ShardDataset":
        """The same documents as ids of another vocabulary, which knows the data set's tokenizers.

        Raises:
            VocabMismatch: it does not.
        """
        return self if layout == self.layout else ShardDataset(self.folder, self.check, layout)

    @property
    def totals(self) -> Totals:
        return self.manifest.totals

    @cached_property
    def feature_width(self) -> int:
        """Width of the vectors that stand beside the tokens; 0 where there are none. Reads up to the first document that has some."""
        if not any(entry.continuous for entry in self.layout.media):
            return 0
        return next((row.features.shape[1] for row in self if row.features is not None), 0)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that stand for every byte of the data."""
        return config_hash({"layout": self.manifest.layout.hash, "shards": [record.xxh3 for record in self._records]})

    def shard(self, number: int) -> Shard:
        """One of its shards.

        Raises:
            DataError: it is damaged.
        """
        if number not in self._shards:
            record = self._records[number]
            if self.check:
                check_hash(self.folder / record.file, record.xxh3)
            self._shards[number] = Shard(self.folder / record.file)
        return self._shards[number]


def joined_layout(datasets: Sequence[ShardDataset]) -> VocabLayout:
    """The vocabulary over the tokenizers of all data sets.

    Raises:
        VocabMismatch: two of them have different tokenizers of one kind.
    """
    return VocabLayout.joined({str(dataset.folder): dataset.layout for dataset in datasets})


def open_rows(path: str | Path) -> tuple[ShardDataset | Shard, VocabLayout]:
    """The documents of a data set, or of one shard of it, and their vocabulary."""
    if Path(path).suffix == ".arrow":
        shard = Shard(Path(path))
        return shard, shard.head.layout
    dataset = ShardDataset(path)
    return dataset, dataset.layout


class PackedBatches:
    """The batches of training, packed first-fit, as a function of the step.

    Documents come in epochs: each a permutation of its own. Windows of ``window`` documents of that order are packed into rows, and a
    step takes the next ``rows`` rows, across windows and epochs. A process takes an equal part of them, in order of rank.

    Args:
        datasets: one, or several; where they know different tokenizers, they are read by the vocabulary over all.
        rows: rows of a batch over all processes.
        budget: tokens per row.
        seed: of the order.
        world_size: processes; it must divide ``rows``.
        rank: which of them this is.
        weights: part of the documents that comes from each data set; None takes all documents of all.
        window: documents packed together.
        layout: vocabulary of the batches, which knows all tokenizers; None takes that over the data sets.

    Raises:
        VocabMismatch: two data sets, or one and the layout, have different tokenizers of one kind.
        DataError: a document is longer than a row, or the numbers do not fit.
    """

    def __init__(
        self,
        datasets: ShardDataset | Sequence[ShardDataset],
        *,
        rows: int,
        budget: int,
        seed: int = 0,
        world_size: int = 1,
        rank: int = 0,
        weights: Sequence[float] | None = None,
        window: int = WINDOW,
        layout: VocabLayout | None = None,
    ) -> None:
        chosen = [datasets] if isinstance(datasets, ShardDataset) else list(datasets)
        self.layout = layout or joined_layout(chosen)
        self.datasets = [dataset.over(self.layout) for dataset in chosen]
        self.rows, self.budget, self.seed, self.world_size, self.rank, self.window = rows, budget, seed, world_size, rank, window
        if rows < 1 or rows % world_size or not 0 <= rank < world_size:
            raise DataError(f"{rows} rows over {world_size} processes (rank {rank}): the number of processes must divide the rows")
        self.grammar = StreamGrammar(self.layout)
        self._lengths = np.concatenate([dataset.lengths for dataset in self.datasets])
        self._firsts = np.cumsum([0, *map(len, self.datasets)])
        self._counts = _counts([len(dataset) for dataset in self.datasets], weights)
        self._check_lengths()
        self._row_starts = [0]  # first row of every window whose number of rows is known
        self._epoch: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=np.int64))
        self._bins: dict[int, list[np.ndarray]] = {}

    @cached_property
    def fingerprint(self) -> str:
        """Stands for the order of all batches; a checkpoint that holds another was trained on something else."""
        values = [self.rows, self.budget, self.seed, self.window, self._counts]
        return config_hash({"data": [dataset.fingerprint for dataset in self.datasets], "order": values})

    def batch(self, step: int) -> Batch:
        """This process's rows of a step's batch; ``meta`` holds the epoch in which it begins.

        Raises:
            DataError: a shard is damaged, or a stream breaks the grammar: names file, row and offset.
        """
        rows = self.documents(step)
        share = self.rows // self.world_size
        mine = [[self._document(i) for i in row] for row in rows[self.rank * share : (self.rank + 1) * share]]
        try:
            batch = collate_rows(mine, self.grammar, self.budget)
        except GrammarError:
            for index in (i for row in rows for i in row):
                self._check_document(index)
            raise
        batch.meta.update(step=step, epoch=self.epoch(step))
        return batch

    def stream(self, start: int = 0, ahead: int = 2) -> Iterator[Batch]:
        """Batches from step ``start`` on, without end; up to ``ahead`` are made beforehand in a thread."""
        with ThreadPoolExecutor(1, thread_name_prefix="mmtp-batches") as pool:
            coming = [pool.submit(self.batch, start + i) for i in range(ahead + 1)]
            step = start + len(coming)
            try:
                while True:
                    yield coming.pop(0).result()
                    coming.append(pool.submit(self.batch, step))
                    step += 1
            finally:
                for future in coming:
                    future.cancel()

    def placed(self, step: int) -> Iterator[tuple[int, int, int]]:
        """Where the documents of this process's rows of a step stand: data set, document in it, and flat place of its first token."""
        share = self.rows // self.world_size
        for r, row in enumerate(self.documents(step)[self.rank * share : (self.rank + 1) * share]):
            place = r * self.budget
            for index in row:
                number = bisect_right(self._firsts, index) - 1
                yield number, index - int(self._firsts[number]), place
                place += int(self._lengths[index])

    def documents(self, step: int) -> list[list[int]]:
        """Documents of every row of a step's whole batch, as indices into the data sets laid end to end."""
        first = step * self.rows
        self._scan(first + self.rows)
        out: list[list[int]] = []
        while len(out) < self.rows:
            window = bisect_right(self._row_starts, first + len(out)) - 1
            skip = first + len(out) - self._row_starts[window]
            out += [row.tolist() for row in self._window(window)[skip : skip + self.rows - len(out)]]
        return out

    def epoch(self, step: int) -> int:
        """The epoch in which a step's batch begins."""
        self._scan(step * self.rows + 1)
        return (bisect_right(self._row_starts, step * self.rows) - 1) // self._windows_per_epoch

    @cached_property
    def steps_per_epoch(self) -> int:
        """Steps that the first epoch takes; later ones differ by how the packing falls out."""
        while len(self._row_starts) <= self._windows_per_epoch:
            self._scan(self._row_starts[-1] + 1)
        return -(-self._row_starts[self._windows_per_epoch] // self.rows)

    @property
    def _windows_per_epoch(self) -> int:
        return -(-sum(self._counts) // self.window)

    def _locate(self, index: int) -> tuple[ShardDataset, int]:
        number = bisect_right(self._firsts, index) - 1
        return self.datasets[number], index - int(self._firsts[number])

    def _document(self, index: int) -> PackDocument:
        dataset, row = self._locate(index)
        return dataset[row].packed()

    def _check_document(self, index: int) -> None:
        dataset, row = self._locate(index)
        try:
            self.grammar.analyse(dataset[row].tokens, complete=True)
        except GrammarError as error:
            raise DataError(f"{dataset.where(row)} ({dataset[row].key}): {error}; make the data set anew") from error

    def _scan(self, row: int) -> None:
        """Packs windows until the one that holds ``row - 1`` is known."""
        while self._row_starts[-1] < row:
            window = len(self._row_starts) - 1
            self._row_starts.append(self._row_starts[-1] + len(self._window(window)))

    def _window(self, window: int) -> list[np.ndarray]:
        if window not in self._bins:
            epoch, place = divmod(window, self._windows_per_epoch)
            documents = self._order(epoch)[place * self.window : (place + 1) * self.window]
            for old in list(self._bins)[:-2]:
                del self._bins[old]
            self._bins[window] = [documents[row] for row in pack(self._lengths[documents], self.budget)]
        return self._bins[window]

    def _order(self, epoch: int) -> np.ndarray:
        """Documents of an epoch, shuffled."""
        if self._epoch[0] != epoch:
            drawn = [self._drawn(number, epoch) + self._firsts[number] for number in range(len(self.datasets))]
            self._epoch = epoch, self._random(epoch, len(self.datasets)).permutation(np.concatenate(drawn))
        return self._epoch[1]

    def _drawn(self, number: int, epoch: int) -> np.ndarray:
        """What an epoch takes of one data set: the next part of its own endless shuffled passes, so that every document has its turn."""
        size, count = len(self.datasets[number]), self._counts[number]
        taken, at, end = [], epoch * count, (epoch + 1) * count
        while at < end:
            own, skip = divmod(at, size)
            part = self._random(own, number).permutation(size)[skip : skip + end - at]
            taken.append(part)
            at += len(part)
        return np.concatenate(taken) if taken else np.zeros(0, dtype=np.int64)

    def _random(self, epoch: int, purpose: int) -> np.random.Generator:
        data = [int(dataset.fingerprint, 16) for dataset in self.datasets]
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, *data, purpose, epoch])))

    def _check_lengths(self) -> None:
        if not sum(self._counts):
            raise DataError("the data sets hold no documents")
        longest = int(self._lengths.argmax())
        if self._lengths[longest] > self.budget:
            dataset, row = self._locate(longest)
            raise DataError(
                f"{dataset.where(row)}: has {self._lengths[longest]} tokens, and a row holds {self.budget} "
                f"({int((self._lengths > self.budget).sum())} documents are too long); raise the token budget"
            )


def _all_records(folder: Path, manifest: Manifest) -> list[ShardRecord]:
    records, damaged = read_journals(folder)
    if len(records) < manifest.shards:
        what = "its journal is damaged" if damaged else "it is unfinished"
        raise DataError(f"{folder}: {len(records)} of {manifest.shards} shards are there, {what}; run the same mmtp tokenize again")
    return list(records.values())


def _counts(sizes: Sequence[int], weights: Sequence[float] | None) -> list[int]:
    """Documents per epoch of every data set: all, or as many in all, shared out by weight (largest remainders)."""
    if weights is None:
        return list(sizes)
    if len(weights) != len(sizes) or min(weights) < 0 or not sum(weights):
        raise DataError(f"weights {list(weights)}: one of at least 0 for each of {len(sizes)} data sets is wanted")
    if any(weight and not size for weight, size in zip(weights, sizes, strict=True)):
        raise DataError(f"weights {list(weights)}: an empty data set cannot be drawn from")
    exact = [sum(sizes) * weight / sum(weights) for weight in weights]
    counts = [int(value) for value in exact]
    for i in sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])[: sum(sizes) - sum(counts)]:
        counts[i] += 1
    return counts
