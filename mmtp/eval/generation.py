"""Drawings from words, judged by the parser of :mod:`mmtp.eval.shapes`, and the ceiling that the tokenizer sets them."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mmtp.data.media import decode_image
from mmtp.data.sources import open_source
from mmtp.decode.sample import Sampling
from mmtp.eval.report import Pictures, Table
from mmtp.eval.shapes import COLOURS, SHAPES, Parsed, parse
from mmtp.eval.vqa import Count
from mmtp.types import Codes

Progress = Callable[[int, int], None]
"""Called with what is done and what there is in all."""


@runtime_checkable
class Drawer(Protocol):
    """What is evaluated; a pipeline is one."""

    def try_draw(
        self, captions: Sequence[str], samplings: Sequence[Sampling], *, max_new_tokens: int, candidates: int
    ) -> Sequence[Tensor | None]:
        """A picture for every caption, RGB in [0, 1], the best of so many candidates; None where there came none."""
        ...


@runtime_checkable
class PictureTokenizer(Protocol):
    """Pictures to codes and back."""

    def encode(self, media: Any) -> Codes: ...

    def decode(self, codes: Codes) -> Any: ...


@dataclass(frozen=True)
class Drawing:
    """A picture that should show one colour and shape.

    Attributes:
        colour: what was asked for, or is known of a real picture; None where it is not known.
        shape: likewise.
        seed: of the draw; for a real picture its number.
        picture: RGB in [0, 1].
        parsed: what it does show.
    """

    colour: str | None
    shape: str | None
    seed: int
    picture: Float[Tensor, "3 h w"]
    parsed: Parsed

    @property
    def colour_right(self) -> bool:
        return self.colour is None or self.parsed.colour == self.colour

    @property
    def shape_right(self) -> bool:
        return self.parsed.shape is not None if self.shape is None else self.parsed.shape == self.shape

    @property
    def right(self) -> bool:
        return self.colour_right and self.shape_right


@dataclass(frozen=True)
class DrawingResult:
    """Judged pictures."""

    drawings: Sequence[Drawing]

    @property
    def accuracy(self) -> float:
        """Share of pictures whose colour and shape are both right."""
        return self.count().share

    def count(self, colour: str | None = None, shape: str | None = None) -> Count:
        """Right pictures, of all or of a colour or shape."""
        count = Count()
        for d in self.drawings:
            if colour in (None, d.colour) and shape in (None, d.shape):
                count.add(d.right)
        return count

    def shares(self) -> dict[str, float]:
        """Shares of pictures with the right colour, the right shape, and both."""
        n = max(len(self.drawings), 1)
        return {
            "colour": sum(d.colour_right for d in self.drawings) / n,
            "shape": sum(d.shape_right for d in self.drawings) / n,
            "both": sum(d.right for d in self.drawings) / n,
        }

    def table(self, caption: str = "") -> Table:
        """Right pictures per colour and shape."""
        rows = [[c, *(str(self.count(c, s)) for s in SHAPES), str(self.count(c))] for c in COLOURS]
        rows.append(["all", *(str(self.count(None, s)) for s in SHAPES), str(self.count())])
        return Table(["colour", *SHAPES, "all"], rows, caption)

    def pictures(self, caption: str = "", limit: int | None = None) -> Pictures:
        """The pictures as a section of a report."""
        shown = self.drawings[:limit]
        labels = [" ".join(filter(None, (d.colour, d.shape))) for d in shown]
        return Pictures([d.picture for d in shown], labels, caption, good=[d.right for d in shown])

    def to_dict(self) -> dict[str, Any]:
        """Shares in plain values."""
        return {
            "pictures": len(self.drawings),
            **{k: round(v, 5) for k, v in self.shares().items()},
            "by_shape": {s: round(self.count(None, s).share, 5) for s in SHAPES},
            "by_colour": {c: round(self.count(c).share, 5) for c in COLOURS},
        }


def evaluate(
    drawer: Drawer,
    *,
    seeds: int = 10,
    sampling: Sampling | None = None,
    candidates: int = 1,
    max_new_tokens: int = 4352,
    batch_size: int = 24,
    max_seconds: float | None = None,
    progress: Progress | None = None,
) -> DrawingResult:
    """Draws all colours and shapes with so many seeds each, and judges them.

    Args:
        drawer: what is evaluated. What it does not finish as a picture counts as wrong.
        seeds: pictures per colour and shape; seeds run from 0.
        sampling: temperature and truncation, temperature 1 where it is not given; the seeds are set here.
        candidates: drawings among which the drawer chooses itself; it is not told what the judge says of them.
        max_new_tokens: limit of a picture's tokens.
        batch_size: pictures per call of the model; 24 are all colours and shapes once.
        max_seconds: draws no further pictures after so long.
        progress: called with pictures drawn and pictures wanted.
    """
    wanted = [(colour, shape, seed) for seed, colour, shape in product(range(seeds), COLOURS, SHAPES)]
    drawings: list[Drawing] = []
    began = time.monotonic()
    for start in range(0, len(wanted), batch_size):
        if start and max_seconds is not None and time.monotonic() - began > max_seconds:
            break
        chunk = wanted[start : start + batch_size]
        samplings = [replace(sampling or Sampling(), seed=seed) for _, _, seed in chunk]
        drawn = drawer.try_draw([f"a {c} {s}" for c, s, _ in chunk], samplings, max_new_tokens=max_new_tokens, candidates=candidates)
        pictures = [torch.ones(3, 64, 64) if picture is None else picture for picture in drawn]
        drawings += [Drawing(c, s, seed, p, parse(p)) for (c, s, seed), p in zip(chunk, pictures, strict=True)]
        if progress is not None:
            progress(len(drawings), len(wanted))
    return DrawingResult(drawings)


def judge(
    samples: Sequence[tuple[Mapping[str, Any], Float[Tensor, "3 _ _"]]],
    tokenizer: PictureTokenizer | None = None,
    *,
    batch_size: int = 50,
    progress: Progress | None = None,
) -> DrawingResult:
    """Judges real pictures, as they are or after a tokenizer has turned them into codes and back.

    Without a tokenizer this measures the parser itself; with one, the best that drawings through this tokenizer can reach.

    Args:
        samples: labels (``color`` and ``shape``, either may be missing) and pictures.
        tokenizer: None judges the pictures as they are.
        batch_size: pictures per call of the tokenizer.
        progress: called with pictures judged and pictures in all.
    """
    drawings: list[Drawing] = []
    for start in range(0, len(samples), batch_size):
        chunk = samples[start : start + batch_size]
        pictures = [picture for _, picture in chunk]
        if tokenizer is not None:
            pictures = tokenizer.decode(tokenizer.encode(pictures))
        for (labels, _), picture in zip(chunk, pictures, strict=True):
            drawings.append(Drawing(labels.get("color"), labels.get("shape"), len(drawings), picture, parse(picture)))
        if progress is not None:
            progress(len(drawings), len(samples))
    return DrawingResult(drawings)


def labelled_pictures(spec: str = "easy-vqa:test", limit: int | None = None) -> list[tuple[dict[str, Any], Tensor]]:
    """Labels and pictures of a source, the first ``limit``; ``color`` and ``shape`` among the labels say what a picture shows."""
    source = open_source(spec)
    samples = (source.read(item) for item in source.items()[:limit])
    return [(sample.labels, decode_image(sample.media)) for sample in samples]
