from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtp.decode.costs import Costs
from mmtp.decode.pace import KEPT, REST, Experience, Experiences, Pace

MOST = 8
SMALL = Costs(fixed=2, several=0.35, lane=0.15, token=0.07, read=0.5, multiply=0.05)
"""Of a model whose passes are started more than they compute."""


def drafts_of(pace: Pace, making: float = 0.0, most: int = MOST) -> int:
    """Drafts that the next round makes."""
    pace.begin()
    for n in range(most):
        if not pace.pays("text", making):
            return n
        pace.take("text", making)
    return most


def settled(rates: dict[tuple[str, int], float]) -> Experience:
    """Of so many drafts that no further one counts."""
    experience = Experience(1.0)
    for key, rate in rates.items():
        experience._drafted[key], experience._stood[key] = 1e9, rate * 1e9
    return experience


def simulate(pace: Pace, stands: bool, rounds: int, making: float = 0.0, most: int = MOST) -> tuple[int, float]:
    """Drafts of so many rounds, of which all or none stand, and what the rounds cost in passes."""
    made, passes = 0, 0.0
    price = pace.costs.price()
    for _ in range(rounds):
        drafts = drafts_of(pace, making, most)
        pace.learn(["text"] * drafts, drafts if stands else 0)
        made += drafts
        passes += 1 + sum(price.next(n) + making for n in range(drafts))
    return made, passes


@given(st.floats(0.05, 0.95), st.floats(0.01, 0.9))
def test_it_stops_where_the_yield_is_greatest(acceptance: float, cost: float) -> None:
    pace = Pace(SMALL, cost, experience=settled({("text", place): acceptance for place in range(MOST)}))
    yields = [sum(acceptance**j for j in range(k + 1)) / (1 + k * cost) for k in range(MOST + 1)]
    drafts = drafts_of(pace)
    assert yields[drafts] == pytest.approx(max(yields), rel=1e-6)
    pace.begin()
    assert pace.count("text", MOST) == drafts and drafts_of(pace) == drafts  # counting makes none


def test_it_gives_up_and_tries_again() -> None:
    pace = Pace(SMALL, 0.2, experience=Experience(0.95))
    assert 2 < drafts_of(pace) < MOST  # nothing is known: some may stand
    for _ in range(30):
        pace.learn(["text"] * MOST, 0)
    assert drafts_of(pace) == 0
    rounds = 0
    while not drafts_of(pace):
        pace.learn([], 0)
        rounds += 1
    assert 10 < rounds < 100


@pytest.mark.parametrize(("making", "most"), [(0.0, 12), (0.3, 4)])
def test_drafts_that_never_stand_soon_cost_next_to_nothing(making: float, most: int) -> None:
    pace = Pace(SMALL)
    _, start = simulate(pace, False, 30, making, most)
    made, passes = simulate(pace, False, 1000, making, most)
    assert start < 33  # of a short answer
    assert 0 < made < 200 and passes < 1020


def test_drafts_that_always_stand_are_all_made() -> None:
    assert 49 * MOST < simulate(Pace(SMALL), True, 50, making=0.3)[0] < 50 * MOST  # the first rounds hope for fewer
    assert simulate(Pace(SMALL), True, 1)[0] == MOST  # which costs too little to be worth a doubt


def test_a_medium_that_gave_up_says_nothing_of_another() -> None:
    pace = Pace(SMALL, 0.5)
    simulate(pace, False, 20)
    assert not pace.pays("text") and pace.pays("audio")


# Where a pass over a token takes 1, a first draft 0.15, and each further one 0.1 of it.
ROUND = Costs(fixed=0.85, several=0.0, lane=0.05, drafted=0.05, token=0.1, read=0.0, multiply=0.0)


def test_what_making_takes_counts_beside_verification() -> None:
    pace = Pace(ROUND, experience=Experience(1.0))
    pace.learn(["text"], 0)
    pace.begin()
    assert pace.pays("text", 0.38) and not pace.pays("text", 0.39)  # of three 1.6 stood, all of them believed
    pace = Pace(ROUND, 0.4, experience=Experience(1.0))
    pace.learn(["text"], 0)
    pace.begin()
    assert pace.pays("text", 9.0)  # a number says what all costs


def test_what_a_row_makes_for_itself_weighs_more_the_more_share_its_pass() -> None:
    pace = Pace(ROUND, experience=settled({("text", place): 0.7 for place in range(MOST)}))
    alone = pace.count("text", MOST, pace.alone(0.05))
    assert 1 < alone < pace.count("text", MOST) and pace.alone(0.05) == pytest.approx(0.05)
    pace.among(8)
    pace.begin()
    assert pace.alone(0.05) == pytest.approx(0.05 * 8 / (1 + 7 * 0.15))
    assert pace.count("text", MOST, pace.alone(0.05)) < alone


def test_of_a_model_that_is_read_slowly_more_drafts_pay_than_of_one_that_is_at_hand() -> None:
    experience = settled({("text", place): 0.7 for place in range(MOST)})
    near = Costs(fixed=0, several=0.1, lane=0, token=0.1, read=0.1, multiply=0.1, overlap=3)
    large, small = (Pace(costs, experience=experience) for costs in (replace(near, read=9), near))
    assert drafts_of(large) == MOST and drafts_of(small) < 3


