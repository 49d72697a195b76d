"""Named recipes: which neurons count as experts of toxicity, and by what factor each is turned down.

| recipe | sites | evidence | selected | factor α |
|---|---|---|---|---|
| ``aura`` | outputs of the MLPs' linear maps | max over all tokens | AUROC > 0.5 | 1 − Gini |
| ``det0`` | same | same | the model's 100 highest AUROC | 0 |
| ``damp`` | same | same | same | 0.5 |
| ``sgm-early`` | same | mean over all tokens | AUROC > 0.3 | 1 − Gini, not clamped: up to 1.4 |
| ``sgm`` | outputs of all linear maps | last prompt token; max over response | FDR 5 % | 1 − max Gini |
| ``sgm-calibrated`` | same | same | AUROC > 0.52 or < 0.48, also held out | 1 − λ·max |Gini|, λ learned |

Gini = 2 (AUROC − 0.5).

Source: AurA, Det0 and Damp are Suau et al. 2024, "Whispering Experts", section 3 (AurA: equation 4).
``sgm-early`` is the rule of the SGM authors' early public code (arXiv 2512.15052); the paper's own rule is
not public. ``sgm`` and ``sgm-calibrated`` are ours.
"""

import re
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from safeglasses.defend.calibrated import CalibratedRule
from safeglasses.defend.expertise import (
    constant_factors,
    experts,
    gini_factors,
    restrict,
    rows,
    table_columns,
)
from safeglasses.defend.factors import by_head, count
from safeglasses.defend.glasses import Glasses
from safeglasses.defend.recipe import Recipe
from safeglasses.errors import PartialMatch, SafeglassesError
from safeglasses.find.evidence import Evidence
from safeglasses.find.pools import Pool
from safeglasses.model.anatomy import Anatomy
from safeglasses.model.sites import Site

__all__ = ["RECIPES", "CalibratedRule", "Recipe", "apply"]

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


def apply(
    recipe: Recipe,
    evidence: Evidence,
    *,
    anatomy: Anatomy | None = None,
    strengths: Float[Tensor, "*group"] | None = None,
) -> Glasses:
    """Make glasses from evidence.

    Args:
        recipe: the rule.
        evidence: AUROC per neuron; must hold the recipe's pools.
        anatomy: of the base model; restricts wider evidence to the recipe's sites. Without it, for ``mlp`` and
            ``linears``, all of its sites are used.
        strengths: λ of a ``calibrated`` recipe, of `CalibratedRule.shape`.

    Raises:
        SafeglassesError: no neuron is selected, the evidence lacks a pool, or strengths are missing.
        PartialMatch: the evidence lacks some of the recipe's sites, or has others and no anatomy is given.
    """
    evidence = _on_sites(recipe, evidence, anatomy)
    if recipe.rule == "calibrated":
        return _calibrated(recipe, evidence, strengths, recipe.heads(anatomy) if anatomy is not None else {})
    masks = experts(evidence, recipe.pools, threshold=recipe.threshold, fdr=recipe.fdr, top_k=recipe.top_k)
    factors = {}
    for site, chosen in masks.items():
        if recipe.rule == "gini":
            factors[site] = gini_factors(rows(evidence, site, recipe.pools), chosen, clamp=recipe.clamp)
        else:
            factors[site] = constant_factors(chosen, recipe.constant)
    factors = by_head(factors, recipe.heads(anatomy)) if anatomy is not None else factors
    if count(factors) == 0:
        rated = [evidence.rated(pool) for pool in recipe.pools]
        known = {site: torch.stack([some[site] for some in rated]) for site in masks}
        highest = max(float(rows(evidence, site, recipe.pools).where(known[site], 0).max()) for site in masks)
        raise SafeglassesError(
            "the recipe selects no neuron: wearing its glasses would silently do nothing",
            given=f"recipe {recipe.name}: {_selection(recipe)}; the highest AUROC is {highest:.3f}",
            expected="at least one neuron whose factor is not 1",
            do="give more or clearer pairs, or loosen the threshold in a recipe file",
        )
    selected = sum(int(mask.any(dim=0).sum()) for mask in masks.values())
    notes = {"rule": recipe.rule, "selection": _selection(recipe), "n_experts": selected}
    notes["held_out"] = recipe.fdr is not None and evidence.held_out is not None
    return Glasses(
        factors=factors,
        base_fingerprint=evidence.base_fingerprint,
        recipe=recipe.name,
        columns=table_columns(evidence, recipe.pools),
        notes=notes,
    )


