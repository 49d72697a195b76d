"""How sure one can be of an AUROC: standard errors, p-values, false discovery rate."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from safeglasses.errors import SafeglassesError
from safeglasses.find.auroc import auroc, auroc_rows

__all__ = [
    "auroc",
    "auroc_rows",
    "benjamini_hochberg",
    "delong_standard_error",
    "null_sd",
    "p_values",
    "standard_error",
    "upper_tail",
]

_BLOCK = 2**22
"""Values that are compared at once."""


def standard_error(
    auroc: Float[Tensor, "*shape"], n_pos: int | Float[Tensor, "*shape"], n_neg: int | Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Return the standard error of AUROCs; counts may differ between them.

    Source: Hanley and McNeil 1982, equation 1 with Q1 = A/(2 − A), Q2 = 2A²/(1 + A) (exponential model).
    """
    a = auroc.double()
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    variance = (a * (1 - a) + (n_pos - 1) * (q1 - a * a) + (n_neg - 1) * (q2 - a * a)) / (n_pos * n_neg)
    return variance.clamp(min=0).sqrt()


def delong_standard_error(
    values: Float[Tensor, "neuron sample"], labels: Bool[Tensor, " sample"]
) -> Float[Tensor, " neuron"]:
    """Return the standard error of each neuron's AUROC from its own samples, with no model of their distribution.

    Samples count as independent: where they come in clusters, see `uncertainty.stability`.

    Source: DeLong, DeLong and Clarke-Pearson 1988, equations 4 to 6 for a single curve.

    Raises:
        SafeglassesError: a class has fewer than two samples, or as in `auroc`.
    """
    n_pos, n_neg = int(labels.sum()), int((~labels).sum())
    if min(n_pos, n_neg) < 2:
        raise SafeglassesError(
            "DeLong's standard error needs two samples of each class",
            given=f"{n_pos} positive and {n_neg} negative samples",
            do="add examples, or take Hanley and McNeil's `standard_error`",
        )
    auroc_rows(values, labels)  # tells NaN
    if not len(values):
        return torch.zeros(0, dtype=torch.float64)
    variances = []
    for some in values.split(max(1, _BLOCK // values.shape[1])):
        rows = some if some.dtype == torch.float64 else some.float()  # exact; searchsorted knows no halves
        positive, negative = rows[:, labels].contiguous(), rows[:, ~labels].contiguous()
        among = ((positive, negative.sort(dim=1).values), (negative, positive.sort(dim=1).values))
        below = [torch.searchsorted(b, a) + torch.searchsorted(b, a, right=True) for a, b in among]
        parts = [(twice.double() / (2 * n)).var(dim=1) for twice, n in zip(below, (n_neg, n_pos), strict=True)]
        variances.append(parts[0] / n_pos + parts[1] / n_neg)
    return torch.cat(variances).sqrt()


def null_sd(n_pos: int, n_neg: int) -> float:
    """Return the standard deviation of the AUROC of samples that do not differ and do not tie.

    Source: Mann and Whitney 1947, the variance of U.
    """
    return math.sqrt((n_pos + n_neg + 1) / (12 * n_pos * n_neg))


def upper_tail(z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the probability that a standard normal exceeds z, to full relative accuracy.

    torch's own ndtr is 0 below z = -8.3.
    """
    return torch.special.erfc(z.double() / math.sqrt(2)) / 2


def p_values(
    auroc: Float[Tensor, "*shape"], n_pos: int | Float[Tensor, "*shape"], n_neg: int | Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Return one-sided p-values of AUROC > 0.5; counts may differ between neurons.

    Mann and Whitney's normal approximation without continuity correction. Without tie correction too, which
    an AUROC alone does not allow: ties make the true variance smaller, so the p-values err on the safe side.
    """
    sd = ((n_pos + n_neg + 1) / (12 * n_pos * n_neg)) ** 0.5  # as `null_sd`
    return upper_tail((auroc.double() - 0.5) / sd)


def benjamini_hochberg(p: Float[Tensor, " hypothesis"]) -> Float[Tensor, " hypothesis"]:
    """Return q-values: the smallest false discovery rate at which each hypothesis is rejected.

    Source: Benjamini and Hochberg 1995.
    """
    n = p.numel()
    if n == 0:
        return p.double()
    order = p.double().argsort()
    scaled = p.double()[order] * (n / torch.arange(1, n + 1, dtype=torch.float64))
    q = scaled.flip(0).cummin(0).values.flip(0).clamp(max=1)
    return torch.empty_like(q).scatter_(0, order, q)
