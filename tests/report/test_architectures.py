"""The committed page of architectures against a fresh sweep over every registered type, on the meta device."""

import re
from collections.abc import Iterator
from difflib import unified_diff
from pathlib import Path

import transformers

from safeglasses.model.architectures import Entry, entry, picture_types
from safeglasses.report.architectures import page

COMMITTED = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"


def test_the_page_is_that_of_the_installed_transformers() -> None:
    located: list[str] = []

    def swept() -> Iterator[Entry]:
        for name in picture_types():
            found = entry(name)
            located.extend([name] * (found.anatomy is not None and bool(found.anatomy.neurons)))
            yield found

    text = COMMITTED.read_text(encoding="utf-8")
    fresh = page(swept(), transformers.__version__)
    made_with = re.search(r"transformers (\S+) registers", text)
    difference = "\n".join(unified_diff(text.splitlines(), fresh.splitlines(), "committed", "found", n=0, lineterm=""))
    assert not difference, (
        f"docs/architectures.md was made with transformers {made_with and made_with[1]}, installed is "
        f"{transformers.__version__}. If what was found is right, run `python scripts/make_architectures.py` and "
        f"commit the page.\n{difference}"
    )
    assert len(located) == len(picture_types())
