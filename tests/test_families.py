"""Every tiny family goes round the whole circle, and docs/families.md says what came of it."""

from difflib import unified_diff
from pathlib import Path

import pytest
from transformers.utils import is_torchvision_available

import circle
import families

ANEW = "If what was found is right, run `python scripts/make_families.py` and commit the page."


@pytest.mark.parametrize("name", families.FAMILIES)
def test_the_circle(name: str, tmp_path: Path) -> None:
    found = circle.row(name, tmp_path)
    if name in families.NEED_TORCHVISION:
        return  # the page is that of a machine without it
    committed = circle.rows_of(circle.PAGE.read_text(encoding="utf-8")).get(name, "")
    difference = "\n".join(unified_diff([committed], [found], "committed", "found", n=0, lineterm=""))
    assert not difference, f"docs/families.md is not what this run found. {ANEW}\n{difference}"


def test_the_page_is_its_rows() -> None:
    """Each row is compared where its family runs; together they are the page, its counts and words."""
    text = circle.PAGE.read_text(encoding="utf-8")
    rows = circle.rows_of(text)
    names = [name for name in families.FAMILIES if name not in families.NEED_TORCHVISION]
    assert list(rows) == names, ANEW
    fresh = circle.page(rows.values())
    difference = "\n".join(unified_diff(text.splitlines(), fresh.splitlines(), "committed", "made", n=0, lineterm=""))
    assert not difference, f"{ANEW}\n{difference}"


def test_what_the_families_cover() -> None:
    rows = circle.rows_of(circle.PAGE.read_text(encoding="utf-8"))
    assert len(families.FAMILIES) >= 30
    assert sum(bool(counts) for counts in families.PICTURES.values()) >= 24
    assert len(families.MIXTURES) >= 6
    assert {"glm4v", "mllama", "florence2", "blip_2", "opt", "llama"} <= set(families.FAMILIES)
    assert all(row.count("| yes") == len(circle.STEPS) for row in rows.values())
    assert is_torchvision_available() or not set(families.NEED_TORCHVISION) & set(families.FAMILIES)
