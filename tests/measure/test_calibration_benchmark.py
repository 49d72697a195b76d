"""The benchmark of calibration counts areas, intervals and its budget right."""

import importlib
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SIDE = 12
NAMES = ("hypervolume", "calibration_figures", "calibration_plot", "calibrators", "searchers")
sides = st.integers(0, SIDE + 2).map(float)
places = st.lists(st.tuples(sides, sides), max_size=7)


@pytest.fixture(scope="module")
def bench() -> Iterator[dict[str, ModuleType]]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in NAMES:
            sys.modules.pop(name, None)


@given(points=places)
def test_hypervolume_counts_the_cells_that_some_point_dominates(bench: dict[str, ModuleType], points: list) -> None:
    cells = [(x, y) for x in range(SIDE) for y in range(SIDE)]
    counted = sum(any(a <= x and b <= y for a, b in points) for x, y in cells)
    assert bench["hypervolume"].hypervolume(points, (SIDE, SIDE)) == pytest.approx(counted / SIDE**2)


@given(points=places, k=st.integers(1, 4))
def test_the_few_points_kept_hold_most_of_the_area(bench: dict[str, ModuleType], points: list, k: int) -> None:
    area, corner = bench["hypervolume"].hypervolume, (SIDE, SIDE)
    kept = bench["hypervolume"].most(points, corner, k)
    assert len(kept) == len(set(kept)) <= k
    held = area([points[i] for i in kept], corner)
    best = max((area(some, corner) for some in combinations(points, min(k, len(points)))), default=0.0)
    assert best * (1 - 1 / 2.718281828) - 1e-9 <= held <= best + 1e-9
    everything = bench["hypervolume"].most(points, corner, len(points) + 1)
    assert area([points[i] for i in everything], corner) == pytest.approx(area(points, corner))


def test_intervals_are_students(bench: dict[str, ModuleType]) -> None:
    values = [0.3, 0.5, 0.1, 0.4, 0.45]
    found = bench["calibration_figures"].interval(values)
    low, high = stats.t.interval(0.95, 4, loc=sum(values) / 5, scale=stats.sem(values))
    assert (found["low"], found["high"]) == (pytest.approx(low), pytest.approx(high))
    assert bench["calibration_figures"].interval([0.2]) == {"mean": 0.2}


def test_a_budget_is_kept_by_the_clock_of_the_process(
    bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(bench["calibrators"].time, "process_time", lambda: now[0])
    budget = bench["calibrators"].Budget(10.0)
    now[0] = 104.0
    assert budget.spent == 4.0
    assert budget.fits(6.0)
    assert not budget.fits(6.1)
    assert not budget.fits(2.0, share=0.5)


@pytest.mark.parametrize("space", ["kinds", "kinds and layers", "kinds and terms", "groups"])
def test_every_space_makes_strengths_of_the_rules_shape(bench: dict[str, ModuleType], space: str) -> None:
    class Rule:
        shape = (3, 2, 4)

    asked: list[str] = []

    def ask(name: str, high: float) -> float:
        asked.append(name)
        return high / 2

    strengths = bench["searchers"].strengths_of(ask, bench["searchers"].Plan(space, high=2.0), Rule())
    assert strengths.shape == Rule.shape
    assert (
        len(set(asked)) == len(asked) == {"kinds": 3, "kinds and layers": 5, "kinds and terms": 12, "groups": 24}[space]
    )
    assert (strengths == (0.5 if space == "kinds and layers" else 1.0)).all()


def run_of(*areas: float) -> dict:
    def method(area: float) -> dict:
        point = {"judged": {"harmful": 0.4 * (1 - area), "damage": 0.01, "kl": 0.01}}
        return {
            "untouched": 0.4,
            "points": [point],
            "hypervolume": area,
            "hypervolume_kl": area,
            "tried": 1,
            "seconds": 2.0,
        }

    return {"methods": {name: method(area) for name, area in zip(("ours", "theirs"), areas, strict=True)}}


def test_methods_are_compared_seed_by_seed_and_drawn(bench: dict[str, ModuleType]) -> None:
    runs = [run_of(0.9, 0.5), run_of(0.7, 0.4)]
    summary = bench["calibration_figures"].compared(runs, ["ours", "theirs"], "ours")
    assert summary["hypervolume"]["ours"]["mean"] == pytest.approx(0.8)
    assert summary["hypervolume_ahead"] == {"theirs": pytest.approx(bench["calibration_figures"].interval([0.4, 0.3]))}
    assert "ahead of theirs" in bench["calibration_figures"].printed(summary)
    root = ElementTree.fromstring(bench["calibration_plot"].drawing(runs, ["ours", "theirs"], 0.1))  # noqa: S314
    lines = [e for e in root.iter() if e.tag.endswith("path") and e.get("class") == "seed"]
    assert len(lines) == 4
    assert {e.text for e in root.iter() if e.tag.endswith("text")} >= {"ours", "theirs", "damage, points"}
