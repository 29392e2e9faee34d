"""Answers to questions about pictures, beside what can be had without looking.

A share of right answers means little alone: many questions can be answered from their words. So every evaluation puts three
controls beside the model: the same question without a picture, the same question with another picture, and the prior, the
commonest answer to the same words in the training questions. A model that looks falls to about the prior in both controls.
"""

import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from mmtp.data.media import decode_image
from mmtp.data.sources import open_source
from mmtp.eval.report import Table
from mmtp.eval.shapes import COLOURS, SHAPES

Progress = Callable[[int, int], None]
"""Called with what is done and what there is in all."""

ALL, YES_NO, OPEN = "all answers", "yes / no", "not yes / no"
GROUPS = (ALL, OPEN, YES_NO, "colour", "shape", "presence", "absence")
WITH_PICTURE, WITHOUT_PICTURE, OTHER_PICTURE, PRIOR = "picture", "no picture", "other picture", "prior"


@dataclass(frozen=True)
class VqaSample:
    """A question about a picture.

    Attributes:
        key: names the picture; samples of one picture share it, and the picture itself.
        picture: RGB in [0, 1].
        question: its words.
        answer: the right one.
    """

    key: str
    picture: Float[Tensor, "3 _ _"]
    question: str
    answer: str

    @property
    def groups(self) -> tuple[str, ...]:
        """The rows of the table that count this sample."""
        if self.answer not in ("yes", "no"):
            kind = "colour" if self.answer in COLOURS else "shape" if self.answer in SHAPES else None
            return (ALL, OPEN, kind) if kind else (ALL, OPEN)
        return (ALL, YES_NO, "absence" if re.search(r"\b(no|not)\b", self.question) else "presence")


@runtime_checkable
class Answerer(Protocol):
    """What is evaluated; a pipeline is one."""

    def answer(self, pictures: Sequence[Any], questions: Sequence[str], *, batch_size: int = 64) -> list[str]:
        """One answer for every question; None in place of a picture asks without one."""
        ...


@dataclass
class Count:
    """Right answers out of so many."""

    right: int = 0
    total: int = 0

    def add(self, right: bool) -> None:
        self.right += right
        self.total += 1

    @property
    def share(self) -> float:
        return self.right / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"{100 * self.share:.1f} %" if self.total else "–"


@dataclass(frozen=True)
class VqaResult:
    """Counts per condition and group, and the answers themselves.

    Attributes:
        counts: condition -> group -> count.
        answers: condition -> one answer per sample.
    """

    counts: Mapping[str, Mapping[str, Count]]
    answers: Mapping[str, Sequence[str]]

    @property
    def accuracy(self) -> float:
        """Share of right answers with the picture."""
        return self.counts[WITH_PICTURE][ALL].share

    def table(self, caption: str = "") -> Table:
        conditions = list(self.counts)
        rows = []
        for group in GROUPS:
            counts = [self.counts[c][group] for c in conditions]
            if counts[0].total:
                rows.append([group, counts[0].total, *map(str, counts)])
        return Table(["answers", "questions", *conditions], rows, caption)

    def to_dict(self) -> dict[str, Any]:
        """Shares and totals in plain values."""
        return {
            condition: {g: {"right": c.right, "total": c.total, "share": round(c.share, 5)} for g, c in groups.items() if c.total}
            for condition, groups in self.counts.items()
        }


