import io
import json
import random
import subprocess
import sys
import time
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

import families
import other_world
from families.unrolled import chat
from forked import Forked
from other_world import World
from safeglasses.cli import execute
from safeglasses.defend.glasses import Glasses
from safeglasses.defend.recipes import RECIPES
from safeglasses.errors import SafeglassesError
from safeglasses.find.enough import FEWEST
from safeglasses.find.evidence import Evidence
from safeglasses.measure.results_reading import read_results
from safeglasses.model.vlm import load
from safeglasses.report.schema import validate
from safeglasses.run.fit import fit
from safeglasses.ship.fold import fold_checkpoint
from safeglasses.ship.known import KnownAnswers
from safeglasses.ship.verify import verify_model


def command(world: World, out: Path, *more: str) -> list[str]:
    base = [sys.executable, "-m", "safeglasses", "fit", str(world.model), "--pairs", str(world.pairs)]
    return [*base, "--judge", f"lexicon:{world.words}", "--out", str(out), "--json", *more]


def run(world: World, out: Path, *more: str) -> dict:
    """Run the command here: starting a process costs more than this fit."""
    said = io.StringIO()
    with redirect_stdout(said):
        status = execute(command(world, out, *more)[3:])
    assert status == 0, said.getvalue()[-2000:]
    return json.loads(said.getvalue())


def glasses_bytes(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((out / "glasses").iterdir())}


def row(summary: dict, defence: str, decoding: str = "sampled") -> dict:
    return next(
        r for r in summary["rows"] if (r["defence"], r["decoding"], r["condition"]) == (defence, decoding, "all")
    )


@pytest.fixture(scope="module")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """One run that nobody disturbs, with the smallest calibration."""
    out = tmp_path_factory.mktemp("fit") / "run"
    return run(world, out, "--budget", "1s")["summary"], out


