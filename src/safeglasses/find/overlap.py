"""How far sets of neurons overlap across languages and modalities, beside what random sets would."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from safeglasses.data.probes import Cell
from safeglasses.errors import SafeglassesError
from safeglasses.find.contrast import Contrast
from safeglasses.find.rules import RuleName
from safeglasses.find.selection import Selection

COVERAGE = 0.95
"""Share of random sets whose overlap lies in the interval of the null."""
_NEGLIGIBLE = 1e-13


@dataclass(frozen=True, eq=False)
class Null:
    """Neurons that two random sets with the same numbers per site share; NaN on the diagonal."""

    mean: Float[Tensor, "set set_"]
    """Expected number."""
    low: Float[Tensor, "set set_"]
    """Lower end of the 95 % interval."""
    high: Float[Tensor, "set set_"]
    """Upper end."""
    p: Float[Tensor, "set set_"]
    """Probability of sharing at least as many as are shared."""


@dataclass(frozen=True, eq=False)
class Atlas:
    """Sets of neurons and what every two of them share, layer by layer."""

    names: tuple[str, ...]
    """What the sets are called: ``en/image-dominant``."""
    layers: tuple[int, ...]
    """Decoder layers, one for each feed-forward block."""
    blocks: tuple[int, ...]
    """Last axis of the counts: to which of these each site belongs; fused experts are a site each."""
    neurons: tuple[int, ...]
    """Neurons of each site."""
    sizes: Int[Tensor, "set site"]
    """Neurons in each set."""
    common: Int[Tensor, "set set_ site"]
    """Neurons in both sets."""
    idle: Float[Tensor, "set set_"] | None = None
    """Directional shares of sets about nothing, see `Contrast.idle`; None where they were not measured."""

    def directional(self) -> Float[Tensor, "set set_"]:
        """Return |A ∩ B| / |A|, A down; NaN where A is empty."""
        return self.common.sum(dim=2).double() / self.sizes.sum(dim=1)[:, None]

    def jaccard(self) -> Float[Tensor, "set set_"]:
        """Return |A ∩ B| / |A ∪ B|; NaN where both are empty."""
        sizes, both = self.sizes.sum(dim=1), self.common.sum(dim=2)
        return both.double() / (sizes[:, None] + sizes[None] - both)

    def directional_by_layer(self) -> Float[Tensor, "set set_ layer"]:
        """Return |A ∩ B| / |A| in each layer; NaN where A has none there."""
        return self.in_layers(self.common).double() / self.in_layers(self.sizes)[:, None]

    def jaccard_by_layer(self) -> Float[Tensor, "set set_ layer"]:
        """Return |A ∩ B| / |A ∪ B| in each layer; NaN where neither has any there."""
        sizes, common = self.in_layers(self.sizes), self.in_layers(self.common)
        return common.double() / (sizes[:, None] + sizes[None] - common)

    def expected_by_layer(self) -> Float[Tensor, "set set_ layer"]:
        """Return the share of A that a random B with as many neurons at every site holds; NaN where A has none."""
        both = self.sizes[:, None].double() * self.sizes[None] / torch.tensor(self.neurons)
        return self.in_layers(both) / self.in_layers(self.sizes)[:, None]

    def in_layers(self, counts: Num[Tensor, "*_ site"]) -> Num[Tensor, "*_ layer"]:
        """Add up counts of sites by layer."""
        zeros = counts.new_zeros(*counts.shape[:-1], len(self.layers))
        return zeros.index_add_(-1, torch.tensor(self.blocks), counts)

    def null(self) -> Null:
        """Return what random sets share: at each site a hypergeometric number, over sites their sum.

        It is exact. It is also a low bar: importance ranks much the same neurons first on any prompt, so sets
        drawn from important neurons share more than random ones whether they are about harm or not; `idle` is the
        higher one.
        """
        found = torch.full((4, len(self.names), len(self.names)), torch.nan, dtype=torch.float64)
        for a, b in combinations(range(len(self.names)), 2):
            drawn = zip(self.neurons, self.sizes[a].tolist(), self.sizes[b].tolist(), strict=True)
            first, chances = _sum_of([hypergeometric(*three) for three in drawn if three[1] and three[2]])
            counts = first + np.arange(len(chances))
            tail = np.cumsum(chances)
            low, high = (counts[np.searchsorted(tail, q)] for q in ((1 - COVERAGE) / 2, (1 + COVERAGE) / 2))
            seen = int(self.common[a, b].sum())
            row = [float(counts @ chances), float(low), float(high), float(chances[counts >= seen].sum())]
            found[:, a, b] = found[:, b, a] = torch.tensor(row, dtype=torch.float64)
        return Null(*found)

    def summary(self) -> dict[str, Any]:
        """Return means over the pairs that differ in one thing alone, JSON-ready; sets must be named as cells.

        ``cross_modal``: the two risk types of a language. ``cross_lingual``: two languages of a risk type. Each
        has the mean, smallest and largest directional share (both ways) and Jaccard index, the shares that random
        sets and sets about nothing give, and how many pairs share more than random ones at p < 0.05 (Bonferroni
        over these pairs).
        """
        cells = [Cell.parse(name) for name in self.names]
        kinds: dict[str, Callable[[Cell, Cell], bool]] = {
            "cross_modal": lambda a, b: a.language == b.language and a.risk != b.risk,
            "cross_lingual": lambda a, b: a.language != b.language and a.risk == b.risk,
        }
        null, shares, jaccard = self.null(), self.directional(), self.jaccard()
        sizes = self.sizes.sum(dim=1)
        found: dict[str, Any] = {}
        for kind, alike in kinds.items():
            pairs = [(i, j) for i, j in combinations(range(len(cells)), 2) if alike(cells[i], cells[j])]
            both = [*pairs, *((j, i) for i, j in pairs)]
            found[kind] = {
                "pairs": len(pairs),
                "directional": _range([float(shares[pair]) for pair in both]),
                "jaccard": _range([float(jaccard[pair]) for pair in pairs]),
                "random_directional": _range([float(null.mean[i, j] / sizes[i]) for i, j in both]),
                "idle_directional": None if self.idle is None else _range([float(self.idle[pair]) for pair in both]),
                "beyond_random": sum(float(null.p[pair]) < 0.05 / len(pairs) for pair in pairs),
            }
        return found

    def record(self) -> dict[str, Any]:
        """Return the atlas JSON-ready: matrices with A down and B across, null where there is no number."""
        null = self.null()
        sizes = self.sizes.sum(dim=1)[:, None]
        shares, jaccard, expected = self.directional_by_layer(), self.jaccard_by_layer(), self.expected_by_layer()
        return {
            "sets": [
                {"name": name, "neurons": int(row.sum()), "by_layer": row.tolist()}
                for name, row in zip(self.names, self.in_layers(self.sizes), strict=True)
            ],
            "layers": list(self.layers),
            "layer_neurons": self.in_layers(torch.tensor(self.neurons)).tolist(),
            "common": self.common.sum(dim=2).tolist(),
            "directional": _plain(self.directional()),
            "jaccard": _plain(self.jaccard()),
            "random": {
                "coverage": COVERAGE,
                "directional": {name: _plain(getattr(null, name) / sizes) for name in ("mean", "low", "high")},
                "p": _plain(null.p),
            },
            "idle": None if self.idle is None else _plain(self.idle),
            "by_layer": [
                {
                    "layer": layer,
                    "directional": _plain(shares[:, :, i]),
                    "jaccard": _plain(jaccard[:, :, i]),
                    "random_directional": _plain(expected[:, :, i]),
                }
                for i, layer in enumerate(self.layers)
            ],
        }


def overlap_atlas(sets: Mapping[str, Selection]) -> Atlas:
    """Count what every two sets share.

    Args:
        sets: over the same sites, by name.

    Raises:
        SafeglassesError: fewer than two sets, or sets over different sites.
    """
    if len(sets) < 2:
        raise SafeglassesError(
            "an overlap needs at least two sets of neurons",
            given=f"{len(sets)}: {', '.join(sets) or 'none'}",
            expected="sets of several languages or risk types",
            do="find safety neurons with a probe that holds more of them",
        )
    selections = list(sets.values())
    for other in selections[1:]:
        _ = selections[0] & other  # tells sets that cannot be combined
    sites = sorted(selections[0].masks, key=lambda site: (site.layer, site))
    masks = [torch.stack([selection.masks[site] for selection in selections]).double() for site in sites]
    blocks = list(dict.fromkeys((site.layer, site.kind) for site in sites))
    numbers = {block: number for number, block in enumerate(blocks)}
    return Atlas(
        names=tuple(sets),
        layers=tuple(layer for layer, _ in blocks),
        blocks=tuple(numbers[site.layer, site.kind] for site in sites),
        neurons=tuple(mask.shape[1] for mask in masks),
        sizes=torch.stack([mask.sum(dim=1) for mask in masks], dim=1).long(),
        common=torch.stack([mask @ mask.T for mask in masks], dim=2).long(),
    )


def atlas_of(contrast: Contrast, rule: RuleName | None = None) -> Atlas:
    """Return the atlas of the sets of all cells, with what sets about nothing share.

    Raises:
        SafeglassesError: a rule that was not measured, or only one cell.
    """
    atlas = overlap_atlas({str(cell): found for cell, found in contrast.sets(rule).items()})
    idle = contrast.idle.get(contrast.rule(rule).name)
    if idle is None:
        return atlas
    shares = [[math.nan if value is None else value for value in row] for row in idle]
    return replace(atlas, idle=torch.tensor(shares, dtype=torch.float64))


@cache
def hypergeometric(population: int, first: int, second: int) -> tuple[int, np.ndarray]:
    """Return the chances of what two random sets share, and the number that the first chance is of.

    Args:
        population: neurons there are.
        first: neurons in one set.
        second: neurons in the other.
    """
    counts = np.arange(max(0, first + second - population), min(first, second) + 1)
    table = _log_factorials(population)

    def log_choose(n: int, k: np.ndarray) -> np.ndarray:
        return table[n] - table[k] - table[n - k]

    every = log_choose(population, np.full_like(counts, second))
    logs = log_choose(first, counts) + log_choose(population - first, second - counts) - every
    return _trimmed(int(counts[0]), np.exp(logs))


@cache
def _log_factorials(largest: int) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, largest + 1)))])


def _sum_of(parts: Sequence[tuple[int, np.ndarray]]) -> tuple[int, np.ndarray]:
    """Return the chances of the sum of independent numbers."""
    start, chances = 0, np.ones(1)
    for first, more in parts:
        start, chances = _trimmed(start + first, np.convolve(chances, more))
    return start, chances / chances.sum()


def _trimmed(start: int, chances: np.ndarray) -> tuple[int, np.ndarray]:
    """Cut off ends that are next to impossible."""
    kept = np.nonzero(chances > _NEGLIGIBLE)[0]
    return start + int(kept[0]), chances[kept[0] : kept[-1] + 1]


def _range(values: Sequence[float]) -> dict[str, float] | None:
    known = [value for value in values if not math.isnan(value)]
    return {"mean": sum(known) / len(known), "low": min(known), "high": max(known)} if known else None


def _plain(matrix: Float[Tensor, "row column"]) -> list[list[float | None]]:
    return [[None if math.isnan(value) else value for value in row] for row in matrix.tolist()]
