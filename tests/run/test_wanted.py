import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import families
import other_world
from other_world import World
from safeglasses.data.examples import Example, Text, Turn
from safeglasses.data.pictures import Picture
from safeglasses.defend.recipes import RECIPES
from safeglasses.errors import SafeglassesError
from safeglasses.find.evidence import Evidence
from safeglasses.model.vlm import VLM
from safeglasses.protect.compose import compose
from safeglasses.protect.steps import Ask, Log, Prompt
from safeglasses.run.fit import fit
from safeglasses.run.stacks import refuse_misfits
from safeglasses.run.under import Under

HERE = Path(__file__)
PICTURE = HERE.parents[2] / "docs/report.png"


def example(language: str, *, system: bool) -> Example:
    turns = (Turn("system", (Text("Be brief."),)),) if system else ()
    asked = Turn("user", (Picture(path=HERE), Text("what is this")))
    return Example("x", (*turns, asked), "a dog", "non-toxic", category="c", language=language)


@pytest.mark.parametrize("text", ["self-reminder", "adashield-s", "xsafety", "xsafety+self-reminder", "system"])
@pytest.mark.parametrize("system", [False, True])
def test_what_is_read_is_what_the_stack_asks_of_the_model(text: str, system: bool, tmp_path: Path) -> None:
    (tmp_path / "rules.txt").write_text("Never curse.", encoding="utf-8")
    text = f"system:{tmp_path / 'rules.txt'}+self-reminder" if text == "system" else text
    given = example("de", system=system)
    steps = compose(text).steps(Prompt.of(given), Log())
    asked = next(steps)
    (asked,) = asked if isinstance(asked, list | tuple) else (asked,)
    assert isinstance(asked, Ask)
    read = Under.read(text)(given)
    assert read.messages == asked.prompt.turns
    assert read == replace(given, messages=asked.prompt.turns)
    assert read.messages != given.messages


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("typographic", "typographic"),
        ("self-reminder+ecso+best-of-n:2", "ecso, best-of-n:2"),
        ("none", "none"),
    ],
)
def test_parts_that_are_more_than_words_around_a_request_are_refused(text: str, named: str) -> None:
    with pytest.raises(SafeglassesError, match="glasses cannot be calibrated under that") as error:
        Under.read(text)
    assert error.value.given == named
    assert error.value.expected.startswith("words around the request: self-reminder, adashield-s, xsafety or system")


@pytest.fixture
def deaf(tmp_path: Path) -> Path:
    """A tiny model whose template drops system turns."""
    folder = families.build("llava", tmp_path / "deaf")
    template = folder / "chat_template.jinja"
    text = template.read_text(encoding="utf-8")
    template.write_text(text.replace("for m in messages", "for m in messages if m.role != 'system'"), encoding="utf-8")
    return folder


def test_words_that_a_template_drops_are_refused_before_a_run_begins(deaf: Path, tmp_path: Path) -> None:
    pairs = other_world.write_data(tmp_path / "data")
    (tmp_path / "rules.txt").write_text("Never curse.", encoding="utf-8")
    judge = f"lexicon:{tmp_path}/data/words.txt"
    with pytest.raises(SafeglassesError) as caught:
        fit(deaf, pairs, judge=judge, out=tmp_path / "run", under=f"system:{tmp_path / 'rules.txt'}", limit=200)
    assert caught.value.what == "the model's chat template drops what a system turn says"
    assert caught.value.given.startswith("'Never curse.' of chat 0")
    assert not (tmp_path / "run").exists()


def test_a_stack_whose_words_reach_the_model_with_no_prompt_is_refused(
    tiny_vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rules.txt").write_text("Never curse.", encoding="utf-8")
    stacks = [compose("none"), compose(f"system:{tmp_path / 'rules.txt'}"), compose("self-reminder")]
    asked = Example("x", (Turn("user", (Text("what is this"),)),))
    pictured = Example("y", (Turn("user", (Picture(path=PICTURE), Text("what is this"))),))
    refuse_misfits(stacks, tiny_vlm, [asked, pictured])
    text: Any = tiny_vlm.processor.chat_template
    deaf = text.replace("for m in messages", "for m in messages if m.role != 'system'")
    monkeypatch.setattr(tiny_vlm.processor, "chat_template", deaf)
    with pytest.raises(SafeglassesError, match="drops what a system turn says"):
        refuse_misfits(stacks, tiny_vlm, [asked, pictured])
    fussy = "{% if messages | length > 1 and messages[1].content | length > 1 %}{{ raise_exception('no') }}{% endif %}"
    monkeypatch.setattr(tiny_vlm.processor, "chat_template", fussy + text)
    refuse_misfits(stacks, tiny_vlm, [asked, pictured])  # pictures alone are refused: their answers count as failures
    with pytest.raises(SafeglassesError, match="refuses a chat"):
        refuse_misfits(stacks, tiny_vlm, [pictured])


@pytest.fixture(scope="module")
def categorised(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's pairs with categories by turns: half of the insults are about people, half about things."""
    rows = [json.loads(line) for line in world.pairs.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["category"] = ("people", "things")[int(row["pair_id"]) % 2]
        for part in row["messages"][0]["content"]:
            if part["type"] == "image":
                part["path"] = str(world.pairs.parent / part["path"])
    path = tmp_path_factory.mktemp("categorised") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_glasses_for_one_category_by_category_and_under_a_reminder(
    world: World, categorised: Path, tmp_path: Path
) -> None:
    grouped = replace(RECIPES["sgm-calibrated"], name="grouped", granularity="group", by_category=True)
    done = fit(
        world.model,
        categorised,
        judge=f"lexicon:{world.words}",
        out=tmp_path / "run",
        budget="1s",
        limit=100,
        recipe=grouped,
        category="people",
        under="self-reminder",
        harm="90%",
    )
    assert done.glasses.notes["categories"] == ["people"]
    assert done.glasses.notes["under"] == "self-reminder"
    terms = done.glasses.notes["strengths"]["terms"]
    assert terms == [f"{p}{side} [people]" for side in ("", " below") for p in ("prompt:last", "response:max")]
    told = done.summary["by_category"]
    assert [(row["category"], row["meant"]) for row in told] == [("people", True), ("things", False)]
    assert all(row["none"]["n"] == row["glasses"]["n"] > 0 for row in told)
    assert done.summary["calibration"]["harm_limit"] == 0.9
    assert not done.summary["calibration"]["missed"]
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "made for it" in page
    assert "answered with self-reminder at the input" in page
    evidence = Evidence.load(tmp_path / "run/evidence.safetensors")
    toxic, plain = evidence.samples[evidence.row(RECIPES["sgm-calibrated"].pools[1])]
    assert toxic < plain  # toxic rows of one category against all that are not toxic
    inputs = json.loads((tmp_path / "run/environment.json").read_text(encoding="utf-8"))["inputs"]
    assert inputs["categories"] == ["people"]
    assert inputs["under"].startswith("self-reminder ")


def test_an_unknown_category_is_refused_before_a_run_begins(world: World, categorised: Path, tmp_path: Path) -> None:
    with pytest.raises(SafeglassesError, match="no such category of harm") as error:
        fit(world.model, categorised, judge=f"lexicon:{world.words}", out=tmp_path / "run", category="hate,people")
    assert error.value.given == "hate"
    assert error.value.expected.startswith("some of people (")
    assert not (tmp_path / "run").exists()
