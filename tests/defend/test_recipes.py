"""Every named recipe against scikit-learn and its formula; files; what is refused."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from safeglasses.defend.recipes import RECIPES, CalibratedRule, Recipe, apply
from safeglasses.errors import PartialMatch, SafeglassesError
from safeglasses.find.auroc import auroc
from safeglasses.find.evidence import Evidence
from safeglasses.find.pools import Pool
from safeglasses.model.anatomy import Anatomy, What
from safeglasses.model.blocks import Block
from safeglasses.model.sites import Site

POOLS = tuple(Pool.parse(text) for text in ("all:max", "all:mean", "prompt:last", "response:max"))
SITES = {
    Site(f"layers.{layer}.{path}", "out"): width
    for layer in range(2)
    for path, width in (("self_attn.q_proj", 6), ("mlp.up_proj", 8), ("mlp.down_proj", 5))
}
MLP = tuple(site for site in SITES if ".mlp." in site.path)
N = 120


class Data:
    """Activations of which some neurons tell the classes apart, ties included; and what scikit-learn says."""

    def __init__(self, *, flipped: bool = False) -> None:
        rng = np.random.default_rng(0)
        self.labels = rng.random(N) < 0.5
        self.values, self.known = {}, {}
        for site, width in SITES.items():
            shift = self.labels[None, :, None] * rng.normal(0.3, 0.8, size=(len(POOLS), 1, width))
            values = np.round(rng.normal(size=(len(POOLS), N, width)) + shift, 1)
            self.values[site] = np.where(flipped & (np.arange(width) % 4 == 0), -values, values)
            self.known[site] = np.array(
                [[roc_auc_score(self.labels, column) for column in pool.T] for pool in self.values[site]]
            )
        labels = torch.from_numpy(self.labels)
        self.auroc = {
            site: torch.stack([auroc(torch.from_numpy(pool), labels) for pool in values])
            for site, values in self.values.items()
        }

    def oracle(self, site, pool):
        return self.known[site][POOLS.index(Pool.parse(pool))]

    @property
    def samples(self):
        return ((int(self.labels.sum()), int((~self.labels).sum())),) * len(POOLS)


FIND, HELD = Data(), Data(flipped=True)


def evidence(**more):
    given = {"held_out": HELD.auroc, "held_out_samples": HELD.samples}
    return Evidence(
        auroc=FIND.auroc,
        pools=POOLS,
        samples=FIND.samples,
        base_fingerprint="sg1-a",
        source_sha256="0",
        **{**given, **more},
    )


WIDTHS = {site.path: width for site, width in SITES.items()}
ANATOMY = Anatomy(
    decoder_path="",
    layers_path="layers",
    n_layers=2,
    hidden_size=5,
    linears=WIDTHS,
    in_features=WIDTHS,
    blocks=tuple(
        Block(
            tuple(site.path for site in MLP if site.layer == layer and "down" not in site.path),
            f"layers.{layer}.mlp.down_proj",
        )
        for layer in (0, 1)
    ),
)


def made(recipe, **more):
    wide = evidence()
    narrow = MLP if recipe.sites == "mlp" else tuple(SITES)
    cut = replace(wide, auroc={s: wide.auroc[s] for s in narrow}, held_out={s: wide.held_out[s] for s in narrow})
    return apply(recipe, cut, **more), narrow


def check(factors, expected, sites):
    assert tuple(factors) == sites
    for site in sites:
        np.testing.assert_allclose(factors[site].numpy(), expected(site), rtol=0, atol=1e-6)


def test_aura():
    glasses, sites = made(RECIPES["aura"])

    def expected(site):
        a = FIND.oracle(site, "all:max")
        return np.where(a > 0.5, 1 - 2 * (a - 0.5), 1)

    check(glasses.factors, expected, sites)
    assert glasses.notes["selection"] == "AUROC > 0.5 by all:max"


@pytest.mark.parametrize(("name", "constant"), [("det0", 0.0), ("damp", 0.5)])
def test_det0_and_damp(name, constant):
    glasses, sites = made(replace(RECIPES[name], top_k=7))
    flat = np.concatenate([FIND.oracle(site, "all:max") for site in sites])
    top = np.argsort(-flat, kind="stable")[:7]
    chosen = np.isin(np.arange(len(flat)), top)
    got = np.concatenate([glasses.factors[site].numpy() for site in sites])
    np.testing.assert_allclose(got, np.where(chosen, constant, 1), rtol=0, atol=1e-6)
    assert glasses.n_neurons == 7


def test_sgm_early():
    glasses, sites = made(RECIPES["sgm-early"])

    def expected(site):
        a = FIND.oracle(site, "all:mean")
        return np.where(a > 0.3, 2 * (1 - a), 1)

    check(glasses.factors, expected, sites)
    assert max(float(row.max()) for row in glasses.factors.values()) > 1


def benjamini_hochberg(p, q):
    """The step-up procedure as its definition has it."""
    order = np.argsort(p)
    passed = np.nonzero(p[order] <= q * np.arange(1, len(p) + 1) / len(p))[0]
    chosen = np.zeros(len(p), bool)
    chosen[order[: passed[-1] + 1 if len(passed) else 0]] = True
    return chosen


def test_sgm():
    glasses, sites = made(RECIPES["sgm"])
    wide, factor = evidence(), {site: np.ones(SITES[site]) for site in sites}
    for pool in RECIPES["sgm"].pools:
        found = {site: FIND.oracle(site, str(pool)) for site in sites}
        q = wide.q_values(pool)
        for site in sites:
            chosen = (q[site].numpy() <= 0.05) & (HELD.oracle(site, str(pool)) > 0.5)
            factor[site] = np.where(chosen, np.minimum(factor[site], 2 * (1 - found[site])), factor[site])
    check(glasses.factors, lambda site: factor[site], sites)
    assert glasses.notes["held_out"] is True
    assert 0 < glasses.n_neurons < sum(SITES.values())


def test_sgm_without_held_out_data():
    whole = apply(RECIPES["sgm"], evidence(held_out=None, held_out_samples=None))
    confirmed = apply(RECIPES["sgm"], evidence())
    assert whole.notes["held_out"] is False
    assert whole.n_neurons > confirmed.n_neurons


KINDS = ["self_attn.q_proj:out", "mlp.up_proj:out", "mlp.down_proj:out"]


def ginis(site, threshold, *, two_sided, confirmed=False):
    """|Gini| per term where it counts: the evidences, then their lower sides."""
    found = [FIND.oracle(site, pool) for pool in ("prompt:last", "response:max")]
    if confirmed:
        again = [HELD.oracle(site, pool) for pool in ("prompt:last", "response:max")]
        found = [
            np.where((f - 0.5) * (h - 0.5) > 0, np.where(np.abs(f - 0.5) < np.abs(h - 0.5), f, h), 0.5)
            for f, h in zip(found, again, strict=True)
        ]
    above = [np.maximum(2 * (a - 0.5), 0) * (a > threshold) for a in found]
    below = [np.maximum(2 * (0.5 - a), 0) * (a < 1 - threshold) for a in found]
    return above + below if two_sided else above


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("two_sided", [True, False])
def test_sgm_calibrated_per_group(clamp, two_sided):
    change = {"clamp": clamp, "two_sided": two_sided, "granularity": "group", "threshold": 0.55, "confirmed": False}
    shape = (3, 2, 4 if two_sided else 2)
    strengths = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2
    glasses, sites = made(replace(RECIPES["sgm-calibrated"], **change), strengths=strengths)

    def expected(site):
        shares = strengths[KINDS.index(site.kind), site.layer].tolist()
        terms = ginis(site, 0.55, two_sided=two_sided)
        total = 1 - sum(share * gini for share, gini in zip(shares, terms, strict=True))
        return np.clip(total, 0, 1) if clamp else total

    check(glasses.factors, expected, sites)
    assert glasses.notes["strengths"]["kinds"] == KINDS


@pytest.mark.parametrize("confirmed", [True, False])
@pytest.mark.parametrize("two_sided", [True, False])
def test_sgm_calibrated_per_neuron(two_sided, confirmed):
    change = {"two_sided": two_sided, "granularity": "neuron", "threshold": 0.55, "confirmed": confirmed}
    strengths = torch.rand((6, 8), generator=torch.Generator().manual_seed(0)) * 2
    glasses, sites = made(replace(RECIPES["sgm-calibrated"], **change), strengths=strengths)

    def expected(site):
        largest = np.max(ginis(site, 0.55, two_sided=two_sided, confirmed=confirmed), axis=0)
        return np.clip(1 - strengths[sites.index(site), : SITES[site]].numpy() * largest, 0, 1)

    check(glasses.factors, expected, sites)
    terms = [ginis(s, 0.55, two_sided=two_sided, confirmed=confirmed) for s in sites]
    selected = sum(int((np.max(term, axis=0) > 0).sum()) for term in terms)
    assert glasses.notes["strengths"] == {"granularity": "neuron", "learned_scalars": selected}


def test_anatomy_narrows_wider_evidence():
    wide = apply(RECIPES["aura"], evidence(), anatomy=ANATOMY)
    assert wide == made(RECIPES["aura"])[0]
    assert tuple(wide.factors) == MLP


def test_columns_for_the_table():
    glasses = apply(RECIPES["sgm"], evidence())
    assert list(glasses.columns) == [
        f"{what} {pool}" for pool in ("prompt:last", "response:max") for what in ("auroc", "held-out", "q")
    ]
    site = MLP[0]
    np.testing.assert_allclose(
        glasses.columns["auroc response:max"][site], FIND.oracle(site, "response:max"), atol=1e-6
    )


# the calibrated rule


def rule(**more):
    return CalibratedRule.from_evidence(evidence(), pools=POOLS[2:], **more)


def test_rule_of_no_strength_changes_nothing():
    assert all(bool((row == 1).all()) for row in rule().factors(rule().start(0)).values())


def test_rule_of_strength_one_is_the_gini_rule():
    one = CalibratedRule.from_evidence(evidence(), pools=POOLS[:1])
    gini = apply(replace(RECIPES["aura"], sites="linears"), evidence())
    for site, row in one.factors(one.start(1)).items():
        torch.testing.assert_close(row, gini.factors[site], rtol=0, atol=1e-6)


@pytest.mark.parametrize("two_sided", [False, True])
def test_strengths_by_category_act_where_the_evidence_of_the_category_selects(two_sided):
    rude, false = evidence(), replace(evidence(), auroc=HELD.auroc)
    given = {"pools": POOLS[2:], "two_sided": two_sided}
    both = CalibratedRule.from_evidence(rude, categories={"rude": rude, "false": false}, **given)
    sides = ("", " below") if two_sided else ("",)
    assert both.terms == tuple(f"{p}{side} [{c}]" for c in ("rude", "false") for side in sides for p in POOLS[2:])
    half = len(both.terms) // 2
    for part, alone in ((slice(0, half), rude), (slice(half, None), false)):
        strengths = both.start(0)
        strengths[:, :, part] = 0.7
        expected = CalibratedRule.from_evidence(alone, **given)
        for site, row in expected.factors(expected.start(0.7)).items():
            torch.testing.assert_close(both.factors(strengths)[site], row, rtol=0, atol=0)
    table = both.table(both.start(0.5))
    assert both.strengths_from(table).shape == both.shape


def test_evidence_of_a_category_that_lacks_a_site_is_refused():
    short = replace(evidence(held_out=None, held_out_samples=None), auroc=dict(list(FIND.auroc.items())[1:]))
    with pytest.raises(PartialMatch):
        CalibratedRule.from_evidence(evidence(), pools=POOLS[2:], categories={"rude": short})


def test_a_recipe_by_category_cannot_be_applied_to_one_evidence():
    grouped = replace(RECIPES["sgm-calibrated"], granularity="group", by_category=True)
    with pytest.raises(SafeglassesError, match="this recipe needs evidence of every category") as error:
        apply(grouped, evidence())
    assert "safeglasses fit" in error.value.do
    with pytest.raises(SafeglassesError, match="by_category with granularity"):
        replace(RECIPES["sgm-calibrated"], by_category=True)


def test_rule_is_differentiable():
    free = rule(clamp=False)
    strengths = free.start(0.3).double().requires_grad_(True)

    def total(values):
        return sum((row.double() ** 2).sum() for row in free.factors(values).values())

    total(strengths).backward()
    step = 1e-2
    for index in ((0, 0, 0), (2, 1, 1)):
        near = [strengths.detach().clone(), strengths.detach().clone()]
        near[0][index] += step
        near[1][index] -= step
        numeric = (total(near[0]) - total(near[1])) / (2 * step)
        torch.testing.assert_close(strengths.grad[index], numeric, rtol=1e-3, atol=1e-3)


def test_rule_counts_its_experts():
    neurons = sum(
        int(((FIND.oracle(s, "prompt:last") > 0.6) | (FIND.oracle(s, "response:max") > 0.6)).sum()) for s in SITES
    )
    assert rule(threshold=0.6).n_experts == neurons
    assert rule(threshold=0.6).shape == (3, 2, 2)


def test_rule_of_some_sites():
    assert rule(sites=MLP).sites == MLP
    assert rule(sites=MLP).kinds == ("mlp.up_proj:out", "mlp.down_proj:out")


def test_strengths_survive_their_table():
    strengths = torch.rand(3, 2, 2)
    table = rule().table(strengths)
    assert torch.equal(rule().strengths_from(table), strengths)
    turned = {**table, "terms": table["terms"][::-1], "values": strengths.flip(2).tolist()}
    assert torch.equal(rule().strengths_from(turned), strengths)
    with pytest.raises(SafeglassesError) as error:
        rule(sites=MLP).strengths_from({**table, "kinds": ["a", "mlp.up_proj:out", "c"]})
    assert str(error.value) == (
        "strengths were learned for other evidence\n"
        "  given:    kinds: a, mlp.up_proj:out, c\n"
        "  expected: kinds that include mlp.down_proj:out"
    )


def test_strengths_of_another_shape():
    with pytest.raises(SafeglassesError) as error:
        rule().factors(torch.ones(3, 2, 1))
    assert str(error.value) == (
        "strengths of the wrong shape\n  given:    (3, 2, 1)\n  expected: (3, 2, 2), for granularity group"
    )


def test_strengths_of_zero_make_no_glasses():
    with pytest.raises(SafeglassesError) as error:
        rule(threshold=0.6).glasses(rule().start(0))
    assert str(error.value) == (
        "these glasses change no neuron: wearing them would silently do nothing\n"
        f"  given:    {rule(threshold=0.6).n_experts} selected neurons, largest strength 0\n"
        "  do:       lower the threshold, or start from larger strengths"
    )


# refusals


def test_nothing_selected_names_the_threshold():
    highest = max(FIND.oracle(site, "all:max").max() for site in MLP)
    with pytest.raises(SafeglassesError) as error:
        made(replace(RECIPES["aura"], threshold=0.99))
    assert str(error.value) == (
        "the recipe selects no neuron: wearing its glasses would silently do nothing\n"
        f"  given:    recipe aura: AUROC > 0.99 by all:max; the highest AUROC is {highest:.3f}\n"
        "  expected: at least one neuron whose factor is not 1\n"
        "  do:       give more or clearer pairs, or loosen the threshold in a recipe file"
    )


def test_wider_evidence_needs_the_anatomy():
    with pytest.raises(PartialMatch) as error:
        apply(RECIPES["aura"], evidence())
    assert str(error.value) == (
        "the evidence covers more sites than the recipe\n"
        "  given:    layers.0.self_attn.q_proj:out for recipe aura, which acts on the MLPs\n"
        "  expected: evidence of the MLPs' sites, or the model's anatomy to tell them from others\n"
        "  do:       apply(recipe, evidence, anatomy=vlm.anatomy)"
    )


def test_narrower_evidence_is_refused():
    wide = evidence()
    narrow = replace(wide, auroc={s: wide.auroc[s] for s in MLP[:1]}, held_out=None)
    with pytest.raises(PartialMatch) as error:
        apply(RECIPES["aura"], narrow, anatomy=ANATOMY)
    assert str(error.value) == (
        "the evidence does not cover the sites of the recipe\n"
        "  given:    3 of 4 sites missing: layers.0.mlp.down_proj:out, layers.1.mlp.up_proj:out, "
        "layers.1.mlp.down_proj:out\n"
        "  do:       measure the evidence again at anatomy.sites(recipe.sites)"
    )


def test_calibrated_recipe_needs_strengths():
    with pytest.raises(SafeglassesError) as error:
        apply(replace(RECIPES["sgm-calibrated"], granularity="group", two_sided=False), evidence())
    assert str(error.value) == (
        "this recipe needs calibrated strengths\n"
        "  given:    recipe sgm-calibrated without strengths\n"
        "  expected: strengths of shape (3, 2, 2)\n"
        "  do:       run safeglasses fit, which calibrates them, or use the parameter-free recipe sgm"
    )


def test_pool_that_was_not_measured():
    with pytest.raises(SafeglassesError, match="the evidence was not measured for this way of pooling"):
        apply(replace(RECIPES["sgm"], pools=(Pool("image", "max"),)), evidence())


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"pools": ()}, "no pools"),
        ({"pools": POOLS[:1] * 2}, "a pool twice"),
        ({"threshold": 1.0}, "threshold 1.0, not from 0 to below 1"),
        ({"threshold": None}, "nothing selects neurons: set threshold, fdr or top_k"),
        ({"fdr": 1.5}, "fdr 1.5, not between 0 and 1"),
        ({"top_k": 0}, "top_k 0, not at least 1"),
        ({"constant": float("inf")}, "constant inf"),
        ({"rule": "calibrated", "top_k": 3}, "top_k with the calibrated rule"),
    ],
)
def test_recipes_that_cannot_work(change, what):
    with pytest.raises(SafeglassesError) as error:
        replace(RECIPES["aura"], **change)
    assert str(error.value) == f"a recipe that cannot work\n  given:    aura: {what}"


# files


@pytest.mark.parametrize("name", RECIPES)
def test_named_recipes_survive_their_file(name, tmp_path):
    (tmp_path / "r.toml").write_text(RECIPES[name].to_toml(), encoding="utf-8")
    assert Recipe.from_toml(tmp_path / "r.toml") == RECIPES[name]


@settings(deadline=None, max_examples=50)
@given(
    st.text(st.characters(codec="utf-8"), min_size=1),
    st.text(st.characters(codec="utf-8")),
    st.floats(0, 0.99),
    st.none() | st.integers(1, 10**6),
    st.booleans(),
    st.lists(st.sampled_from(POOLS), min_size=1, unique=True),
)
def test_any_recipe_survives_its_file(tmp_path_factory, name, doc, threshold, top_k, clamp, pools):
    recipe = Recipe(name, doc, "mlp", tuple(pools), "gini", threshold=threshold, top_k=top_k, clamp=clamp)
    path = tmp_path_factory.getbasetemp() / "recipe.toml"
    path.write_bytes(recipe.to_toml().encode())
    assert Recipe.from_toml(path) == recipe


def test_a_short_recipe_file(tmp_path):
    (tmp_path / "mine.toml").write_text('sites = "mlp"\npools = ["response:max"]\nrule = "gini"\nfdr = 0.1\n')
    recipe = Recipe.from_toml(tmp_path / "mine.toml")
    assert recipe == Recipe("mine", "", "mlp", (Pool("response", "max"),), "gini", threshold=None, fdr=0.1)


SHORT = 'sites = "mlp"\npools = ["response:max"]\nrule = "gini"\n'
EXPECTED = "name, doc, sites, pools, rule, threshold, fdr, top_k, constant, clamp, two_sided, granularity, confirmed"
EXPECTED += ", by_category, by_head"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (SHORT + "treshold = 0.5\n", "unknown entry treshold"),
        ('sites = "mlp"\n', "no entry pools, rule"),
        (SHORT + 'threshold = "0.5"\n', "wrong type of threshold"),
        (SHORT + "top_k = true\n", "wrong type of top_k"),
        (SHORT + "clamp = 1\n", "wrong type of clamp"),
        (SHORT.replace('["response:max"]', "[1]"), "wrong type of pools"),
    ],
)
def test_mistakes_in_a_recipe_file(text, what, tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(SafeglassesError) as error:
        Recipe.from_toml(path)
    assert str(error.value) == (
        f"the recipe file has a mistake\n  given:    {path}: {what}\n  expected: {EXPECTED}\n"
        "  do:       start from the file of a named recipe: RECIPES['sgm'].to_toml()"
    )


def test_unreadable_recipe_files(tmp_path):
    with pytest.raises(SafeglassesError, match=r"could not read the recipe\n.*No such file"):
        Recipe.from_toml(tmp_path / "r.toml")
    (tmp_path / "r.toml").write_text("sites = \n")
    with pytest.raises(SafeglassesError, match=r"could not read the recipe\n.*Invalid value"):
        Recipe.from_toml(tmp_path / "r.toml")


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        ("sites", "attic", " or ".join(get_args(What))),
        ("rule", "aura", "gini or constant or calibrated"),
    ],
)
def test_unknown_words_in_a_recipe_file(entry, value, words, tmp_path):
    known, path = {"sites": "mlp", "rule": "gini"}, tmp_path / "r.toml"
    path.write_text(SHORT.replace(known[entry], value) + "threshold = 0.5\n")
    with pytest.raises(SafeglassesError) as error:
        Recipe.from_toml(path)
    assert str(error.value) == (
        f"the recipe file has a mistake\n  given:    {path}: {entry} = '{value}'\n  expected: {words}"
    )
