"""AUROC within strata against SciPy, scikit-learn and its own definition."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu, norm
from sklearn.metrics import roc_auc_score
from torch import Tensor

from safeglasses.errors import SafeglassesError
from safeglasses.find.auroc import auroc_rows
from safeglasses.find.strata import adjusted, comparable, strata_of

laws = settings(max_examples=40, deadline=None)


@st.composite
def samples(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Values with ties, labels and strata, of which one at least holds both classes."""
    n = draw(st.integers(2, 30))
    values = torch.tensor([draw(st.lists(st.integers(-4, 4), min_size=n, max_size=n)) for _ in range(3)])
    labels = torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    strata = torch.tensor(draw(st.lists(st.integers(0, 4), min_size=n, max_size=n)))
    assume(comparable(labels, strata) > 0)
    return values.double(), labels, strata


def by_pairs(values: Tensor, labels: Tensor, strata: Tensor) -> tuple[Tensor, Tensor]:
    """Wins of toxic samples over non-toxic ones of the same stratum, and how many such pairs there are."""
    inside = strata[labels][:, None] == strata[~labels]
    a, b = values[:, labels][:, :, None], values[:, ~labels][:, None, :]
    return (((a > b).double() + 0.5 * (a == b).double()) * inside).sum(dim=(1, 2)), inside.sum()


@laws
@given(samples())
def test_equals_the_definition(sample: tuple[Tensor, Tensor, Tensor]) -> None:
    _, labels, strata = sample
    wins, pairs = by_pairs(*sample)
    found = adjusted(*sample)
    torch.testing.assert_close(found.auroc, wins / pairs)
    assert found.comparable == pytest.approx(float(pairs) / (int(labels.sum()) * int((~labels).sum())))
    assert found.comparable == comparable(labels, strata)
    variance = 0.0
    for stratum in strata.unique():
        p, n = int(labels[strata == stratum].sum()), int((~labels)[strata == stratum].sum())
        variance += p * n * (p + n + 1) / 12
    expected = norm.sf((wins - pairs / 2) / variance**0.5)
    assert found.p.tolist() == pytest.approx(expected.tolist(), rel=1e-9)


@laws
@given(samples())
def test_flipped_labels_and_negated_values_give_the_complement(sample: tuple[Tensor, Tensor, Tensor]) -> None:
    values, labels, strata = sample
    found = adjusted(values, labels, strata)
    for other in (adjusted(values, ~labels, strata), adjusted(-values, labels, strata)):
        torch.testing.assert_close(other.auroc, 1 - found.auroc)
        torch.testing.assert_close(other.p, 1 - found.p)


@laws
@given(samples(), st.randoms(use_true_random=False))
def test_names_of_strata_order_and_monotone_maps_do_not_matter(
    sample: tuple[Tensor, Tensor, Tensor], random: object
) -> None:
    values, labels, strata = sample
    order = list(range(len(labels)))
    random.shuffle(order)  # type: ignore[attr-defined]
    moved = values + 100 * strata  # a shift per stratum is what is adjusted for
    others = [adjusted(values[:, order], labels[order], strata[order]), adjusted(values, labels, 3 - 2 * strata)]
    for other in [*others, adjusted(moved.exp2(), labels, strata)]:
        torch.testing.assert_close(other.auroc, adjusted(*sample).auroc)


def test_one_stratum_is_the_plain_test() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) < 40
    values = torch.randn(5, 90, generator=generator).double() + 0.4 * labels
    found = adjusted(values, labels, torch.zeros(90, dtype=torch.int64))
    assert found.comparable == 1
    assert torch.equal(found.auroc, auroc_rows(values, labels))
    for row, p in zip(values, found.p.tolist(), strict=True):
        plain = mannwhitneyu(
            row[labels], row[~labels], alternative="greater", method="asymptotic", use_continuity=False
        )
        assert p == pytest.approx(plain.pvalue, rel=1e-9)


def test_p_values_of_noise_are_uniform_whatever_the_strata() -> None:
    generator = torch.Generator().manual_seed(0)
    strata = torch.randint(6, (200,), generator=generator)
    labels = torch.rand(200, generator=generator) < 0.1 + 0.15 * strata
    values = torch.randn(20_000, 200, generator=generator) + strata
    p = adjusted(values, labels, strata).p
    for level in (0.01, 0.05, 0.5):
        assert float((p <= level).double().mean()) == pytest.approx(level, rel=0.15)
    assert float(auroc_rows(values, labels).mean()) > 0.6


def test_strata_without_one_of_the_classes_count_nothing() -> None:
    values = torch.tensor([[3.0, 1.0, 9.0, -9.0, 2.0]])
    labels = torch.tensor([True, False, True, False, False])
    found = adjusted(values, labels, torch.tensor([0, 0, 1, 2, 0]))
    assert found.auroc.item() == roc_auc_score([1, 0, 0], [3, 1, 2])
    assert found.comparable == 2 / 6


def test_nothing_to_compare_is_an_error() -> None:
    labels = torch.tensor([True, True, False])
    with pytest.raises(SafeglassesError) as caught:
        adjusted(torch.zeros(2, 3), labels, torch.tensor([0, 1, 2]))
    assert str(caught.value) == (
        "no toxic sample has a non-toxic one to compare with\n"
        "  given:    3 strata, each of one class\n"
        "  expected: at least one stratum with both classes\n"
        "  do:       make coarser strata, or add examples: the property tells the classes apart by itself"
    )
    assert comparable(labels, labels.long()) == 0
    assert comparable(torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.int64)) == 0
    assert comparable(torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)) == 0


numbers = st.lists(st.integers(-50, 50) | st.integers(0, 3), min_size=1, max_size=60)


@laws
@given(numbers, st.integers(1, 12))
def test_numbers_are_cut_in_their_order_and_never_within_a_tie(column: list[int], n: int) -> None:
    codes = strata_of(column, n).tolist()
    assert sorted(set(codes)) == list(range(len(set(codes))))
    assert len(set(codes)) <= n
    for a, x in zip(codes, column, strict=True):
        for b, y in zip(codes, column, strict=True):
            assert a <= b if x <= y else a >= b
    if len(set(column)) <= n:
        assert len(set(codes)) == len(set(column))


@laws
@given(numbers, st.integers(2, 12))
def test_monotone_maps_change_no_stratum(column: list[int], n: int) -> None:
    cubes = [x**3 for x in column]
    assert torch.equal(strata_of(column, n), strata_of(cubes, n))
    assert torch.equal(strata_of(column, n), strata_of(torch.tensor(column), n))
    assert torch.equal(strata_of(column, n), strata_of([float(x) for x in column], n))


def test_distinct_numbers_are_cut_into_equal_parts() -> None:
    codes = strata_of(torch.randperm(1000))
    assert codes.bincount().tolist() == [100] * 10


def test_categories_are_strata() -> None:
    assert strata_of(["en", None, "de", "en", None]).tolist() == [2, 0, 1, 2, 0]
    assert strata_of([None, None]).tolist() == [0, 0]
    assert len(strata_of([str(i) for i in range(40)]).unique()) == 40
