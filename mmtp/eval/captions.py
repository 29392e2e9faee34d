"""Captions of pictures, beside what can be said without looking, and what the nearest known picture is called.

The measure is token F1, as in reading comprehension (Rajpurkar et al. 2016, arXiv 1606.05250, section 6.1): words of a caption and of
the right one are compared as multisets.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mmtp.eval.report import Table

PICTURE, OTHER_PICTURE, NEAREST, CONSTANT = "picture", "other picture", "nearest known picture", "best constant"
Look = Callable[[Float[Tensor, "b 3 h w"]], Float[Tensor, "b d"]]
"""Pictures in [0, 1] to vectors that are near where pictures are alike."""


@runtime_checkable
class Captioner(Protocol):
    """What is evaluated; a pipeline is one."""

    def caption(self, media: Sequence[Any], *, batch_size: int = 64) -> list[str]:
        """A caption for every picture."""
        ...


@dataclass(frozen=True)
class Captioned:
    """Pictures of one size with their captions, values in [0, 1]."""

    pictures: Float[Tensor, "b 3 h w"]
    captions: tuple[str, ...]


@dataclass(frozen=True)
class CaptionResult:
    """What was said under every condition.

    Attributes:
        said: condition -> one caption per picture.
        wanted: the right ones.
    """

    said: Mapping[str, Sequence[str]]
    wanted: Sequence[str]

    def f1(self, condition: str = PICTURE) -> float:
        """Mean token F1."""
        return _mean_f1(self.said[condition], self.wanted)

    def exact(self, condition: str = PICTURE) -> float:
        """Share of captions whose words are the right ones in order."""
        return sum(_words(a) == _words(b) for a, b in zip(self.said[condition], self.wanted, strict=True)) / len(self.wanted)

    def table(self, caption: str = "") -> Table:
        """Both figures of all conditions."""
        rows = [[c, len(self.wanted), f"{self.f1(c):.3f}", f"{100 * self.exact(c):.1f} %"] for c in self.said]
        return Table(["caption from", "pictures", "token F1", "exact"], rows, caption)

    def to_dict(self) -> dict[str, Any]:
        """Figures in plain values."""
        return {
            "pictures": len(self.wanted),
            **{c: {"f1": round(self.f1(c), 5), "exact": round(self.exact(c), 5)} for c in self.said},
        }


def evaluate_captions(
    captioner: Captioner, held_out: Captioned, bank: Captioned, *, look: Look | None = None, batch_size: int = 64
) -> CaptionResult:
    """Captions held-out pictures, under four conditions.

    - ``picture``: the model's words for the picture;
    - ``other picture``: its words for a picture drawn at random, compared with this one's caption;
    - ``nearest known picture``: the caption of the bank's picture whose vector has the greatest cosine;
    - ``best constant``: that caption of the bank which has the greatest mean F1 over the bank.

    Args:
        captioner: what is evaluated.
        held_out: pictures to measure on.
        bank: known pictures of the same size.
        look: what the nearest picture is found by; centred pixels where there is nothing better.
        batch_size: pictures captioned at a time.
    """
    said = captioner.caption(list(held_out.pictures), batch_size=batch_size)
    known = [bank.captions[i] for i in nearest_pictures(bank.pictures, held_out.pictures, look)]
    constant = best_constant(bank.captions)
    conditions = {PICTURE: said, OTHER_PICTURE: elsewhere(said), NEAREST: known, CONSTANT: [constant] * len(said)}
    return CaptionResult(conditions, held_out.captions)


def elsewhere(values: Sequence[Any]) -> list[Any]:
    """Each value at another place, drawn at random: neighbours in a list are often alike."""
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0)).tolist()
    moved = list(values)
    for here, there in zip(order, order[1:] + order[:1], strict=True):
        moved[here] = values[there]
    return moved


def token_f1(said: str, wanted: str) -> float:
    """Harmonic mean of the shares of words that are right and that were found; 1 where both are without words."""
    a, b = Counter(_words(said)), Counter(_words(wanted))
    if not a or not b:
        return float(a == b)
    return 2 * (a & b).total() / (a.total() + b.total())


def best_constant(captions: Sequence[str]) -> str:
    """That of the captions which has the greatest mean token F1 with all of them; the first of several."""
    counted = Counter(captions)
    return max(counted, key=lambda c: sum(n * token_f1(c, other) for other, n in counted.items()))


@torch.no_grad()
def nearest_pictures(bank: Float[Tensor, "m 3 h w"], queries: Float[Tensor, "q 3 h w"], look: Look | None = None) -> list[int]:
    """For each picture that of the bank whose vector, less the bank's mean, has the greatest cosine with its own."""
    a, b = (look(part) if look else part.flatten(1) for part in (bank, queries))
    centre = a.mean(0)
    a, b = (torch.nn.functional.normalize(part - centre, dim=1) for part in (a, b))
    return (b @ a.T).argmax(1).tolist()


def _mean_f1(said: Sequence[str], wanted: Sequence[str]) -> float:
    return sum(token_f1(a, b) for a, b in zip(said, wanted, strict=True)) / len(wanted)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
