"""What drafts cost, in passes of the model over one token, by arithmetic alone.

How many drafts are made shows in what rejection puts out, so that a clock must not decide it: equal seeds would give other tokens on
another day. So parameters are counted, and the rest are constants that were measured once: ``mmtp bench decode`` prints what drafts and
their verification cost a model, with ``--compile`` of compiled passes, and ``scripts/bench_decode.py`` what passes cost by their width.
"""

from typing import Any, NamedTuple

from mmtp.decode.step import Step


class Costs(NamedTuple):
    """Constants of one way to run passes.

    Attributes:
        start: what surrounds the blocks of a pass or of a head's step (embedding, mask, logits, choice), in blocks of the model.
        first: what a round with a draft costs more than one without, beside making it: a pass over two tokens runs other kernels, and a
            head reads what is new; in passes.
        further: what each further token of a pass costs more, with what grammar and choice take.
    """

    start: float
    first: float
    further: float

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


BY_CALLS = Costs(start=1.5, first=0.2, further=0.02)
"""Of passes by torch's kernels. Steps of the heads of emoji-s, omni-s and vqa-s come to 0.27 to 0.28 passes; measured were 0.25 to 0.31,
over four steps, and 0.33 to 0.36 for the first alone."""

COMPILED = Costs(start=0.0, first=0.15, further=0.1)
"""Of compiled passes, whose cost is arithmetic. A step of emoji-s comes to 0.16 passes; measured were 0.13 to 0.20."""


def _parameters(module: Any) -> int:
    return sum(weight.numel() for weight in module.parameters())
