"""Every tiny family goes round the whole circle, and docs/families.md says what came of it."""

from collections.abc import Callable
from difflib import unified_diff
from pathlib import Path

import pytest

import circle
import families
import films
from safeglasses.model.vlm import VLM

ANEW = "If what was found is right, run `python scripts/make_families.py` and commit the page."
PAGE = circle.PAGE.read_text(encoding="utf-8")
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # NumPy's, on GLM's frames


def check(found: str, committed: str) -> None:
    difference = "\n".join(unified_diff([committed], [found], "committed", "found", n=0, lineterm=""))
    assert not difference, f"docs/families.md is not what this run found. {ANEW}\n{difference}"


@pytest.mark.parametrize("name", [name for name in families.EVERY if name not in families.NEED_TORCHVISION])
def test_the_circle(name: str, tmp_path: Path) -> None:
    check(circle.row(name, tmp_path), circle.rows_of(PAGE).get(name, ""))


@pytest.mark.torchvision
@pytest.mark.parametrize("name", families.NEED_TORCHVISION)
def test_the_circle_with_torchvision(name: str, tmp_path: Path) -> None:
    check(circle.row(name, tmp_path), circle.rows_of(PAGE).get(name, ""))


@pytest.mark.torchvision
@pytest.mark.parametrize("name", families.VIDEOS)
def test_videos(name: str, family: Callable[[str], VLM]) -> None:
    check(films.row(name, family(name)), circle.rows_of(PAGE, films=True).get(name, ""))


def test_the_page_is_its_rows() -> None:
    """Each row is compared where its family runs; together they are the page, its counts and words."""
    rows, filmed = circle.rows_of(PAGE), circle.rows_of(PAGE, films=True)
    assert tuple(rows) == families.EVERY, ANEW
    assert tuple(filmed) == families.VIDEOS, ANEW
    fresh = circle.page(rows.values(), filmed.values())
    difference = "\n".join(unified_diff(PAGE.splitlines(), fresh.splitlines(), "committed", "made", n=0, lineterm=""))
    assert not difference, f"{ANEW}\n{difference}"


def test_what_the_families_cover() -> None:
    rows = circle.rows_of(PAGE)
    assert len(families.EVERY) >= 40
    assert sum(bool(counts) for counts in families.PICTURES.values()) >= 32
    assert len(families.MIXTURES) >= 6
    assert len(families.VIDEOS) >= 15
    assert {"glm4v", "mllama", "florence2", "blip_2", "opt", "llama", "mistral3", "kimi_k25"} <= set(families.EVERY)
    assert all(row.count("| yes") == len(circle.STEPS) for row in rows.values())
