"""How many drafts pay: by what a draft costs, and by how often drafts have stood in this row so far."""

from collections import OrderedDict, defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from mmtp.decode.costs import Costs

BELIEVED = 2
"""Drafts that what is believed beforehand weighs as much as. With fewer, answers whose drafts do not stand lose less, and
short ones whose drafts do stand are given up after a refusal or two."""

HOPED = 0.8
"""How often the first draft is believed to stand. Where drafts are cheap nearly all are tried at once; where they are dear a few."""

KEPT = 4
"""Drafts that what was learnt in batches before weighs as much as, at each place in a round."""

REST = 8
"""Rounds for which nobody asks again whether drafts pay, once they do not: counts change by a hundredth a round, and asking takes time."""

TOGETHER = 4
"""Drafts that the first one of a round is weighed with, for it alone bears what a round with drafts takes more."""

LEFT = {"image": 0.2}
"""Tokens that later rounds gain by a draft that does not stand, in as far as first drafts do: of what the pass leaves at its place the next
draft there is made. In pictures much of that is right, for the rows above are; elsewhere it hangs on the very tokens that were refused, and
nothing was gained."""


class _Round(NamedTuple):
    """Drafts of a round so far.

    Attributes:
        drafts: how many.
        tokens: that the round is to yield, with what its drafts leave behind.
        standing: that it is to yield by itself.
        passes: that it costs.
        chance: that all stand.
        rate: at which the last one stands after all before it did.
    """

    drafts: int = 0
    tokens: float = 1.0
    standing: float = 1.0
    passes: float = 1.0
    chance: float = 1.0
    rate: float = HOPED


class Experience:
    """How many drafts were made, and stood, of each medium at each place in a round. Counts fade.

    Args:
        memory: what is left of a count after a round.
    """

    def __init__(self, memory: float = 0.99) -> None:
        self.memory = memory
        self._drafted: defaultdict[tuple[str, int], float] = defaultdict(float)
        self._stood: defaultdict[tuple[str, int], float] = defaultdict(float)

    def learn(self, media: Sequence[str], kept: int) -> None:
        """Counts the drafts of a round, of which the first ``kept`` stood; of those after the first that did not, nothing is known."""
        for counts in (self._drafted, self._stood):
            for key in counts:
                counts[key] *= self.memory
        for place, medium in enumerate(media[: kept + 1]):
            self._drafted[medium, place] += 1
            self._stood[medium, place] += place < kept

    def weaken(self, most: float) -> None:
        """Leaves rates as they are, as if they had been seen so often at most."""
        for key, drafted in self._drafted.items():
            if drafted > most:
                self._stood[key] *= most / drafted
                self._drafted[key] = most

    def rate(self, medium: str, place: int, believed: float) -> float:
        """Share of drafts that stood where all before them did; what is believed beforehand counts as if it had been seen."""
        return (BELIEVED * believed + self._stood[medium, place]) / (BELIEVED + self._drafted[medium, place])


class Experiences:
    """What an engine knows of its drafts, by settings: requests that sample alike go on from what those before them have learnt. A batch
    begins with little more than the rates, for its prompts may be others.

    Args:
        most: settings that are remembered, those met last.
    """

    def __init__(self, most: int = 256) -> None:
        self.most = most
        self._known: OrderedDict[Hashable, Experience] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def begin(self) -> None:
        """A new batch."""
        for experience in self._known.values():
            experience.weaken(KEPT)

    def of(self, settings: Hashable) -> Experience:
        """That of requests with these settings, whatever their seeds."""
        found = self._known.pop(settings, None) or Experience()
        self._known[settings] = found
        if len(self._known) > self.most:
            self._known.popitem(last=False)
        return found


