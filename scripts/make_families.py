"""Write docs/families.md from a run of every tiny family; about a minute of one core, no network.

Lines that need torchvision stay as they are where there is none; all are made by
``PYTHONPATH=.venv/torchvision python scripts/make_families.py``.
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # the families

import half_torchvision

half_torchvision.mend()

# ruff: noqa: E402
from transformers.utils import is_torchvision_available
from transformers.utils.logging import disable_progress_bar

import circle
import families
import films
from safeglasses.files import atomic_write_text
from safeglasses.model.vlm import load

if __name__ == "__main__":
    disable_progress_bar()
    page = circle.PAGE.read_text(encoding="utf-8")
    rows, filmed = circle.rows_of(page), circle.rows_of(page, films=True)
    there = is_torchvision_available()
    for name in families.EVERY if there else families.FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = circle.row(name, Path(folder) / "circle")
            print(rows[name], flush=True)
            if there and name in families.VIDEOS:
                filmed[name] = films.row(name, load(families.build(name, Path(folder) / "films")))
                print(filmed[name], flush=True)
    missing = [name for name in families.EVERY if name not in rows]
    missing += [name for name in families.VIDEOS if name not in filmed]
    if missing:
        raise SystemExit(f"{', '.join(missing)}: no line yet; run it with torchvision on the path")
    atomic_write_text(circle.PAGE, circle.page([rows[n] for n in families.EVERY], [filmed[n] for n in families.VIDEOS]))
