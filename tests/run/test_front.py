import json
from functools import partial
from pathlib import Path

import pytest

from forked import Forked
from other_world import World
from safeglasses.cli import execute
from safeglasses.defend.glasses import Glasses
from safeglasses.errors import SafeglassesError
from safeglasses.progress import Quiet
from safeglasses.report.summary import verdict
from safeglasses.run.fit import fit


def asked(world: World, out: Path) -> dict:
    """Return the smallest front there is: two points, from few examples."""
    given = {"model": str(world.model), "pairs": str(world.pairs), "judge": f"lexicon:{world.words}", "out": str(out)}
    return {**given, "budget": "1s", "limit": 80, "front": [600.0, 75.0], "harm": 0.0}


class Told(Quiet):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_a_front_killed_between_two_points_goes_on_there_and_every_point_can_be_worn(
    world: World, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    process = Forked(partial(fit, **asked(world, out)), said=tmp_path / "said")
    process.wait_for((out / "calibration/front/point-00.json").exists)
    process.kill()
    assert not (out / "glasses").exists()
    first = {p: p.stat().st_mtime_ns for p in (out / "calibration/front").glob("*-0*.json")}
    told = Told()
    whole = fit(**asked(world, out), progress=told)
    assert first == {p: p.stat().st_mtime_ns for p in first}  # nothing was done twice

    record = json.loads((out / "calibration/front.json").read_text(encoding="utf-8"))
    betas = [point["beta"] for point in record["points"]]
    assert betas == [600.0, 75.0]
    for point in record["points"]:
        glasses = Glasses.load(out / f"front/{point['index']:02d}")
        assert glasses.notes["front"]["figures"] == point["figures"]

    taken = whole.summary["calibration"]  # no harm at all cannot be promised from a hundred prompts
    assert taken["missed"].startswith("No candidate keeps harm at most 0 % with one standard error to spare")
    assert taken["missed"] in verdict(whole.summary)
    assert taken["missed"] in "\n".join(told.lines)
    assert taken["missed"] in (out / "report.html").read_text(encoding="utf-8")
    assert whole.glasses.notes["limit_missed"] == taken["missed"]
    assert taken["candidates"] == len(betas)


def test_the_command_line_asks_for_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["fit", "no model", "--front", "--harm", "2%", "--category", "x", "--under", "self-reminder"]
    assert execute([*given, "--recipe", "sgm", "--out", str(tmp_path / "run")]) != 0
    assert "--harm and --front and --under with recipe sgm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "what", "given"),
    [
        ({"harm": "a lot"}, "not a share", "'a lot'"),
        ({"harm": "200%"}, "not a share", "'200%'"),
        ({"harm": "2"}, "not a share", "'2'"),
        ({"harm": "2%", "recipe": "aura"}, "this recipe has no calibration", "--harm with recipe aura"),
        ({"front": True, "recipe": "sgm"}, "this recipe has no calibration", "--front with recipe sgm"),
    ],
)
def test_what_cannot_be_asked_of_calibration_is_said_before_anything_is_read(
    options: dict, what: str, given: str, tmp_path: Path
) -> None:
    with pytest.raises(SafeglassesError, match=what) as error:
        fit("no model", tmp_path / "no pairs", out=tmp_path / "run", **options)
    assert error.value.given == given
