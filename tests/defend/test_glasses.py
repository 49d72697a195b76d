"""Wearing, strength, products, equality, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from defend.conftest import batch_for, glasses_for, logits_of
from safeglasses.defend.factors import effective
from safeglasses.defend.glasses import Glasses
from safeglasses.errors import PartialMatch, SafeglassesError, WrongBase
from safeglasses.model.hooks import scaled
from safeglasses.model.sites import Site

UP = Site("layers.0.mlp.up_proj", "out")
DOWN = Site("layers.1.mlp.down_proj", "in")
ROW = st.lists(st.floats(0, 2, width=32), min_size=3, max_size=3).map(torch.tensor)


def small(row, *, site=UP, base="sg1-a", **more):
    return Glasses({site: row}, base, "test", **more)


def test_off_is_bit_identical_and_worn_is_not(tiny_vlm):
    batch = batch_for(tiny_vlm)
    before = logits_of(tiny_vlm, batch)
    with glasses_for(tiny_vlm).worn(tiny_vlm):
        worn = logits_of(tiny_vlm, batch)
    assert not torch.equal(before, worn)
    assert torch.equal(before, logits_of(tiny_vlm, batch))


def test_wearing_is_scaling(tiny_vlm):
    batch, glasses = batch_for(tiny_vlm), glasses_for(tiny_vlm, what="neurons", strength=0.7)
    with glasses.worn(tiny_vlm):
        worn = logits_of(tiny_vlm, batch)
    with scaled(tiny_vlm.model, tiny_vlm.anatomy, glasses.effective()):
        assert torch.equal(worn, logits_of(tiny_vlm, batch))


def test_bare_model_can_wear(tiny_vlm):
    batch, glasses = batch_for(tiny_vlm), glasses_for(tiny_vlm)
    with glasses.worn(tiny_vlm):
        worn = logits_of(tiny_vlm, batch)
    with glasses.worn(tiny_vlm.model):
        assert torch.equal(worn, logits_of(tiny_vlm, batch))


def test_exception_inside_takes_them_off(tiny_vlm):
    batch = batch_for(tiny_vlm)
    before = logits_of(tiny_vlm, batch)
    with pytest.raises(KeyboardInterrupt), glasses_for(tiny_vlm).worn(tiny_vlm):
        raise KeyboardInterrupt
    assert torch.equal(before, logits_of(tiny_vlm, batch))


@pytest.mark.parametrize("how", ["strength 0", "factors 1"])
def test_identity_changes_no_bit(tiny_vlm, how):
    batch, glasses = batch_for(tiny_vlm), glasses_for(tiny_vlm)
    ones = {site: torch.ones_like(row) for site, row in glasses.factors.items()}
    identity = glasses.at(0) if how == "strength 0" else Glasses(ones, glasses.base_fingerprint, "ones")
    assert identity.n_neurons == 0
    before = logits_of(tiny_vlm, batch)
    with identity.worn(tiny_vlm):
        assert torch.equal(before, logits_of(tiny_vlm, batch))


def test_product_is_both_at_once(tiny_vlm):
    a, b = glasses_for(tiny_vlm, seed=1), glasses_for(tiny_vlm, seed=2).at(0.5)
    batch = batch_for(tiny_vlm)
    with (a * b).worn(tiny_vlm):
        product = logits_of(tiny_vlm, batch)
    with a.worn(tiny_vlm), b.worn(tiny_vlm):
        torch.testing.assert_close(product, logits_of(tiny_vlm, batch), rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(ROW, ROW, ROW)
def test_product_laws(x, y, z):
    a, b, c = small(x), small(y), small(z, site=DOWN)
    assert torch.equal((a * b).factors[UP], x * y)
    assert torch.equal((a * b).factors[UP], (b * a).factors[UP])
    assert (a * c).factors.keys() == {UP, DOWN}
    assert torch.equal((a * b * c).factors[UP], (a * (b * c)).factors[UP])
    assert torch.equal((a * small(torch.ones(3))).factors[UP], x)


def test_product_takes_strengths_up():
    product = small(torch.tensor([0.0, 0.5, 1.0])).at(0.5) * small(torch.tensor([0.0, 0.0, 1.0]))
    assert product.strength == 1
    assert product.factors[UP].tolist() == [0, 0, 1]
    assert product.recipe == "test × test"
    assert [part["strength"] for part in product.notes["product_of"]] == [0.5, 1]


def test_product_keeps_evidence_of_both():
    nan = float("nan")
    a = small(torch.tensor([0.5, 1.0]), columns={"auroc": {UP: torch.tensor([0.9, nan])}})
    b = small(torch.tensor([0.5, 0.5]), columns={"auroc": {UP: torch.tensor([0.1, 0.8])}, "q": {UP: torch.zeros(2)}})
    assert torch.equal((a * b).columns["auroc"][UP], torch.tensor([0.9, 0.8]))
    assert torch.equal((a * b).columns["q"][UP], torch.zeros(2))


@settings(deadline=None, max_examples=40)
@given(ROW, st.floats(0, 3))
def test_strength_law(row, strength):
    acts = effective({UP: row}, strength)[UP]
    torch.testing.assert_close(acts.double(), 1 - strength * (1 - row.double()), rtol=1e-6, atol=1e-6)
    assert torch.equal(effective({UP: row}, 0)[UP], torch.ones(3))
    assert torch.equal(effective({UP: row}, 1)[UP], row)


@settings(deadline=None, max_examples=40)
@given(ROW, st.floats(0.1, 2))
def test_equality_is_of_what_acts(row, strength):
    assert small(row).at(strength) == small(row).at(strength)
    extra = Glasses({UP: row, DOWN: torch.ones(5)}, "sg1-a", "test")
    assert extra == small(row)  # a site without change says nothing
    assert small(row) != small(row + 0.25)
    assert small(row) != small(row, base="sg1-b")
    assert small(row, notes={"a": 1}) != small(row)
    assert small(row) != "glasses"


def test_equality_reads_the_evidence_of_changed_neurons():
    row = torch.tensor([0.5, 1.0])
    column = {"auroc": {UP: torch.tensor([0.9, 0.1])}}
    assert small(row, columns=column) == small(row, columns={"auroc": {UP: torch.tensor([0.9, float("nan")])}})
    assert small(row, columns=column) != small(row, columns={"auroc": {UP: torch.tensor([0.8, 0.1])}})
    assert small(row, columns=column) != small(row)


def test_counts(tiny_vlm):
    glasses = Glasses({UP: torch.tensor([1.0, 0.5, 1.0]), DOWN: torch.zeros(4)}, "sg1-a", "test")
    assert glasses.n_neurons == 5
    assert glasses.at(0.5).n_neurons == 5


def message(error):
    return str(error.value)


def test_wrong_base(tiny_vlm):
    glasses = Glasses({UP: torch.zeros(48)}, "sg1-other", "test")
    with pytest.raises(WrongBase) as error, glasses.worn(tiny_vlm):
        pass
    assert message(error) == (
        "these glasses were made for another model\n"
        f"  given:    {tiny_vlm.source} (fingerprint {tiny_vlm.fingerprint()})\n"
        "  expected: a model (fingerprint sg1-other)\n"
        "  do:       load that model, or fit glasses to this one: safeglasses fit"
    )


def test_partial_match_names_modules(tiny_vlm):
    factors = {
        UP: torch.zeros(47),
        Site("layers.7.mlp.up_proj", "out"): torch.zeros(48),
        DOWN: torch.zeros(48),
    }
    glasses = Glasses(factors, tiny_vlm.fingerprint(), "test")
    with pytest.raises(PartialMatch) as error, glasses.worn(tiny_vlm):
        pass
    assert message(error) == (
        "the glasses fit only a part of this model\n"
        "  given:    2 of 3 sites do not match: layers.0.mlp.up_proj:out (width 48, not 47), "
        "layers.7.mlp.up_proj:out (no such module)\n"
        "  expected: every site to name a module of the decoder with as many neurons\n"
        "  do:       wear them on the model they were made for; safeglasses inspect MODEL lists sites"
    )
    with pytest.raises(PartialMatch), glasses.worn(tiny_vlm.model):
        pass


def test_product_of_different_bases():
    with pytest.raises(WrongBase) as error:
        small(torch.zeros(3)) * small(torch.zeros(3), base="sg1-b")
    assert message(error) == (
        "glasses for different models cannot be worn at once\n  given:    sg1-b\n  expected: sg1-a"
    )


def test_product_of_different_widths():
    with pytest.raises(SafeglassesError) as error:
        small(torch.zeros(3)) * small(torch.zeros(4))
    assert message(error) == (
        "glasses of different width cannot be worn at once\n"
        "  given:    layers.0.mlp.up_proj:out: 4 neurons\n"
        "  expected: 3 neurons"
    )


def test_bad_factors():
    with pytest.raises(SafeglassesError) as error:
        small(torch.tensor([1.0, float("nan")]))
    assert message(error) == (
        "factors must be finite numbers, one per neuron\n"
        "  given:    layers.0.mlp.up_proj:out: shape (2,), torch.float32, 1 not finite"
    )


@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf")])
def test_bad_strength(strength):
    with pytest.raises(SafeglassesError) as error:
        small(torch.zeros(2)).at(strength)
    assert message(error) == f"not a strength\n  given:    {strength}\n  expected: a finite number of at least 0"


def test_bad_notes():
    with pytest.raises(SafeglassesError) as error:
        small(torch.zeros(2), notes={"auroc": float("nan")})
    assert message(error).startswith("notes must be JSON-ready\n  given:    Out of range float values are not JSON")