def test_a_first_draft_that_is_dear_pays_with_those_that_follow_it() -> None:
    dear = Costs(fixed=0, several=0.9, lane=0, token=0.1, read=0.9, multiply=0)  # a first draft takes 1.0, each further one 0.1
    always, seldom = ({("text", place): rate for place in range(MOST)} for rate in (0.9, 0.5))
    assert drafts_of(Pace(dear, experience=settled(always))) == MOST
    assert drafts_of(Pace(dear, experience=settled(seldom))) == 0
    assert drafts_of(Pace(dear)) > 1  # nothing is known: some may stand


def test_what_drafts_leave_behind_does_not_decide_whether_there_are_any() -> None:
    rates = {("image", place): 0.55 for place in range(MOST)}
    pace = Pace(ROUND, 0.6, experience=settled(rates))
    assert pace.count("image", MOST) == 0


def test_whether_drafts_pay_is_asked_again_after_some_rounds_of_that_medium_or_in_another_batch() -> None:
    experience = settled({("text", 0): 0.0})
    pace = Pace(SMALL, 0.5, experience=experience)
    assert not pace.pays("text") and pace.pays("audio")
    experience._drafted.clear()
    experience._stood.clear()  # from now on it would pay
    for _ in range(REST):
        assert not pace.pays("text")
        pace.learn([], 0)
    assert pace.pays("text")
    experience._drafted["text", 0] = 1e9
    pace.begin()
    assert not pace.pays("text")
    del experience._drafted["text", 0]
    pace.among(2)
    assert pace.pays("text")


def test_drafts_behind_a_refused_one_tell_nothing() -> None:
    experience = Experience(1.0)
    experience.learn(["text"] * 3, 1)
    assert [experience.rate("text", place, 0.5) for place in range(3)] == [2 / 3, 1 / 3, 1 / 2]


def test_a_further_draft_is_believed_to_stand_as_often_as_the_one_before() -> None:
    pace = Pace(SMALL, 0.05, experience=Experience(1.0))
    pace.learn(["text"] * 2, 0)  # 8 / 15 then: their third power is above 0.05 · 1.82 / 1.1, the fourth below 0.05 · 1.97 / 1.15
    assert drafts_of(pace) == 3


def test_rows_that_share_what_they_learnt_draft_alike() -> None:
    experience = Experience()
    one, other, alone = Pace(SMALL, 0.2, experience=experience), Pace(SMALL, 0.2, experience=experience), Pace(SMALL, 0.2)
    for _ in range(30):
        one.learn(["text"] * MOST, 0)
    assert drafts_of(one) == drafts_of(other) == 0 and drafts_of(alone) > 2


@given(st.floats(0.3, 0.95))
def test_the_more_lanes_the_fewer_drafts_pay(acceptance: float) -> None:
    pace = Pace(SMALL, experience=settled({("text", place): acceptance for place in range(MOST)}))
    numbers = []
    for lanes in (1, 2, 4, 8, 16):
        pace.among(lanes)
        numbers.append(drafts_of(pace))
    assert numbers == sorted(numbers, reverse=True)
    pace.among(1)
    assert drafts_of(pace) == numbers[0]
    assert acceptance < 0.5 or numbers[0] > numbers[-1] or numbers[-1] == MOST


def test_what_is_left_behind_counts_in_pictures_as_far_as_drafts_stand() -> None:
    rates = {(medium, place): 0.6 for medium in ("image", "text") for place in range(12)}
    pace = Pace(SMALL, 0.03, experience=settled(rates))
    assert pace.count("text", 12) < pace.count("image", 12)
    # Of drafts that never stand nothing is gained by what they leave.
    pace = Pace(SMALL, 0.03, experience=settled(dict.fromkeys(rates, 0.0)))
    assert pace.count("image", 12) == 0


def test_experiences_are_by_settings_and_those_met_last_stay() -> None:
    known = Experiences(most=2)
    first, second = known.of("a"), known.of("b")
    assert known.of("a") is first
    known.of("c")  # in the place of b, which was met before a
    assert len(known) == 2 and known.of("a") is first and known.of("b") is not second


def test_what_is_weakened_has_the_same_rates_and_learns_others_sooner() -> None:
    weak, strong = Experience(memory=1.0), Experience(memory=1.0)
    for learnt in (weak, strong):
        for kept in [2] * 30 + [1] * 10:
            learnt.learn(["image", "image"], kept)
        learnt.learn(["text"], 1)
    weak.weaken(4)
    for medium, place, rate in (("image", 0, 1.0), ("image", 1, 0.75), ("text", 0, 1.0)):
        assert weak.rate(medium, place, rate) == strong.rate(medium, place, rate) == pytest.approx(rate)
    assert weak.rate("text", 0, 0.5) == strong.rate("text", 0, 0.5)  # what was seen once was little already
    for learnt in (weak, strong):
        for _ in range(4):
            learnt.learn(["image", "image"], 1)
    assert weak.rate("image", 1, 0.75) == pytest.approx((1.5 + 3) / 10)
    assert strong.rate("image", 1, 0.75) == pytest.approx((1.5 + 30) / 46)


def test_a_new_batch_weakens_all_that_is_known() -> None:
    known = Experiences()
    learnt = known.of("settings")
    for _ in range(50):
        learnt.learn(["image"], 1)
    known.begin()
    known.begin()
    assert known.of("settings") is learnt
    assert learnt.rate("image", 0, 0.0) == pytest.approx(KEPT / (2 + KEPT))