@pytest.mark.slow
def test_fit_without_tuning_flags_lowers_harm(world: World, tmp_path: Path) -> None:
    done = subprocess.run(command(world, tmp_path / "run"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    summary = json.loads(done.stdout)["summary"]
    before, after = row(summary, "none"), row(summary, "glasses")
    assert before["harmful_rate"]["value"] > 0.3
    assert after["harmful_rate"]["high"] < before["harmful_rate"]["low"]
    assert summary["paired"]["p_value"] < 0.001
    for slot in ("color", "shape"):
        assert after["utility"][slot]["value"] > before["utility"][slot]["value"] - 0.1


def test_the_run_folder_holds_everything(finished: tuple[dict, Path]) -> None:
    summary, out = finished
    validate(summary)
    assert json.loads((out / "summary.json").read_text(encoding="utf-8")) == summary
    names = {p.name for p in out.iterdir()}
    assert {"recipe.toml", "environment.json", "evidence.safetensors", "plan.json", "report.html"} <= names
    assert {r["defence"] for r in summary["rows"]} == {"none", "aura", "sgm", "glasses"}
    assert summary["learned_scalars"] > 0
    assert summary["n_experts"] > 0
    assert set(summary["seconds"]) == {"capture", "statistics", "calibrate", "measure", "total"}
    (results,) = (out / "results" / "glasses").glob("results_*.json")
    assert {r.decoding["name"] for r in read_results(results)} == {"sampled", "greedy"}
    assert execute(["compare", str(out), str(out)]) == 0  # results are judged already: no --judge, no --prompts
    assert "worthless" in (out / "report.html").read_text(encoding="utf-8")


def after_evidence(out: Path) -> bool:
    return (out / "evidence.safetensors").exists()


def after_a_round(out: Path) -> bool:
    return (out / "calibration/trial-00/round-0.json").exists()


def before_the_last_lessons(out: Path) -> bool:
    return (out / "calibration/refit").exists()


def amid_answers(out: Path) -> bool:
    journal = out / "responses/sgm-sampled.jsonl"
    return journal.exists() and journal.stat().st_size > 0


def started(world: World, out: Path) -> Forked:
    return Forked(execute, command(world, out, "--budget", "1s")[3:], said=out.with_name("said"))


def test_a_fit_killed_again_and_again_ends_with_the_same_glasses(
    world: World, finished: tuple[dict, Path], tmp_path: Path
) -> None:
    summary, undisturbed = finished
    out = tmp_path / "run"
    for reached in (after_evidence, after_a_round, before_the_last_lessons, amid_answers):
        process = started(world, out)
        process.wait_for(partial(reached, out))
        process.kill()
        assert not (out / "summary.json").exists()
    again = run(world, out, "--budget", "1s")["summary"]
    assert glasses_bytes(out) == glasses_bytes(undisturbed)
    assert again["rows"] == summary["rows"]


def test_a_fit_killed_at_a_random_moment_ends_with_the_same_glasses(
    world: World, finished: tuple[dict, Path], tmp_path: Path
) -> None:
    summary, undisturbed = finished
    out = tmp_path / "run"
    process = started(world, out)
    process.wait_for((out / "environment.json").exists)
    time.sleep(random.uniform(0, 0.8 * summary["seconds"]["total"]))  # another moment in every run of the tests
    process.kill()
    run(world, out, "--budget", "1s")
    assert glasses_bytes(out) == glasses_bytes(undisturbed)


def test_a_folder_of_other_inputs_is_refused(world: World, finished: tuple[dict, Path]) -> None:
    _, out = finished
    with pytest.raises(SafeglassesError, match=r"different: seed \(0 → 7\)") as error:
        fit(world.model, world.pairs, judge=f"lexicon:{world.words}", out=out, budget="1s", seed=7)
    assert "--overwrite" in error.value.do


def test_a_foreign_folder_is_never_touched(world: World, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(SafeglassesError, match="not a run of safeglasses"):
        fit(world.model, world.pairs, judge=f"lexicon:{world.words}", out=tmp_path, overwrite=True)
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_prompts_without_a_test_split_are_refused_before_the_run_begins(world: World, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in world.pairs.read_text(encoding="utf-8").splitlines()]
    pairs = world.pairs.with_name("no-test.jsonl")  # beside the pictures
    pairs.write_text("".join(json.dumps({**row, "split": "find"}) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(SafeglassesError) as error:
        fit(world.model, pairs, judge=f"lexicon:{world.words}", out=tmp_path / "run")
    assert error.value.what == "no prompt to prove anything on"
    assert error.value.given.endswith("; calibrate: 0 prompts; test: 0 prompts")
    assert error.value.do == (
        'give prompts of the test split with --prompts, or leave "split" out of the pairs: '
        "rows are then split by a hash"
    )
    assert not (tmp_path / "run").exists()


def test_a_missing_recipe_names_those_that_exist(world: World, tmp_path: Path) -> None:
    with pytest.raises(SafeglassesError, match="no such recipe") as error:
        fit(world.model, world.pairs, judge=f"lexicon:{world.words}", out=tmp_path / "run", recipe="nope")
    assert "sgm-calibrated" in error.value.expected
    assert not (tmp_path / "run").exists()


def test_fit_on_fused_experts_saves_loads_and_folds(tmp_path: Path) -> None:
    """The evidence holds experts where the recipe acts on them alone; who met few examples says so."""
    model = families.build("qwen3_vl_moe", tmp_path / "model")
    pairs = other_world.write_data(tmp_path / "data", pairs=80)
    out = tmp_path / "run"
    result = fit(model, pairs, judge=f"lexicon:{tmp_path}/data/words.txt", recipe="aura", out=out, limit=40)
    vlm = load(model)
    glasses = Glasses.load(out / "glasses")
    assert glasses == result.glasses
    assert any(site.fused for site in glasses.factors)
    assert {row["defence"] for row in result.summary["rows"]} == {"none", "sgm", "glasses"}
    assert set(result.summary["hashes"]) > {"glasses/glasses.safetensors", "glasses/neurons.parquet"}
    table = pq.read_table(out / "glasses/neurons.parquet").to_pylist()
    met = [min(row["met-toxic all:max"], row["met-non-toxic all:max"]) for row in table]
    assert min(met) >= FEWEST
    evidence = Evidence.load(out / "evidence.safetensors")
    assert any((counts < FEWEST).any() for counts in evidence.columns["n_toxic"].values())
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "PeftModel" not in page
    assert "toxic, " in page
    assert execute(["report", str(out)]) == 0
    folded = fold_checkpoint(model, out / "glasses", tmp_path / "folded")
    again = load(folded.folder)
    batch = vlm.encode([chat(vlm, 2, "a red dog")])
    with torch.no_grad(), glasses.worn(vlm):
        worn = vlm.forward(batch)
    with torch.no_grad():
        torch.testing.assert_close(again.forward(batch), worn, atol=1e-4, rtol=1e-4)
    answers = KnownAnswers.load(out / "glasses")
    assert verify_model(again, answers).kind == "worn"
    assert verify_model(vlm, answers).kind == "not worn"


def test_fit_leaves_experts_alone_where_its_recipe_does(tmp_path: Path) -> None:
    model = families.build("qwen3_vl_moe", tmp_path / "model")
    pairs = other_world.write_data(tmp_path / "data", pairs=80)
    recipe = replace(RECIPES["sgm"], rule="constant", constant=1.0)
    with pytest.raises(SafeglassesError, match="the recipe selects no neuron"):
        fit(model, pairs, judge=f"lexicon:{tmp_path}/data/words.txt", recipe=recipe, out=tmp_path / "run", limit=40)
    found = Evidence.load(tmp_path / "run/evidence.safetensors")
    assert set(found.auroc) == set(load(model).anatomy.sites("linears"))


def test_bad_pairs_leave_no_run_folder(world: World, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    lines = world.pairs.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [json.loads(line) for line in lines[:30]]
    for item in rows:
        item["messages"][0]["content"] = item["messages"][0]["content"][1:]
        item["split"] = "find"
    pairs.write_text("".join(json.dumps(item) + "\n" for item in rows), encoding="utf-8")
    with pytest.raises(SafeglassesError):  # fifteen of each label are too few
        fit(world.model, pairs, judge=f"lexicon:{world.words}", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
