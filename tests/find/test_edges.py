"""Where bins are put: quantiles, values of their own bin, and nothing that depends on how samples are laid out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safeglasses.errors import SafeglassesError
from safeglasses.find.blocks import INTEGER, ordered
from safeglasses.find.edges import Edges, edges_of
from safeglasses.find.statistic import HALF_A, LEFT_OUT, TOXIC, Samples
from value_batches import FLOATS, batches


def halves(n: int) -> Samples:
    return Samples((torch.arange(n) % 2).to(torch.int8)[None], torch.arange(n) // 2)


def edges_in(edges: Edges, neuron: int = 0) -> Tensor:
    """The edges in use, as floats."""
    keys = edges.keys[0, neuron]
    keys = keys[keys <= edges.infinity]
    integer = INTEGER[edges.dtype][0]
    return torch.where(keys < 0, -keys | torch.iinfo(integer).min, keys).to(integer).view(edges.dtype)


def test_bins_hold_equal_shares_of_a_continuous_sample() -> None:
    values = torch.randn(1, 4, 2000, generator=torch.Generator().manual_seed(0))
    edges = edges_of(values, halves(2000), bins=100)
    assert edges.bins == 100
    for neuron in range(4):
        place = torch.bucketize(values[0, neuron], edges_in(edges, neuron), right=True)
        assert place.bincount(minlength=100).tolist() == pytest.approx([20] * 100, abs=1)


def test_both_classes_weigh_alike() -> None:
    groups = torch.full((1, 1000), HALF_A, dtype=torch.int8)
    groups[:, :200] = TOXIC
    values = torch.rand(1, 1, 1000, generator=torch.Generator().manual_seed(0)) + (groups == TOXIC) * 10
    edges = edges_in(edges_of(values, Samples(groups, torch.arange(1000)), bins=64))
    assert int((edges > 5).sum()) == pytest.approx(32, abs=1)


def test_a_class_of_three_does_not_draw_all_the_edges() -> None:
    groups = torch.full((1, 1000), HALF_A, dtype=torch.int8)
    groups[:, :3] = TOXIC
    values = torch.rand(1, 1, 1000, generator=torch.Generator().manual_seed(0)) + (groups == TOXIC) * 10
    assert int((edges_in(edges_of(values, Samples(groups, torch.arange(1000)))) > 5).sum()) <= 4


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_value_that_fills_a_bin_gets_its_own(dtype: torch.dtype) -> None:
    values = torch.randn(1, 1, 1000, generator=torch.Generator().manual_seed(0)).clamp(min=0).to(dtype)
    edges = edges_of(values, halves(1000), bins=64)
    found = edges_in(edges)
    assert found[0] == 0
    assert ordered(found[None])[0, :2].tolist() == [0, 1]
    assert len(found) >= 62  # the rest of the edges lie among the rest of the values
    assert edges.single(0, 0, 1)[0, :2].tolist() == [False, True]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_few_values_get_a_bin_each(dtype: torch.dtype) -> None:
    few = torch.tensor([-torch.inf, -3.0, -0.0, 0.0, 1.0, 2.0, torch.inf], dtype=dtype)
    edges = edges_of(few.repeat(1, 2, 2), halves(14), bins=16)
    place = torch.searchsorted(edges.keys[0], ordered(few.repeat(2, 1)), right=True)
    assert edges.single(0, 0, 2).gather(1, place).all()
    assert place[0].unique().numel() == 6  # both zeros share one


def test_bins_of_one_float_or_none_are_known() -> None:
    keys = torch.tensor([[[0, 1, 1, 5, 6, 0x7F81, 0x7F81]]], dtype=torch.int16)
    single = Edges(keys, torch.bfloat16).single(0, 0, 1)
    assert single.tolist() == [[False, True, True, False, True, False, True, True]]
    wide = torch.tensor([[[-0x7FE0_0000_0000_0000, 0x7FE0_0000_0000_0000]]])
    assert not Edges(wide, torch.float64).single(0, 0, 1).any()
    outer = torch.tensor([[[-0x7F80, -0x7F7F, 0x7F80]]], dtype=torch.int16)
    assert Edges(outer, torch.bfloat16).single(0, 0, 1).tolist() == [[True, True, False, True]]


@given(st.data(), st.integers(2, 12))
@settings(max_examples=60, deadline=None)
def test_edges_ascend_and_ignore_order_of_samples_and_block(data: st.DataObject, bins: int) -> None:
    values, samples = data.draw(batches())
    edges = edges_of(values, samples, bins)
    assert edges.keys.shape == (*values.shape[:2], bins - 1)
    assert (edges.keys[..., 1:] >= edges.keys[..., :-1]).all()
    assert (edges.keys.long().abs() <= edges.infinity + 1).all()
    order = torch.tensor(data.draw(st.permutations(range(values.shape[2]))))
    assert edges.same(edges_of(values[:, :, order], samples.take(order), bins))
    last = edges_of(values[:, -1:], samples, bins)
    assert torch.equal(last.keys, edges.keys[:, -1:])


@pytest.mark.parametrize("bins", [2, 3, 255, 256])
def test_many_values_that_could_fill_a_bin_do_not_take_more_edges_than_there_are(bins: int) -> None:
    for count in (bins // 2, bins - 1, bins, 2 * bins):
        values = torch.arange(count).repeat(4).float()[None, None]
        edges = edges_of(values, halves(4 * count), bins)
        assert edges.keys.shape == (1, 1, bins - 1)


def test_one_bin_needs_no_edges() -> None:
    edges = edges_of(torch.randn(1, 3, 8), halves(8), bins=1)
    assert (edges.bins, edges.keys.shape) == (1, (1, 3, 0))


def test_a_pool_without_samples_has_one_bin() -> None:
    samples = Samples(torch.full((1, 4), LEFT_OUT, dtype=torch.int8), torch.arange(4))
    assert edges_in(edges_of(torch.randn(1, 1, 4), samples, bins=8)).numel() == 0


def test_nan_is_an_error_that_names_the_neuron() -> None:
    values = torch.zeros(1, 40, 6, dtype=torch.bfloat16)
    values[0, 33, 4] = torch.nan
    with pytest.raises(SafeglassesError) as caught:
        edges_of(values, halves(6))
    assert str(caught.value) == (
        "a value is not a number (NaN)\n"
        "  given:    neuron 33\n"
        "  do:       look for overflow: load the model in bfloat16 or float32"
    )
