"""How many drafts pay: by what a draft costs, and by how often drafts have stood in this row so far."""

from collections import defaultdict
from collections.abc import Sequence

Key = tuple[str, int]
"""Modality of a drafted token, and its offset."""


class Pace:
    """Stops drafting where a further draft would lower the tokens that a unit of cost yields.

    With acceptance a_i of draft i after all before it stood, k drafts yield 1 + Σ_j Π_{i≤j} a_i tokens on average (Leviathan et al. 2023,
    section 3.1, with a rate per draft) at a cost of 1 + k c passes. Draft k pays while Π_{i≤k} a_i / c is above that ratio for k - 1.

    Acceptance is counted per key with one success beforehand, and counts fade, so that what was given up is tried again. It depends on what
    the row has settled before, and on nothing else: a request drafts equally in any batch.

    Args:
        cost: of one more draft and its verification, in passes of the model.
        memory: what is left of a count after a round.
    """

    def __init__(self, cost: float, memory: float = 0.95) -> None:
        self.cost, self.memory = cost, memory
        self._drafted: defaultdict[Key, float] = defaultdict(float)
        self._stood: defaultdict[Key, float] = defaultdict(float)
        self.begin()

    def begin(self) -> None:
        """A new round, without drafts."""
        self._chance = self._tokens = self._passes = 1.0

    def acceptance(self, key: Key) -> float:
        """Share of drafts that stood where all before them did."""
        return (1 + self._stood[key]) / (1 + self._drafted[key])

    def pays(self, key: Key) -> bool:
        """Whether one more draft is worth its cost."""
        return self._chance * self.acceptance(key) * self._passes >= self.cost * self._tokens

    def take(self, key: Key) -> None:
        """One more draft was made."""
        self._chance *= self.acceptance(key)
        self._tokens += self._chance
        self._passes += self.cost

    def learn(self, drafted: Sequence[Key], kept: int) -> None:
        """Counts the drafts of a round, of which the first ``kept`` stood; of those after the first that did not, nothing is known."""
        for counts in (self._drafted, self._stood):
            for key in counts:
                counts[key] *= self.memory
        for key in drafted[: kept + 1]:
            self._drafted[key] += 1
        for key in drafted[:kept]:
            self._stood[key] += 1