class Pace:
    """Stops drafting where a further draft would lower the tokens that a unit of cost yields.

    With acceptance a_i of draft i after all before it stood, k drafts yield 1 + Σ_j Π_{i≤j} a_i tokens on average (Leviathan et al. 2023,
    section 3.1, with a rate per draft) at a cost of 1 + Σ_j c_j passes, and what drafts that do not stand leave behind comes to their yield
    (``LEFT``). Draft k pays while its yield in units of its cost c_k is above that ratio for k - 1. Whether there are to be any is decided
    for the first few together, by the tokens of the round alone: how often they stand shows already what rounds before have left. Where
    none are to be, nobody asks again for some rounds (``REST``).

    Acceptance is counted per medium and place in the round. Beforehand the first draft is believed to stand four times in five, and a
    further one as often as the one before it, each as if that had been seen twice. Counts fade, so that what was given up is tried again: a
    draft of cost c that never stands is made as often as keeps its count at 1.6 / c - 2, which takes (1 - memory) (1.6 - 2 c) of all
    passes. All depends on what was learnt before, and on the lanes that :meth:`among` was told: with an experience of its own and alone, on
    the row and nothing else.

    Args:
        costs: of passes of the model.
        cost: of any draft and its verification, in passes of the model; None for what making each takes, and what ``costs`` says.
        experience: with drafts so far, which several may share that draft alike; None begins one.
    """

    def __init__(self, costs: Costs, cost: float | None = None, experience: Experience | None = None) -> None:
        self.cost, self.costs = cost, costs
        self.experience = Experience() if experience is None else experience
        self._price = costs.price()
        self._rests: dict[str, int] = {}  # medium -> rounds
        self.begin()

    def among(self, lanes: int) -> None:
        """From now on costs are those of a pass that so many lanes share."""
        price = self.costs.price(lanes)
        if price is not self._price:
            self._price = price
            self._rests.clear()

    def alone(self, passes: float) -> float:
        """What is done for this row alone, in its part of the pass that it shares."""
        return passes * self._price.alone

    def begin(self) -> None:
        """A new round, without drafts."""
        self._round = _Round()

    def pays(self, medium: str, making: float = 0.0) -> bool:
        """Whether one more draft is worth its cost.

        Args:
            medium: of its token.
            making: passes of the model that it takes to make it.
        """
        if self._round.drafts:
            return self._pays(self._round, medium, making)
        if self._rests.get(medium):
            return False
        pays = self._pays(self._round, medium, making)
        if not pays:
            self._rests[medium] = REST
        return pays

    def count(self, medium: str, most: int, making: float = 0.0) -> int:
        """How many more drafts of a medium are worth their cost, where making each takes so many passes."""
        ahead = self._round
        while ahead.drafts - self._round.drafts < most and self._pays(ahead, medium, making):
            ahead = self._after(ahead, medium, making)
        return ahead.drafts - self._round.drafts

    def take(self, medium: str, making: float = 0.0) -> None:
        """One more draft was made; arguments are those of :meth:`pays`."""
        self._round = self._after(self._round, medium, making)

    def learn(self, media: Sequence[str], kept: int) -> None:
        """Counts the drafts of a round; arguments are those of :meth:`Experience.learn`."""
        self.experience.learn(media, kept)
        for medium, rounds in self._rests.items():
            self._rests[medium] = max(0, rounds - 1)

    def _pays(self, before: _Round, medium: str, making: float) -> bool:
        """Whether one more draft is worth its cost, or a first one with those that follow it."""
        if before.drafts:
            return self._yield(before, medium) * before.passes >= self._cost(before, making) * before.tokens
        after = before
        for _ in range(TOGETHER):
            after = self._after(after, medium, making)
            if after.standing >= after.passes:
                return True
        return False

    def _after(self, before: _Round, medium: str, making: float) -> _Round:
        """A round with one more draft."""
        rate, tokens = self._rate(before, medium), before.tokens + self._yield(before, medium)
        chance, passes = before.chance * rate, before.passes + self._cost(before, making)
        return _Round(before.drafts + 1, tokens, before.standing + chance, passes, chance, rate)

    def _yield(self, before: _Round, medium: str) -> float:
        """Tokens of the next draft: that it stands, and what it leaves behind where it does not."""
        chance = before.chance * self._rate(before, medium)
        left = LEFT[medium] * self.experience.rate(medium, 0, HOPED) if medium in LEFT else 0.0
        return chance + left * (1 - chance)

    def _rate(self, before: _Round, medium: str) -> float:
        """Share of next drafts that stood where all before them did; it is believed to be that of the one before."""
        return self.experience.rate(medium, before.drafts, before.rate)

    def _cost(self, before: _Round, making: float) -> float:
        """Of the next draft and its verification, in passes."""
        if self.cost is not None:
            return self.cost
        return making + self._price.next(before.drafts)
