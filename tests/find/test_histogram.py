"""Histograms: exact counts in any cut, and an AUROC that is never further from the exact one than they say."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from safeglasses.errors import SafeglassesError
from safeglasses.find import histogram as module
from safeglasses.find.blocks import ordered
from safeglasses.find.edges import Edges, edges_of
from safeglasses.find.histogram import Histogram
from safeglasses.find.ranks import Ranks
from safeglasses.find.statistic import HALF_A, HALF_B, LEFT_OUT, TOXIC, Samples
from value_batches import FLOATS, batches, cuts

laws = settings(max_examples=40, deadline=None)


def counted(values: Tensor, samples: Samples, edges: Edges) -> Histogram:
    made = Histogram(edges)
    made.add(values, samples)
    return made


def one_by_one(values: Tensor, samples: Samples, edges: Edges) -> np.ndarray:
    """Counts by the definition of a bin, a value at a time."""
    counts = np.zeros((*values.shape[:2], 3, edges.bins), int)
    for pool, neuron in np.ndindex(*values.shape[:2]):
        keys = ordered(values[pool, neuron][None])[0].tolist()
        for key, group in zip(keys, samples.groups[pool].tolist(), strict=True):
            if group != LEFT_OUT:
                counts[pool, neuron, group, sum(e <= key for e in edges.keys[pool, neuron].tolist())] += 1
    return counts


@given(st.data(), st.integers(1, 9))
@laws
def test_counts_are_those_of_the_definition(data: st.DataObject, bins: int) -> None:
    values, samples = data.draw(batches())
    first = torch.tensor(data.draw(st.lists(st.integers(0, len(samples) - 1), min_size=1)))
    edges = edges_of(values[:, :, first], samples.take(first), bins)
    whole = counted(values, samples, edges)
    assert np.array_equal(whole.counts.numpy(), one_by_one(values, samples, edges))
    searched = Histogram(edges)
    for pool, groups in enumerate(samples.groups):
        columns = (groups != LEFT_OUT).nonzero()[:, 0]
        if len(columns):
            searched._add_searched(pool, values[pool], columns, groups[columns])
    assert torch.equal(searched.counts, whole.counts)


@given(st.data())
@laws
def test_any_cut_and_any_merge_give_the_same_counts(data: st.DataObject) -> None:
    values, samples = data.draw(batches())
    edges = edges_of(values[:, :, :9], samples.take(torch.arange(min(9, len(samples)))), 8)
    parts = [counted(values[:, :, rows], samples.take(rows), edges) for rows in data.draw(cuts(samples))]
    while len(parts) > 1:
        left = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        parts[data.draw(st.integers(0, len(parts) - 1))].merge(left)
    whole = counted(values, samples, edges)
    assert torch.equal(parts[0].counts, whole.counts)
    assert torch.equal(parts[0].seen(), (samples.groups != LEFT_OUT).sum(dim=1))
    for name, column in whole.finish().items():
        assert torch.equal(parts[0].finish()[name], column)


@given(st.data(), st.integers(1, 9))
@laws
def test_the_bound_holds_whatever_the_values(data: st.DataObject, bins: int) -> None:
    values, samples = data.draw(batches())
    few = torch.arange(data.draw(st.integers(1, len(samples))))
    found = counted(values, samples, edges_of(values[:, :, few], samples.take(few), bins)).finish()
    ranks = Ranks()
    ranks.add(values, samples)
    error = (found["auroc"] - ranks.finish()["auroc"]).abs()
    assert (error <= found["auroc_bound"] + 1e-12).all()
    assert (found["auroc_bound"] >= 0).all()
    assert (found["auroc_bound"] <= 0.5).all()


# Distributions of [neuron, sample], drawn sample by sample: the bins are set from the first quarter.
NEURONS, N = 6, 1200
Draw = Callable[[np.random.Generator, np.ndarray], np.ndarray]
REST = np.arange(N) >= N // 4


def normal(random: np.random.Generator, toxic: np.ndarray) -> np.ndarray:
    return random.normal(size=(NEURONS, N)) + 0.3 * toxic


def within_one_bin(random: np.random.Generator, toxic: np.ndarray) -> np.ndarray:
    """All of the rest lies between two edges, the toxic above the others: as wrong as one can be."""
    values = random.permutation(np.arange(N // 4) * 1.0)[None].repeat(NEURONS, 0)
    return np.concatenate([values, np.broadcast_to(100.25 + 0.5 * toxic[N // 4 :], (NEURONS, N - N // 4))], axis=1)


def neighbours(random: np.random.Generator, toxic: np.ndarray) -> np.ndarray:
    return np.float32(1).view(np.int32) + random.integers(0, 600, (NEURONS, N)) + 5 * toxic


DISTRIBUTIONS: dict[str, tuple[torch.dtype, Draw]] = {
    "normal": (torch.float32, normal),
    "normal, bfloat16": (torch.bfloat16, normal),
    "normal, float16": (torch.float16, normal),
    "normal, float64": (torch.float64, normal),
    "bfloat16 grid in float32": (
        torch.float32,
        lambda r, t: torch.from_numpy(normal(r, t)).to(torch.bfloat16).double().numpy(),
    ),
    "constant": (torch.float32, lambda r, t: np.full((NEURONS, N), 0.1)),
    "constant per class": (torch.float32, lambda r, t: np.broadcast_to(t * 1.0, (NEURONS, N))),
    "two values": (torch.bfloat16, lambda r, t: (r.random((NEURONS, N)) < 0.4 + 0.2 * t) * 1.0),
    "counts": (torch.float16, lambda r, t: r.poisson(3 + t, (NEURONS, N)) * 1.0),
    "Cauchy": (torch.float32, lambda r, t: r.standard_cauchy((NEURONS, N)) + t),
    "log-normal over hundreds of octaves": (torch.float64, lambda r, t: np.exp(60 * normal(r, t))),
    "bimodal": (torch.float32, lambda r, t: normal(r, t) + 100 * (r.random((NEURONS, N)) < 0.5)),
    "uniform and rounded": (torch.float32, lambda r, t: np.round(r.random((NEURONS, N)) + 0.1 * t, 2)),
    "rectified": (torch.bfloat16, lambda r, t: np.maximum(normal(r, t) - 1, 0)),
    "mostly one negative value": (torch.float16, lambda r, t: np.maximum(normal(r, t), 0.5) - 0.7),
    "both zeros": (torch.float32, lambda r, t: np.copysign(0.0, r.normal(size=(NEURONS, N)))),
    "denormals": (torch.float32, lambda r, t: r.integers(-500, 500, (NEURONS, N)) * 1.4e-45 + 2.8e-44 * t),
    "infinities": (
        torch.float32,
        lambda r, t: np.where(r.random((NEURONS, N)) < 0.2, np.copysign(np.inf, r.normal(size=N)), normal(r, t)),
    ),
    "overflow in the rest": (torch.float16, lambda r, t: np.where(REST & (t > 0), np.inf, normal(r, t))),
    "neighbouring floats": (torch.float32, neighbours),
    "drift: all of the rest lies above the bins": (torch.float32, lambda r, t: normal(r, t) + 1000 * REST),
    "drift: all of the rest lies below the bins": (torch.bfloat16, lambda r, t: normal(r, t) - 1000 * REST),
    "drift: a value that the first sample lacks": (torch.float32, lambda r, t: np.where(REST, 0.05, normal(r, t))),
    "drift: all of the rest lies in one bin": (torch.float32, within_one_bin),
    "drift: slow, in time": (torch.float32, lambda r, t: normal(r, t) + np.linspace(0, 3, N)),
}


def exact(values: Tensor, toxic: np.ndarray) -> np.ndarray:
    """AUROC by searching each toxic value among the others: another way than the package's."""
    found = []
    for row in values.double().numpy():
        others = np.sort(row[~toxic])
        wins = np.searchsorted(others, row[toxic]) + np.searchsorted(others, row[toxic], side="right")
        found.append(wins.sum() / 2 / len(others) / toxic.sum())
    return np.array(found)


