"""Every verb on a tiny random model, for people and for programs."""

import inspect
import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from safeglasses.cli import VERBS, demo, execute, fit
from safeglasses.data.probes import Cell
from safeglasses.defend.glasses import Glasses
from safeglasses.find.contrast import COLUMNS, FILE, Contrast
from safeglasses.find.evidence import Evidence
from safeglasses.find.overlap import atlas_of
from safeglasses.find.rules import Rule
from safeglasses.model.overview import overview
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM, load


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    status = execute([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert status == 0, out + err
    return out, err


def record_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    out, _ = call(capsys, *arguments, "--json")
    assert out.count("\n") == 1, "one object on one line, and nothing else"
    return json.loads(out)


@pytest.fixture
def glasses(tiny_vlm: VLM, tmp_path: Path) -> Path:
    """A folder of glasses that turn off half of one site."""
    site = Site("layers.0.mlp.up_proj", "out")
    factors = torch.ones(tiny_vlm.anatomy.width(site))
    factors[::2] = 0
    made = Glasses({site: factors}, base_fingerprint=tiny_vlm.fingerprint(), recipe="by hand")
    return made.save(tmp_path / "glasses", tiny_vlm)


def test_every_verb_has_json_and_debug() -> None:
    for verb in VERBS:
        assert {"json", "debug"} <= inspect.signature(verb).parameters.keys()
        assert verb.__doc__


def test_inspect(tiny: Path, tiny_vlm: VLM, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = record_of(capsys, "inspect", tiny, "--pairs", data / "pairs.jsonl")
    assert record["base_fingerprint"] == tiny_vlm.fingerprint()
    assert record["parameters"] == tiny_vlm.model.num_parameters()
    assert record["addresses"] == "layers.LAYER.KIND:out#INDEX"
    assert record["anatomy"] == overview(tiny_vlm.anatomy)
    assert record["pairs"] == {
        "rows": 210,
        "skipped": [],
        "splits": {
            "calibrate": {"non-toxic": 24, "toxic": 18},
            "find": {"non-toxic": 72, "toxic": 54},
            "test": {"non-toxic": 24, "toxic": 18},
        },
    }
    out, err = call(capsys, "inspect", tiny, "--pairs", data / "pairs.jsonl")
    assert tiny_vlm.fingerprint() in out
    assert "mlp.up_proj" in out
    assert "pairs: 210 usable rows, 0 skipped\n  calibrate: 24 non-toxic, 18 toxic\n" in out
    assert "load the model: " in err


def test_inspect_counts_rows_skipped_on_request(
    tiny: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (data / "pairs.jsonl").read_text().replace('"path": "', f'"path": "{data}/')
    (tmp_path / "pairs.jsonl").write_text(text + '{"messages": [{"role": "user"\n')
    command = ["inspect", str(tiny), "--pairs", str(tmp_path / "pairs.jsonl"), "--json"]
    assert execute(command) == 2
    error = json.loads(capsys.readouterr().out)
    assert error["error"] == f"{tmp_path}/pairs.jsonl:211: the row is not JSON"
    record = record_of(capsys, *command[:-1], "--skip-bad")
    assert record["pairs"]["rows"] == 210
    assert [line.split("\n")[0] for line in record["pairs"]["skipped"]] == [error["error"]]


def test_measure_without_glasses(tiny: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prompts", data / "prompts.jsonl", "--judge", f"lexicon:{data / 'words.txt'}"]
    record = record_of(capsys, "measure", tiny, *options, "--max-new-tokens", 4)
    assert record["paired"] is None
    assert {(row["defence"], row["decoding"]) for row in record["rows"]} == {
        ("none", "sampled"),
        ("none", "greedy"),
    }
    every = next(row for row in record["rows"] if row["condition"] == "all")
    assert every["harmful_rate"]["n"] + every["refusal_on_benign"]["n"] == 24, "the test split"
    limited = record_of(capsys, "measure", tiny, *options, "--max-new-tokens", 4, "--split", "all", "--limit", 5)
    assert next(row for row in limited["rows"] if row["condition"] == "all")["empty"]["n"] == 5


def test_measure_with_glasses_compares(
    tiny: Path, data: Path, glasses: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--prompts", data / "prompts.jsonl", "--judge", f"lexicon:{data / 'words.txt'}"]
    options += ["--glasses", glasses, "--max-new-tokens", 4]
    record = record_of(capsys, "measure", tiny, *options)
    assert {row["defence"] for row in record["rows"]} == {"none", "glasses"}
    assert {"fixed", "broken", "p_value"} <= record["paired"].keys()
    off = record_of(capsys, "measure", tiny, *options, "--strength", 0)
    before, after = (
        [{**row, "defence": "", "kl": None} for row in off["rows"] if row["defence"] == defence]
        for defence in ("none", "glasses")
    )
    assert before == after, "glasses at strength 0 change nothing"
    assert {row["kl"] for row in off["rows"] if row["defence"] == "glasses"} <= {0.0, None}
    out, err = call(capsys, "measure", tiny, *options)
    assert "harmful answers" in out
    assert err.startswith("24 of 120 prompts (test)\n")


def test_measure_of_an_empty_split(tiny: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = json.loads((data / "prompts.jsonl").read_text().split("\n")[0])
    row["messages"] = [{"role": "user", "content": "hello"}]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps(row))
    judge = f"lexicon:{data / 'words.txt'}"
    assert execute(["measure", str(tiny), "--prompts", str(prompts), "--judge", judge]) == 2
    assert capsys.readouterr().err == (
        "error: no prompts to answer\n"
        f"  given:    {prompts}, split test\n"
        "  expected: at least one row\n"
        "  do:       give rows that split, or use --split all\n"
    )


def test_fold(tiny: Path, glasses: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "folded"
    record = record_of(capsys, "fold", tiny, "--glasses", glasses, "--out", out, "--strength", 0.5)
    worn = Glasses.load(glasses)
    told = {"checkpoint": str(out), "neurons": worn.n_neurons, "strength": 0.5, "base": str(tiny)}
    assert told.items() <= record.items()
    name = "layers.0.mlp.up_proj.weight"
    before, after = (
        next(p for key, p in load(folder).model.named_parameters() if key.endswith(name)) for folder in (tiny, out)
    )
    assert torch.equal(after[::2], before[::2] / 2)
    assert torch.equal(after[1::2], before[1::2])
    assert execute(["fold", str(tiny), "--glasses", str(glasses), "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    text, _ = call(capsys, "fold", tiny, "--glasses", glasses, "--out", out, "--overwrite")
    assert text.startswith(f"folded {worn.n_neurons} neurons at strength 1\n")
    assert text.endswith(f"checkpoint: {out}\n")


@dataclass
class Result:
    """What `run.fit` gives back, as far as the command line looks at it."""

    folder: Path
    summary: dict[str, Any]


@pytest.mark.parametrize("verb", [fit, demo])
def test_options_and_arguments_agree(verb: Any) -> None:
    function = getattr(import_module(f"safeglasses.run.{verb.__name__}"), verb.__name__)
    options = dict(inspect.signature(verb).parameters)
    arguments = dict(inspect.signature(function).parameters)
    assert options.keys() - {"json", "debug"} == arguments.keys() - {"progress"}
    for name in options.keys() - {"json", "debug", "budget"}:
        ours, theirs = options[name].default, arguments[name].default
        assert ours == theirs or str(ours) == theirs, name


def test_fit_passes_everything_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, Any] = {}

    def stand_in(model: str, pairs: Path, **rest: Any) -> Result:
        seen.update(model=model, pairs=pairs, **rest)
        print("noise of a library on stdout")
        (tmp_path / "report.html").touch()
        return Result(tmp_path, {"schema": 1})

    monkeypatch.setattr(import_module("safeglasses.run.fit"), "fit", stand_in)
    given = {
        "prompts": tmp_path / "p.jsonl",
        "judge": "lexicon:w.txt",
        "refusals": "lexicon:r.txt",
        "recipe": "aura",
        "out": tmp_path / "run",
        "budget": "90s",
        "seed": 3,
        "limit": 4,
        "batch_size": 5,
        "dtype": "float32",
        "device_map": "cpu",
        "revision": "main",
        "category": "hate,threats",
        "harm": "2%",
        "under": "self-reminder",
        "sites": "heads",
    }
    options = [word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", value)]
    flags = ["--skip-bad", "--overwrite", "--front", "--by-head"]
    record = record_of(capsys, "fit", "MODEL", "--pairs", tmp_path / "pairs.jsonl", *options, *flags)
    assert record == {
        "folder": str(tmp_path),
        "report": str(tmp_path / "report.html"),
        "summary": {"schema": 1},
    }
    progress = seen.pop("progress")
    assert callable(progress.stage)
    assert seen == {
        "model": "MODEL",
        "pairs": tmp_path / "pairs.jsonl",
        **given,
        "judge": ["lexicon:w.txt"],
        "skip_bad": True,
        "overwrite": True,
        "front": True,
        "by_head": True,
    }


@pytest.fixture(scope="module")
def contrast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a contrast in two languages, as a run of `shield` leaves it."""
    cells = tuple(Cell(language, "text-dominant") for language in ("en", "sw"))
    sites = [Site(f"layers.{i}.mlp.down_proj", "in") for i in range(2)]
    generator = torch.Generator().manual_seed(0)
    columns = {name: {site: torch.rand(2, 2, 30, generator=generator) for site in sites} for name in COLUMNS}
    rules = (Rule("precise-shield", 0.3), Rule("wanda", 0.2))
    norms = {site: torch.ones(30) for site in sites}
    made = Contrast(
        cells,
        rules,
        "last",
        columns,
        norms,
        ((5, 6), (7, 8)),
        "sg1-a",
        "b",
        left_out=(3,),
        idle={"wanda": [[1.0, 0.25], [None, 1.0]]},
    )
    folder = tmp_path_factory.mktemp("shield")
    made.save(folder / FILE)
    return folder


def test_neurons(contrast: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Contrast.load(contrast)
    record = record_of(capsys, "neurons", contrast)
    assert record["folder"] == str(contrast)
    assert [row["found"] for row in record["cells"]] == [len(made.neurons(cell)) for cell in made.cells]
    assert "overlap" not in record
    assert record_of(capsys, "neurons", contrast / FILE, "--rule", "wanda")["rule"]["name"] == "wanda"
    atlas = atlas_of(made, "wanda")
    record = record_of(capsys, "neurons", contrast, "--rule", "wanda", "--overlap")
    assert record["overlap"] == {"summary": atlas.summary(), **atlas.record()}
    assert record["overlap"]["idle"] == [[1.0, 0.25], [None, 1.0]]
    assert record["overlap"]["summary"]["cross_lingual"]["idle_directional"] == {
        "mean": 0.25,
        "low": 0.25,
        "high": 0.25,
    }
    assert "sets about nothing 25%" in call(capsys, "neurons", contrast, "--rule", "wanda", "--overlap")[0]
    text, _ = call(capsys, "neurons", contrast, "--overlap")
    assert "60 neurons, rule precise-shield, signed means, p = 0.3, tokens: last" in text
    assert "en/text-dominant" in text
    assert "5 + 6" in text
    assert "not looked at: layers 3, which only cross-attend to pictures" in text
    assert "two languages of a modality" in text


def test_neurons_errors(contrast: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["neurons", str(tmp_path)]) == 2
    assert "no file of safety neurons" in capsys.readouterr().err
    assert execute(["neurons", str(contrast), "--rule", "snip"]) == 2
    assert "expected: precise-shield or wanda" in capsys.readouterr().err
    assert execute(["neurons", str(contrast), "--rule", "nonsense"]) == 2
    assert "no such rule" in capsys.readouterr().err


def test_both_sides_of_the_fusion_in_one_capture(
    tiny: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["capture", str(tiny), "--pairs", str(data / "pairs.jsonl"), "--limit", "40", "--resamples", "0"]
    where = ["--sites", "mlp", "--sites", "projector", "--sites", "vision"]
    assert execute([*given, *where, "--out", str(tmp_path / "none"), "--json"]) == 2
    failed = json.loads(capsys.readouterr().out)
    assert failed["error"] == "no token to pool over at this site"
    assert failed["given"].startswith("/model.multi_modal_projector.linear_1:out with prompt:last")
    assert execute([*given, *where, "--pools", "prompt:max", "--out", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sites"] == 6 + 2 + 12
    evidence = Evidence.load(tmp_path / "run" / "evidence.safetensors")
    assert {site.outside for site in evidence.auroc} == {True, False}
    page = (tmp_path / "run" / "evidence.html").read_text(encoding="utf-8")
    assert "/multi_modal_projector…linear_1" in page or "/multi_modal_projector\\u2026linear_1" in page
    assert execute(["inspect", str(tiny), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["anatomy"]["outside"]
    assert {row["region"] for row in rows} == {"vision", "projector"}
    assert execute(["inspect", str(tiny)]) == 0
    shown = capsys.readouterr().out
    assert "linear maps beyond the decoder, on request (--sites)" in shown
    assert "/model.vision_tower.encoder.layers.0.self_attn.k_proj:out#INDEX" in shown
