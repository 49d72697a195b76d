"""A small folder of glasses to damage, and what loading may answer then."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from safeglasses.defend.glasses import Glasses
from safeglasses.defend.home import Home
from safeglasses.defend.record import HASHED, RECORD, seal_of
from safeglasses.errors import SafeglassesError
from safeglasses.files import sha256_file
from safeglasses.model.sites import Site

HOME = Home("owner/model", None, "model.language_model", True, False)
FILES = ("glasses.json", "adapter_config.json", "adapter_model.safetensors", "neurons.parquet", "README.md")
CONFIG, TENSORS, TABLE = HASHED["ia3"]
SITES = tuple(
    Site(f"layers.{i}.mlp.{name}", side) for i in (0, 11) for name, side in (("up_proj", "out"), ("down_proj", "in"))
)


def original():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.rand(6, generator=generator).where(torch.tensor([1, 1, 1, 0, 1, 0]) > 0, 1.0) for _ in SITES]
    columns = {"auroc prompt:last": {site: torch.rand(6, generator=generator) for site in SITES}}
    notes = {"learned": [1, 0.5, "λ"], "choice": {"pools": None}}
    return Glasses(
        dict(zip(SITES, rows, strict=True)), "sg1-a", "test", 0.8, columns, notes, HOME, {SITES[1]: SITES[0]}
    )


def copies(tmp_path: Path) -> Callable[[], Path]:
    """Give a function that copies the folder anew, over what the last example left."""
    original().save(tmp_path / "saved")

    def copy() -> Path:
        shutil.rmtree(tmp_path / "glasses", ignore_errors=True)
        return shutil.copytree(tmp_path / "saved", tmp_path / "glasses")

    return copy


def refusal(folder: Path) -> str:
    with pytest.raises(SafeglassesError) as error:
        Glasses.load(folder)
    text = str(error.value)
    assert text == text.strip()
    assert len(text) < 2500
    assert "given:" in text, text
    return text


def reseal(folder: Path, *, hashes: bool = True) -> None:
    """Make hashes and seal fit whatever the files are now."""
    record = json.loads((folder / RECORD).read_text())
    if isinstance(record, dict):
        if hashes and isinstance(record.get("files"), dict):
            record["files"] |= {name: sha256_file(folder / name) for name in HASHED["ia3"]}
        record["sha256"] = seal_of(record)
    (folder / RECORD).write_text(json.dumps(record))


def edit(folder: Path, name: str, change: Callable[[dict], object]) -> None:
    record = json.loads((folder / name).read_text())
    change(record)
    (folder / name).write_text(json.dumps(record))
    reseal(folder, hashes=name != RECORD)
