"""Floats as integers of the same order, and work that is dealt out in blocks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safeglasses.errors import SafeglassesError
from safeglasses.find.blocks import in_blocks, ordered
from value_batches import FEW, FLOATS, WIDTHS


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@given(st.data())
@settings(max_examples=30, deadline=None)
def test_integers_have_the_order_of_the_values(dtype: torch.dtype, data: st.DataObject) -> None:
    value = st.floats(allow_nan=False, width=WIDTHS[dtype]) | st.sampled_from(FEW)
    a, b = (torch.tensor([[data.draw(value)]], dtype=torch.float64).to(dtype) for _ in range(2))
    below, equal = float(a) < float(b), float(a) == float(b)  # as Python numbers: no flushed denormals
    assert (int(ordered(a)) < int(ordered(b)), int(ordered(a)) == int(ordered(b))) == (below, equal)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_next_float_has_the_next_integer(dtype: torch.dtype) -> None:
    values = torch.tensor([[-2.0, -1.0, -0.0, 0.0, 1.0, 1.5, 3.0]], dtype=dtype)
    following = torch.nextafter(values, torch.full_like(values, torch.inf))
    assert torch.equal(ordered(following), ordered(values) + 1)
    assert ordered(values)[0, 2:4].tolist() == [0, 0]


def test_nan_is_named() -> None:
    values = torch.zeros(3, 2)
    values[1, 1] = -torch.nan
    with pytest.raises(SafeglassesError) as caught:
        ordered(values, first=40)
    assert caught.value.given == "neuron 41"


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [0, 1, 10, 11])
def test_blocks_cover_each_row_once(threads: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    seen: list[int] = []
    in_blocks(lambda start, stop: seen.extend(range(start, stop)), rows, 5)
    assert sorted(seen) == list(range(rows))


def test_an_error_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)

    def work(start: int, stop: int) -> None:
        if start == 5:
            raise SafeglassesError("here")

    with pytest.raises(SafeglassesError, match="here"):
        in_blocks(work, 11, 5)
