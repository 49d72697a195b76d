"""Moments against numpy and scipy, in any cut, and where naive sums would lose all digits."""

from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from scipy.stats import ttest_ind
from torch import Tensor

from safeglasses.errors import SafeglassesError
from safeglasses.find import moments as module
from safeglasses.find.moments import Moments
from safeglasses.find.statistic import HALF_A, HALF_B, LEFT_OUT, TOXIC, Columns, Samples
from value_batches import FLOATS, batches, cuts

laws = settings(max_examples=40, deadline=None)
NAMES = {
    *("mean_toxic", "mean_non_toxic", "mean_abs_toxic", "mean_abs_non_toxic"),
    *("rate_toxic", "rate_non_toxic", "effect_size", "rms_change"),
}


def moments_of(values: Tensor, samples: Samples) -> Moments:
    made = Moments()
    made.add(values, samples)
    return made


def drawn(seed: int, n: int = 200, pools: int = 2, neurons: int = 5) -> tuple[Tensor, Samples]:
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randint(-1, 3, (pools, n), generator=generator).to(torch.int8)
    clusters = torch.randint(0, n // 3, (n,), generator=generator)
    return torch.randn(pools, neurons, n, generator=generator) + (groups == TOXIC)[:, None], Samples(groups, clusters)


def same(found: Columns, expected: Columns, rtol: float = 1e-9) -> None:
    assert set(found) == set(expected)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=1e-12, equal_nan=True)


