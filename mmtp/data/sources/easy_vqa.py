"""easy-VQA (PyPI ``easy-vqa``, MIT; extra ``demo``): 5,000 pictures of one coloured shape, with questions and answers.

The pictures have no captions, but their questions tell what is on them: "what color is the circle?" "blue" is a blue circle.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from mmtp.data.errors import DataError
from mmtp.data.media import read_bytes
from mmtp.data.sources.base import Item, Sample

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
SPLITS = ("train", "test")


@dataclass(frozen=True)
class EasyVqaSource:
    """One split, in the order of the pictures' numbers.

    Labels: ``questions``; and where the questions determine them ``color``, ``shape`` and ``caption`` ("a blue circle").

    Attributes:
        split: "train" or "test".
    """

    split: str = "train"

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise DataError(f"easy-vqa has no split {self.split!r}; it has {' and '.join(SPLITS)}")

    @property
    def name(self) -> str:
        return f"easy-vqa:{self.split}"

    def items(self) -> list[Item]:
        version = metadata.version("easy-vqa") if _pictures(self.split) else ""
        return [
            Item(f"{self.split}/{number}", f"{self.split}/images/{number}.png", "", path.stat().st_size, version)
            for number, path in _pictures(self.split).items()
        ]

    def read(self, item: Item) -> Sample:
        number = int(item.key.rpartition("/")[2])
        questions = _questions(self.split).get(number, [])
        labels: dict[str, Any] = {"questions": questions}
        if colour := determine(questions, COLOURS):
            labels["color"] = colour
        if shape := determine(questions, SHAPES):
            labels["shape"] = shape
        if colour and shape:
            labels["caption"] = f"a {colour} {shape}"
        return Sample(item.key, read_bytes(_pictures(self.split)[number]), labels)


def determine(questions: Iterable[list[str]], values: tuple[str, ...]) -> str | None:
    """The one value that all answers agree on, or None.

    Told outright (the answer to "what color …?", a value that a "what …?" question takes for granted, a "yes"), else what is
    left when everything that was denied is struck out.

    Args:
        questions: pairs of question and answer.
        values: all values of the attribute.
    """
    told: set[str] = set()
    denied: set[str] = set()
    for question, answer in questions:
        named = {value for value in values if re.search(rf"\b{value}\b", question)}
        if answer in values:
            told.add(answer)
        elif answer in ("yes", "no"):
            negated = re.search(r"\b(not|no)\b", question) is not None
            (told if (answer == "yes") != negated else denied).update(named)
        else:
            told |= named
    left = told - denied if told else set(values) - denied
    return left.pop() if len(left) == 1 and not told & denied else None


@lru_cache(maxsize=2)
def _pictures(split: str) -> dict[int, Path]:
    paths = getattr(_package(), f"get_{split}_image_paths")()
    return {number: Path(paths[number]) for number in sorted(paths)}


@lru_cache(maxsize=2)
def _questions(split: str) -> dict[int, list[list[str]]]:
    by_picture: dict[int, list[list[str]]] = {}
    for question, answer, number in zip(*getattr(_package(), f"get_{split}_questions")(), strict=True):
        by_picture.setdefault(number, []).append([question, answer])
    return by_picture


def _package() -> Any:
    try:
        import easy_vqa
    except ImportError as error:
        raise DataError("easy-vqa: the data set is a package of its own: pip install 'mmtp[demo]'") from error
    return easy_vqa