@pytest.mark.parametrize("rare", [False, True], ids=["even", "three of 1200"])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_exact_auroc_lies_within_the_bound(name: str, rare: bool) -> None:
    random = np.random.default_rng(len(name))
    toxic = np.isin(np.arange(N), [7, 400, 900]) if rare else random.random(N) < 0.5
    dtype, draw = DISTRIBUTIONS[name]
    drawn = draw(random, toxic.astype(int))
    if name == "neighbouring floats":
        drawn = drawn.astype(np.int32).view(np.float32)
    values = torch.from_numpy(np.array(drawn, dtype=np.float64)).to(dtype)[None]
    groups = torch.where(torch.from_numpy(toxic), TOXIC, torch.from_numpy(random.integers(HALF_A, HALF_B + 1, N)))
    samples = Samples(groups.to(torch.int8)[None], torch.arange(N))
    first = torch.arange(N // 4)
    found = counted(values, samples, edges_of(values[:, :, first], samples.take(first))).finish()
    error = np.abs(found["auroc"][0].numpy() - exact(values[0], toxic))
    bound = found["auroc_bound"][0].numpy()
    assert (error <= bound + 1e-12).all()
    if name in ("constant", "constant per class", "two values", "both zeros"):
        assert bound.max() == 0
        assert error.max() < 1e-15
    if name == "drift: all of the rest lies in one bin" and not rare:
        assert error.min() > 0.2
    if "drift" not in name and "overflow" not in name and not rare:
        assert bound.max() <= 0.005


def test_the_bound_is_useful() -> None:
    """At 256 bins, set from a tenth of the samples, for normals and for neurons that are mostly zero."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 8, 10_000, generator=generator)
    values[1] = (values[1] - 1).clamp(min=0)
    groups = torch.randint(0, 3, (2, 10_000), generator=generator).to(torch.int8)
    samples, first = Samples(groups, torch.arange(10_000)), torch.arange(1000)
    bound = counted(values, samples, edges_of(values[:, :, first], samples.take(first))).finish()["auroc_bound"]
    assert bound[0].max() <= 0.003
    assert bound[1].max() <= 0.0002


def test_null_compares_the_halves() -> None:
    values = torch.tensor([[[5.0, 1.0, 2.0, 3.0, 4.0]]])
    groups = torch.tensor([[TOXIC, HALF_B, HALF_A, HALF_B, HALF_A]], dtype=torch.int8)
    samples = Samples(groups, torch.arange(5))
    found = counted(values, samples, edges_of(values, samples)).finish()
    assert {name: column.tolist() for name, column in found.items()} == {
        "auroc": [[1.0]],
        "auroc_bound": [[0.0]],
        "null": [[0.75]],
    }


def test_a_missing_class_gives_one_half() -> None:
    groups = torch.tensor([[TOXIC, TOXIC], [HALF_A, HALF_A], [LEFT_OUT, LEFT_OUT]], dtype=torch.int8)
    samples = Samples(groups, torch.arange(2))
    values = torch.randn(3, 2, 2)
    found = counted(values, samples, edges_of(values, samples, bins=4)).finish()
    assert found["auroc"].tolist() == found["null"].tolist() == [[0.5, 0.5]] * 3
    assert found["auroc_bound"].tolist() == [[0.0, 0.0]] * 3


@pytest.mark.parametrize("group", [TOXIC, HALF_A, HALF_B])
def test_more_samples_than_are_counted_at_a_time(group: int) -> None:
    n = 2 * module._COLUMNS + 5
    values = torch.linspace(0, 1, n).to(torch.bfloat16)[None, None]
    samples = Samples(torch.full((1, n), group, dtype=torch.int8), torch.arange(n))
    first = torch.arange(0, n, 100)
    counts = counted(values, samples, edges_of(values[:, :, first], samples.take(first), bins=6)).counts
    assert counts.sum(dim=(0, 1, 3)).tolist() == [n if g == group else 0 for g in range(3)]


def test_threads_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 100, 50, generator=generator)
    samples = Samples(torch.randint(-1, 3, (2, 50), generator=generator).to(torch.int8), torch.arange(50))
    edges = edges_of(values, samples, bins=16)
    whole = counted(values, samples, edges)
    monkeypatch.setattr(module, "_BLOCK", 100)
    monkeypatch.setattr(module, "_SEARCHED", 500)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(counted(values, samples, edges).counts, whole.counts)
    assert edges_of(values, samples, bins=16).same(edges)
    double = Edges(edges_of(values.double(), samples, bins=16).keys, torch.float64)
    assert torch.equal(counted(values.double(), samples, double).counts, whole.counts)


def test_values_that_lie_apart_in_memory_are_read_where_they_are() -> None:
    wide = torch.randn(1, 30, 40, generator=torch.Generator().manual_seed(0))
    samples = Samples(torch.arange(20).remainder(3).to(torch.int8)[None], torch.arange(20))
    edges = edges_of(wide[:, 5:15, ::2], samples, bins=8)
    apart = counted(wide[:, 5:15, ::2], samples, edges)
    assert torch.equal(apart.counts, counted(wide[:, 5:15, ::2].contiguous(), samples, edges).counts)


def test_state_survives_a_file_and_takes_the_memory_it_says() -> None:
    for dtype in FLOATS:
        values = torch.randn(2, 5, 40).to(dtype)
        samples = Samples(torch.arange(40).remainder(3).to(torch.int8).repeat(2, 1), torch.arange(40))
        made = counted(values, samples, edges_of(values, samples, bins=16))
        assert sum(t.nbytes for t in made.state().values()) == Histogram.memory(5, 2, 16, dtype)
        again = Histogram.from_state(load(save(made.state())))
        again.add(values, samples)
        made.merge(counted(values, samples, made.edges))
        assert torch.equal(again.counts, made.counts)
        assert again.edges.same(made.edges)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_is_an_error_that_names_the_neuron(dtype: torch.dtype) -> None:
    samples = Samples(torch.tensor([[TOXIC, HALF_A, HALF_B, LEFT_OUT]], dtype=torch.int8), torch.arange(4))
    values = torch.zeros(1, 40, 4, dtype=dtype)
    edges = edges_of(values, samples, bins=4)
    values[0, 20, 3] = torch.nan  # left out
    counted(values, samples, edges)
    values[0, 33, 1] = torch.nan
    with pytest.raises(SafeglassesError) as caught:
        counted(values, samples, edges)
    assert str(caught.value) == (
        "a value is not a number (NaN)\n"
        "  given:    neuron 33\n"
        "  do:       look for overflow: load the model in bfloat16 or float32"
    )


def test_what_does_not_fit_is_an_error() -> None:
    samples = Samples(torch.tensor([[TOXIC, HALF_A]], dtype=torch.int8), torch.arange(2))
    made = counted(torch.zeros(1, 3, 2), samples, edges_of(torch.zeros(1, 3, 2), samples, bins=4))
    with pytest.raises(SafeglassesError) as caught:
        made.add(torch.zeros(1, 3, 2, dtype=torch.float16), samples)
    assert str(caught.value) == (
        "the bins were set for another type of values\n  given:    torch.float16\n  expected: torch.float32"
    )
    with pytest.raises(SafeglassesError, match="these are other neurons than before"):
        made.add(torch.zeros(1, 4, 2), samples)
    with pytest.raises(SafeglassesError) as caught:
        made.merge(Histogram(edges_of(torch.ones(1, 3, 2), samples, bins=4)))
    assert str(caught.value) == (
        "histograms with different bins cannot be merged\n"
        "  do:       set the edges once, from one first sample, and give them to all"
    )
    made.counts[0, :, HALF_B, 1] = 2**31 - 3  # with the 2 before: as many as fit
    with pytest.raises(SafeglassesError) as caught:
        made.add(torch.zeros(1, 3, 2), samples)
    assert str(caught.value) == (
        "too many samples for 32-bit counts\n"
        "  given:    2,147,483,649 samples\n"
        "  expected: at most 2,147,483,647\n"
        "  do:       use fewer examples (--limit)"
    )