def evaluate(
    answerer: Answerer,
    samples: Sequence[VqaSample],
    *,
    prior: Mapping[str, str] | None = None,
    controls: bool = True,
    batch_size: int = 64,
    seed: int = 0,
    max_seconds: float | None = None,
    progress: Progress | None = None,
) -> VqaResult:
    """Asks every question and counts.

    Args:
        answerer: what is evaluated.
        samples: the questions.
        prior: from :func:`commonest_answers`; adds the prior's column.
        controls: whether to ask also without and with another picture; where all questions are about one picture, there is no other.
        batch_size: questions per call of the model.
        seed: of the exchange of pictures.
        max_seconds: asks no further questions after so long; those that were asked count.
        progress: called with answers given and answers wanted, over all conditions.
    """
    pictures: dict[str, Sequence[Tensor | None]] = {WITH_PICTURE: [s.picture for s in samples]}
    if controls:
        pictures[WITHOUT_PICTURE] = [None] * len(samples)
        if len({s.key for s in samples}) > 1:
            pictures[OTHER_PICTURE] = exchange(samples, seed)
    answers: dict[str, list[str]] = {condition: [] for condition in pictures}
    began = time.monotonic()
    asked = 0
    while asked < len(samples) and (max_seconds is None or not asked or time.monotonic() - began < max_seconds):
        # Several batches per call, so that a pipeline may encode a picture once for many of its questions.
        part = slice(asked, min(asked + 8 * batch_size, len(samples)))
        questions = [s.question for s in samples[part]]
        for condition, images in pictures.items():
            answers[condition] += answerer.answer(images[part], questions, batch_size=batch_size)
            if progress is not None:
                progress(sum(map(len, answers.values())), len(samples) * len(pictures))
        asked = part.stop
    samples = samples[:asked]
    if prior is not None:
        commonest = Counter(prior.values()).most_common(1)[0][0] if prior else ""
        answers[PRIOR] = [prior.get(s.question, commonest) for s in samples]
    return VqaResult({c: score(samples, given) for c, given in answers.items()}, answers)


def score(samples: Sequence[VqaSample], answers: Sequence[str]) -> dict[str, Count]:
    """Counts per group. An answer is right if it is the wanted word, case and outer blanks aside."""
    counts = {group: Count() for group in GROUPS}
    for sample, answer in zip(samples, answers, strict=True):
        for group in sample.groups:
            counts[group].add(answer.strip().lower() == sample.answer)
    return counts


def exchange(samples: Sequence[VqaSample], seed: int = 0) -> list[Tensor]:
    """Another picture for every sample, never its own: the pictures are shuffled and handed on in a ring.

    Raises:
        ValueError: all samples show the same picture.
    """
    by_key = {s.key: s.picture for s in samples}
    if len(by_key) < 2:
        raise ValueError("exchanging pictures needs samples of at least two pictures")
    ring = list(by_key)
    random.Random(seed).shuffle(ring)
    other = dict(zip(ring, ring[1:] + ring[:1], strict=True))
    return [by_key[other[s.key]] for s in samples]


def commonest_answers(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """What one would say without looking: the commonest answer to every question, ties by the alphabet."""
    counts: dict[str, Counter[str]] = {}
    for question, answer in pairs:
        counts.setdefault(question, Counter())[answer] += 1
    return {question: min(c, key=lambda a: (-c[a], a)) for question, c in counts.items()}


def easy_vqa_prior() -> dict[str, str]:
    """The prior of easy-VQA's training questions."""
    source = open_source("easy-vqa:train")
    return commonest_answers((q, a) for item in source.items() for q, a in source.read(item).labels["questions"])


def easy_vqa_samples(split: str = "test", limit: int | None = None, seed: int = 0) -> list[VqaSample]:
    """Questions of easy-VQA.

    Args:
        split: "train" or "test".
        limit: at most so many, drawn at random but the same for the same seed; None gives all in order.
        seed: of the draw.
    """
    source = open_source(f"easy-vqa:{split}")
    records = [source.read(item) for item in source.items()]
    pairs = [(i, question, answer) for i, record in enumerate(records) for question, answer in record.labels["questions"]]
    if limit is not None and limit < len(pairs):
        pairs = sorted(random.Random(seed).sample(pairs, limit))
    pictures = {i: decode_image(records[i].media) for i in {i for i, _, _ in pairs}}
    return [VqaSample(records[i].key, pictures[i], question, answer) for i, question, answer in pairs]
