"""Sizes and durations as people write them, and how much memory and disk there is."""

import math
import re
import shutil
from pathlib import Path

import psutil

from safeglasses.errors import SafeglassesError

MEMORY_SHARE = 0.6
"""Share of the available memory that is used unless the user says otherwise."""
_UNITS = ("B", "KB", "MB", "GB", "TB", "PB", "EB")
_POWERS = {unit: 1000**i for i, unit in enumerate(_UNITS)} | {
    f"{u[0]}IB": 1024 ** (i + 1) for i, u in enumerate(_UNITS[1:])
}


def parse_bytes(text: str) -> int:
    """Read ``8GB``, ``500 MB`` (powers of 1,000) or ``2GiB`` (powers of 1,024).

    Raises:
        SafeglassesError: the text is no size, or less than a byte.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([a-z]+)", text.strip(), re.IGNORECASE | re.ASCII)
    power = _POWERS.get(match[2].upper()) if match else None
    size = int(float(match[1]) * power) if match and power else 0
    if size < 1:
        raise SafeglassesError(
            "not a size of memory", given=repr(text), expected="a number with its unit, such as 8GB, 500MB or 2GiB"
        )
    return size


def format_bytes(size: int) -> str:
    """Write a size with three digits, in powers of 1,000: ``1.67 TB``."""
    value, unit = float(size), 0
    while unit + 1 < len(_UNITS) and float(f"{value:.3g}") >= 1000:
        value, unit = value / 1000, unit + 1
    return f"{size} B" if unit == 0 else f"{_three_digits(value)} {_UNITS[unit]}"


def _three_digits(value: float) -> str:
    rounded = float(f"{value:.3g}")
    return f"{rounded:.{max(0, 2 - math.floor(math.log10(rounded)))}f}" if 0 < rounded < 1000 else f"{rounded:,.0f}"


def format_seconds(seconds: float) -> str:
    """Write a duration with two digits or so: ``0.35 s``, ``42 s``, ``12 min``, ``3.5 h``, ``12 days``."""
    units = (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48), ("days", 86400, math.inf))
    unit, length, _ = next(found for found in units if seconds / found[1] < found[2])
    value = seconds / length
    return f"{value:,.0f} {unit}" if value >= 9.5 else f"{value:.2g} {unit}"


def memory_budget(text: str | None) -> int:
    """Return the bytes that a user allows, or by default `MEMORY_SHARE` of what is available now.

    Raises:
        SafeglassesError: as in `parse_bytes`.
    """
    return int(MEMORY_SHARE * psutil.virtual_memory().available) if text is None else parse_bytes(text)


def free_disk(folder: Path) -> int:
    """Return the free bytes where a folder lies, or will lie."""
    folder = folder.absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