def by_definition(values: Tensor, samples: Samples, pool: int, neuron: int) -> dict[str, float]:
    """One neuron by numpy and scipy, a cluster at a time."""
    row, groups = values[pool, neuron].double().numpy(), samples.groups[pool].numpy()
    toxic, others = row[groups == TOXIC], row[groups > TOXIC]
    members: dict[int, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for value, group, cluster in zip(row, groups, samples.clusters.tolist(), strict=True):
        if group != LEFT_OUT:
            members[cluster][int(group > TOXIC)].append(value)
    changes = [np.mean(a) - np.mean(b) for a, b in members.values() if a and b]
    t = ttest_ind(toxic, others)[0]
    return {
        "mean_toxic": toxic.mean(),
        "mean_non_toxic": others.mean(),
        "mean_abs_toxic": np.abs(toxic).mean(),
        "mean_abs_non_toxic": np.abs(others).mean(),
        "rate_toxic": (toxic > 0).mean(),
        "rate_non_toxic": (others > 0).mean(),
        "effect_size": t * np.sqrt(1 / len(toxic) + 1 / len(others)),
        "rms_change": np.sqrt(np.mean(np.square(changes))),
    }


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_columns_are_those_of_numpy_and_scipy(dtype: torch.dtype) -> None:
    values, samples = drawn(0)
    values = values.to(dtype)
    found = moments_of(values, samples).finish()
    assert set(found) == NAMES
    for pool, neuron in np.ndindex(2, 5):
        for name, expected in by_definition(values, samples, pool, neuron).items():
            assert float(found[name][pool, neuron]) == pytest.approx(expected, rel=1e-12), name
            assert found[name].dtype == torch.float64


@given(st.data())
@laws
def test_any_cut_of_whole_clusters_and_any_merge_give_the_same(data: st.DataObject) -> None:
    values, samples = data.draw(batches(finite=True))
    parts = []
    for rows in data.draw(cuts(samples)):
        part = Moments()
        if len(rows) or data.draw(st.booleans()):
            part.add(values[:, :, rows], samples.take(rows))
        parts.append(part)
    while len(parts) > 1:
        left = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        if data.draw(st.booleans()):
            left = Moments.from_state(left.state())
        parts[data.draw(st.integers(0, len(parts) - 1))].merge(left)
    same(parts[0].finish(), moments_of(values, samples).finish())


def test_batches_added_in_turn_give_the_same() -> None:
    values, samples = drawn(1)
    made = Moments()
    for rows in (samples.clusters % 7 == i for i in range(7)):
        chosen = rows.nonzero()[:, 0]
        made.add(values[:, :, chosen], samples.take(chosen))
    same(made.finish(), moments_of(values, samples).finish())


@pytest.mark.parametrize("parts", [1, 5])
def test_large_offsets_do_not_cancel(parts: int) -> None:
    """Noise of 0.01 on 1e4: float32 squares are off by 4, and float64 sums of squares have lost 12 digits of 16."""
    generator = torch.Generator().manual_seed(0)
    values = (1e4 + 0.01 * torch.randn(1, 3, 4000, generator=generator)).float()
    groups = torch.arange(4000).remainder(2).to(torch.int8)[None]
    samples = Samples(groups, torch.arange(4000) // 2)
    made = Moments()
    for rows in torch.arange(4000).chunk(parts):
        made.add(values[:, :, rows], samples.take(rows))
    found = made.finish()
    shifted = values.double() - 1e4  # exact
    for neuron in range(3):
        expected = by_definition(shifted, samples, 0, neuron)
        for name in ("effect_size", "rms_change"):
            assert float(found[name][0, neuron]) == pytest.approx(expected[name], abs=1e-9)
        assert float(found["mean_toxic"][0, neuron]) == pytest.approx(1e4 + expected["mean_toxic"], rel=1e-15)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_neurons_without_spread(dtype: torch.dtype) -> None:
    """0.1 is no sum of powers of two: rounded means of equal values would differ and have spread."""
    toxic = torch.arange(70).remainder(7) < 3
    rows = [torch.full((70,), 0.1), torch.where(toxic, 0.7, 0.1), torch.where(toxic, -0.3, 0.1)]
    values = torch.stack(rows)[None].to(dtype)
    samples = Samples(torch.where(toxic, TOXIC, HALF_A).to(torch.int8)[None], torch.arange(70) // 7)
    made = moments_of(values[:, :, :49], samples.take(torch.arange(49)))
    made.merge(moments_of(values[:, :, 49:], samples.take(torch.arange(49, 70))))
    found = made.finish()
    assert found["effect_size"].tolist() == [[0.0, torch.inf, -torch.inf]]
    change = (values[:, :, 0].double() - values[:, :, 3].double()).abs()
    torch.testing.assert_close(found["rms_change"], change, rtol=1e-12, atol=0)
    assert found["rms_change"][0, 0] == 0


def test_what_is_not_known_is_nan() -> None:
    groups = [TOXIC, TOXIC, TOXIC, LEFT_OUT], [TOXIC, HALF_A, HALF_B, LEFT_OUT], [TOXIC, HALF_A, LEFT_OUT, LEFT_OUT]
    values = torch.arange(12.0).view(3, 1, 4)
    samples = Samples(torch.tensor(groups, dtype=torch.int8), torch.tensor([0, 1, 1, 0]))
    found = {name: column[:, 0].tolist() for name, column in moments_of(values, samples).finish().items()}
    nan = pytest.approx(torch.nan, nan_ok=True)
    assert found["mean_non_toxic"] == [nan, 5.5, 9.0]
    assert found["mean_abs_non_toxic"] == [nan, 5.5, 9.0]
    assert found["rate_non_toxic"] == [nan, 1.0, 1.0]
    assert found["mean_toxic"] == [1.0, 4.0, 8.0]
    assert found["effect_size"] == [nan, pytest.approx(-1.5 / np.sqrt(0.5)), nan]  # with one sample each: no spread
    assert found["rms_change"] == [nan, nan, nan]
    assert Moments().finish() == {}


def test_clusters_hold_any_number_of_each_class() -> None:
    values = torch.tensor([[[1.0, 4.0, 3.0, 10.0, 2.0, 7.0]]])
    groups = torch.tensor([[TOXIC, HALF_A, TOXIC, TOXIC, HALF_B, HALF_A]], dtype=torch.int8)
    samples = Samples(groups, torch.tensor([5, 5, 5, 9, 9, 2]))
    found = moments_of(values, samples).finish()["rms_change"]
    assert float(found) == pytest.approx(np.sqrt(((2 - 4) ** 2 + (10 - 2) ** 2) / 2))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_neuron_gets_the_same_bits_in_any_company(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values, samples = drawn(2, n=101, pools=1, neurons=400)
    whole = moments_of(values, samples).state()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        monkeypatch.setattr(module, "_BLOCK", 101 * 75)
        for start, stop in ((0, 1), (3, 77), (17, 400), (0, 400)):
            part = moments_of(values[:, start:stop], samples).state()
            for name, expected in whole.items():
                of_all = name in ("count", "clusters")
                assert torch.equal(part[name], expected if of_all else expected[..., start:stop]), name
    finally:
        torch.set_num_threads(before)


def test_state_survives_a_file() -> None:
    values, samples = drawn(3)
    made = moments_of(values, samples)
    again = Moments.from_state(load(save(made.state())))
    other = moments_of(values.flip(2), samples)
    again.merge(other)
    made.merge(other)
    for name, column in made.finish().items():
        assert torch.equal(again.finish()[name], column)
    assert Moments.from_state({}).state() == {}


def test_merging_leaves_the_other_alone() -> None:
    values, samples = drawn(4)
    other, empty = moments_of(values, samples), Moments()
    expected = {name: column.clone() for name, column in other.finish().items()}
    empty.merge(other)
    empty.merge(other)
    assert all(torch.equal(other.finish()[name], column) for name, column in expected.items())
    assert not torch.equal(empty.finish()["effect_size"], expected["effect_size"])


def test_infinities_are_no_nan() -> None:
    values = torch.tensor([[[torch.inf, 1.0, 2.0, 3.0], [5.0, 1.0, 2.0, 3.0]]])
    samples = Samples(torch.tensor([[TOXIC, TOXIC, HALF_A, HALF_A]], dtype=torch.int8), torch.arange(4))
    found = moments_of(values, samples).finish()
    assert found["rate_toxic"].tolist() == [[1.0, 1.0]]
    assert found["mean_abs_toxic"].tolist() == [[torch.inf, 3.0]]


@pytest.mark.parametrize("group", [TOXIC, HALF_B])
def test_nan_is_an_error_that_names_the_neuron(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 4 * 32)
    samples = Samples(torch.tensor([[TOXIC, HALF_A, LEFT_OUT, group]], dtype=torch.int8), torch.arange(4))
    values = torch.zeros(1, 40, 4)
    values[0, 20, 2] = torch.nan  # left out
    moments_of(values, samples)
    values[0, 33, 3] = torch.nan
    with pytest.raises(SafeglassesError) as caught:
        moments_of(values, samples)
    assert str(caught.value) == (
        "a value is not a number (NaN)\n"
        "  given:    neuron 33\n"
        "  do:       look for overflow: load the model in bfloat16 or float32"
    )


def test_shapes_must_fit() -> None:
    samples = Samples(torch.tensor([[TOXIC, HALF_A]], dtype=torch.int8), torch.arange(2))
    made = moments_of(torch.zeros(1, 3, 2), samples)
    with pytest.raises(SafeglassesError) as caught:
        made.merge(moments_of(torch.zeros(1, 4, 2), samples))
    assert str(caught.value) == (
        "these are other neurons than before\n  given:    1 pools × 4 neurons\n  expected: 1 pools × 3 neurons"
    )
    with pytest.raises(SafeglassesError, match="the samples do not fit the values"):
        made.add(torch.zeros(1, 3, 4), samples)
