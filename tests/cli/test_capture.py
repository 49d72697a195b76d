"""``safeglasses capture`` in real processes: alone, through torchrun, killed, and killed in part."""

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import families
from forked import Forked, ranks
from safeglasses.cli import execute
from safeglasses.find.evidence import Evidence

SMALL = ("--memory", "300KB", "--batch-size", "4", "--resamples", "20")
HISTOGRAM = ("--engine", "histogram")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "safeglasses")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "PYTHONUNBUFFERED": "1"}
ENDED = "another process of the job has ended, or the job was told to stop"


def command(processes: int, model: Path, data: Path, out: Path, *more: str) -> list[str]:
    start = ("-m", "safeglasses") if processes == 1 else TORCHRUN
    given = ("capture", str(model), "--pairs", str(data / "pairs.jsonl"), "--out", str(out), *SMALL, *more)
    return [sys.executable, *start, *given, "--json"]


def run(processes: int, *args: Any) -> dict[str, Any]:
    """Run the command: on one process here, since starting one costs more than the capture."""
    asked = command(processes, *args)
    if processes == 1:
        said = io.StringIO()
        with redirect_stdout(said):
            assert execute(asked[3:]) == 0, said.getvalue()
        return json.loads(said.getvalue())
    done = subprocess.run(asked, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1, done.stdout  # one process speaks for all
    return json.loads(lines[0])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute here as the other processes do: sums over threads differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shards(out: Path) -> set[str]:
    return {path.name for path in out.glob("shards/find/*.safetensors")}


@pytest.fixture(scope="module")
def alone(tiny: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("alone") / "run"
    return run(1, tiny, data, out), out


@pytest.fixture(scope="module")
def counted(tiny: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("counted") / "run"
    run(1, tiny, data, out, *HISTOGRAM)
    return out


def test_says_what_was_found(alone: tuple[dict[str, Any], Path]) -> None:
    record, out = alone
    assert record["folder"] == str(out)
    assert (record["engine"], record["processes"]) == ("exact", 1)
    assert [row["pool"] for row in record["pools"]] == ["prompt:last", "response:max"]
    second = record["pools"][1]
    assert (second["toxic"], second["non_toxic"]) == (54, 72)
    assert second["selected"] > 0  # two fixed answers differ in many neurons
    assert second["stability"]["resamples"] == 20
    assert {row["name"] for row in record["confounds"] if row["flagged"]} >= {"response_characters"}
    assert json.loads((out / "evidence.json").read_text())["pools"] == record["pools"]
    assert not (out / "shards").exists()
    evidence = Evidence.load(out / "evidence.safetensors")
    assert evidence.certainty["pools"] == record["pools"]
    assert set(record["statistics"]) == {"auroc", *evidence.columns}


def test_two_processes_count_the_same(counted: Path, tiny: Path, data: Path, tmp_path: Path) -> None:
    run(2, tiny, data, tmp_path / "two", *HISTOGRAM)
    one, two = (Evidence.load(out / "evidence.safetensors") for out in (counted, tmp_path / "two"))
    assert one.engine == two.engine == "histogram"
    for site in one.auroc:
        assert torch.equal(one.auroc[site], two.auroc[site])
        for name in ("auroc_bound", "null"):
            assert torch.equal(one.columns[name][site], two.columns[name][site])
        for name in ("mean_toxic", "rms_change"):
            torch.testing.assert_close(one.columns[name][site], two.columns[name][site], equal_nan=True)


def test_experts_over_two_processes_give_the_same_bytes(data: Path, tmp_path: Path) -> None:
    """Every shard rates other samples per expert, and a process may meet experts that another does not."""
    model = families.build("qwen3_vl_moe", tmp_path / "model")
    given = ["--sites", "neurons", "--limit", "48", "--memory", "40KB"]
    run(1, model, data, tmp_path / "one", *given, "--keep-shards")
    assert len(shards(tmp_path / "one")) > 3, "a process must have some"
    asked = command(1, model, data, tmp_path / "two", *given, "--processes", "2")[3:]
    job = ranks(2, execute, asked, said=tmp_path / "said")
    assert [rank.wait() for rank in job] == [0, 0], job[0].err()
    one, two = (tmp_path / name / "evidence.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    met = Evidence.load(two).columns["n_toxic"]
    assert len({int(number) for counts in met.values() for number in counts.flatten()}) > 3, "experts met all alike"


@pytest.mark.parametrize("engine", ["exact", "histogram"])
def test_a_killed_run_goes_on(
    engine: str, alone: tuple[dict[str, Any], Path], counted: Path, tiny: Path, data: Path, tmp_path: Path
) -> None:
    undisturbed = alone[1] if engine == "exact" else counted
    out, more = tmp_path / "run", ("--engine", engine)
    process = Forked(execute, command(1, tiny, data, out, *more)[3:], said=tmp_path / "said")
    process.wait_for(lambda: shards(out))
    process.kill()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("shards/find/0*.safetensors")}
    assert bool(kept) == (engine == "exact")
    assert not (out / "evidence.safetensors").exists()
    run(1, tiny, data, out, *more, "--keep-shards")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # not captured again
    one, two = ((folder / "evidence.safetensors").read_bytes() for folder in (out, undisturbed))
    assert one == two


def test_a_killed_rank_ends_the_job_with_one_message_and_the_job_goes_on_to_the_same_bytes(
    alone: tuple[dict[str, Any], Path], tiny: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    given = command(1, tiny, data, out, "--processes", "2")[3:]
    for killed in (0, 1):  # the first writes for all
        before = len(shards(out))
        job = ranks(2, execute, given, said=tmp_path / f"said-{killed}")
        job[0].wait_for(lambda before=before: len(shards(out)) > before)
        job[killed].kill()
        assert job[1 - killed].wait(60) == 2
        assert json.loads(job[1 - killed].out())["error"] == ENDED
        assert not (out / "evidence.safetensors").exists()
    job = ranks(2, execute, given, said=tmp_path / "said")
    assert [rank.wait() for rank in job] == [0, 0], job[0].err()
    assert json.loads(job[0].out())["processes"] == 2
    assert job[1].out() == ""  # one process speaks for all
    assert (out / "evidence.safetensors").read_bytes() == (alone[1] / "evidence.safetensors").read_bytes()


def test_a_job_of_torchrun_ends_with_one_message_when_a_rank_is_killed(tiny: Path, data: Path, tmp_path: Path) -> None:
    out, said = tmp_path / "run", tmp_path / "said"
    with (
        said.open("wb") as file,
        subprocess.Popen(command(2, tiny, data, out), stdout=file, stderr=file, env=ENVIRONMENT) as job,
    ):
        while not shards(out):
            assert job.poll() is None, f"it ended too early: {said.read_text()[-3000:]}"
            time.sleep(0.002)
        children = psutil.Process(job.pid).children(recursive=True)
        next(child for child in children if child.environ().get("RANK") == "0").kill()
        assert job.wait(timeout=60) != 0
    text = said.read_text()
    assert text.count(ENDED) == 1, text
    assert not (out / "evidence.safetensors").exists()


def test_sites_that_no_pool_reaches_are_refused_before_a_folder_is_claimed(
    tiny: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute([*command(1, tiny, data, tmp_path / "run")[3:-1], "--sites", "vision"]) == 2
    said = capsys.readouterr().err
    assert "error: no token to pool over at this site" in said
    assert "image:max" in said
    assert not (tmp_path / "run").exists()


def test_the_number_of_processes_is_asserted(
    tiny: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(command(1, tiny, data, tmp_path / "run", "--processes", "2")[3:]) == 2
    assert json.loads(capsys.readouterr().out) == {
        "error": "the job has another number of processes than it should",
        "given": "1 running, --processes 2",
        "expected": "2",
        "do": "start it with `torchrun --nproc_per_node 2 -m safeglasses …` (on a CPU, "
        "`accelerate launch --cpu` starts one process whatever it is told)",
    }
    assert not (tmp_path / "run").exists()


def test_a_sharded_model_gives_the_same_evidence(
    alone: tuple[dict[str, Any], Path], tiny: Path, data: Path, tmp_path: Path
) -> None:
    job = ranks(2, execute, command(1, tiny, data, tmp_path / "run", "--fsdp")[3:], said=tmp_path / "said")
    assert [rank.wait() for rank in job] == [0, 0], job[0].err()
    one, two = (Evidence.load(out / "evidence.safetensors") for out in (alone[1], tmp_path / "run"))
    for site in one.auroc:
        torch.testing.assert_close(one.auroc[site], two.auroc[site], rtol=0, atol=2e-3)
        torch.testing.assert_close(one.columns["mean_toxic"][site], two.columns["mean_toxic"][site])
