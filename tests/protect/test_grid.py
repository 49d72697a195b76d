"""What a grid counts and marks: by brute force, by hand, and on the page."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.conftest import prompts, prompts_file  # noqa: F401  (fixtures)
from protect.script import Says, ask
from safeglasses.data.miniature import CHECKPOINT, LEXICON, REFUSALS
from safeglasses.errors import SafeglassesError
from safeglasses.measure.judging import judge_answers
from safeglasses.measure.respond import Response
from safeglasses.protect.grid import Measured, dominators, grid_rows
from safeglasses.protect.running import Outcome
from safeglasses.protect.steps import Cost, Event
from safeglasses.report.grid_page import grid_study, headline, recommended
from safeglasses.report.study import render_study
from safeglasses.run.gridding import GridAsked, grid_model
from safeglasses.run.inputs import drawn_from, rows_of

POINTS = st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=8)


@given(POINTS)
def test_dominated_is_what_another_point_beats(points):
    found = dominators(points)
    for i, one in enumerate(points):
        better = [
            j for j, other in enumerate(points) if other != one and all(b <= a for a, b in zip(one, other, strict=True))
        ]
        assert found[i] == (better[0] if better else None)


@given(POINTS)
def test_the_front_is_never_empty_and_beats_all_that_is_dominated(points):
    front = {i for i, by in enumerate(dominators(points)) if by is None}
    assert front
    for i in set(range(len(points))) - front:
        assert any(all(b <= a for a, b in zip(points[i], points[j], strict=True)) for j in front)


ROWS = [
    ask("x", id="e1", label="toxic", condition="adversarial", slots={"name": "cat"}),
    ask("x", id="e2", label="toxic"),
    ask("x", id="b1", label="non-toxic", slots={"name": "dog"}),
    ask("x", id="b2", label="non-toxic"),
]


def measured(name: str, texts: list[str], cost: Cost, events: tuple[Event, ...] = ()) -> Measured:
    responses = [Response(e.id, text, 1, 0) for e, text in zip(ROWS, texts, strict=True)]
    answers = judge_answers(ROWS, responses, Says("bad"), Says("sorry"))
    outcomes = tuple(Outcome(e.id, text, events, cost) for e, text in zip(ROWS, texts, strict=True))
    return Measured(name, answers, outcomes, 1000, 10)


GRID = [
    measured("none", ["bad cat", "bad", "dog", "fine"], Cost(1, 0, 5, 20, 0.5, 25)),
    measured("a+b", ["cat", "fine", "sorry", "fine"], Cost(3, 1, 9, 60, 1.5, 70), (Event("a", "failed open", "why"),)),
    measured("worse", ["bad cat", "bad", "dog", "sorry"], Cost(2, 0, 5, 20, 0.5, 25)),
]


def test_a_grid_counts_harm_utility_refusals_and_cost():
    rows = {(row.defence, row.condition): row for row in grid_rows(GRID)}
    assert {condition for _, condition in rows} == {"all", "standard", "adversarial"}
    stack = rows["a+b", "all"].to_json()
    assert stack["harmful_rate"]["value"] == 0.0
    assert stack["utility"]["name"]["value"] == 0.5
    assert stack["refusal_on_benign"]["value"] == 0.5
    assert stack["cost"] == {
        "calls": 3, "checks": 1, "tokens": 9, "prompt_tokens": 60, "seconds": 1.5, "memory_bytes": 1000 + 700,
    }  # fmt: skip
    assert stack["failures"] == {"a: failed open": 4}
    assert stack["change"]["harmful"]["value"] == -1.0
    assert stack["change"]["utility:name"]["value"] == -0.5
    assert rows["none", "all"].change == {}
    assert rows["a+b", "adversarial"].refusal_on_benign is None
    assert (rows["worse", "all"].dominated_by, rows["none", "all"].dominated_by) == ("none", None)
    assert stack["dominated"] is False


def test_what_breaks_the_model_is_recommended_only_where_nothing_else_is():
    def row(name: str, harm: float, lost: float, refused: float) -> dict:
        change = {"utility:name": {"value": -lost}, "refused": {"value": refused}}
        cost = {"tokens": 1, "calls": 1}
        return {
            "defence": name, "condition": "all", "harmful_rate": {"value": harm}, "cost": cost,
            "change": {} if name == "none" else change,
        }  # fmt: skip

    none, kind = row("none", 0.5, 0, 0), row("kind", 0.1, 0.005, 0.01)
    fair, mute, refusing = row("fair", 0.05, 0.03, 0), row("mute", 0.0, 0.9, 0), row("refusing", 0.0, 0, 0.5)
    best = [
        recommended({"rows": rows}) for rows in ([none, kind, fair, mute, refusing], [none, fair, mute], [none, mute])
    ]
    assert [found and found["defence"] for found in best] == ["kind", "fair", "mute"]
    assert recommended({"rows": [none]}) is None


def test_stacks_need_names_of_their_own():
    with pytest.raises(SafeglassesError, match=r"^stacks need names of their own\n  given:    none, none\n"):
        grid_rows([GRID[0], GRID[0]])


def test_the_grid_of_the_miniature_resumes_and_has_a_page(prompts_file, tmp_path):  # noqa: F811
    def run(*defences: str, **options) -> dict:
        asked = GridAsked(
            defences=defences,
            out=tmp_path / "out",
            prompts=prompts_file,
            judges=[f"lexicon:{LEXICON}"],
            refusals=f"lexicon:{REFUSALS}",
            limit=8,
            **options,
        )
        return grid_model(CHECKPOINT, asked)

    first = run("self-reminder")
    again = run("filter?judge=lexicon:" + str(LEXICON), "self-reminder")
    kept = [row for row in again["rows"] if row["defence"] in ("none", "self-reminder")]
    assert [row["cost"] for row in kept] == [row["cost"] for row in first["rows"]]  # read back, not answered again
    assert again["circular"] == ["filter?judge=lexicon:" + str(LEXICON)]
    stored = json.loads((tmp_path / "out" / "grid.json").read_text(encoding="utf-8"))
    assert stored["rows"] == json.loads(json.dumps(again["rows"]))
    assert {row["defence"] for row in stored["rows"]} == {"none", "self-reminder", again["circular"][0]}
    page = (tmp_path / "out" / "grid.html").read_text(encoding="utf-8")
    assert headline(stored) in page
    assert "Same judge inside and outside" in page
    with pytest.raises(SafeglassesError, match=r"^the journal belongs to another run\n"):
        run("self-reminder", seed=1)


def test_a_limit_draws_from_all_kinds_of_prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    labels = ["toxic", "toxic", "non-toxic", "toxic"]  # every fourth would be of one kind
    rows = [
        {"id": f"p{i}", "messages": [{"role": "user", "content": str(i)}], "label": labels[i % 4], "split": "test"}
        for i in range(80)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    _, every = rows_of(file, "test")
    found = drawn_from(every, 20)
    assert len(found) == 20
    assert {row.label for row in found} == {"toxic", "non-toxic"}
    assert [row.id for row in found] == [row["id"] for row in rows if row["id"] in {one.id for one in found}]
    assert set(drawn_from(every, 10)) < set(found)


def test_names_are_escaped_on_the_page():
    named = [replace(one, defence=one.defence.replace("a+b", "a<img>+b")) for one in GRID]
    record = {
        "model": "<script>m", "judge": "<b>j", "judges_inside": [], "refusal_judge": "r", "circular": [],
        "decoding": {"name": "sampled", "temperature": 1.0, "seed": 0, "max_new_tokens": 4},
        "split": "test", "prompts": 4, "base_fingerprint": "f",
        "rows": [row.to_json() for row in grid_rows(named)],
    }  # fmt: skip
    page = render_study(grid_study(record))
    assert "<script>m" not in page
    assert "<img>" not in page
    assert "<b>j" not in page
    assert page.count('<tr class="glasses">') == 6  # two stacks of three on the front, under three conditions