def _on_sites(recipe: Recipe, evidence: Evidence, anatomy: Anatomy | None) -> Evidence:
    """Restrict the evidence to the recipe's sites."""
    if anatomy is not None:
        return restrict(evidence, anatomy.sites(recipe.sites))
    if recipe.sites not in ("mlp", "linears"):
        raise SafeglassesError(
            "this recipe needs the model's anatomy",
            given=f"recipe {recipe.name}, sites = {recipe.sites}, without it",
            do="apply(recipe, evidence, anatomy=vlm.anatomy)",
        )
    wider = [str(site) for site in evidence.auroc if _ATTENTION.search(site.path)]
    if recipe.sites == "mlp" and wider:
        raise PartialMatch(
            "the evidence covers more sites than the recipe",
            given=f"{wider[0]} for recipe {recipe.name}, which acts on the MLPs",
            expected="evidence of the MLPs' sites, or the model's anatomy to tell them from others",
            do="apply(recipe, evidence, anatomy=vlm.anatomy)",
        )
    return evidence


def _calibrated(
    recipe: Recipe, evidence: Evidence, strengths: Float[Tensor, "*group"] | None, heads: Mapping[Site, int]
) -> Glasses:
    rule = CalibratedRule.from_evidence(
        evidence,
        pools=recipe.pools,
        threshold=recipe.threshold,
        fdr=recipe.fdr,
        clamp=recipe.clamp,
        two_sided=recipe.two_sided,
        granularity=recipe.granularity,
        confirmed=recipe.confirmed,
        heads=heads,
    )
    if recipe.by_category:
        raise SafeglassesError(
            "this recipe needs evidence of every category",
            given=f"recipe {recipe.name} with by_category, and one evidence",
            do="run safeglasses fit, which measures it from pairs with categories",
        )
    if strengths is None:
        raise SafeglassesError(
            "this recipe needs calibrated strengths",
            given=f"recipe {recipe.name} without strengths",
            expected=f"strengths of shape {rule.shape}",
            do="run safeglasses fit, which calibrates them, or use the parameter-free recipe sgm",
        )
    return rule.glasses(strengths, recipe=recipe.name)


def _selection(recipe: Recipe) -> str:
    """Say in words which neurons are selected."""
    criteria = [f"AUROC > {recipe.threshold:g}"] if recipe.threshold is not None else []
    criteria += [f"false discovery rate {recipe.fdr:g}"] if recipe.fdr is not None else []
    criteria += [f"top {recipe.top_k}"] if recipe.top_k is not None else []
    return f"{' and '.join(criteria)} by {' or '.join(map(str, recipe.pools))}"


_LAST, _MAX, _ALL = Pool("prompt", "last"), Pool("response", "max"), Pool("all", "max")
_NAMED = (
    Recipe("aura", "AurA: every expert of the MLPs by its expertise", "mlp", (_ALL,), "gini"),
    Recipe("det0", "the strongest experts off", "mlp", (_ALL,), "constant", threshold=None, top_k=100),
    Recipe(
        "damp",
        "the strongest experts halved",
        "mlp",
        (_ALL,),
        "constant",
        threshold=None,
        top_k=100,
        constant=0.5,
    ),
    Recipe(
        "sgm-early",
        "the SGM authors' early public code; amplifies neurons with AUROC from 0.3 to 0.5",
        "mlp",
        (Pool("all", "mean"),),
        "gini",
        threshold=0.3,
        clamp=False,
    ),
    Recipe(
        "sgm",
        "parameter-free: significant experts of decision and of generation, attention included",
        "linears",
        (_LAST, _MAX),
        "gini",
        fdr=0.05,
    ),
    Recipe(
        "sgm-calibrated",
        "experts on either side, confirmed on held-out data; the strength of every one learned",
        "linears",
        (_LAST, _MAX),
        "calibrated",
        threshold=0.52,
        two_sided=True,
        granularity="neuron",
        confirmed=True,
    ),
)
RECIPES = {recipe.name: recipe for recipe in _NAMED}
"""The named recipes."""
