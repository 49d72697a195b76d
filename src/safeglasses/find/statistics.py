"""How sure one can be of an AUROC: standard errors, p-values, false discovery rate."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from safeglasses.find.auroc import auroc, auroc_rows

__all__ = ["auroc", "auroc_rows", "benjamini_hochberg", "p_values", "standard_error"]


def standard_error(auroc: Float[Tensor, "*shape"], n_pos: int, n_neg: int) -> Float[Tensor, "*shape"]:
    """Return the standard error of AUROCs.

    Source: Hanley and McNeil 1982, equation 1 with Q1 = A/(2 − A), Q2 = 2A²/(1 + A) (exponential model).
    """
    a = auroc.double()
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    variance = (a * (1 - a) + (n_pos - 1) * (q1 - a * a) + (n_neg - 1) * (q2 - a * a)) / (n_pos * n_neg)
    return variance.clamp(min=0).sqrt()


def p_values(auroc: Float[Tensor, "*shape"], n_pos: int, n_neg: int) -> Float[Tensor, "*shape"]:
    """Return one-sided p-values of AUROC > 0.5.

    Mann and Whitney's normal approximation without continuity correction. Without tie correction too, which
    an AUROC alone does not allow: ties make the true variance smaller, so the p-values err on the safe side.
    """
    sd = math.sqrt((n_pos + n_neg + 1) / (12 * n_pos * n_neg))
    z = (auroc.double() - 0.5) / sd
    return torch.special.erfc(z / math.sqrt(2)) / 2  # torch's ndtr is 0 below z = -8.3


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
