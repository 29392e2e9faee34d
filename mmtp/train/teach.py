"""Asks frozen teachers about every document of a data set, and keeps what they say beside it (see :mod:`mmtp.data.teacher_cache`)."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmtp.config import ConfigError
from mmtp.data.errors import DataError
from mmtp.data.loader import ShardDataset
from mmtp.data.manifest import shard_name
from mmtp.data.restore import load_tokenizers
from mmtp.data.shards import Row
from mmtp.data.storage import Journal, Share, digest, locked, write_durable
from mmtp.data.teacher_cache import (
    JOURNAL,
    CacheHead,
    CacheRecord,
    Entry,
    PictureCache,
    TeacherCache,
    WordCache,
    begin,
    cache_folder,
    pictures,
    to_bytes,
    words,
)
from mmtp.hub import LIBRARY, SMOLLM2
from mmtp.models.language import LanguageConfig, LanguageTeacher
from mmtp.models.teachers import Teacher, TeacherConfig, last_name, on_grid
from mmtp.nn.features import SIZE
from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.vocab import VocabLayout
from mmtp.stream.words import speeches
from mmtp.tokenizers.align import shared_boundaries, shared_tokens
from mmtp.tokenizers.image.one_d import OneDImageTokenizer
from mmtp.tokenizers.text import bytes_of_tokens, ids_of_bytes
from mmtp.types import Codes, Modality

PASS_PICTURES = 32
"""Pictures that go through a teacher at a time."""

Progress = Callable[[int, int], None]
"""Called with shards done (in earlier runs as well), and shards in all."""


@dataclass(frozen=True)
class Taught:
    """What a run gave.

    Attributes:
        folder: of the cache.
        rows: pictures, or documents, that the teacher was asked about, each once per shard.
        answers: positions that it has said something of.
        positions: positions that there were.
        bytes: of all files.
        made: shards made by this run.
        seconds: wall time.
    """

    folder: Path
    rows: int
    answers: int
    positions: int
    bytes: int
    made: int
    seconds: float


def teacher_config(network: str, *, stage: int = -1, size: int = SIZE, top: int = 64) -> TeacherConfig | LanguageConfig:
    """The teacher of a name: a language model's, else a vision model's.

    Raises:
        ConfigError: there is none of that name.
    """
    try:
        if network == SMOLLM2 or network.startswith(LIBRARY):
            return LanguageConfig(network=network, top=top)
        return TeacherConfig(network=network, stage=stage, size=size)
    except ValueError as error:
        raise ConfigError(f"teacher: {error}; of language, {SMOLLM2!r} and '{LIBRARY}NAME'") from error


def teach(
    folder: str | Path,
    teacher: TeacherConfig | LanguageConfig,
    *,
    tokenizers: Iterable[str | Path] = (),
    progress: Progress | None = None,
) -> Taught:
    """Asks a teacher about a data set, or goes on where this was stopped.

    A file is a pure function of (shard, teacher), and is written whole or not at all.

    Args:
        folder: a finished data set of ``mmtp tokenize``.
        teacher: which; weights of a local file start at the working directory.
        tokenizers: zoo entries or folders, for data made with tokenizers that the zoo does not know under their names.
        progress: called after every shard.

    Raises:
        ConfigError: the teacher cannot be loaded.
        DataError: the data are not what it could be asked about, or the cache is another teacher's or belongs to other data.
    """
    began = time.monotonic()
    dataset = ShardDataset(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(teacher, LanguageConfig):
        interview: Interview = LanguageInterview(dataset, teacher, tokenizers, device)
    else:
        interview = VisualInterview(dataset, teacher, tokenizers, device)
    place = cache_folder(dataset.folder, last_name(teacher.network))
    head = CacheHead(interview.cache.kind, teacher.network, interview.fingerprint, dataset.fingerprint, interview.width)
    place.mkdir(parents=True, exist_ok=True)
    with locked(place, Share()):
        records = begin(place, head)
        shards = dataset.manifest.shards
        todo = [number for number in range(shards) if number not in records]
        for number in todo:
            record = interview.ask(number, place)
            Journal(place / JOURNAL).append(asdict(record))
            records[number] = record
            if progress is not None:
                progress(len(records), shards)
    sums = {name: sum(getattr(record, name) for record in records.values()) for name in ("rows", "answers", "positions", "bytes")}
    return Taught(place, **sums, made=len(todo), seconds=time.monotonic() - began)


class Interview(ABC):
    """A teacher, and how it is asked about documents.

    Args:
        dataset: whose documents.
        teacher: which.
        tokenizers: zoo entries or folders, where names of the vocabulary do not find them.
        device: where the teacher computes.

    Attributes:
        cache: the class that reads what comes out.
        fingerprint: of the teacher and how it is asked.
        width: numbers for each position.
    """

    cache: ClassVar[type[TeacherCache]]
    dataset: ShardDataset
    fingerprint: str
    width: int

    @abstractmethod
    def __init__(self, dataset: ShardDataset, teacher: Any, tokenizers: Iterable[str | Path], device: torch.device) -> None: ...

    @abstractmethod
    def entries(self, rows: Iterable[Row]) -> tuple[dict[str, Entry], int, int]:
        """What the teacher says of some documents, by key; positions that it says something of, and all that there were."""

    def ask(self, number: int, folder: Path) -> CacheRecord:
        """Makes and writes the file of one shard."""
        entries, answers, positions = self.entries(self.dataset.shard(number))
        data = to_bytes(entries, self.cache.columns(self.dataset.layout))
        write_durable(folder / shard_name(number), data)
        return CacheRecord(number, digest(data), len(data), len(entries), answers, positions, **self.moments(entries))

    def moments(self, entries: Mapping[str, Entry]) -> dict[str, list[float]]:
        """Sums that training standardises features by; none where there is nothing to standardise."""
        return {}


class VisualInterview(Interview):
    """Pictures are decoded from their codes, so that any data set will do; the teacher sees what the tokenizer has kept of them."""

    cache = PictureCache

    def __init__(self, dataset: ShardDataset, teacher: TeacherConfig, tokenizers: Iterable[str | Path], device: torch.device) -> None:
        self.dataset, self.device = dataset, device
        entry = next((e for e in dataset.layout.media if e.modality is Modality.IMAGE and not e.continuous), None)
        if entry is None:
            raise DataError(f"{dataset.folder}: holds no codes of pictures, of which a visual teacher could say something")
        self.tokenizer = load_tokenizers(VocabLayout(media=(entry,)), tokenizers)[entry.name]
        if isinstance(self.tokenizer, OneDImageTokenizer):
            raise DataError(
                f"{dataset.folder}: codes of {entry.name!r} have no places in the picture, and a visual teacher speaks of places"
            )
        self.tokenizer.to(device)
        self.teacher = Teacher(teacher, Path(), device)
        self.fingerprint = self.teacher.fingerprint
        self.grammar = StreamGrammar(dataset.layout)
        self.width = self.teacher.map(torch.zeros(1, 3, SIZE, SIZE, device=device)).shape[1]

    def entries(self, rows: Iterable[Row]) -> tuple[dict[str, Entry], int, int]:
        codes = {picture.key: picture.codes for row in rows for picture in pictures(row.tokens, self.grammar)}
        by_grid: dict[tuple[int, ...], list[str]] = {}
        for key, ids in codes.items():
            by_grid.setdefault(ids.shape[1:], []).append(key)
        found: dict[str, Entry] = {}
        for grid, keys in by_grid.items():
            for start in range(0, len(keys), PASS_PICTURES):
                part = keys[start : start + PASS_PICTURES]
                features = self._features(torch.from_numpy(np.stack([codes[key] for key in part])), grid)
                if not features.isfinite().all():
                    raise DataError(f"{self.dataset.folder}: features of this teacher reach beyond 65504, the largest number of float16")
                found |= {key: {"features": values.numpy()} for key, values in zip(part, features, strict=True)}
        cells = sum(len(entry["features"]) for entry in found.values())
        return {key: found[key] for key in codes}, cells, cells

    def moments(self, entries: Mapping[str, Entry]) -> dict[str, list[float]]:
        flat = np.concatenate([np.zeros((0, self.width)), *(entry["features"] for entry in entries.values())]).astype(np.float64)
        return {"sums": flat.sum(0).tolist(), "squares": np.square(flat).sum(0).tolist()}

    @torch.no_grad()
    def _features(self, ids: Int[Tensor, "b k *grid"], grid: tuple[int, ...]) -> Float[Tensor, "b n c"]:
        """Features of pictures, one for each cell of the grid of their codes, padding included."""
        media = self.tokenizer.decode(Codes(ids.to(self.device), torch.tensor([grid] * len(ids))))
        lo, hi = self.tokenizer.spec.value_range
        found = self.teacher.map((torch.stack(media).to(self.device) - lo) * (2 / (hi - lo)) - 1)
        return torch.cat([on_grid(found, part) for part in code_grids(self.tokenizer.spec.scales, grid)], 1).half().cpu()


def code_grids(scales: tuple[int, ...], grid: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Grids of a picture's cells whose codes follow each other: one, or one for each of the scales that a row of codes holds."""
    rows, columns = grid
    if not scales:
        yield rows, columns
        return
    ends = [0, *np.cumsum([scale * scale for scale in scales]).tolist()]
    yield from ((scale, scale) for scale, (_, end) in zip(scales, pairwise(ends), strict=True) if end <= columns)


