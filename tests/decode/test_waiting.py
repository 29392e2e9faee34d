import torch

from mmtp.decode.waiting import Waiting


def states(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float).unsqueeze(1)


def found(waiting: Waiting, lane: int) -> list[float]:
    count = waiting.count(lane)
    return waiting.take(lane, count)[:, 0].tolist() if count else []


def test_the_oldest_come_first_and_others_go_on_waiting() -> None:
    waiting, given = Waiting(2), states(1, 2, 3)
    waiting.add(1, given)
    given.zero_()  # the pass that they come from is not kept
    waiting.add(1, states())
    waiting.add(1, states(4))
    assert (waiting.count(0), waiting.count(1)) == (0, 4)
    assert waiting.take(1, 2)[:, 0].tolist() == [1, 2]
    waiting.add(1, states(5))
    assert waiting.count(1) == 3 and found(waiting, 1) == [3, 4, 5] and waiting.count(1) == 0
    waiting.add(1, states(6))
    waiting.drop(1)
    assert waiting.count(1) == 0


def test_lanes_are_copied_and_exchanged() -> None:
    waiting = Waiting(3)
    waiting.add(0, states(1, 2))
    waiting.add(0, states(3))
    waiting.add(1, states(9))
    waiting.copy(0, 1, 2)
    waiting.add(1, states(7))
    waiting.swap(1, 2)
    waiting.copy(2, 2, 2)  # of itself: what is longer is cut
    assert [found(waiting, lane) for lane in range(3)] == [[1, 2, 3], [], [1, 2]]
    waiting.add(2, states(4))
    waiting.copy(0, 2, 0)
    assert waiting.count(2) == 0
