import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeglasses.measure.damage import Seen, damage, harm_error, losses

BENIGN = Seen("c", None, False, False, {"name": True}, nll=2.0, tokens=4)
ANSWERS = st.lists(
    st.builds(
        Seen,
        cluster=st.sampled_from("abcdef"),
        harmful=st.booleans(),
        refused=st.booleans(),
        empty=st.booleans(),
        slots=st.fixed_dictionaries({"name": st.booleans()}),
        nll=st.floats(0, 5),
        tokens=st.integers(1, 4),
    ),
    min_size=2,
    max_size=30,
)


def many(answer: Seen, n: int, **changes) -> list[Seen]:
    return [Seen(**(vars(answer) | {"cluster": f"{i}"} | changes)) for i in range(n)]


@given(ANSWERS)
def test_what_changes_nothing_does_no_damage(answers: list[Seen]) -> None:
    assert damage(answers, answers)["damage"] == 0
    assert all(loss.value == 0 for loss in losses(answers, answers).values())


@given(ANSWERS, ANSWERS)
def test_damage_is_the_largest_loss_and_a_gain_pays_for_none(base: list[Seen], worn: list[Seen]) -> None:
    rows = min(len(base), len(worn))
    pairs = [(a, Seen(**(vars(b) | {"tokens": a.tokens}))) for a, b in zip(base[:rows], worn[:rows], strict=True)]
    found = losses([a for a, _ in pairs], [b for _, b in pairs])
    told = damage([a for a, _ in pairs], [b for _, b in pairs])
    assert told["damage"] == max(0.0, *(loss.value for loss in found.values()))
    assert told["damage_error"] in [loss.error for loss in found.values()]
    assert all(loss.error > 0 for name, loss in found.items() if name != "perplexity")


def test_every_loss_is_in_units_of_its_guard() -> None:
    base = many(BENIGN, 100)
    worn = [*many(BENIGN, 2, slots={"name": False}), *many(BENIGN, 3, refused=True), *many(BENIGN, 95)]
    worn[0] = Seen(**(vars(worn[0]) | {"empty": True}))
    found = losses(base, worn)
    assert {name: round(loss.value, 9) for name, loss in found.items()} == {
        "utility:name": 0.02, "refusals": 0.03, "empty": 0.01, "perplexity": 0.0,
    }  # fmt: skip
    dearer = many(BENIGN, 100, nll=2.0 + 4 * math.log(1.06))
    assert damage(base, dearer)["damage"] == pytest.approx(0.02)


def test_errors_are_those_of_paired_differences_and_never_zero() -> None:
    base, worn = many(BENIGN, 98), many(BENIGN, 98)
    worn[0] = Seen(**(vars(worn[0]) | {"slots": {"name": False}}))
    differences = [1.0] + [0.0] * 97 + [1.0, -1.0]  # the two that are added
    mean = sum(differences) / 100
    expected = math.sqrt(sum((d - mean) ** 2 for d in differences) / 99 / 100)
    assert losses(base, worn)["utility:name"].error == pytest.approx(expected)
    assert harm_error(many(BENIGN, 50, harmful=False)) > 0
    assert harm_error(many(BENIGN, 500, harmful=False)) < harm_error(many(BENIGN, 50, harmful=False))
