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

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from safeglasses.defend.calibrated import CalibratedRule, Granularity
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
from safeglasses.defend.recipe_files import read_recipe, write_recipe
from safeglasses.errors import PartialMatch, SafeglassesError
from safeglasses.find.evidence import Evidence
from safeglasses.find.pools import Pool
from safeglasses.model.anatomy import Anatomy, What
from safeglasses.model.sites import Site

__all__ = ["RECIPES", "CalibratedRule", "Recipe", "apply"]

Rule = Literal["gini", "constant", "calibrated"]
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


@dataclass(frozen=True)
class Recipe:
    """How evidence becomes glasses; `to_toml` writes it as a file to edit."""

    name: str
    """What glasses made by it are called."""
    doc: str
    """One line for people."""
    sites: What | tuple[What, ...]
    """``mlp``: outputs of the MLPs' linear maps; ``linears``: outputs of all linear maps of the decoder; ``neurons``:
    inputs of the MLPs' output maps; ``attention``: outputs of attention's maps; ``heads``: what its heads write, the
    inputs of its output maps; ``vision``, ``projector``, ``encoder``, ``crossing``: beyond the decoder. Several may be
    named. See `Anatomy.sites`."""
    pools: tuple[Pool, ...]
    """The evidences, each as span:how, e.g. ``prompt:last``, ``response:max``, ``all:mean``."""
    rule: Rule
    """``gini``: 1 − the largest Gini; ``constant``: a constant; ``calibrated``: 1 − Σ λ·Gini⁺."""
    threshold: float | None = 0.5
    """Select neurons with AUROC above it."""
    fdr: float | None = None
    """Select neurons significant at this false discovery rate, above 0.5 on held-out data if there is any."""
    top_k: int | None = None
    """Select so many neurons of the whole model, by AUROC; ties go to the earlier site and index."""
    constant: float = 0.0
    """Factor of the ``constant`` rule."""
    clamp: bool = True
    """Hold factors in [0, 1]."""
    two_sided: bool = False
    """For the ``calibrated`` rule: neurons that are low on toxic examples count as well."""
    granularity: Granularity = "group"
    """For the ``calibrated`` rule: ``group``: a strength per module kind × layer × evidence; ``neuron``: one
    per expert."""
    confirmed: bool = False
    """For the ``calibrated`` rule: only the expertise that held-out examples confirm counts, if there are any."""
    by_category: bool = False
    """For the ``calibrated`` rule and ``group``: a strength per category of harm as well, each by its own evidence."""
    by_head: bool = False
    """For ``attention`` and ``heads``: the neurons of a head are turned down together, by the mean of what each would
    be; keys and values by their own heads, which several query heads share. Sites without heads, such as what the
    output map writes, stay as they are."""

    def __post_init__(self) -> None:
        problems = [text for wrong, text in _problems(self) if wrong]
        if problems:
            raise SafeglassesError("a recipe that cannot work", given=f"{self.name}: {'; '.join(problems)}")

    def heads(self, anatomy: Anatomy) -> Mapping[Site, int]:
        """Return how many heads lie on each of the recipe's sites that has heads, if it goes by head; else nothing.

        Raises:
            SafeglassesError: no site has heads.
        """
        if not self.by_head:
            return {}
        known = anatomy.attention.heads
        found = {site: known[site] for site in anatomy.sites(self.sites) if site in known}
        if not found:
            raise SafeglassesError(
                "none of the recipe's sites has attention heads",
                given=f"recipe {self.name}, sites = {self.sites}, by_head",
                expected="queries, keys and values with maps of their own",
                do='use sites = "heads": what each head writes',
            )
        return found

    @classmethod
    def from_toml(cls, path: str | Path) -> "Recipe":
        """Read a recipe from a TOML file.

        ``sites``, ``pools`` and ``rule`` are needed; a criterion that is not named does not count.

        Raises:
            SafeglassesError: no such file, no TOML, an unknown or missing entry, or a value of a wrong type.
        """
        table = read_recipe(Path(path))
        pools = tuple(Pool.parse(text) for text in table.pop("pools"))
        if isinstance(table["sites"], list):
            table["sites"] = tuple(table["sites"])
        return cls(**{"name": Path(path).stem, "doc": "", "threshold": None, **table, "pools": pools})

    def to_toml(self) -> str:
        """Write the recipe as TOML, every entry with its meaning."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return write_recipe({**values, "pools": [str(pool) for pool in self.pools]})


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


def _problems(recipe: Recipe) -> list[tuple[bool, str]]:
    threshold, fdr = recipe.threshold, recipe.fdr
    where = {recipe.sites} if isinstance(recipe.sites, str) else set(recipe.sites)
    return [
        (not recipe.name, "no name"),
        (not recipe.pools, "no pools"),
        (len(set(recipe.pools)) != len(recipe.pools), "a pool twice"),
        (not where or not where <= set(get_args(What)), f"sites {recipe.sites!r}"),
        (recipe.rule not in get_args(Rule), f"rule {recipe.rule!r}"),
        (threshold is not None and not 0 <= threshold < 1, f"threshold {threshold}, not from 0 to below 1"),
        (fdr is not None and not 0 < fdr < 1, f"fdr {fdr}, not between 0 and 1"),
        (recipe.top_k is not None and recipe.top_k < 1, f"top_k {recipe.top_k}, not at least 1"),
        (threshold is fdr is recipe.top_k is None, "nothing selects neurons: set threshold, fdr or top_k"),
        (not math.isfinite(recipe.constant), f"constant {recipe.constant}"),
        (recipe.rule == "calibrated" and recipe.top_k is not None, "top_k with the calibrated rule"),
        (recipe.granularity not in get_args(Granularity), f"granularity {recipe.granularity!r}"),
        (recipe.rule != "calibrated" and recipe.two_sided, "two_sided without calibration"),
        (recipe.rule != "calibrated" and recipe.confirmed, "confirmed without calibration"),
        (recipe.rule != "calibrated" and recipe.by_category, "by_category without calibration"),
        (
            recipe.by_head and not where & {"attention", "heads"},
            f"by_head with sites {recipe.sites!r}, not attention or heads",
        ),
        (recipe.by_category and recipe.granularity == "neuron", 'by_category with granularity "neuron", not "group"'),
    ]


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
