import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeglasses.errors import SafeglassesError
from safeglasses.run.budget import LADDER, cost, parse_budget


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
