"""States that wait for a head: where drafts come from elsewhere it reads nothing, and has much to read when it is asked again."""

import torch
from jaxtyping import Float
from torch import Tensor


class Waiting:
    """States of anchors that a head has not read yet, oldest first. Lanes are counted from the first of all.

    Args:
        num_lanes: lanes of the batch.
    """

    def __init__(self, num_lanes: int) -> None:
        self._states: list[list[Float[Tensor, "_ d"]]] = [[] for _ in range(num_lanes)]
        self._counts = [0] * num_lanes

    def count(self, lane: int) -> int:
        """How many wait in a lane."""
        return self._counts[lane]

    def add(self, lane: int, states: Float[Tensor, "n d"]) -> None:
        """Lets states wait behind those that do already."""
        if len(states):
            self._states[lane].append(states.clone())  # a view would keep the whole pass
            self._counts[lane] += len(states)

    def take(self, lane: int, count: int) -> Float[Tensor, "count d"]:
        """The oldest of a lane, one at least, which wait no longer."""
        states = torch.cat(self._states[lane])
        self._states[lane] = [states[count:].clone()] if count < len(states) else []
        self._counts[lane] = max(0, len(states) - count)
        return states[:count]

    def drop(self, lane: int) -> None:
        """Forgets what waits in a lane."""
        self._states[lane], self._counts[lane] = [], 0

    def copy(self, source: int, target: int, count: int) -> None:
        """Lets the oldest of a lane wait in another as well, in place of what waited there."""
        states = [torch.cat(self._states[source])[:count].clone()] if count else []
        self._states[target], self._counts[target] = states, sum(map(len, states))

    def swap(self, one: int, other: int) -> None:
        """Exchanges what waits in two lanes."""
        self._states[one], self._states[other] = self._states[other], self._states[one]
        self._counts[one], self._counts[other] = self._counts[other], self._counts[one]
