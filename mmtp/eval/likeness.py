"""Pictures drawn from held-out captions, judged by what a classifier of real pictures reads in them.

The judge is a linear classifier per label on the pooled features of a named network, fitted on known real pictures and on the same
after the tokenizer's round trip: fitted on the first alone it reads what codes leave of them little better than by chance. Its own accuracy
on real held-out pictures stands beside every figure, and so does what it reads in their reconstructions, which bound what can be drawn.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmtp.decode.sample import Sampling
from mmtp.eval.captions import elsewhere
from mmtp.eval.features import FeatureNetwork, Gaussian, frechet_distance
from mmtp.eval.generation import Drawer, PictureTokenizer
from mmtp.eval.probes import linear_probe
from mmtp.eval.report import Pictures, Table

REAL, RECONSTRUCTED, DRAWN, OTHER_CAPTION, COMMONEST = "real", "reconstructed", "drawn", "drawn for another caption", "commonest label"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Judged:
    """Real pictures with what should be read in them.

    Attributes:
        pictures: values in [0, 1].
        prompts: what a model is asked to draw.
        labels: label -> value for every picture.
    """

    pictures: Float[Tensor, "b 3 h w"]
    prompts: tuple[str, ...]
    labels: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class LikenessResult:
    """What was read.

    Attributes:
        shares: condition -> label -> share of pictures in which the right value was read. A drawing that was not finished is wrong.
        frechet: condition -> Fréchet distance to the real held-out pictures in the judge's features.
        drawings: None where one was not finished.
        prompts: as many.
    """

    shares: Mapping[str, Mapping[str, float]]
    frechet: Mapping[str, float]
    drawings: Sequence[Tensor | None]
    prompts: Sequence[str]

    def table(self, caption: str = "") -> Table:
        labels = list(next(iter(self.shares.values())))
        rows = [
            [c, *(f"{100 * shares[label]:.1f} %" for label in labels), f"{self.frechet[c]:.1f}" if c in self.frechet else None]
            for c, shares in self.shares.items()
        ]
        return Table(["pictures", *labels, "Fréchet distance"], rows, caption)

    def pictures(self, caption: str = "", limit: int = 64) -> Pictures:
        """The first drawings as a section of a report."""
        shown = [(d, p) for d, p in zip(self.drawings, self.prompts, strict=True) if d is not None][:limit]
        return Pictures([d for d, _ in shown], [p for _, p in shown], caption)

    def to_dict(self) -> dict[str, Any]:
        """Figures in plain values."""
        return {
            "pictures": len(self.prompts),
            "unfinished": sum(d is None for d in self.drawings),
            "shares": {c: {label: round(v, 5) for label, v in shares.items()} for c, shares in self.shares.items()},
            "frechet": {c: round(v, 3) for c, v in self.frechet.items()},
        }


def evaluate_likeness(
    drawer: Drawer,
    tokenizer: PictureTokenizer,
    network: FeatureNetwork,
    held_out: Judged,
    bank: Judged,
    *,
    sampling: Sampling | None = None,
    candidates: int = 1,
    max_new_tokens: int = 512,
    batch_size: int = 24,
    progress: Progress | None = None,
) -> LikenessResult:
    """Draws every held-out prompt once (seeds 0, 1, 2, …) and reads the labels.

    Args:
        drawer: what is evaluated.
        tokenizer: its tokenizer of pictures.
        network: whose features the judge reads.
        held_out: what to draw, beside the real pictures.
        bank: real pictures to fit the judge on, with the same labels.
        sampling: how codes are chosen.
        candidates: see :meth:`mmtp.pipeline.Pipeline.try_draw`.
        max_new_tokens: limit of a drawing.
        batch_size: drawings made at a time.
        progress: called with drawings done and all.
    """
    base, number = sampling or Sampling(), len(held_out.prompts)
    drawings: list[Tensor | None] = []
    for start in range(0, number, batch_size):
        part = held_out.prompts[start : start + batch_size]
        samplings = [replace(base, seed=start + i) for i in range(len(part))]
        drawings += drawer.try_draw(part, samplings, max_new_tokens=max_new_tokens, candidates=candidates)
        if progress is not None:
            progress(len(drawings), number)
    rebuilt = _round_trip(tokenizer, held_out.pictures, batch_size)
    finished = [i for i, drawing in enumerate(drawings) if drawing is not None]
    sets = {
        REAL: network.pooled(list(held_out.pictures)),
        RECONSTRUCTED: network.pooled(rebuilt),
        DRAWN: network.pooled([d for d in drawings if d is not None]) if finished else torch.zeros(0, 1),
    }
    known = network.pooled([*bank.pictures, *_round_trip(tokenizer, bank.pictures, batch_size)])
    shares: dict[str, dict[str, float]] = {c: {} for c in (REAL, RECONSTRUCTED, DRAWN, OTHER_CAPTION, COMMONEST)}
    for label, wanted in held_out.labels.items():
        names = sorted(set(bank.labels[label]))
        targets = torch.tensor([names.index(v) for v in bank.labels[label]]).repeat(2)
        queries = torch.cat([features for features in sets.values() if len(features)])
        read = [names[i] for i in linear_probe(known, targets, queries).tolist()]
        real, again, drawn = read[:number], read[number : 2 * number], read[2 * number :]
        seen: list[str | None] = [None] * number
        for place, value in zip(finished, drawn, strict=True):
            seen[place] = value
        commonest = Counter(bank.labels[label]).most_common(1)[0][0]
        found = {REAL: real, RECONSTRUCTED: again, DRAWN: seen, OTHER_CAPTION: elsewhere(seen), COMMONEST: [commonest] * number}
        for condition, values in found.items():
            shares[condition][label] = sum(a == b for a, b in zip(values, wanted, strict=True)) / number
    frechet = {c: _frechet(sets[c], sets[REAL]) for c in (RECONSTRUCTED, DRAWN) if len(sets[c]) > 1}
    return LikenessResult(shares, frechet, drawings, held_out.prompts)


@torch.no_grad()
def _round_trip(tokenizer: PictureTokenizer, pictures: Float[Tensor, "b 3 h w"], batch_size: int) -> list[Tensor]:
    rebuilt = [picture for part in pictures.split(batch_size) for picture in tokenizer.decode(tokenizer.encode(list(part)))]
    return [picture.clamp(0, 1) for picture in rebuilt]


def _frechet(a: Tensor, b: Tensor) -> float:
    first, second = Gaussian(), Gaussian()
    first.add(a)
    second.add(b)
    return frechet_distance(first, second)
