"""Inspect's own command line: finds the tasks, re-judges, retries what was killed, shows; and a server agrees."""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from inspect_ai.log import read_eval_log

from evals.apart import inspect
from evals.conftest import inspect_command
from evals.looking import look
from forked import Forked
from safeglasses.data.miniature import CHECKPOINT, LEXICON, REFUSALS
from safeglasses.ship.fold import fold_checkpoint
from shipped import both_sides

pytestmark = pytest.mark.slow
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TASK = "safeglasses/mm_toxic_qa"


def run(env: dict[str, str], *words: object, cwd: Path) -> str:
    """Run Inspect to its end and return what it said."""
    process = started(env, *words, cwd=cwd)
    assert process.wait(300) == 0, process.out() + process.err()
    return process.out() + process.err()


def started(env: dict[str, str], *words: object, cwd: Path) -> Forked:
    """Start Inspect."""
    return Forked(inspect, [str(word) for word in words], cwd, env, said=cwd / f"said-{words[0]}")


def asked(prompts_file: Path, *more: object) -> list[object]:
    """Return the words that start a task on these prompts."""
    return ["eval", TASK, "-T", f"data={prompts_file}", "-T", f"judge=lexicon:{LEXICON}", *more]


@contextmanager
def server(command: list[str], env: dict[str, str], url: str, log: Path) -> Iterator[None]:
    """Run a server until the block ends."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out, cwd=log.parent)
    try:
        for _ in range(1200):
            assert process.poll() is None, log.read_text(errors="replace")
            try:
                with urllib.request.urlopen(url, timeout=5):  # noqa: S310
                    break
            except OSError:
                time.sleep(0.1)
        else:
            raise AssertionError(log.read_text(errors="replace"))
        yield
    finally:
        process.terminate()
        process.wait(timeout=60)


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def logged(installed, prompts_file, tmp_path_factory) -> Path:
    """A log of eight samples, made by the plain command; treat it as read-only."""
    tmp_path = tmp_path_factory.mktemp("logged")
    model = ["--model", f"safeglasses/{CHECKPOINT}", "-M", "batch_size=4", "--log-dir", "logs", "--limit", "8"]
    command = inspect_command(*asked(prompts_file, *model))
    ran = subprocess.run(command, cwd=tmp_path, env=installed, capture_output=True, text=True, timeout=300, check=False)
    said = ran.stdout + ran.stderr
    assert ran.returncode == 0, said
    (log,) = (tmp_path / "logs").glob("*.eval")
    assert log.name in said
    return log


def test_the_command_finds_the_task_and_judges_again(logged, installed, tmp_path):
    log = read_eval_log(str(logged))
    assert (log.status, log.eval.task, log.eval.model) == ("success", TASK, f"safeglasses/{CHECKPOINT}")
    assert log.samples is not None
    before = [s.output.completion for s in log.samples]
    with zipfile.ZipFile(logged) as file:
        assert "data:image/png;base64," in file.read(f"samples/{log.samples[0].id}_epoch_1.json").decode()
    scorer = ["--scorer", "safeglasses/lexicon", "-S", f"judge=lexicon:{REFUSALS}"]
    run(installed, "score", logged, *scorer, "--action", "append", "--output-file", "again.eval", cwd=tmp_path)
    again = read_eval_log(str(tmp_path / "again.eval"))
    assert again.samples is not None
    assert [s.output.completion for s in again.samples] == before
    assert again.stats == log.stats  # no model was asked
    assert again.results is not None
    assert [s.name for s in again.results.scores].count("lexicon") >= 1
    second = next(s for s in again.results.scores if s.params.get("judge") == f"lexicon:{REFUSALS}")
    assert second.metrics["rate"].value == 0.0


def test_a_killed_run_is_retried_without_what_it_has(installed, prompts_file, tmp_path):
    once = ["--max-tokens", "8", "--temperature", "1", "--seed", "3"]
    words = asked(
        prompts_file, "--model", f"safeglasses/{CHECKPOINT}", "-M", "batch_size=1", "--max-samples", "1", *once
    )
    words += ["--log-buffer", "1", "--no-log-realtime", "--log-dir", "logs"]
    process = started(installed, *words, cwd=tmp_path)
    process.wait_for(lambda: len(finished(tmp_path / "logs")) >= 3)
    process.kill()
    (killed,) = (tmp_path / "logs").glob("*.eval")
    kept = finished(tmp_path / "logs")
    assert 3 <= len(kept) < 30
    run(installed, "eval-retry", killed, "--log-dir", "logs", cwd=tmp_path)
    (retried,) = set((tmp_path / "logs").glob("*.eval")) - {killed}
    log = read_eval_log(str(retried))
    assert log.status == "success"
    assert log.samples is not None
    assert len(log.samples) == 30
    with zipfile.ZipFile(killed) as file:
        old = {name: json.loads(file.read(name)) for name in kept}
    new = {f"samples/{s.id}_epoch_1.json": s for s in log.samples}
    assert {new[name].uuid for name in kept} == {sample["uuid"] for sample in old.values()}  # not answered twice
    whole = asked(prompts_file, "--model", f"safeglasses/{CHECKPOINT}", *once, "--log-dir", "whole")
    run(installed, *whole, cwd=tmp_path)
    (uninterrupted,) = (tmp_path / "whole").glob("*.eval")
    wanted = read_eval_log(str(uninterrupted))
    assert wanted.samples is not None
    assert [s.output.completion for s in log.samples] == [s.output.completion for s in wanted.samples]


def finished(folder: Path) -> list[str]:
    """Return the samples in the only log of a folder, as far as it can be read now."""
    for path in folder.glob("*.eval") if folder.exists() else ():
        try:
            with zipfile.ZipFile(path) as file:
                return [name for name in file.namelist() if name.startswith("samples/")]
        except (zipfile.BadZipFile, OSError):
            return []
    return []


def test_a_half_written_log_is_an_error(logged, installed, tmp_path):
    half = tmp_path / logged.name
    half.write_bytes(logged.read_bytes()[: logged.stat().st_size // 2])
    words = ["score", half, "--scorer", "safeglasses/lexicon", "-S", f"judge=lexicon:{LEXICON}"]
    assert started(installed, *words, cwd=tmp_path).wait(300) != 0


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_log_opens_in_the_viewer(logged, installed, tmp_path):
    port = free_port()
    command = inspect_command("view", "--log-dir", logged.parent, "--port", port, "--host", "127.0.0.1")
    log = read_eval_log(str(logged))
    assert log.samples is not None
    sample = log.samples[0]
    place = f"http://127.0.0.1:{port}"
    words = ["mm_toxic_qa", "lexicon", str(sample.id), sample.output.completion]
    inside = [sample.output.completion, str(sample.id), "data:image/png;base64,"]
    with server(command, installed, f"{place}/", tmp_path / "view.txt"):
        table = look(str(CHROMIUM), f"{place}/#/logs/{logged.name}", words, tmp_path / "one")
        page = f"{place}/#/logs/{logged.name}/samples/sample/{sample.id}/1/messages"
        opened = look(str(CHROMIUM), page, inside, tmp_path / "two")
    assert [word for word in words if word not in table] == []
    assert [word for word in inside if word not in opened] == []  # the picture is drawn, too


@pytest.fixture
def worn(miniature, tmp_path) -> tuple[Path, Path]:
    """Glasses of the miniature that change what it says, and the checkpoint into which they are folded."""
    glasses = both_sides(miniature)
    glasses.save(tmp_path / "glasses", miniature)
    fold_checkpoint(CHECKPOINT, glasses, tmp_path / "folded")
    return tmp_path / "glasses", tmp_path / "folded"


def test_a_server_of_the_folded_model_gives_the_same_answers(logged, worn, installed, prompts_file, tmp_path):
    pytest.importorskip("fastapi")
    glasses, folded = worn
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    keys: dict[str, Any] = {"SERVED_API_KEY": "none", "SERVED_BASE_URL": f"{url}/v1"}
    model = ["--model", f"openai-api/served/{folded}", "--max-connections", "1", "--log-dir", "served"]
    with server(command, {**installed, "HF_HUB_OFFLINE": "1"}, f"{url}/health", tmp_path / "serve.txt"):
        run({**installed, **keys}, *asked(prompts_file, *model, "--limit", "8"), cwd=tmp_path)
    model = ["--model", f"safeglasses/{CHECKPOINT}", "-M", f"glasses={glasses}", "--log-dir", "worn"]
    run(installed, *asked(prompts_file, *model, "--limit", "8"), cwd=tmp_path)
    (there,), (here,) = ((tmp_path / name).glob("*.eval") for name in ("served", "worn"))
    answers = [
        {s.id: s.output.completion.strip() for s in read_eval_log(str(log)).samples or ()}
        for log in (here, there, logged)
    ]
    assert len(answers[0]) == 8
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]  # the glasses show: the folded model was served, not the one below
