"""AUROC among samples that are alike in some property: what a neuron tells beyond it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safeglasses.errors import SafeglassesError
from safeglasses.find.auroc import auroc_rows
from safeglasses.find.statistics import upper_tail

Column = Tensor | Sequence[int | float] | Sequence[str | None]
"""A property of every sample: a number, or the name of a category."""


@dataclass(frozen=True, eq=False)
class Adjusted:
    """AUROC among samples that agree in a property."""

    auroc: Float[Tensor, " neuron"]
    """Share of the compared pairs that the toxic sample wins, ties half."""
    p: Float[Tensor, " neuron"]
    """One-sided p-value of that share above 0.5."""
    comparable: float
    """Share of all toxic–non-toxic pairs that lie within a stratum."""


def adjusted(
    values: Float[Tensor, "neuron sample"], labels: Bool[Tensor, " sample"], strata: Int[Tensor, " sample"]
) -> Adjusted:
    """Compare toxic with non-toxic samples only inside each stratum: A = Σ U_s / Σ P_s N_s.

    p-values are normal, with variance Σ P_s N_s (P_s + N_s + 1)/12 / (Σ P_s N_s)², neither continuity nor tie
    correction (on the safe side, as in `p_values`).

    Source: van Elteren 1960, rank sums combined over strata. He weights U_s by 1/(P_s + N_s + 1), the most
    powerful choice under a common shift; here every pair counts alike, so that the result stays an AUROC.

    Raises:
        SafeglassesError: no stratum holds both classes, or as in `auroc`.
    """
    share = comparable(labels, strata)
    if not share:
        raise SafeglassesError(
            "no toxic sample has a non-toxic one to compare with",
            given=f"{len(torch.unique(strata))} strata, each of one class",
            expected="at least one stratum with both classes",
            do="make coarser strata, or add examples: the property tells the classes apart by itself",
        )
    wins = torch.zeros(len(values), dtype=torch.float64)
    pairs = variance = 0.0
    for stratum in torch.unique(strata).tolist():
        rows = (strata == stratum).nonzero()[:, 0]
        inside = labels[rows]
        n_pos, n_neg = int(inside.sum()), int((~inside).sum())
        if n_pos and n_neg:
            wins += auroc_rows(values.index_select(1, rows), inside) * (n_pos * n_neg)
            pairs += n_pos * n_neg
            variance += n_pos * n_neg * (n_pos + n_neg + 1) / 12
    auroc = wins / pairs
    return Adjusted(auroc, upper_tail((auroc - 0.5) * (pairs / math.sqrt(variance))), share)


def comparable(labels: Bool[Tensor, " sample"], strata: Int[Tensor, " sample"]) -> float:
    """Return the share of toxic–non-toxic pairs whose members lie in one stratum (0 if there are no pairs)."""
    number = torch.unique(strata, return_inverse=True)[1]
    n = int(number.max()) + 1 if len(number) else 0
    toxic, other = (torch.bincount(number[chosen], minlength=n).double() for chosen in (labels, ~labels))
    return float((toxic * other).sum() / (toxic.sum() * other.sum()).clamp(min=1))


def strata_of(column: Column, n: int = 10) -> Int[Tensor, " sample"]:
    """Number the strata of a property.

    Categories are strata (None is one). So are numbers that take at most n distinct values; others are cut at
    their quantiles into at most n strata, equal numbers never apart.
    """
    items = column.tolist() if isinstance(column, Tensor) else list(column)
    if any(item is None or isinstance(item, str) for item in items):
        number = {item: i for i, item in enumerate(sorted(set(items), key=lambda x: (x is not None, x)))}
        return torch.tensor([number[item] for item in items], dtype=torch.int64)
    numbers = np.asarray(items, dtype=np.float64)
    distinct, codes = np.unique(numbers, return_inverse=True)
    if len(distinct) > n:
        edges = np.quantile(numbers, np.arange(1, n) / n, method="inverted_cdf")
        codes = np.unique(np.searchsorted(np.unique(edges), numbers), return_inverse=True)[1]
    return torch.from_numpy(codes.astype(np.int64))
