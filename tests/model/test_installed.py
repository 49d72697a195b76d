"""A torchvision that does not load is said to be one, before transformers stumbles over it."""

import sys
from pathlib import Path

import pytest

from safeglasses.errors import SafeglassesError
from safeglasses.model.installed import check_torchvision


def fake(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a torchvision of our own before any other."""
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text(body)
    (folder / "torchvision-0.1.dist-info").mkdir()
    (folder / "torchvision-0.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\n"
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(folder)


def test_built_for_another_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, "raise RuntimeError('operator torchvision::nms does not exist')", monkeypatch)
    with pytest.raises(SafeglassesError) as caught:
        check_torchvision()
    lines = str(caught.value).splitlines()
    assert lines[0] == "torchvision is installed, but cannot be loaded beside the installed torch"
    assert lines[1].startswith("  given:    operator torchvision::nms does not exist (torchvision 0.1, torch ")
    assert lines[2:] == [
        "  expected: torchvision of the same release and build (CPU, CUDA …) as torch, or none",
        "  do:       install both from one index (https://pytorch.org/get-started), or pip uninstall torchvision: only "
        "videos and a few processors need it",
    ]


def test_one_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, "", monkeypatch)
    check_torchvision()
