"""Precise Shield from the command to its files, on the miniature: small, and the same after a kill."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import families
from families.unrolled import NOT_OURS
from safeglasses.cli import execute
from safeglasses.data.miniature import CHECKPOINT
from safeglasses.data.miniature.benchmark import Benchmark
from safeglasses.errors import SafeglassesError
from safeglasses.find.selection import Selection
from safeglasses.measure.judges import refusal_judge
from safeglasses.model.vlm import VLM, load
from safeglasses.report.shield_page import headline, shield_study
from safeglasses.run.hardening import defended, fine_tuned, pruned, rounded, rounded_to_int8
from safeglasses.run.shield import ShieldPlan, shield
from safeglasses.run.shield_data import _refusals, read_shield_data
from safeglasses.run.shield_summary import gates_of, verdict, whole_row
from safeglasses.tune.config import TuneConfig
from safeglasses.tune.shield import Shield
from tune.conftest import examples_of

PLAN = ShieldPlan(controls=1, tune=TuneConfig(learning_rate=5e-3, max_steps=6), transfer="none", robustness=False)


def run(benchmark: Benchmark, out: Path, plan: ShieldPlan = PLAN, **more):
    given = {"languages": ("en", "sw"), "limit": 4, "test_limit": 3, **more}
    return shield(CHECKPOINT, benchmark.probe, benchmark.prompts, "complied", out, plan=plan, **given)


@pytest.fixture(scope="module")
def finished(benchmark: Benchmark, tmp_path_factory: pytest.TempPathFactory):
    return run(benchmark, tmp_path_factory.mktemp("shield") / "run")


def test_a_run_leaves_what_it_promises(finished) -> None:
    summary = json.loads((finished.folder / "summary.json").read_text(encoding="utf-8"))
    assert summary == json.loads(json.dumps(finished.summary))
    assert {row["defence"] for row in summary["rows"]} == {"none", "shield", "random-neurons", "lora"}
    assert {row["modality"] for row in summary["rows"]} == {"all", "image-dominant", "text-dominant"}
    assert {row["language"] for row in summary["rows"]} == {"all", "en", "sw"}
    assert {"trainable_share", "touched_share", "neurons"} <= summary["parameters"].keys()
    loaded = Shield.load(finished.folder / "shield")
    assert len(loaded.neurons) == summary["parameters"]["neurons"] > 0
    assert summary["verdict"] in (finished.folder / "report.html").read_text(encoding="utf-8")
    assert whole_row(summary["rows"], "none")["asr"]["n"] == 2 * 2 * 3
    everyone = summary["rows"][0]
    assert everyone["refusal_on_benign"]["n"] > 0


def test_the_page_is_drawn_again_from_the_summary(finished, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(finished.folder / "summary.json", copy)
    assert execute(["report", str(copy)]) == 0
    assert (copy / "report.html").read_bytes() == (finished.folder / "report.html").read_bytes()


def test_random_controls_are_other_neurons_of_the_same_layers(finished) -> None:
    own = Shield.load(finished.folder / "shield").neurons
    random = Shield.load(finished.folder / "controls" / "random-0").neurons
    assert {s: int(m.sum()) for s, m in own.masks.items()} == {s: int(m.sum()) for s, m in random.masks.items()}
    assert not len(own & random)


def test_a_run_goes_on_where_it_was_killed(finished, benchmark: Benchmark, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(finished.folder, half)
    for name in ("summary.json", "report.html", "controls/lora", "responses/lora-greedy.jsonl"):
        path = half / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = run(benchmark, half)
    kept = {key: value for key, value in again.summary.items() if key not in ("seconds", "command")}
    assert kept == {key: value for key, value in finished.summary.items() if key not in ("seconds", "command")}
    same = ("shield/adapter_model.safetensors", "controls/lora/adapter_model.safetensors")
    for name in same:
        assert (half / name).read_bytes() == (finished.folder / name).read_bytes()


def test_another_run_in_the_same_folder_is_refused(finished, benchmark: Benchmark) -> None:
    with pytest.raises(SafeglassesError, match="the output folder holds a run with other inputs"):
        run(benchmark, finished.folder, limit=5)


def test_a_probe_without_a_test_split_is_refused_before_any_work(benchmark: Benchmark, tmp_path: Path) -> None:
    rows = benchmark.probe.read_text(encoding="utf-8").splitlines()
    only = benchmark.folder / "only-find.jsonl"
    only.write_text("\n".join(row for row in rows if '"split": "find"' in row), encoding="utf-8")
    with pytest.raises(SafeglassesError) as error:
        shield(CHECKPOINT, only, out=tmp_path / "run", plan=PLAN)
    assert str(error.value) == (
        "the probe has no test split\n"
        f"  given:    {only}\n"
        '  expected: rows with "split": "find" (to find neurons and tune them) and "test" (to measure)\n'
        "  do:       add rows, of other pictures and wordings than the other split's"
    )
    assert not (tmp_path / "run").exists()


def test_a_probe_without_answers_gets_refusals_and_the_models_own(benchmark: Benchmark, tmp_path: Path) -> None:
    rows = [json.loads(row) for row in benchmark.probe.read_text(encoding="utf-8").splitlines()]
    bare = benchmark.folder / "bare.jsonl"
    bare.write_text("\n".join(json.dumps({**row, "response": None}) for row in rows), encoding="utf-8")
    vlm = load(CHECKPOINT)
    asked = {"languages": ("en",), "limit": 4, "test_limit": 2, "skip_bad": False}
    data = read_shield_data(vlm, bare, None, "complied", None, **asked)
    assert {row.response for row in data.training()} == {"I'm sorry, but I can't help with that."}
    assert all(row.is_toxic for row in data.training())
    texts = {row.id: "a knife" for row in data.unanswered[1:]} | {data.unanswered[0].id: ""}
    whole = data.answered(texts).training()
    assert sum(row.response == "a knife" for row in whole) == len(data.unanswered) - 1
    unknown = benchmark.folder / "unknown.jsonl"
    text = bare.read_text(encoding="utf-8").replace('"language": "en"', '"language": "xx"')
    unknown.write_text(text, encoding="utf-8")
    with pytest.raises(SafeglassesError, match="no refusal in its language ships"):
        read_shield_data(vlm, unknown, None, "complied", None, **{**asked, "languages": ("xx",)}).training()


def test_every_shipped_refusal_is_known_to_the_judge() -> None:
    judge = refusal_judge()
    assert all(verdict.harmful for verdict in judge.judge(list(_refusals().values())))


def test_a_model_is_enough(tiny: Path, tmp_path: Path) -> None:
    plan = ShieldPlan(controls=0, tune=TuneConfig(max_steps=1), transfer="none", robustness=False)
    found = shield(tiny, out=tmp_path / "run", plan=plan, limit=4, test_limit=1)
    assert {"en", "zh"} <= set(found.summary["languages"])
    assert found.summary["parameters"]["neurons"] > 0


def test_amplifying_trains_nothing(benchmark: Benchmark, tmp_path: Path) -> None:
    plan = ShieldPlan(mode="amplify", controls=0, transfer="none", robustness=False)
    found = run(benchmark, tmp_path / "run", plan)
    assert found.summary["parameters"]["optimiser_parameters"] == 0
    assert found.summary["choice"] == {}
    assert (tmp_path / "run" / "shield" / "glasses.json").exists()


def test_the_command_says_it_as_json(benchmark: Benchmark, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        "--probe",
        str(benchmark.probe),
        "--languages",
        "en,sw",
        "--limit",
        "4",
        "--test-limit",
        "2",
        "--epochs",
        "1",
    ]
    more = ["--controls", "0", "--transfer", "zero-shot", "--no-robustness", "--out", str(tmp_path / "run"), "--json"]
    assert execute(["shield", str(CHECKPOINT), *given, *more]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {entry["tuned_on"] for entry in said["summary"]["transfer"]} == {"en", "en/text-dominant"}
    seen = {e["tested_on"] for e in said["summary"]["transfer"] if e["tuned_on"] == "en" and not e["zero_shot"]}
    assert seen == {"en/image-dominant", "en/text-dominant"}
    page = Path(said["report"]).read_text(encoding="utf-8")
    assert "Does safety transfer?" in page


def test_treatments_change_what_they_say() -> None:
    vlm = load(CHECKPOINT)
    fingerprint = vlm.fingerprint()
    site = vlm.anatomy.sites("neurons")[0]
    mask = torch.zeros(vlm.anatomy.width(site), dtype=torch.bool)
    mask[3] = True
    twin = defended(vlm, None)
    pruned(twin, Selection({site: mask}))
    weight = twin.model.get_parameter(vlm.anatomy.absolute_path(f"{site.path}.weight"))
    assert not weight[:, 3].any()
    assert weight[:, 4].any()
    assert vlm.fingerprint() == fingerprint


@pytest.mark.filterwarnings(NOT_OURS)
def test_a_mixture_is_tuned_expert_by_expert(benchmark: Benchmark, tmp_path: Path) -> None:
    """Where PEFT takes linear maps for experts, only experts are looked at, and the page says so."""
    model = families.build("glm4v_moe", tmp_path / "glm4v_moe")
    plan = ShieldPlan(controls=1, tune=TuneConfig(max_steps=1), robustness=False)
    given = {"languages": ("en",), "limit": 6, "test_limit": 1, "plan": plan}
    with pytest.raises(SafeglassesError, match="freeze does not work on fused experts"):
        shield(model, benchmark.probe, out=tmp_path / "run", **{**given, "plan": replace(plan, mode="freeze")})
    assert not (tmp_path / "run").exists()
    found = shield(model, benchmark.probe, out=tmp_path / "run", **given)
    own, random = (Shield.load(found.folder / name).neurons for name in ("shield", "controls/random-0"))
    assert {s: int(m.sum()) for s, m in own.masks.items()} == {s: int(m.sum()) for s, m in random.masks.items()}
    assert all(site.fused for site in own.masks)
    assert found.summary["left_out"] == ["layers.0.mlp.down_proj", "layers.1.mlp.shared_experts.down_proj"]
    page = (found.folder / "report.html").read_text(encoding="utf-8")
    assert "Not looked at: what layers.0.mlp.down_proj and 1 more maps read" in page
    layers = found.summary["certainty"]["en/text-dominant"]["layers"]
    assert [(layer["layer"], layer["experts"]) for layer in layers] == [(1, 4)]
    assert layers[0]["rated"] < 4
    assert "were met by enough requests" in page


@pytest.mark.filterwarnings(NOT_OURS)
@pytest.mark.parametrize("name", ["glm4v_moe", "gpt_oss"])
def test_treatments_reach_experts(family: Callable[[str], VLM], name: str) -> None:
    vlm = family(name)
    fingerprint, (experts, *_) = vlm.fingerprint(), vlm.anatomy.experts.values()
    site = experts.sites("in")[2]
    twin = defended(vlm, None)
    pruned(twin, Selection({site: torch.arange(experts.width) == 3}))
    down = twin.model.get_parameter(f"{vlm.anatomy.absolute_path(experts.path)}.down_proj")
    reads = down.transpose(1, 2) if not experts.transposed else down  # [expert, neuron, hidden]
    assert (reads == 0).all(dim=2).nonzero().tolist() == [[2, 3]]
    rounded_to_int8(twin)
    both = twin.model.get_parameter(f"{vlm.anatomy.absolute_path(experts.path)}.gate_up_proj")
    row = (both.transpose(1, 2) if experts.transposed else both)[1, 5]
    levels = row / (row.abs().max() / 127)
    assert torch.allclose(levels, levels.round(), atol=1e-3)
    before, config = both.clone(), TuneConfig(batch=2, micro_batch=2, learning_rate=1e-2, warmup=0.0)
    fine_tuned(twin, examples_of(vlm, 4), steps=1, config=config)
    assert not torch.equal(both, before)
    assert vlm.fingerprint() == fingerprint


def test_eight_bits_are_255_levels_a_row() -> None:
    weight = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    found = rounded(weight)
    for row, small in zip(weight, found, strict=True):
        step = row.abs().max() / 127
        assert (row - small).abs().max() <= step / 2 * 1.0001
        assert torch.allclose(small / step, (small / step).round(), atol=1e-3)
    assert torch.equal(rounded(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_the_verdict_follows_the_figures(finished) -> None:
    summary = dict(finished.summary)
    assert "did not beat" in verdict({**summary, "choice": {**summary["choice"], "beats_random": False}})
    assert " beat random ones" in verdict({**summary, "choice": {**summary["choice"], "beats_random": True}})
    assert "neurons" not in verdict({**summary, "choice": {}})
    gates = gates_of(summary["rows"])
    cells = {
        (r["language"], r["modality"]): r["asr"]["value"]
        for r in summary["rows"]
        if r["defence"] == "none" and "all" not in (r["language"], r["modality"])
    }
    assert gates["worst_before"] == max(cells.values())
    assert gates["mean_before"] == pytest.approx(sum(cells.values()) / len(cells))
    study = shield_study(summary)
    assert study.headline == headline(summary)
    assert [section.id for section in study.sections] == ["asr", "controls", "neurons"]


def test_measure_takes_a_shield_and_no_strength(finished, benchmark: Benchmark, capsys: pytest.CaptureFixture) -> None:
    base = [
        "measure",
        str(CHECKPOINT),
        "--prompts",
        str(benchmark.probe),
        "--judge",
        "complied",
        "--limit",
        "2",
        "--json",
    ]
    worn = ["--glasses", str(finished.folder / "shield")]
    assert execute([*base, *worn]) == 0
    assert {row["defence"] for row in json.loads(capsys.readouterr().out)["rows"]} == {"none", "glasses"}
    assert execute([*base, *worn, "--strength", "0.5"]) != 0
    assert json.loads(capsys.readouterr().out)["error"] == "a shield has no strength"
