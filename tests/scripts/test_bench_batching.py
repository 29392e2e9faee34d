import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_batching.py"


def run(requests: int) -> list[list[str]]:
    """Cells of the table; in a process of its own, without the checks of shapes that tests run under, and with its memory to itself."""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    arguments = [sys.executable, str(SCRIPT), "--requests", str(requests)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[2:]]


def check(requests: int) -> None:
    rows = run(requests)
    ways = ["sequential", "synchronized", "parallel", "by medium", "compiled", "refined", "n-grams", "look-up", "model"]
    assert [row[0] for row in rows] == ways
    each = -(-requests // len(rows))
    for _, ended, cancelled, refused, unequal, tokens, copied, *_ in rows:
        assert int(ended) + int(cancelled) + int(refused) == each
        assert int(unequal) == 0 and int(tokens) > each
        assert 10 < int(copied.strip("%")) < 90
    for column in (2, 3):
        assert sum(int(row[column]) for row in rows)


def test_a_few_hundred_requests_get_what_they_would_get_alone() -> None:
    check(200)


@pytest.mark.heavy
@pytest.mark.timeout(3600)
def test_ten_thousand_requests_get_what_they_would_get_alone() -> None:
    check(10_000)
