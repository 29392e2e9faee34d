"""What drafts cost, in passes of the model over one token, by arithmetic alone.

How many drafts are made shows in what rejection puts out, so that a clock must not decide it: equal seeds would give other tokens on
another day. So a model's numbers are counted, and the rest are constants that were measured once: ``scripts/bench_rounds.py`` prints what
rounds cost by how many drafts rows make, alone and together, of models of any size, beside what is reckoned here, and ``mmtp bench decode``
what drafts and their verification cost a trained one.

A pass reads every weight, and multiplies it by every token. While a weight comes from memory several tokens could be multiplied by it, so
that a pass over these costs little more than one over a token (the roofline: Williams, Waterman & Patterson, 2009). Beside that blocks,
rows and tokens take some time of their own, which counts the less the larger a model is. So the larger it is, the more drafts pay.
"""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

from mmtp.decode.step import Step
from mmtp.nn import native

LONGEST = 64
"""Drafts of a round that are reckoned one by one; each after them costs what the last one does."""


class Price(NamedTuple):
    """What drafts of a row cost, in passes over one token of each row.

    Attributes:
        verifying: verification of each, in the order in which a round makes them.
        alone: what is done for one row alone, and takes as long as a pass over one token.
    """

    verifying: tuple[float, ...]
    alone: float

    def next(self, made: int) -> float:
        """Verification of one more draft after so many."""
        return self.verifying[min(made, len(self.verifying) - 1)]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What passes of a model cost. Times are in milliseconds, and only their ratios matter.

    Attributes:
        fixed: what a pass takes however many tokens it has.
        several: what it takes more where rows have several tokens: it runs other kernels, and a head reads what is new.
        lane: what each lane takes: its choice, its place in the grammar.
        drafted: what each lane takes more that has drafts, however many.
        token: what each token takes, whatever the model's size.
        read: what reading all weights takes.
        multiply: what multiplying a token by them takes.
        overlap: how far both go on at the same time: at 1 they take turns, without end the longer one takes all.
        drawing: what a refiner takes for a draft, where all are made in one call.
        drawing_by_calls: where it makes them one by one.
        counting: what a draft by n-grams takes.
        start: what surrounds the blocks of a pass or of a head's step (embedding, mask, logits, choice), in blocks of the model.
    """

    fixed: float
    several: float
    lane: float
    token: float
    read: float
    multiply: float
    drafted: float = 0.0
    overlap: float = 1.0
    drawing: float = 0.0
    drawing_by_calls: float = 0.0
    counting: float = 0.0
    start: float = 0.0

    def round(self, lanes: int = 1, drafts: int = 0) -> float:
        """What a pass takes over so many lanes, each with so many drafts."""
        tokens = lanes * (1 + drafts)
        weights = (self.read**self.overlap + (tokens * self.multiply) ** self.overlap) ** (1 / self.overlap)
        return self.fixed + lanes * self.lane + tokens * self.token + weights + (self.several + lanes * self.drafted if drafts else 0.0)

    def price(self, lanes: int = 1) -> Price:
        """What drafts cost a row in passes over so many lanes, for its part of such a pass over one token each.

        A pass over more lanes costs little more, so that its part is small, and what drafts take of it the greater.
        """
        return _price(self, lanes)

    @property
    def draft(self) -> float:
        """Passes that a refiner takes for a draft, where all are made in one call."""
        return self.drawing / self.round()

    @property
    def draft_by_calls(self) -> float:
        """Passes that it takes where it makes them one by one."""
        return self.drawing_by_calls / self.round()

    @property
    def draft_by_counts(self) -> float:
        """Passes that a draft by n-grams takes."""
        return self.counting / self.round()

    def head_step(self, model: Step) -> float:
        """Passes that a step of the model's head takes, which drafts one token."""
        return self._passes(_parameters(model.head) / model.head.num_modules, model)

    def passes_of(self, other: Step, model: Step) -> float:
        """Passes of a model that one of another over the same vocabulary takes."""
        return self._passes(_parameters(other.backbone), model)

    def _passes(self, parameters: float, model: Step) -> float:
        """What reads so many parameters, in passes of a model."""
        whole = _parameters(model.backbone)
        start = self.start * whole / model.config.backbone.depth
        return (parameters + start) / (whole + start)


