"""Rows come out sorted whichever way is taken, whatever lies in them."""

import numpy as np
import pytest

from safeglasses.find import sorting
from safeglasses.find.sorting import sort_rows

DRAWN = {
    "normal": lambda random, shape: random.normal(size=shape) * 2**20,
    "few values": lambda random, shape: random.integers(-5, 5, size=shape),
    "one value": lambda random, shape: np.zeros(shape),
    "all 32 bits": lambda random, shape: random.integers(-(2**31), 2**31, size=shape),
    "one far away": lambda random, shape: np.where(np.arange(shape[1]) == 7, 2**30, random.integers(9000, size=shape)),
    "second row unlike the first": lambda random, shape: (
        random.normal(size=shape) * np.geomspace(2**28, 1, shape[0])[:, None]
    ),
}


@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64])
@pytest.mark.parametrize("n", [1, 600, 1025, 2261, 4096])
@pytest.mark.parametrize("name", DRAWN)
def test_rows_come_out_sorted(name: str, n: int, dtype: type, slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorting, "_divides_slowly", lambda: slow)
    drawn = DRAWN[name](np.random.default_rng(n), (5, n))
    info = np.iinfo(dtype)
    rows = np.clip(drawn, info.min, info.max).astype(dtype)
    expected = np.sort(rows, axis=1)
    assert np.array_equal(sort_rows(rows), expected)


def test_the_processor_is_asked_once() -> None:
    assert sorting._divides_slowly() is sorting._divides_slowly()
    assert sorting._divides_slowly.cache_info().misses <= 1
