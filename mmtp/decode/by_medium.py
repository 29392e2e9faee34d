"""Drafts by what suits the medium: words by counts of n-grams, by the model's refiner or by its head, codes of pictures, sounds and videos
by the refiner or by the pass before.

Words that a model was made for are mostly known by the few before them, and a table of those costs no pass. Codes are known to nobody but
the model: a refiner (:mod:`mmtp.decode.refined`) starts from its own states. Where there is none, neighbours are alike, so that what the
model chose behind a refused draft says more of the codes to come than a small head does, and costs next to nothing
(:mod:`mmtp.decode.jacobi`). While codes are drafted the head reads nothing: see :class:`mmtp.decode.drafts.HeadDrafter`.
"""

import sys
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mmtp.decode.chooser import Chooser
from mmtp.decode.drafts import Drafter, Drafts, HeadDrafts
from mmtp.decode.jacobi import JacobiDrafts
from mmtp.decode.ngrams import NGramDrafts
from mmtp.decode.refined import RefinedDrafts
from mmtp.decode.rows import Lane, Row
from mmtp.decode.step import Step
from mmtp.types import Modality


@dataclass(frozen=True, kw_only=True)
class DraftsByMedium:
    """Two ways of drafting, each where it is the better one.

    Attributes:
        text: drafts where words stand, and may go on into what follows them. None takes the model's n-grams, or where it has none its
            refiner, if that has learnt words, else its head; a model without any of them drafts no words.
        codes: drafts codes, and what the grammar leaves no choice about. None takes the model's refiner where it has learnt codes; else
            what the pass before chose.
    """

    text: Drafts | None = None
    codes: Drafts | None = None

    def length(self, model: Step) -> int:
        return max(self._text(model).length(model), self._most_codes(model))

    def begin(self, chooser: Chooser, num_lanes: int, capacity: int, exact: bool = False) -> Drafter:
        of = chooser.model
        ways = (self._text(of), self._text(of).length(of)), (self._codes(of), self._most_codes(of))
        text, codes = (way.begin(chooser, num_lanes, capacity, exact) if most else None for way, most in ways)
        return _DrafterByMedium(chooser, text, codes)

    def _text(self, model: Step) -> Drafts:
        if self.text is not None:
            return self.text
        if model.ngrams is not None:
            return NGramDrafts()
        return RefinedDrafts() if model.refiner is not None and Modality.TEXT in model.refiner.media else HeadDrafts(rows=False)

    def _codes(self, model: Step) -> Drafts:
        if self.codes is not None:
            return self.codes
        return RefinedDrafts() if model.refiner is not None and model.refiner.media - {Modality.TEXT} else JacobiDrafts()

    def _most_codes(self, model: Step) -> int:
        """Drafts of codes at most; a vocabulary without any needs no room for them."""
        return self._codes(model).length(model) if any(not entry.continuous for entry in model.config.layout.media) else 0


class _DrafterByMedium:
    """Asks one of two drafters for each row, and tells both what is read."""

    def __init__(self, chooser: Chooser, text: Drafter | None, codes: Drafter | None) -> None:
        self.slots, self.text, self.codes = chooser.slots, text, codes
        self.both = [drafter for drafter in (text, codes) if drafter is not None]

    @property
    def lookahead(self) -> int:
        return max((drafter.lookahead for drafter in self.both), default=0)

    @property
    def pads(self) -> bool:
        return any(drafter.pads for drafter in self.both)

    def propose(self, rows: list[Row], lanes: list[Lane], hidden: Float[Tensor, "b s d"], counts: list[int], least: int) -> None:
        words = [row for row in rows if not row.done and self._in_words(row)]
        codes = [row for row in rows if not row.done and not self._in_words(row)]
        if self.text is not None:
            self.text.propose(words, lanes, hidden, counts, least)
        if self.codes is not None:
            self.codes.propose(codes, lanes, hidden, counts, least)

    def _in_words(self, row: Row) -> bool:
        """Whether words come next, with words before them. What closes a span is forced, and mostly ends the turn as well: for the one
        token that follows it a head would have to read the whole span.
        """
        after, newest = self.slots[row.state.slot], self.slots[row.slots[-1]]
        return after.modality is Modality.TEXT and after.forced is None and newest.forced is None

    def restart(self, lane: int) -> None:
        for drafter in self.both:
            drafter.restart(lane)

    def focus(self, first: int, count: int) -> None:
        for drafter in self.both:
            drafter.focus(first, count)

    def held(self, lane: int) -> int:
        return min((drafter.held(lane) for drafter in self.both), default=sys.maxsize)

    def keeps(self, lane: int, length: int) -> bool:
        return all(drafter.keeps(lane, length) for drafter in self.both)

    def copy(self, source: int, target: int, length: int) -> None:
        for drafter in self.both:
            drafter.copy(source, target, length)

    def swap(self, one: int, other: int) -> None:
        for drafter in self.both:
            drafter.swap(one, other)