@cache
def _price(costs: Costs, lanes: int) -> Price:
    rounds = [costs.round(lanes, drafts) for drafts in range(LONGEST + 1)]
    return Price(tuple((more - less) / rounds[0] for less, more in pairwise(rounds)), lanes * costs.round() / rounds[0])


class Way(NamedTuple):
    """Constants of one way to run passes; those that :class:`Costs` has too are the same.

    Attributes:
        block: what starting a block takes.
        several: see there.
        lane: see there.
        drafted: see there.
        token: see there.
        bandwidth: bytes that are read, in billions a second.
        rate: numbers that are multiplied in float32, in billions a second; of half as long ones twice as many.
        overlap: see there.
        drawing: of a refiner, for each million numbers that a draft reads; a part of the drafts costs nothing, for they are carried.
        drawing_by_calls: see there.
        counting: see there.
        start: see there.
    """

    block: float
    several: float
    lane: float
    drafted: float
    token: float
    bandwidth: float
    rate: float
    overlap: float
    drawing: float
    drawing_by_calls: float
    counting: float
    start: float

    def costs(self, model: Step) -> Costs:
        """What passes of a model cost so."""
        size, weight = model.config.backbone, model.unembedding.weight
        choices = max(sum(high - low for low, high in slot.generable) for slot in model.config.layout.slots) * size.width
        numbers, refined = _parameters(model.backbone) + choices, choices
        if model.refiner is not None:
            refined += sum(each.numel() for each in model.refiner.parameters)
        length = 2 if self is COMPILED and native.exact(weight) else weight.itemsize
        return Costs(
            fixed=self.block * (size.depth + self.start),
            several=self.several,
            lane=self.lane,
            drafted=self.drafted,
            token=self.token,
            read=1e-6 * numbers * length / self.bandwidth,
            multiply=1e-6 * numbers * weight.itemsize / 4 / self.rate,
            overlap=self.overlap,
            drawing=1e-6 * refined * self.drawing,
            drawing_by_calls=self.drawing_by_calls,
            counting=self.counting,
            start=self.start,
        )


BY_CALLS = Way(
    block=0.18, several=0.35, lane=0.14, drafted=0, token=0.07, bandwidth=35, rate=105, overlap=1,
    drawing=0.016, drawing_by_calls=0.32, counting=0.08, start=1.5,
)  # fmt: skip
"""Of passes by torch's kernels on a core of a CPU. Steps of the heads of emoji-s, omni-s and vqa-s come to 0.27 to 0.28 passes; measured
were 0.25 to 0.31, over four steps, and 0.33 to 0.36 for the first alone."""

COMPILED = Way(
    block=0.003, several=0.1, lane=0.03, drafted=0.03, token=0.045, bandwidth=40, rate=110, overlap=3,
    drawing=0.02, drawing_by_calls=0.2, counting=0.04, start=0,
)  # fmt: skip
"""Of compiled passes there, which read weights that bfloat16 can hold in it. A step of emoji-s' head comes to 0.16 passes; 0.13 to 0.20
were measured before weights were read so."""

ON_ACCELERATORS = BY_CALLS._replace(block=0.05, bandwidth=2000, rate=75000, overlap=3)
"""Of passes on an accelerator, recorded or not: as on a CPU what rows and tokens take, and for the rest the order of magnitude that data
sheets give (NVIDIA A100); nothing of it was measured."""


def _parameters(module: Any) -> int:
    return sum(weight.numel() for weight in module.parameters())
