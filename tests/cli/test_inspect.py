"""What `inspect --pairs` says finding would cost: as JSON, as a table, and when it cannot be done."""

import inspect as signatures
import json
from pathlib import Path
from typing import Any

import pytest

from safeglasses.cli import execute, fit, inspect
from safeglasses.cli.options import where
from safeglasses.defend.recipes import RECIPES
from safeglasses.model.vlm import VLM


def estimated(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert execute(["inspect", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["estimate"]


def test_defaults_are_those_of_the_default_recipe() -> None:
    recipe = RECIPES[signatures.signature(fit).parameters["recipe"].default]
    options = signatures.signature(inspect).parameters
    assert where(options["sites"].default) == recipe.sites
    assert options["pools"].default == ",".join(map(str, recipe.pools))


def test_record(tiny: Path, tiny_vlm: VLM, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = estimated(capsys, tiny, "--pairs", data / "pairs.jsonl", "--memory", "2GiB")
    neurons = sum(tiny_vlm.anatomy.linears.values())
    assert found["sites"] == "linears"
    assert found["pools"] == ["prompt:last", "response:max"]
    assert (found["neurons"], found["find"], found["held_out"]) == (neurons, 126, 42)
    assert found["exact_bytes"] == neurons * 2 * 126 * 4
    assert found["shards_bytes"] == neurons * 2 * 168 * 4
    assert found["memory_bytes"] == 2**31
    assert (found["engine"], found["where"]) == ("exact", "memory")
    assert found["forward_flops"] > 0
    assert found["forward_seconds"] > 0


@pytest.mark.parametrize("sites", ["mlp", "neurons"])
def test_other_sites_and_pools(
    sites: Any, tiny: Path, tiny_vlm: VLM, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = estimated(capsys, tiny, "--pairs", data / "pairs.jsonl", "--sites", sites, "--pools", "all:mean")
    assert found["sites"] == sites
    assert found["pools"] == ["all:mean"]
    assert found["neurons"] == sum(tiny_vlm.anatomy.width(site) for site in tiny_vlm.anatomy.sites(sites))


def test_rendering(tiny: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["inspect", str(tiny), "--pairs", str(data / "pairs.jsonl"), "--memory", "2GiB"]) == 0
    out, err = capsys.readouterr()
    lines = [line.rstrip() for line in out[out.index("what finding neurons on these pairs would cost") :].splitlines()]
    names = ["neurons", "examples", "tokens", "exact engine", "histogram engine", "evidence file", "engine taken"]
    names += ["forward passes", "sorting for AUROC"]
    assert [line.split("  ")[0] for line in lines[1:]] == names
    assert lines[1].endswith("× prompt:last and response:max")
    assert lines[2].endswith("126 to find, 42 held out")
    assert lines[7].endswith("fit into 2.15 GB of memory")
    assert "estimate the cost of finding neurons: " in err


def test_without_pairs_there_is_nothing_to_estimate(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["inspect", str(tiny), "--json"]) == 0
    assert "estimate" not in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("option", "text", "what"),
    [("--memory", "8", "not a size of memory"), ("--pools", "response:max,all", "not a way of pooling")],
)
def test_options_are_read_before_the_model(
    option: str, text: str, what: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = str(data / "pairs.jsonl")
    assert execute(["inspect", "no-such-model", "--pairs", pairs, option, text, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"] == what


def test_a_job_without_room_is_an_error(
    tiny: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safeglasses.find.sizes.free_disk", lambda _: 0)
    command = ["inspect", str(tiny), "--pairs", str(data / "pairs.jsonl"), "--memory", "1KB", "--json"]
    assert execute(command) == 2
    assert json.loads(capsys.readouterr().out)["error"] == "neither engine has the room that it needs"


def test_a_type_needs_no_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["inspect", "qwen3_vl_moe", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["class"] == "Qwen3VLMoeForConditionalGeneration"
    assert record["config"] == "the default of the type"
    assert record["picture_tokens"] == "`input_ids == config.image_token_id`"
    (experts,) = record["anatomy"]["experts"]
    assert (experts["kind"], experts["parameters"], experts["layout"]) == (
        "mlp.experts", ["gate_up_proj", "down_proj"], "[expert, out, in], gate, then up",
    )  # fmt: skip
    assert [row["action"] for row in record["support"]] == ["capture", "wear", "fold", "IA3", "LoRA", "shield"]


def test_fused_experts_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["inspect", "qwen3_vl_moe"]) == 0
    shown = capsys.readouterr().out
    assert "[expert, out, in]" in shown
    assert "layers.LAYER.mlp.experts.EXPERT:in#INDEX (also :out, :gate, :up)" in shown
    assert "shield: yes" in shown


def test_a_checkpoints_config_is_enough(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((tiny / "config.json").read_bytes())
    assert execute(["inspect", str(bare), "--no-weights", "--json"]) == 0
    without = json.loads(capsys.readouterr().out)
    assert execute(["inspect", str(tiny), "--json"]) == 0
    loaded = json.loads(capsys.readouterr().out)
    shared = {"anatomy", "support", "picture_tokens", "parameters", "addresses"}
    assert {name: without[name] for name in shared} == {name: loaded[name] for name in shared}


def test_pairs_need_the_model_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["inspect", "llava", "--pairs", "pairs.jsonl", "--json"]) == 2
    assert json.loads(capsys.readouterr().out) == {
        "error": "pairs are checked with the model itself",
        "given": "--pairs pairs.jsonl and llava without weights",
        "expected": "a checkpoint with its weights, tokenizer and processor",
        "do": "leave --pairs out, or give a checkpoint",
    }
