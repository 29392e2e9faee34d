import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from mmtp.data.engines.local import LocalEngine
from mmtp.data.errors import DataError


@dataclass
class Square:
    """Squares its unit; refuses one, and dies of another."""

    refused: int = -1
    deadly: int = -1

    def open(self) -> Callable[[int], tuple[int, int]]:
        return self._unit

    def _unit(self, unit: int) -> tuple[int, int]:
        if unit == self.refused:
            raise DataError(f"unit {unit} is refused")
        if unit == self.deadly:
            os._exit(9)
        return unit**2, torch.get_num_threads()


def test_one_worker_works_here_on_one_thread() -> None:
    torch.set_num_threads(2)
    try:
        assert list(LocalEngine(1).run(Square(), [3, 1])) == [(9, 1), (1, 1)]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_an_error_comes_after_what_was_ready() -> None:
    results: list[tuple[int, int]] = []
    with pytest.raises(DataError, match="unit 2 is refused"):
        results.extend(LocalEngine(1).run(Square(refused=2), range(4)))
    assert [square for square, _ in results] == [0, 1]


@pytest.mark.timeout(600)
def test_a_dead_worker_is_one_clear_error() -> None:
    results: list[tuple[int, int]] = []
    with pytest.raises(DataError, match=r"a worker process died \(out of memory, or killed\); what is finished is kept: run the same"):
        results.extend(LocalEngine(2).run(Square(deadly=5), range(6)))
    assert {threads for _, threads in results} <= {1}
    assert {square for square, _ in results} <= {unit**2 for unit in range(5)}


def test_workers_must_be_one_at_least() -> None:
    assert LocalEngine(None).workers >= 1
    with pytest.raises(DataError, match="workers: at least 1 is wanted, 0 given"):
        LocalEngine(0)
