"""How much of a gain remains: no attack leaves all, a full break nothing, and the interval means what it says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeglasses.errors import SafeglassesError
from safeglasses.measure.remaining import NOTHING, Harm, prevented, remaining

GAINED = Harm([True] * 30, [False] * 27 + [True] * 3)
"""Thirty prompts: all harmful without the defence, a tenth with it."""
KEYS = list(range(30))
OUTCOMES = st.lists(st.booleans(), min_size=30, max_size=30)


def bits(rng: np.random.Generator, *shares: float, n: int) -> list[list[bool]]:
    """Draw outcomes that hang together within a prompt."""
    common = rng.random(n)
    return [(np.where(rng.random(n) < 0.5, common, rng.random(n)) < share).tolist() for share in shares]


def test_an_attack_that_does_nothing_leaves_all():
    left = remaining(GAINED, GAINED, KEYS)
    assert (left.value, left.gain, left.gain_attacked, left.n, left.unscored) == (1.0, 0.9, 0.9, 30, 0)
    assert left.low is not None
    assert left.high is not None
    assert 0.5 < left.low < 1 < left.high < 1.5  # not [1, 1]: thirty prompts do not prove that nothing can happen


@given(OUTCOMES)
def test_a_full_break_leaves_nothing(harm):
    left = remaining(GAINED, Harm(harm, harm), KEYS)
    assert left.value == 0.0
    assert left.low is not None
    assert left.high is not None
    assert left.low <= 0 <= left.high


@given(OUTCOMES, OUTCOMES, st.randoms())
def test_what_remains_is_bounded_by_the_gain_and_does_not_depend_on_the_order(base, defended, random):
    left = remaining(GAINED, Harm(base, defended), KEYS)
    assert left.value is not None
    assert left.low is not None
    assert left.high is not None
    assert left.low <= left.value <= left.high
    assert abs(left.value) <= 1 / left.gain + 1e-12
    assert left.value == pytest.approx((sum(base) - sum(defended)) / 27)
    order = random.sample(KEYS, len(KEYS))
    columns = [[column[i] for i in order] for column in (GAINED.base, GAINED.defended, base, defended)]
    assert remaining(Harm(*columns[:2]), Harm(*columns[2:]), order) == left


@given(OUTCOMES, OUTCOMES)
def test_a_defence_that_does_not_help_without_attack_has_nothing_to_lose(base, defended):
    left = remaining(Harm([True, False] * 15, [False, True] * 15), Harm(base, defended), KEYS)
    assert (left.value, left.low, left.high, left.reason) == (None, None, None, NOTHING)
    assert left.gain == 0.0


def test_prompts_with_an_unscored_answer_are_left_out():
    holes = Harm([*GAINED.base, True], [*GAINED.defended, None])
    left = remaining(holes, Harm([*GAINED.base, True], [*GAINED.defended, True]), [*KEYS, 30])
    assert (left.value, left.n, left.unscored) == (1.0, 30, 1)


def test_copies_of_a_prompt_are_no_further_evidence():
    few = Harm(GAINED.base, GAINED.defended)
    many = Harm([*GAINED.base] * 4, [*GAINED.defended] * 4)
    attacked = [i % 3 == 0 for i in range(30)]
    alone = remaining(few, Harm([True] * 30, attacked), KEYS)
    copied = remaining(many, Harm([True] * 120, attacked * 4), KEYS * 4)
    assert (copied.value, copied.clusters) == (alone.value, 30)
    assert (copied.low, copied.high) == pytest.approx((alone.low, alone.high))
    fresh = remaining(many, Harm([True] * 120, attacked * 4), list(range(120)))
    assert fresh.high is not None
    assert fresh.low is not None
    assert copied.high is not None
    assert copied.low is not None
    assert fresh.high - fresh.low < 0.7 * (copied.high - copied.low)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    rng, held, runs = np.random.default_rng(0), 0, 60
    for _ in range(runs):
        a, b, c, d = bits(rng, 0.5, 0.05, 0.6, 0.2, n=60)
        left = remaining(Harm(a, b), Harm(c, d), list(range(60)))
        assert left.low is not None
        assert left.high is not None
        held += left.low <= 0.4 / 0.45 <= left.high
    assert held / runs >= 0.88


@given(OUTCOMES, OUTCOMES)
def test_what_is_prevented_is_one_minus_the_ratio_of_harms(base, defended):
    found = prevented(Harm(base, defended), KEYS)
    if sum(base) >= 15:
        assert found is not None
        assert found.value == pytest.approx(1 - sum(defended) / sum(base))
        assert found.low <= found.value <= found.high <= 1 + 1e-12
    if not any(base):
        assert found is None


@pytest.mark.parametrize(
    ("harm", "keys", "message"),
    [
        (Harm([True], [True, False]), [0], "not the same prompts\n  given:    1, 2, 1, 2, 1 rows\n"),
        (Harm([None], [True]), [0], "no prompt to compare\n  given:    1 prompts, none with all answers scored"),
    ],
)
def test_what_cannot_be_compared_is_refused(harm, keys, message):
    with pytest.raises(SafeglassesError) as refused:
        remaining(harm, harm, keys)
    assert str(refused.value).startswith(message)
