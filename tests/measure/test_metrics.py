import math
from fractions import Fraction
from math import comb

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, entropy

from safeglasses.errors import SafeglassesError
from safeglasses.measure.metrics import kl_divergence, mcnemar, perplexity, rate, response_nll

LAW = settings(deadline=None, max_examples=50)

OUTCOME = st.sampled_from([True, False, None])


@LAW
@given(st.integers(0, 400), st.integers(0, 400), st.integers(0, 9))
def test_the_interval_is_wilsons(hits: int, misses: int, unscored: int) -> None:
    if hits + misses == 0:
        return
    found = rate([True] * hits + [None] * unscored + [False] * misses)
    expected = binomtest(hits, hits + misses).proportion_ci(0.95, method="wilson")
    assert found.value == hits / (hits + misses)
    assert found.low == pytest.approx(expected.low, abs=1e-12)
    assert found.high == pytest.approx(expected.high, abs=1e-12)
    assert (found.n, found.unscored) == (hits + misses, unscored)
    assert 0 <= found.low <= found.value <= found.high <= 1


@LAW
@given(st.lists(OUTCOME, min_size=1))
def test_flipping_the_outcomes_mirrors_the_rate(outcomes: list[bool | None]) -> None:
    if all(o is None for o in outcomes):
        return
    found, flipped = rate(outcomes), rate([None if o is None else not o for o in outcomes])
    assert flipped.value == pytest.approx(1 - found.value)
    assert flipped.low == pytest.approx(1 - found.high)


@pytest.mark.parametrize("outcomes", [[], [None, None]])
def test_an_empty_set_has_no_rate(outcomes: list[None]) -> None:
    with pytest.raises(SafeglassesError, match="no rate of an empty set") as error:
        rate(outcomes)
    assert error.value.given == f"{len(outcomes)} rows, none of them scored"


@LAW
@given(st.lists(st.tuples(OUTCOME, OUTCOME), min_size=1, max_size=200))
def test_mcnemar_is_the_binomial_test_of_discordant_pairs(
    pairs: list[tuple[bool | None, bool | None]],
) -> None:
    scored = [(a, b) for a, b in pairs if a is not None and b is not None]
    if not scored:
        return
    found = mcnemar([a for a, _ in pairs], [b for _, b in pairs])
    fixed, broken = scored.count((True, False)), scored.count((False, True))
    assert (found.fixed, found.broken) == (fixed, broken)
    assert (found.n, found.unscored) == (len(scored), len(pairs) - len(scored))
    expected = binomtest(fixed, fixed + broken).pvalue if fixed + broken else 1.0
    assert found.p_value == pytest.approx(expected, rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1500), st.integers(0, 1500))
def test_mcnemar_stays_exact_for_many_pairs(fixed: int, broken: int) -> None:
    if fixed + broken == 0:
        return
    found = mcnemar([True] * fixed + [False] * broken, [False] * fixed + [True] * broken)
    n, tail = fixed + broken, sum(comb(fixed + broken, k) for k in range(min(fixed, broken) + 1))
    assert found.p_value == float(min(Fraction(1), Fraction(2 * tail, 2**n)))  # scipy's own tail loses digits here


def test_mcnemar_refuses_what_is_not_paired() -> None:
    with pytest.raises(SafeglassesError, match="before and after are not paired") as error:
        mcnemar([True], [True, False])
    assert error.value.given == "1 rows before, 2 after"
    with pytest.raises(SafeglassesError, match="no pair to compare"):
        mcnemar([True, None], [None, False])


def test_perplexity_is_over_tokens_not_over_rows() -> None:
    assert perplexity([1.0, 6.0], [1, 3]) == pytest.approx(math.exp(7 / 4))
    assert perplexity([math.log(5) * 8], [8]) == pytest.approx(5)
    assert math.isfinite(perplexity([1e6], [1]))


def test_no_tokens_have_no_perplexity() -> None:
    with pytest.raises(SafeglassesError, match="no perplexity of an empty set"):
        perplexity([0.0], [0])


@LAW
@given(st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_response_nll_scores_each_response_token_given_those_before(seed: int, cut: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 8, 11, generator=generator, dtype=torch.float64)
    ids = torch.randint(11, (3, 8), generator=generator)
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0, 4:8] = mask[1, 5] = True  # row 2 has no response
    found = response_nll(logits[:, cut:].float(), ids, mask)
    for row in range(3):
        expected = -sum(logits[row, t - 1].softmax(0)[ids[row, t]].log().item() for t in range(8) if mask[row, t])
        assert found[row].item() == pytest.approx(expected, abs=1e-4)


def test_response_nll_needs_the_column_before_the_response() -> None:
    mask = torch.tensor([[False, True, True]])
    with pytest.raises(SafeglassesError, match="logits begin after the first response token"):
        response_nll(torch.zeros(1, 2, 5), torch.zeros(1, 3, dtype=torch.long), mask)


def test_response_nll_refuses_nan() -> None:
    mask = torch.tensor([[False, True]])
    with pytest.raises(SafeglassesError, match="the model computes NaN"):
        response_nll(torch.full((1, 2, 5), math.nan), torch.zeros(1, 2, dtype=torch.long), mask)


@LAW
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 30))
def test_kl_agrees_with_scipy(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    base, worn = (scale * torch.randn(2, 4, 17, generator=generator)).unbind()
    expected = entropy(base.double().softmax(-1).numpy(), worn.double().softmax(-1).numpy(), axis=1)
    found = kl_divergence(base, worn)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-6, abs=1e-12)
    assert kl_divergence(base, base + 3.0).tolist() == pytest.approx([0.0] * 4, abs=1e-6)
    assert kl_divergence(base, base).tolist() == [0.0] * 4


def test_kl_takes_tokens_that_cannot_be() -> None:
    base = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert kl_divergence(base, base).tolist() == [0.0]
    assert kl_divergence(base, torch.zeros(1, 3)).item() == pytest.approx(math.log(3 / 2))


def test_kl_refuses_nan() -> None:
    with pytest.raises(SafeglassesError, match="the model computes NaN"):
        kl_divergence(torch.zeros(1, 3), torch.full((1, 3), math.nan))
