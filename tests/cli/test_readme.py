"""The Python in the README runs as it stands there, on a tiny model."""

import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import safeglasses
from safeglasses.cli import execute

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(first_line: str) -> str:
    (found,) = [b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if b.startswith(first_line)]
    return found


def test_stage_by_stage(tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(data, tmp_path / "work")
    shutil.copytree(tiny, tmp_path / "work" / "MODEL")
    monkeypatch.chdir(tmp_path / "work")
    names: dict[str, Any] = {}
    exec(block("from safeglasses import RECIPES"), names)  # noqa: S102
    assert len(names["experts"]) > 0
    assert (tmp_path / "work" / "glasses" / "adapter_model.safetensors").exists()


def assert_report_is_drawn_again(run: Path) -> None:
    page = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    assert execute(["report", str(run)]) == 0
    assert (run / "report.html").read_bytes() == page


@pytest.mark.slow
def test_the_whole_command(tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(data, tmp_path / "work")
    shutil.copytree(tiny, tmp_path / "work" / "MODEL")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(safeglasses, "fit", partial(safeglasses.fit, budget="1s"))  # the least that it can do
    names: dict[str, Any] = {}
    exec(block("from safeglasses import fit"), names)  # noqa: S102
    assert (tmp_path / "work" / "safeglasses-MODEL" / "report.html").exists()
    assert_report_is_drawn_again(tmp_path / "work" / "safeglasses-MODEL")
    assert names["before"].defence == "none"
    assert names["after"].defence == "glasses"
