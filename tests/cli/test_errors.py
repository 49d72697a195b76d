"""Errors on the command line: exact texts, exit codes, one JSON object, no traceback unless asked."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from safeglasses.cli import execute
from safeglasses.errors import BadRow, SafeglassesError


def test_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["fold", "MODEL", "--glasses", "there"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "error: the command line is wrong\n"
        "  given:    Missing option '--out'.\n"
        "  do:       see `safeglasses fold --help`\n"
    )


def test_unknown_verb_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["fitt", "--json"]) == 2
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert set(record) == {"error", "given", "expected", "do"}
    assert record["error"] == "the command line is wrong"
    assert record["given"].startswith("No such command 'fitt'.")
    assert record["do"] == "see `safeglasses --help`"
    assert out.count("\n") == 1
    assert err == ""


KINDS = (
    "lexicon[:FILE] or complied[:FILE_OF_REFUSALS] or linear[?threshold=0.5] or "
    "classifier:ID_OR_FOLDER?label=toxic&threshold=0.5[&batch=16&device=…&revision=…] or "
    "guard:ID_OR_FOLDER[?family=…&batch=8&device=…&revision=…&threshold=0.5] or "
    "chat:http://HOST:PORT/v1?model=NAME[&key_env=NAME&cache=FILE&timeout=60&attempts=6&parallel=4]"
)


@pytest.mark.parametrize("verb", ["fit", "measure"])
def test_a_wrong_judge_is_told_before_anything_is_loaded(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute([verb, "MODEL", "--judge", "linear", "--judge", "oracle"]) == 2
    assert capsys.readouterr().err == f"error: no such judge\n  given:    oracle\n  expected: {KINDS}\n"


@pytest.mark.parametrize("size", ["0", "-1", "many", ""])
def test_batch_size(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prompts", "p.jsonl", "--judge", "lexicon:w.txt", f"--batch-size={size}"]
    assert execute(["measure", "MODEL", *options]) == 2
    assert capsys.readouterr().err == (
        f"error: not a batch size\n  given:    --batch-size {size}\n  expected: auto, or a count such as 8\n"
    )


def test_not_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["report", str(tmp_path), "--json"]) == 2
    assert json.loads(capsys.readouterr().out) == {
        "error": "not a finished run",
        "given": str(tmp_path),
        "expected": "a folder with summary.json, as `safeglasses fit` and `safeglasses demo` leave it",
        "do": "run the same `safeglasses fit` again: it goes on where it was stopped",
    }


def fail(error: BaseException) -> Callable[..., None]:
    def raises(*_: object, **__: object) -> None:
        raise error

    return raises


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            SafeglassesError("what", given="this", expected="that", do="so"),
            "what\n  given:    this\n  expected: that\n  do:       so",
        ),
        (BadRow("pairs.jsonl:7: bad"), "pairs.jsonl:7: bad"),
        (
            PermissionError(13, "Permission denied", "/there"),
            "the operating system refused\n  given:    /there: Permission denied",
        ),
        (OSError("no more of it"), "the operating system refused\n  given:    no more of it"),
    ],
)
def test_errors_of_the_work(
    error: Exception,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "summary.json").write_text("{}")
    monkeypatch.setattr("safeglasses.report.schema.validate", fail(error))
    assert execute(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {text}\n"
    assert execute(["report", str(tmp_path), "--debug"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("Traceback (most recent call last):")
    assert err.endswith(f"error: {text}\n")
    assert out == ""


def test_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "summary.json").write_text("{}")
    monkeypatch.setattr("safeglasses.report.schema.validate", fail(KeyboardInterrupt()))
    assert execute(["report", str(tmp_path)]) == 130
    assert capsys.readouterr().err == (
        "error: interrupted\n  do:       run the same again: `fit`, `capture` and `demo` go on where they were\n"
    )


BUG = """
import sys
import safeglasses.files
safeglasses.files.read_json = lambda path: {}["nothing"]
from safeglasses.cli import main
sys.exit(main())
"""


def test_a_bug_is_a_short_message_too(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")

    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", BUG, "report", str(tmp_path), *flags]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    plain = run()
    assert plain.returncode == 1
    assert plain.stdout == ""
    assert plain.stderr.startswith(
        "error: a bug in safeglasses, or a case that it does not know\n  given:    KeyError: 'nothing' (in report, "
    )
    assert "Traceback" not in plain.stderr
    as_json = run("--json")
    assert as_json.returncode == 1
    assert json.loads(as_json.stdout)["do"] == "run it again with --debug and report the traceback"
    assert as_json.stderr == ""
    debug = run("--debug")
    assert debug.returncode == 1
    assert "Traceback (most recent call last)" in debug.stderr


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["--version"]) == 0
    assert capsys.readouterr().out == "safeglasses 0.1.0\n"
    assert execute([]) == 0
    listed = capsys.readouterr().out
    for verb in ("demo", "fit", "inspect", "capture", "measure", "fold", "report"):
        assert f"\n  {verb}" in listed
