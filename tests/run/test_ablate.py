"""Ablation from the command to its page, on the miniature, whose refusals depend on known neurons."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from safeglasses.cli import execute
from safeglasses.data.examples import read_examples
from safeglasses.data.miniature import CHECKPOINT
from safeglasses.data.miniature.benchmark import Benchmark
from safeglasses.data.probes import probe_of
from safeglasses.defend.glasses import Glasses
from safeglasses.errors import SafeglassesError
from safeglasses.find.contrasting import measure_contrast
from safeglasses.find.selection import Selection
from safeglasses.measure.judges import judge_from
from safeglasses.model.vlm import VLM, load
from safeglasses.report.ablation_page import ablation_study, headline
from safeglasses.run.ablate import ablate
from safeglasses.run.ablating import neurons_in


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return load(CHECKPOINT)


@pytest.fixture(scope="module")
def contrast(vlm: VLM, benchmark: Benchmark, tmp_path_factory: pytest.TempPathFactory) -> Path:
    probe = probe_of(read_examples(benchmark.probe).split("find"))
    return measure_contrast(vlm, probe, resamples=2).save(tmp_path_factory.mktemp("found") / "contrast.safetensors")


def run(contrast: Path, benchmark: Benchmark, out: Path, *more: str) -> list[str]:
    base = ["ablate", str(CHECKPOINT), "--neurons", str(contrast), "--prompts", str(benchmark.probe)]
    return [*base, "--controls", "2", "--limit", "12", "--out", str(out), "--json", *more]


def test_taking_safety_neurons_out_raises_harm_and_taking_others_does_not(
    vlm: VLM, contrast: Path, benchmark: Benchmark, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = neurons_in(contrast, vlm)
    tuned = Glasses({s: torch.where(m, 1.5, 1.0) for s, m in chosen.masks.items()}, vlm.fingerprint(), "test")
    tuned.save(tmp_path / "tuned", vlm)
    command = run(contrast, benchmark, tmp_path / "run", "--tuned", str(tmp_path / "tuned"))
    assert execute(command) == 0
    said = json.loads(capsys.readouterr().out)
    summary = said["summary"]
    assert [e["how"] for e in summary["effects"]] == ["zero", "mean", "resample", "patch"]
    zero = summary["effects"][0]
    assert zero["selected_minus_none"]["value"] > 0
    assert zero["selected_minus_random"]["low"] > 0
    assert len(zero["controls"]) == 2
    arms = [(r["neurons"], r["how"]) for r in summary["rows"] if r["factor"] is None]
    assert arms.count(("random", "mean")) == 2
    assert ("patched selected", "patch") in arms
    assert sum(r["how"] == "scale" for r in summary["rows"]) == 10
    assert headline(summary) in Path(said["report"]).read_text(encoding="utf-8")
    (tmp_path / "run" / "summary.json").unlink()  # as if killed before the end: every answer is in a journal
    assert execute(command) == 0
    assert json.loads(capsys.readouterr().out)["summary"] == summary
    page = Path(said["report"]).read_bytes()
    Path(said["report"]).unlink()
    assert execute(["report", str(tmp_path / "run")]) == 0
    assert Path(said["report"]).read_bytes() == page
    sections = {section.id: section for section in ablation_study(summary).sections}
    assert list(sections) == ["effect", "price", "dose"]
    assert sections["dose"].figures[0][1]["data"][0]["x"] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0]


def test_bad_input_is_refused_before_the_model_answers(
    vlm: VLM, contrast: Path, benchmark: Benchmark, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(run(contrast, benchmark, tmp_path / "a", "--how", "zero,none")) != 0
    assert json.loads(capsys.readouterr().out)["error"] == "not a kind of ablation"
    with pytest.raises(SafeglassesError, match="neither neurons nor a defence lie here"):
        neurons_in(tmp_path, vlm)
    rows = read_examples(benchmark.probe)
    benign = [e for e in rows.split("test") if e.label == "non-toxic"][:3]
    chosen = neurons_in(contrast, vlm)
    judge = judge_from("complied")
    with pytest.raises(SafeglassesError, match="no prompt that could elicit harm"):
        ablate(vlm, chosen, benign, judge, ordinary=[])
    harmful = [e for e in rows.split("test") if e.label == "toxic"][:2]
    with pytest.raises(SafeglassesError, match="examples are measured whose activations stand in"):
        ablate(vlm, chosen, [*harmful, *benign], judge, ordinary=benign)
    with pytest.raises(SafeglassesError, match="not an ablation"):
        ablate(vlm, chosen, harmful, judge, ordinary=benign, controls=0)
    every = Selection({s: torch.ones_like(m) for s, m in chosen.masks.items()})
    with pytest.raises(SafeglassesError, match="too few neurons are left to draw a control from"):
        ablate(vlm, every, harmful, judge, ordinary=benign)


def test_neurons_are_read_from_a_list_of_addresses(family: Callable[[str], VLM], tmp_path: Path) -> None:
    vlm, path = family("glm4v"), tmp_path / "neurons.txt"
    path.write_text("layers.0.mlp.gate_up_proj:up#3\n\nlayers.0.mlp.gate_up_proj:out#5\nlayers.1.mlp.down_proj:in#7\n")
    chosen = neurons_in(path, vlm)
    named = {vlm.anatomy.address(site, i) for site, mask in chosen.masks.items() for i in mask.nonzero()[:, 0].tolist()}
    assert named == {
        "layers.0.mlp.gate_up_proj:up#3",
        "layers.0.mlp.gate_up_proj:gate#5",
        "layers.1.mlp.down_proj:in#7",
    }
    path.write_text("layers.0.mlp.gate_up_proj:up#48\n")
    with pytest.raises(SafeglassesError, match="no such neuron"):
        neurons_in(path, vlm)
    path.write_text("\n")
    with pytest.raises(SafeglassesError, match="no neuron in the file"):
        neurons_in(path, vlm)


def test_experts_are_not_patched_and_that_is_said_before_the_first_answer(
    family: Callable[[str], VLM], benchmark: Benchmark, tmp_path: Path
) -> None:
    vlm, rows = family("qwen3_vl_moe"), read_examples(benchmark.probe)
    site = vlm.anatomy.sites("neurons")[0]
    mask = torch.arange(vlm.anatomy.width(site)) < 2
    tuned = Glasses({site: torch.where(mask, 1.5, 1.0)}, vlm.fingerprint(), "test")
    ordinary = [row for row in rows.split("find") if not row.is_toxic][:4]
    given = {"judge": judge_from("complied"), "ordinary": ordinary, "journals": tmp_path / "journals"}
    with pytest.raises(SafeglassesError, match="neurons of fused experts cannot be patched"):
        ablate(vlm, Selection({site: mask}), rows.split("test")[:4], tuned=tuned, **given)
    assert not (tmp_path / "journals").exists()
