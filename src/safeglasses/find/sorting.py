"""Sorting many rows of integers with numpy, by whichever of its ways is fastest where it runs."""

import functools
import time
from typing import Any

import numpy as np

Rows = np.ndarray[tuple[int, int], np.dtype[Any]]

_WINDOW = 512
"""Integers of 32 bits that numpy sorts within registers, without dividing them first."""


def sort_rows(rows: Rows) -> Rows:
    """Return the rows, each sorted, in their own memory or in new.

    16 bits: numpy's radix sort, equally fast on every processor; wider: its vector sort. Only AMD Zen 4, whose
    AVX-512 is slow to store compressed vectors, divides long rows several times more slowly than it sorts
    short windows of them; there 32 bits are divided by their top byte first.
    """
    if rows.dtype == np.int32 and rows.shape[1] > 2 * _WINDOW and _divides_slowly():
        return _sort_by_top_byte(rows)
    rows.sort(axis=1, kind="stable" if rows.dtype == np.int16 else None)
    return rows


def _sort_by_top_byte(rows: Rows) -> Rows:
    """Order rows by the highest bits in use, then sort two layers of windows, and what is still out of order.

    The second layer lies across the borders of the first: in order is what has fewer than half a window of
    equal top bytes together.
    """
    n = rows.shape[1]
    bits = max(int(rows.max()), -int(rows.min())).bit_length()
    top = (rows >> max(0, bits - 7)).astype(np.int8)
    if np.bincount(top[0].view(np.uint8)).max() >= _WINDOW // 2:  # many equals; likely so in the other rows, too
        rows.sort(axis=1)
        return rows
    order = top.argsort(axis=1, kind="stable")
    order += np.arange(0, rows.size, n)[:, None]
    rows = np.take(rows.reshape(-1), order, mode="clip")
    for offset in (0, _WINDOW // 2):
        end = offset + (n - offset) // _WINDOW * _WINDOW
        rows[:, offset:end].reshape(len(rows), -1, _WINDOW).sort(axis=2)
        rows[:, end:].sort(axis=1)
    unsorted = (rows[:, 1:] < rows[:, :-1]).any(axis=1)
    if unsorted.any():
        rows[unsorted] = np.sort(rows[unsorted], axis=1)
    return rows


@functools.cache
def _divides_slowly() -> bool:
    """Say whether long rows take numpy over six times as long as windows of them."""
    windows = np.random.default_rng(0).integers(2**30, size=(64, _WINDOW), dtype=np.int32)
    return _seconds(windows.reshape(8, -1)) > 6 * _seconds(windows)


def _seconds(rows: Rows) -> float:
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        np.sort(rows, axis=1)
        taken.append(time.perf_counter() - start)
    return min(taken)
