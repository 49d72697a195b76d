"""Sizes and durations as text, and how much there is."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeglasses.errors import SafeglassesError
from safeglasses.find import sizes
from safeglasses.find.sizes import format_bytes, format_seconds, free_disk, memory_budget, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8 * 10**9),
        ("500MB", 5 * 10**8),
        ("2GiB", 2 * 2**30),
        (" 1.5 tb ", 15 * 10**11),
        ("64 kib", 2**16),
        ("100B", 100),
        ("0.5KB", 500),
    ],
)
def test_reads_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "8", "GB", "-8GB", "8G", "8 giga", "0GB", "0.1B", "1e3MB", "٣GB", "9" * 400 + "GB"]
)
def test_refuses_what_is_no_size(text: str) -> None:
    with pytest.raises(SafeglassesError) as caught:
        parse_bytes(text)
    assert str(caught.value) == (
        f"not a size of memory\n  given:    {text!r}\n  expected: a number with its unit, such as 8GB, 500MB or 2GiB"
    )


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 KB"),
        (999_999, "1.00 MB"),
        (1_671_168_000_000, "1.67 TB"),
        (16_700_000, "16.7 MB"),
        (167_000_000, "167 MB"),
        (10**22, "10,000 EB"),
    ],
)
def test_writes_sizes(size: int, text: str) -> None:
    assert format_bytes(size) == text


@given(st.integers(1, 10**20))
def test_written_sizes_are_read_back_to_three_digits(size: int) -> None:
    assert abs(parse_bytes(format_bytes(size)) - size) <= 0.005 * size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (0.347, "0.35 s"),
        (42.4, "42 s"),
        (89.9, "90 s"),
        (91.0, "1.5 min"),
        (5399.0, "90 min"),
        (5401.0, "1.5 h"),
        (86400.0, "24 h"),
        (2 * 86400.0, "2 days"),
        (365000 * 86400.0, "365,000 days"),
    ],
)
def test_writes_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_budget_is_what_is_said_or_a_share_of_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert memory_budget("3MB") == 3_000_000
    assert memory_budget(None) == 600


def test_free_disk_of_a_folder_to_be(tmp_path: Path) -> None:
    assert free_disk(tmp_path / "not" / "yet") == pytest.approx(free_disk(tmp_path), rel=0.1)
