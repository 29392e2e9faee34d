import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtp.decode.pace import Pace

KEYS = [("image", k) for k in range(1, 9)]


def drafts_of(pace: Pace) -> int:
    """Drafts that the next round makes."""
    pace.begin()
    for n, key in enumerate(KEYS):
        if not pace.pays(key):
            return n
        pace.take(key)
    return len(KEYS)


@given(st.floats(0.05, 0.95), st.floats(0.01, 0.9))
def test_it_stops_where_the_yield_is_greatest(acceptance: float, cost: float) -> None:
    pace = Pace(cost, memory=1.0)
    for key in KEYS:
        pace._drafted[key], pace._stood[key] = 1e9, acceptance * 1e9
    yields = [sum(acceptance**j for j in range(k + 1)) / (1 + k * cost) for k in range(len(KEYS) + 1)]
    assert yields[drafts_of(pace)] == pytest.approx(max(yields), rel=1e-6)


def test_it_gives_up_and_tries_again() -> None:
    pace = Pace(0.2)
    assert drafts_of(pace) == len(KEYS)  # nothing is known: all may stand
    for _ in range(30):
        pace.learn(KEYS, 0)
    assert drafts_of(pace) == 0
    rounds = 0
    while not drafts_of(pace):
        pace.learn([], 0)
        rounds += 1
    assert 10 < rounds < 100


def test_drafts_behind_a_refused_one_tell_nothing() -> None:
    pace = Pace(0.2, memory=1.0)
    pace.learn(KEYS[:3], 1)
    assert [pace.acceptance(key) for key in KEYS[:3]] == [1.0, 0.5, 1.0]
