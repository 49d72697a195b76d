"""Write docs/architectures.md from the installed transformers; about 20 s of one core, no network."""

from pathlib import Path

import transformers

from safeglasses.files import atomic_write_text
from safeglasses.model.architectures import entry, picture_types
from safeglasses.report.architectures import page

if __name__ == "__main__":
    text = page((entry(name) for name in picture_types()), transformers.__version__)
    atomic_write_text(Path(__file__).parents[1] / "docs" / "architectures.md", text)
