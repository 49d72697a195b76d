import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeglasses.errors import SafeglassesError
from safeglasses.run.budget import LADDER, Plan, cost, parse_budget


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("90", 90), ("5m", 300), ("1.5h", 5400), (" 2 m ", 120)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-5s", "0s", "5 days", "1e3s"])
def test_no_durations(text: str) -> None:
    with pytest.raises(SafeglassesError, match="not a time budget") as error:
        parse_budget(text)
    assert error.value.expected == "a duration such as 90s, 5m or 2h"


@given(st.floats(1e-4, 10), st.floats(1e-4, 10))
def test_each_rung_costs_more_than_the_one_before(step: float, answer: float) -> None:
    costs = [cost(plan, step, answer) for plan in LADDER]
    assert costs == sorted(costs)


@given(st.floats(1e-4, 10), st.floats(1e-4, 10), st.integers(1, 20))
def test_a_front_of_one_point_costs_a_trial_and_every_further_one_the_same_again(
    step: float, answer: float, points: int
) -> None:
    (plan,) = [plan for plan in LADDER if plan == Plan()]
    effort = plan.effort
    one, many, more = (cost(plan, step, answer, n) for n in (1, points, points + 1))
    rest = one - 2 * effort.rounds * (3 * effort.steps * effort.batch * step + effort.prompts * answer)
    assert rest == pytest.approx(2 * effort.prompts * answer, rel=1e-6)  # measured once, at most twice as many answers
    round_and_measure = 2 * (3 * effort.steps * effort.batch * step + effort.prompts * answer) + rest
    assert more - many == pytest.approx(round_and_measure, rel=1e-6)
