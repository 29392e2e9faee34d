"""What drafts cost, in passes of the model over one token, by arithmetic alone.

How many drafts are made shows in what rejection puts out, so that a clock must not decide it: equal seeds would give other tokens on
another day. So parameters are counted, and the rest are constants that were measured once: ``mmtp bench decode`` prints what drafts and
their verification cost a model, with ``--compile`` of compiled passes, and ``scripts/bench_rounds.py`` what rounds cost by how many drafts
rows make, alone and together, beside what these constants say.
"""

from typing import Any, NamedTuple

from mmtp.decode.step import Step


class Price(NamedTuple):
    """What drafts of a row cost beside their making, in passes.

    Attributes:
        first: of a round.
        further: each after it.
        alone: what is done for one row alone, and takes as long as a pass over one token.
    """

    first: float
    further: float
    alone: float


class Costs(NamedTuple):
    """Constants of one way to run passes.

    Attributes:
        start: what surrounds the blocks of a pass or of a head's step (embedding, mask, logits, choice), in blocks of the model.
        several: what a pass costs more in which rows have several tokens: it runs other kernels, and a head reads what is new; in passes.
        lane: what each lane more takes, and what a row takes for its drafts however many: its choice, its place in the grammar.
        token: what each token more takes.
        draft: what a refiner takes for a draft of a row, in passes over one token, where all are made in one call.
        draft_by_calls: where it makes them one by one.
    """

    start: float
    several: float
    lane: float
    token: float
    draft: float
    draft_by_calls: float

    def price(self, lanes: int = 1) -> Price:
        """What drafts cost a row in passes over so many lanes, for its part of such a pass over one token each.

        A pass over more lanes costs little more, so that its part is small, and what drafts take of it the greater.
        """
        whole = 1 + (lanes - 1) * (self.lane + self.token)
        return Price((self.several + lanes * (self.lane + self.token)) / whole, lanes * self.token / whole, lanes / whole)

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


BY_CALLS = Costs(start=1.5, several=0.15, lane=0.01, token=0.02, draft=0.01, draft_by_calls=0.12)
"""Of passes by torch's kernels. Steps of the heads of emoji-s, omni-s and vqa-s come to 0.27 to 0.28 passes; measured were 0.25 to 0.31,
over four steps, and 0.33 to 0.36 for the first alone."""

COMPILED = Costs(start=0.0, several=0.3, lane=0.12, token=0.2, draft=0.06, draft_by_calls=0.6)
"""Of compiled passes, whose cost is arithmetic, by weights that bfloat16 can hold; by others a plain pass is dearer, and drafts cost less
of it. A step of emoji-s comes to 0.16 passes; 0.13 to 0.20 were measured before weights were read so."""


def _parameters(module: Any) -> int:
    return sum(weight.numel() for weight in module.parameters())
