"""A recipe: how evidence becomes glasses; `recipes` has the named ones and applies them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from safeglasses.defend.calibrated import Granularity
from safeglasses.defend.recipe_files import read_recipe, write_recipe
from safeglasses.errors import SafeglassesError
from safeglasses.find.pools import Pool
from safeglasses.model.anatomy import Anatomy, What
from safeglasses.model.sites import Site

Rule = Literal["gini", "constant", "calibrated"]


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
                expected="queries, keys and values whose maps write heads of a known width, one behind the other",
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
