"""Write docs/families.md from a run of every tiny family; about a minute of one core, no network."""

import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # the families

from transformers.utils.logging import disable_progress_bar

import circle
import families
from safeglasses.files import atomic_write_text

if __name__ == "__main__":
    disable_progress_bar()
    rows = []
    for name in families.FAMILIES:
        if name not in families.NEED_TORCHVISION:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(circle.row(name, Path(folder)))
                print(rows[-1], flush=True)
    atomic_write_text(circle.PAGE, circle.page(rows))
