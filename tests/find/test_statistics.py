"""Standard errors, p-values and q-values against SciPy and literal formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import false_discovery_control, mannwhitneyu, norm

from safeglasses.errors import SafeglassesError
from safeglasses.find import statistics as module
from safeglasses.find.auroc import auroc
from safeglasses.find.statistics import benjamini_hochberg, delong_standard_error, null_sd, p_values, standard_error

laws = settings(max_examples=40, deadline=None)
shares = st.floats(0, 1)
counts = st.integers(1, 3000)
hypotheses = st.lists(shares, min_size=1, max_size=60).map(lambda p: torch.tensor(p, dtype=torch.float64))


@laws
@given(shares, counts, counts)
def test_standard_error_is_hanley_and_mcneils(a: float, n_a: int, n_n: int) -> None:
    q1, q2 = a / (2 - a), 2 * a**2 / (1 + a)
    numerator = a * (1 - a) + (n_a - 1) * (q1 - a**2) + (n_n - 1) * (q2 - a**2)
    found = standard_error(torch.tensor([a], dtype=torch.float64), n_a, n_n)
    assert found.item() ** 2 == pytest.approx(max(numerator, 0) / (n_a * n_n), abs=1e-12)


@laws
@given(shares, counts, counts)
def test_standard_error_sees_both_classes_alike(a: float, n_pos: int, n_neg: int) -> None:
    one = standard_error(torch.tensor([a], dtype=torch.float64), n_pos, n_neg)
    other = standard_error(torch.tensor([1 - a], dtype=torch.float64), n_neg, n_pos)
    torch.testing.assert_close(one**2, other**2, rtol=1e-9, atol=1e-12)


def test_standard_error_at_the_extremes() -> None:
    assert standard_error(torch.tensor([0.0, 1.0]), 30, 40).tolist() == [0.0, 0.0]
    assert standard_error(torch.tensor([0.5]), 50, 50).item() == pytest.approx(math.sqrt(101 / 12 / 2500))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_delongs_standard_error_is_that_of_the_placements(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 200)
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(70, generator=generator) < 0.4
    values = torch.randn(9, 70, generator=generator) + labels
    values[::2] = values[::2].round()
    values = values.to(dtype)
    a, b = values[:, labels].double()[:, :, None], values[:, ~labels].double()[:, None, :]
    wins = (a > b).double() + (a == b).double() / 2
    variance = wins.mean(dim=2).var(dim=1) / a.shape[1] + wins.mean(dim=1).var(dim=1) / b.shape[2]
    torch.testing.assert_close(delong_standard_error(values, labels), variance.sqrt(), rtol=1e-12, atol=0)


def test_delongs_standard_error_is_the_spread_of_aurocs() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(100) < 40
    values = torch.randn(4000, 100, generator=generator) * (1 + labels) + labels  # classes of unlike spread
    spread = auroc(values.t(), labels).std()
    assert delong_standard_error(values, labels).mean().item() == pytest.approx(spread.item(), rel=0.03)


def test_delongs_standard_error_of_perfect_and_no_neurons_is_zero_and_empty() -> None:
    labels = torch.arange(6) < 3
    assert delong_standard_error(torch.stack([labels.float(), torch.zeros(6)]), labels).tolist() == [0, 0]
    assert delong_standard_error(torch.zeros(0, 6), labels).shape == (0,)


def test_delongs_standard_error_of_one_sample_is_an_error() -> None:
    with pytest.raises(SafeglassesError) as caught:
        delong_standard_error(torch.zeros(2, 4), torch.arange(4) < 1)
    assert str(caught.value) == (
        "DeLong's standard error needs two samples of each class\n"
        "  given:    1 positive and 3 negative samples\n"
        "  do:       add examples, or take Hanley and McNeil's `standard_error`"
    )
    with pytest.raises(SafeglassesError, match="NaN"):
        delong_standard_error(torch.full((2, 4), torch.nan), torch.arange(4) < 2)


def test_null_sd_is_hanley_and_mcneils_at_a_half() -> None:
    assert null_sd(30, 50) == pytest.approx(math.sqrt(81 / 12 / 1500))
    assert null_sd(50, 50) == pytest.approx(standard_error(torch.tensor([0.5]), 50, 50).item())


@pytest.mark.parametrize("shift", [-0.5, 0.0, 0.5, 2.0])
def test_p_values_equal_scipys_without_ties(shift: float) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) < 40
    values = torch.randn(90, generator=generator) + shift * labels
    expected = mannwhitneyu(
        values[labels], values[~labels], alternative="greater", method="asymptotic", use_continuity=False
    )
    found = p_values(auroc(values[:, None], labels), 40, 50)
    assert found.item() == pytest.approx(expected.pvalue, rel=1e-9)


@pytest.mark.parametrize("levels", [2, 4, 30])
def test_p_values_with_ties_are_larger_than_the_exact_variance_gives(levels: int) -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(120) < 50
    values = (torch.rand(120, generator=generator) * levels + labels).floor()
    expected = mannwhitneyu(
        values[labels], values[~labels], alternative="greater", method="asymptotic", use_continuity=False
    )
    found = p_values(auroc(values[:, None], labels), 50, 70).item()
    assert expected.pvalue < found < 0.5
    if levels == 30:
        assert found == pytest.approx(expected.pvalue, rel=0.05)


def test_p_values_keep_small_numbers() -> None:
    assert p_values(torch.tensor([1.0]), 400, 400).item() == pytest.approx(norm.sf(0.5 / math.sqrt(801 / 1.92e6)))
    assert p_values(torch.tensor([0.5, 0.0]), 400, 400).tolist() == pytest.approx([0.5, 1.0])


@laws
@given(hypotheses)
def test_q_values_equal_scipys(p: torch.Tensor) -> None:
    expected = torch.from_numpy(false_discovery_control(p.numpy(), method="bh"))
    torch.testing.assert_close(benjamini_hochberg(p), expected, rtol=1e-12, atol=0)


@laws
@given(hypotheses, st.randoms(use_true_random=False))
def test_q_values_follow_their_hypotheses(p: torch.Tensor, random: object) -> None:
    order = list(range(len(p)))
    random.shuffle(order)  # type: ignore[attr-defined]
    q = benjamini_hochberg(p)
    assert torch.equal(benjamini_hochberg(p[order]), q[order])
    assert bool((q >= p).all())
    assert bool((q <= 1).all())


def test_no_hypotheses_no_q_values() -> None:
    assert benjamini_hochberg(torch.zeros(0)).shape == (0,)
