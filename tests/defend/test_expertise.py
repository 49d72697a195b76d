"""Laws of the factor rules."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safeglasses.defend.expertise import constant_factors, gini, gini_factors

AUROC = st.lists(st.floats(0, 1), min_size=4, max_size=4).map(lambda v: torch.tensor(v, dtype=torch.float64))
MASK = st.lists(st.booleans(), min_size=4, max_size=4).map(torch.tensor)
law = settings(deadline=None, max_examples=50)


def one(auroc, selected, *, clamp=True):
    return gini_factors(auroc[None], selected[None], clamp=clamp)


def test_known_points():
    auroc = torch.tensor([0.5, 0.75, 1.0, 0.3], dtype=torch.float64)
    every = torch.ones(4, dtype=torch.bool)
    assert one(auroc, every).tolist() == [1.0, 0.5, 0.0, 1.0]
    torch.testing.assert_close(one(auroc, every, clamp=False), torch.tensor([1.0, 0.5, 0.0, 1.4]))


@law
@given(AUROC, MASK)
def test_factor_is_twice_what_is_left_to_certainty(auroc, selected):
    expected = torch.where(selected, 2 * (1 - auroc), 1.0)
    torch.testing.assert_close(one(auroc, selected, clamp=False).double(), expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(one(auroc, selected).double(), expected.clamp(0, 1), rtol=0, atol=1e-7)


@law
@given(AUROC, AUROC)
def test_more_expertise_is_never_turned_down_less(a, b):
    every = torch.ones(4, dtype=torch.bool)
    less, more = one(torch.minimum(a, b), every), one(torch.maximum(a, b), every)
    assert bool((more <= less).all())


@law
@given(AUROC, AUROC, MASK, MASK)
def test_two_evidences_take_the_stronger(a, b, in_a, in_b):
    both = gini_factors(torch.stack([a, b]), torch.stack([in_a, in_b]), clamp=True)
    assert torch.equal(both, torch.minimum(one(a, in_a), one(b, in_b)))
    swapped = gini_factors(torch.stack([b, a]), torch.stack([in_b, in_a]), clamp=True)
    assert torch.equal(both, swapped)


@law
@given(AUROC)
def test_gini_is_odd_about_chance(auroc):
    torch.testing.assert_close(gini(1 - auroc), -gini(auroc), rtol=0, atol=1e-12)


@law
@given(MASK, MASK, st.floats(0, 1, width=32))
def test_constant_where_any_evidence_selects(a, b, constant):
    factors = constant_factors(torch.stack([a, b]), constant)
    assert factors.dtype == torch.float32
    assert factors.tolist() == [constant if x or y else 1.0 for x, y in zip(a.tolist(), b.tolist(), strict=True)]
