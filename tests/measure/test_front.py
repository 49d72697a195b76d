import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safeglasses.data.examples import Example, Examples, Text, Turn
from safeglasses.defend.recipes import RECIPES
from safeglasses.errors import SafeglassesError
from safeglasses.find.evidence import Evidence
from safeglasses.measure.calibrate import Effort
from safeglasses.measure.contrasts import calibration_data
from safeglasses.measure.front import dominated
from safeglasses.measure.search import Calibration
from safeglasses.measure.verdicts import Verdict
from safeglasses.model.vlm import VLM


class Odd:
    """Finds every second answer harmful, whatever it says."""

    name = "odd"

    def judge(self, responses):
        return [Verdict(float(len(text) % 2), len(text) % 2 == 1, "length") for text in responses]


def rows(split: str, n: int) -> list[Example]:
    found = []
    for i in range(n):
        messages = (Turn("user", (Text(f"say {'what you see' if i % 2 else 'something'} {i}"),)),)
        toxic = {"response": "a dog", "label": "toxic", "pair_id": f"{split}{i}"}
        found.append(Example(f"{split}{i}t", messages, **toxic, split=split))
        found.append(Example(f"{split}{i}n", messages, "the red cat", "non-toxic", f"{split}{i}", split=split))
    return found


def prompts(split: str, n: int) -> list[Example]:
    found = []
    for i in range(n):
        label = "non-toxic" if i % 2 else "toxic"
        messages = (Turn("user", (Text(f"{'describe' if i % 2 else 'insult'} it {i}"),)),)
        found.append(Example(f"{split}p{i}", messages, "a blue dog", label, split=split, slots={"name": "dog"}))
    return found


@pytest.fixture
def calibration(tiny_vlm: VLM) -> Callable[..., Calibration]:
    sites, pools = tiny_vlm.anatomy.sites("linears"), RECIPES["sgm-calibrated"].pools
    generator = torch.Generator().manual_seed(0)
    auroc = {s: torch.rand(2, tiny_vlm.anatomy.width(s), generator=generator, dtype=torch.float64) for s in sites}
    counts = ((8, 8), (8, 8))
    evidence = Evidence(auroc, None, pools, counts, None, tiny_vlm.fingerprint(), "")
    data = calibration_data(
        Examples((*rows("find", 6), *rows("calibrate", 2))), Examples((*prompts("find", 6), *prompts("calibrate", 8)))
    )

    def make(folder: Path, *, judge: Odd | None = None, **more) -> Calibration:
        return Calibration(
            tiny_vlm,
            evidence,
            data,
            judge or Odd(),
            recipe=RECIPES["sgm-calibrated"],
            effort=Effort(rounds=2, steps=2, prompts=6, batch=4),
            folder=folder,
            refusals=Odd(),
            seed=0,
            max_new_tokens=4,
            **more,
        )

    return make


POINTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)).map(lambda p: (p[0] / 5, p[1] / 5)), max_size=12)


@given(POINTS)
def test_a_point_is_dominated_when_another_is_better_in_one_and_no_worse(points: list[tuple[float, float]]) -> None:
    found = dominated(points)
    assert not points or not all(found)
    front = sorted({p for p, lost in zip(points, found, strict=True) if not lost})
    assert [y for _, y in front] == sorted((y for _, y in front), reverse=True)  # less harm costs more damage
    for (a, b), lost in zip(points, found, strict=True):
        assert lost == any((x < a and y <= b) or (x <= a and y < b) for x, y in points)


def test_the_front_goes_from_gentle_to_harsh_and_each_point_from_its_neighbour(calibration, tmp_path: Path) -> None:
    front = calibration(tmp_path).front([2.0, 8.0, 4.0])
    assert [point.beta for point in front.points] == [8.0, 4.0, 2.0]
    assert sorted(p.name for p in (tmp_path / "front").glob("round-*.json")) == [f"round-{i}.json" for i in range(4)]
    alone = calibration(tmp_path / "alone").front([8.0])
    assert torch.equal(front.points[0].strengths, alone.points[0].strengths)
    cold = calibration(tmp_path / "cold").front([4.0])
    assert not torch.equal(front.points[1].strengths, cold.points[0].strengths)
    record = json.loads((tmp_path / "front.json").read_text(encoding="utf-8"))
    assert record == front.to_json()
    names = {"harmful", "harmful_error", "damage", "damage_error", "kl", "utility:name", "refusals", "empty"}
    assert all(names <= point["figures"].keys() for point in record["points"])


def test_a_sweep_that_is_stopped_goes_on_where_it_was(calibration, tmp_path: Path) -> None:
    whole = calibration(tmp_path / "whole").front([4.0, 2.0])
    part = calibration(tmp_path / "part").front([4.0, 2.0], enough=lambda: True)
    assert len(part.points) == 1
    again = calibration(tmp_path / "part").front([4.0, 2.0])
    assert again.to_json() == whole.to_json()
    assert torch.equal(again.points[1].strengths, whole.points[1].strengths)


def test_glasses_of_a_point_are_those_that_were_measured(calibration, tmp_path: Path) -> None:
    made = calibration(tmp_path)
    front = made.front([4.0])
    glasses = front.glasses(front.points[0])
    learned = front.rule.factors(front.points[0].strengths)
    assert all(torch.equal(glasses.factors[site], row) for site, row in learned.items())
    assert glasses.notes["choice"]["beta"] == 4.0
    again = made.glasses(made.on_front(front))
    assert not torch.equal(torch.cat([*again.factors.values()]), torch.cat([*glasses.factors.values()]))


@pytest.mark.parametrize(("betas", "given"), [((), "nothing"), ((3.0, 3.0), "3, 3"), ((1.0, 0.0), "1, 0")])
def test_what_is_no_sweep_is_refused(calibration, tmp_path: Path, betas, given) -> None:
    with pytest.raises(SafeglassesError, match="not a sweep of β") as error:
        calibration(tmp_path).front(betas)
    assert error.value.given == given


def test_rounds_of_another_sweep_are_not_taken_for_ones_own(calibration, tmp_path: Path) -> None:
    calibration(tmp_path).front([4.0])
    with pytest.raises(SafeglassesError, match="the folder holds a round of another calibration"):
        calibration(tmp_path).front([5.0])


class Asked(Odd):
    """Remembers what it was shown of the prompts."""

    def __init__(self) -> None:
        self.prompts: set[str] = set()

    def judge_with_prompts(self, prompts, responses):
        self.prompts |= set(prompts)
        return self.judge(responses)


def test_words_around_a_request_are_read_everywhere_and_no_judge_sees_them(calibration, tmp_path: Path) -> None:
    seen = []

    def politely(example: Example) -> Example:
        seen.append(example.id)
        return replace(example, messages=(Turn("user", (*example.messages[0].content, Text("please be kind"))),))

    judge = Asked()
    made = calibration(tmp_path / "asked", judge=judge, asked=politely)
    front = made.front([4.0])
    plain = calibration(tmp_path / "plain").front([4.0])
    assert not torch.equal(front.points[0].strengths, plain.points[0].strengths)
    assert front.base["perplexity"] != plain.base["perplexity"]
    assert {e.id for e in (*made.data.find.benign, *made.data.held_out)} <= set(seen)
    assert judge.prompts
    assert not any("please be kind" in prompt for prompt in judge.prompts)