class LanguageInterview(Interview):
    """A document's words are read by the teacher in its own tokens; it is heard where one of them begins together with one of ours."""

    cache = WordCache

    def __init__(self, dataset: ShardDataset, teacher: LanguageConfig, tokenizers: Iterable[str | Path], device: torch.device) -> None:
        self.dataset = dataset
        text = dataset.layout.text
        if text is None:
            raise DataError(f"{dataset.folder}: holds no words, of which a language teacher could say something")
        self.text = load_tokenizers(VocabLayout(text=text), tokenizers)[text.name]
        self.teacher = LanguageTeacher(teacher, device)
        self.bytes = bytes_of_tokens(self.teacher.backend)
        ours, theirs = shared_tokens(self.text.vocabulary, ids_of_bytes(self.teacher.backend))
        if not len(ours):
            raise DataError(f"{dataset.folder}: teacher {teacher.network!r} has no token in common with {text.name!r}")
        self.ours, self.theirs = torch.from_numpy(ours), torch.from_numpy(theirs)
        self.width = min(teacher.top, len(ours))
        self.fingerprint = self.teacher.fingerprint

    def entries(self, rows: Iterable[Row]) -> tuple[dict[str, Entry], int, int]:
        skeletons = dict(words(row.tokens, self.dataset.layout) for row in rows)
        readings, ordinals, places, positions = [], [], [], 0
        for tokens in skeletons.values():
            said = speeches(tokens, self.dataset.layout)
            runs = [self.text.pieces(run) for speech in said for run in speech.runs]
            reading = self.teacher.read(said, [b"".join(run) for run in runs])
            shared, at = self._shared(runs, [(run.start, [self.bytes.get(i, b"") for i in reading.ids[run]]) for run in reading.runs])
            # A prediction needs something that stands before it, and within what the teacher can read.
            heard = (at > 0) & (at < self.teacher.longest)
            readings.append(reading.ids[: self.teacher.longest])
            ordinals.append(shared[heard])
            places.append(torch.from_numpy(at[heard]))
            positions += sum(map(len, runs))
        spoken = [i for i, at in enumerate(places) if len(at)]
        answers = self.teacher.top([readings[i] for i in spoken], [places[i] for i in spoken], self.theirs, self.width)
        empty = torch.zeros(0, self.width, dtype=torch.long), torch.zeros(0, self.width)
        found = dict.fromkeys(range(len(readings)), empty) | dict(zip(spoken, answers, strict=True))
        entries: dict[str, Entry] = {}
        for i, key in enumerate(skeletons):
            chosen, log_probs = found[i]
            entries[key] = {"places": ordinals[i], "ids": self.ours[chosen].numpy(), "log_probs": log_probs.half().numpy()}
        return entries, sum(map(len, ordinals)), positions

    @staticmethod
    def _shared(runs: list[list[bytes]], others: list[tuple[int, list[bytes]]]) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Which text tokens of a document begin together with one of the teacher's, and where in its reading those stand."""
        ordinals, places, first = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
        for run, (start, other) in zip(runs, others, strict=True):
            mine, theirs = shared_boundaries(run, other)
            ordinals.append(first + mine)
            places.append(start + theirs)
            first += len(run)
        return np.concatenate(ordinals), np.concatenate(places)
