from hypothesis import given
from hypothesis import strategies as st

from safeglasses.measure.selecting import at_most, gentlest, lowest

SHARE = st.integers(0, 20).map(lambda n: n / 20)
CANDIDATE = st.builds(
    lambda harm, damage, kl, error: {
        "harmful": harm,
        "harmful_error": error / 5,
        "damage": damage,
        "damage_error": error / 5,
        "kl": kl,
        "score": harm + max(0.0, damage - 0.01),
    },
    SHARE, SHARE, SHARE, SHARE,
)  # fmt: skip
CANDIDATES = st.lists(CANDIDATE, min_size=1, max_size=8)


@given(CANDIDATES, SHARE)
def test_a_limit_holds_with_one_standard_error_or_is_said_to_be_missed(found: list[dict], harm: float) -> None:
    taken = at_most(found, harm)
    mine = found[taken.index]
    kept = [f for f in found if f["harmful"] + f["harmful_error"] <= harm]
    assert bool(taken.missed) == (not kept)
    assert taken.limit == harm
    if not kept:
        assert mine["harmful"] + mine["harmful_error"] == min(f["harmful"] + f["harmful_error"] for f in found)
        assert f"{100 * mine['harmful']:.2f} ±" in taken.missed
        return
    assert mine in kept
    least = min(kept, key=lambda f: f["damage"])
    assert mine["damage"] <= least["damage"] + least["damage_error"]
    equal = [f for f in kept if f["damage"] <= least["damage"] + least["damage_error"]]
    assert mine["kl"] == min(f["kl"] for f in equal)


@given(CANDIDATES, SHARE, SHARE)
def test_a_looser_limit_never_takes_more_than_an_error_more_damage(found: list[dict], one: float, two: float) -> None:
    tight, loose = sorted((one, two))
    strict, lax = at_most(found, tight), at_most(found, loose)
    if not strict.missed:
        least = min(f["damage"] for f in found if f["harmful"] + f["harmful_error"] <= loose)
        assert not lax.missed
        assert found[lax.index]["damage"] <= least + max(f["damage_error"] for f in found)
        assert least <= found[strict.index]["damage"]


@given(CANDIDATES)
def test_without_errors_the_front_takes_the_lowest_score(found: list[dict]) -> None:
    exact = [f | {"harmful_error": 0.0} for f in found]
    assert exact[gentlest(exact).index]["score"] == exact[lowest(exact).index]["score"]
    taken = found[gentlest(found).index]
    assert taken["kl"] <= found[lowest(found).index]["kl"]


def test_of_equals_the_gentlest_is_taken() -> None:
    def candidate(harmful: float, damage: float, kl: float) -> dict[str, float]:
        errors = {"harmful_error": 0.01, "damage_error": 0.005}
        return {"harmful": harmful, "damage": damage, "kl": kl, "score": harmful, **errors}

    found = [candidate(0.05, 0.0, 0.001), candidate(0.03, 0.004, 0.01), candidate(0.005, 0.007, 0.02)]
    assert at_most(found, 0.065).index == 0
    assert at_most(found, 0.059).index == 1  # 5 % ± 1 is not at most 5.9 %
    assert at_most(found, 0.02).index == 2
    assert at_most(found, 0.0).missed
    assert gentlest(found).index == 2
    del found[0]["kl"], found[1]["kl"], found[2]["kl"]
    trained = [f | {"training_kl": kl} for f, kl in zip(found, (0.3, 0.2, 0.1), strict=True)]
    assert at_most(trained, 0.05).index == 2


def test_ties_go_to_the_earlier_candidate() -> None:
    twin = {"harmful": 0.1, "harmful_error": 0.01, "damage": 0.0, "damage_error": 0.01, "kl": 0.1, "score": 0.1}
    assert lowest([twin, twin]).index == gentlest([twin, twin]).index == at_most([twin, twin], 0.5).index == 0
