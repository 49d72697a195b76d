"""The AUROC against three other definitions, under the transformations that it must not notice."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import Tensor

from safeglasses.errors import SafeglassesError
from safeglasses.find import auroc as module
from safeglasses.find.auroc import auroc, auroc_rows

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
laws = settings(max_examples=40, deadline=None)


@st.composite
def samples(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = FLOATS) -> tuple[Tensor, Tensor]:
    """Values with many, few or no ties, of any magnitude, with infinities and both zeros; both classes."""
    dtype = draw(st.sampled_from(dtypes))
    n, neurons = draw(st.integers(2, 40)), draw(st.integers(1, 4))
    width = {torch.bfloat16: 32, torch.float16: 16, torch.float32: 32, torch.float64: 64}[dtype]
    anything = st.floats(allow_nan=False, width=width)
    few = st.sampled_from([0.0, -0.0, 1.0, 1.0078125, -1.0, 6e-8, 1e30, float("inf"), -float("inf")])
    value = draw(st.sampled_from([anything, few]))
    values = torch.tensor([draw(st.lists(value, min_size=n, max_size=n)) for _ in range(neurons)])
    labels = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    assume(0 < sum(labels) < n)
    return values.to(dtype), torch.tensor(labels)


def quadratic(values: Tensor, labels: Tensor) -> Tensor:
    """Share of pairs that the positive wins, ties half: the definition itself."""
    positive, negative = values[:, labels].double()[:, :, None], values[:, ~labels].double()[:, None, :]
    return ((positive > negative).double() + 0.5 * (positive == negative).double()).mean(dim=(1, 2))


def on_device(values: Tensor, labels: Tensor) -> Tensor:
    """What `auroc_rows` does with tensors of an accelerator, on the CPU."""
    wins = module._double_wins_on_device(values, labels)
    return wins.double() / (2 * int(labels.sum()) * int((~labels).sum()))


@laws
@given(samples())
def test_equals_the_quadratic_definition(sample: tuple[Tensor, Tensor]) -> None:
    values, labels = sample
    expected = quadratic(values, labels)
    torch.testing.assert_close(auroc_rows(values, labels), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(auroc(values.t(), labels), expected, rtol=0, atol=1e-12)


@laws
@given(samples((torch.bfloat16, torch.float16, torch.float32)))
def test_accelerators_take_the_same_values(sample: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(on_device(*sample), auroc_rows(*sample))


@laws
@given(samples())
def test_flipped_labels_give_the_complement(sample: tuple[Tensor, Tensor]) -> None:
    values, labels = sample
    torch.testing.assert_close(auroc_rows(values, ~labels), 1 - auroc_rows(values, labels), rtol=0, atol=1e-12)


@laws
@given(samples())
def test_negated_values_give_the_complement(sample: tuple[Tensor, Tensor]) -> None:
    values, labels = sample
    torch.testing.assert_close(auroc_rows(-values, labels), 1 - auroc_rows(values, labels), rtol=0, atol=1e-12)


@laws
@given(samples(), st.randoms(use_true_random=False))
def test_order_of_samples_does_not_matter(sample: tuple[Tensor, Tensor], random: object) -> None:
    values, labels = sample
    order = list(range(len(labels)))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert torch.equal(auroc_rows(values[:, order], labels[order]), auroc_rows(values, labels))


def ranks(row: Tensor) -> Tensor:
    return torch.unique(row, return_inverse=True)[1].double()


MONOTONE: dict[str, Callable[[Tensor], Tensor]] = {
    "ranks": lambda values: torch.stack([ranks(row) for row in values]),
    "small": lambda values: ranks(values.flatten()).reshape(values.shape) * 2.0**-1074,
    "exponential": lambda values: torch.stack([2.0 ** (ranks(row) - 1000) for row in values]),
    "both signs": lambda values: torch.stack([(ranks(row) - 3) ** 3 for row in values]),
    "over all octaves": lambda values: torch.stack([_spread(ranks(row)) for row in values]),
}


def _spread(rank: Tensor) -> Tensor:
    """Strictly increasing through nearly all doubles, so that keys with a label bit do not fit 64 bits."""
    top = torch.tensor(np.finfo(np.float64).max)
    return torch.where(rank == 0, -top, torch.where(rank == rank.max(), top, (rank - 5) * 5e-324))


@laws
@given(samples((torch.float64,)), st.sampled_from(sorted(MONOTONE)))
def test_strictly_monotone_maps_change_nothing(sample: tuple[Tensor, Tensor], name: str) -> None:
    values, labels = sample
    assume(name != "over all octaves" or all(len(row.unique()) > 1 for row in values))
    assert torch.equal(auroc_rows(MONOTONE[name](values), labels), auroc_rows(values, labels))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", [300, 1000])
@pytest.mark.parametrize("layout", ["sample-major", "neuron-major"])
def test_equals_scikit_learn(dtype: torch.dtype, n: int, layout: str) -> None:
    generator = torch.Generator().manual_seed(n)
    values = torch.randn(n, 24, generator=generator, dtype=torch.float64)
    values[:, 8:12] = values[:, 8:12].round()  # ties longer than a window
    values[:, 12:16] = (values[:, 12:16] * 20).round() / 4  # ties within windows and across their borders
    values[:, 16:20] = values[:, 16:20].relu()
    values[:, 20] = 3.0
    values = values.to(dtype)
    labels = torch.rand(n, generator=generator) < 0.4
    found = auroc(values, labels) if layout == "sample-major" else auroc_rows(values.t().contiguous(), labels)
    expected = [roc_auc_score(labels.numpy(), column.double().numpy()) for column in values.t()]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    assert found.dtype == torch.float64


@pytest.mark.parametrize("threads", [1, 3])
def test_blocks_and_threads_do_not_matter(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values, labels = torch.randn(100, 70).bfloat16(), torch.arange(70) % 3 == 0
    expected = quadratic(values, labels)
    monkeypatch.setattr(module, "_BLOCK", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.testing.assert_close(auroc_rows(values, labels), expected, rtol=0, atol=1e-12)


def test_chunks_on_accelerators_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    values, labels = torch.randn(33, 40).half(), torch.arange(40) % 2 == 0
    monkeypatch.setattr(module, "_free_bytes", lambda _: 40 * 64 * 2 * 7)
    assert torch.equal(on_device(values, labels), auroc_rows(values, labels))


@laws
@given(
    st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=8), min_size=1, max_size=4),
    st.integers(1, 40),
    st.integers(1, 90),
)
def test_ties_are_counted_in_runs_of_any_length(runs: list[list[int]], reach: int, few: int) -> None:
    n = max(map(sum, runs))
    rows = [np.repeat(np.arange(len(lengths) + 1), [*lengths, n - sum(lengths)]) for lengths in runs]
    keys = np.array(rows, np.int16)
    keys[:, : n // 2] += 1
    keys.sort(axis=1)
    flat = [row.tolist() for row in keys]
    expected = [sum(b == a + 1 and a % 2 == 0 for i, a in enumerate(row) for b in row[i + 1 :]) for row in flat]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_REACH", reach)
        patch.setattr(module, "_FEW", few)
        assert module._tied_pairs(keys).tolist() == expected


def test_long_rows_sum_without_overflow() -> None:
    n = 70_000
    values = torch.arange(n, dtype=torch.float32)[None]
    assert auroc_rows(values, torch.arange(n) >= n // 2).item() == 1.0
    assert auroc_rows(-values, torch.arange(n) >= n // 2).item() == 0.0


def test_separation_chance_and_zeros() -> None:
    labels = torch.tensor([False, False, True, True])
    rows = torch.tensor(
        [
            [0.0, 1.0, 2.0, 3.0],
            [3.0, 2.0, 1.0, 0.0],
            [5.0, 5.0, 5.0, 5.0],
            [0.0, -0.0, -0.0, 0.0],
            [-torch.inf, 0.0, torch.inf, torch.inf],
            [torch.inf, -torch.inf, torch.inf, -torch.inf],
        ]
    )
    for dtype in FLOATS:
        assert auroc_rows(rows.to(dtype), labels).tolist() == [1.0, 0.0, 0.5, 0.5, 1.0, 0.5]


def test_inputs_are_left_as_they_are() -> None:
    values, labels = torch.randn(5, 9, requires_grad=True), torch.arange(9) % 2 == 0
    before = values.detach().clone()
    assert not auroc_rows(values, labels).requires_grad
    assert torch.equal(values, before)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_is_an_error_that_names_the_neuron(dtype: torch.dtype) -> None:
    values = torch.zeros(40, 6)
    values[33, 4] = torch.nan
    with pytest.raises(SafeglassesError) as caught:
        auroc_rows(values.to(dtype), torch.arange(6) < 3)
    assert str(caught.value) == (
        "a value is not a number (NaN)\n"
        "  given:    neuron 33\n"
        "  do:       look for overflow: load the model in bfloat16 or float32"
    )
    if dtype != torch.float64:
        with pytest.raises(SafeglassesError, match="neuron 33"):
            on_device(values.to(dtype), torch.arange(6) < 3)


@pytest.mark.parametrize("label", [True, False])
def test_one_class_is_an_error(label: bool) -> None:
    with pytest.raises(SafeglassesError) as caught:
        auroc(torch.zeros(4, 2), torch.full((4,), label))
    assert str(caught.value) == (
        "AUROC needs both classes\n"
        f"  given:    {4 * label} positive and {4 - 4 * label} negative samples\n"
        "  expected: at least one of each\n"
        "  do:       add examples of the missing class"
    )


def test_labels_must_fit() -> None:
    with pytest.raises(SafeglassesError) as caught:
        auroc_rows(torch.zeros(4, 3), torch.tensor([True, False]))
    assert str(caught.value) == "labels do not fit the values\n  given:    2 labels\n  expected: 3 labels"


def test_no_neurons_give_no_values() -> None:
    assert auroc(torch.zeros(3, 0), torch.tensor([True, False, True])).shape == (0,)
