"""Rates and means with 95 % intervals, for independent answers and for answers that hang together.

What hangs together (answers to one prompt, prompts about one picture) is a *cluster*; docs/statistics.md says which
interval stands where and how often it holds what it promises.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from safeglasses.errors import SafeglassesError

LEVEL = 0.95
"""Confidence of every interval."""
RESAMPLES = 2_000
"""Bootstrap draws; always from the same seed, so that the same answers have the same interval."""
_Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
_CELLS = 2**22  # counts of clusters in draws that are held at once: 32 MB


@dataclass(frozen=True)
class Rate:
    """A proportion with its 95 % interval: Wilson's, or of a bootstrap of clusters."""

    value: float
    """Share of the scored rows, 0 to 1."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    n: int
    """Scored rows, the denominator."""
    unscored: int = 0
    """Rows on which nothing could be said; in no other field."""

    def to_json(self) -> dict[str, float | int]:
        """Return the fields as JSON-ready values."""
        return dict(vars(self))


@dataclass(frozen=True)
class Mean:
    """The mean of numbers with its 95 % cluster-bootstrap interval."""

    value: float
    """Mean over the scored rows."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    n: int
    """Scored rows."""
    clusters: int
    """Independent groups among them; it is they that count."""
    unscored: int = 0
    """Rows on which nothing could be said; in no other field."""

    def to_json(self) -> dict[str, float | int]:
        """Return the fields as JSON-ready values."""
        return dict(vars(self))


def rate(outcomes: Sequence[bool | None], clusters: Sequence[Hashable] | None = None) -> Rate:
    """Share of True among the outcomes that are not None.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference"; no continuity
    correction. Where rows hang together, `cluster_bootstrap`: Wilson's interval would be too short.

    Args:
        outcomes: what was found, row by row.
        clusters: what each row belongs to; by default all rows are independent.

    Raises:
        SafeglassesError: no outcome is scored; there is no rate of an empty set.
    """
    sums, sizes = clustered(outcomes, clusters)
    n, hits = int(sizes.sum()), int(sums.sum())
    if (sizes == 1).all():
        ends = wilson(np.array([hits / n]), np.array([float(n)]))
    else:
        ends = cluster_bootstrap(sums[:, None], sizes[:, None], ends=(0.0, 1.0))
    # exact at the ends, where rounding would leave 1e-18
    low, high = 0.0 if hits == 0 else float(ends[0][0]), 1.0 if hits == n else float(ends[1][0])
    return Rate(hits / n, low, high, n, len(outcomes) - n)


def mean(values: Sequence[float | None], clusters: Sequence[Hashable] | None = None) -> Mean:
    """Mean of the numbers from 0 to 1 that are not None, with the interval of `cluster_bootstrap`.

    Raises:
        SafeglassesError: none is scored, or a number lies outside 0 to 1.
    """
    sums, sizes = clustered(values, clusters)
    if not all(value is None or 0 <= value <= 1 for value in values):
        raise SafeglassesError("a score out of range", expected="numbers from 0 to 1")
    low, high = cluster_bootstrap(sums[:, None], sizes[:, None], ends=(0.0, 1.0))
    n = int(sizes.sum())
    return Mean(math.fsum(sums) / n, float(low[0]), float(high[0]), n, len(sizes), len(values) - n)


def standard_error(values: Sequence[float | None], clusters: Sequence[Hashable] | None = None) -> float | None:
    """Standard error of the mean; None for a single cluster.

    Without clusters s/√n with s² = Σ(x − x̄)²/(n − 1), as lm-evaluation-harness has it; with them the linearised
    variance of a ratio: G/(G − 1) · Σ_c (s_c − x̄·m_c)² / n².
    Source: Miller 2024, "Adding error bars to evals" (arXiv:2411.00640), sections 2.1 and 2.2; there without
    G/(G − 1).
    """
    sums, sizes = clustered(values, clusters)
    if len(sizes) < 2:
        return None
    return math.sqrt(_variance(sums[:, None], sizes[:, None])[0])


def clustered(
    values: Sequence[float | bool | None], clusters: Sequence[Hashable] | None = None
) -> tuple[Float[ndarray, " cluster"], Float[ndarray, " cluster"]]:
    """Return sum and number of the scored values of each cluster, in an order that the rows' order does not change.

    Raises:
        SafeglassesError: nothing is scored, or there is not one cluster per value.
    """
    if clusters is not None and len(clusters) != len(values):
        raise SafeglassesError("not one cluster per row", given=f"{len(values)} rows, {len(clusters)} clusters")
    found: dict[Hashable, list[float]] = {}
    for index, value in enumerate(values):
        if value is not None:
            found.setdefault(index if clusters is None else clusters[index], []).append(float(value))
    if not found:
        raise SafeglassesError(
            "no rate of an empty set",
            given=f"{len(values)} rows, none of them scored",
            expected="at least one scored row",
            do="look at the reasons of the unscored verdicts, or judge with another judge" if values else "",
        )
    pairs = np.array(sorted((math.fsum(group), float(len(group))) for group in found.values()))
    return pairs[:, 0], pairs[:, 1]


def wilson(
    share: Float[ndarray, " run"], n: Float[ndarray, " run"]
) -> tuple[Float[ndarray, " run"], Float[ndarray, " run"]]:
    """Return both ends of Wilson's interval of a share among n independent outcomes, for many runs at once."""
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * np.sqrt(share * (1 - share) / n + _Z**2 / (4 * n * n))
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)


def cluster_bootstrap(
    sums: Float[ndarray, "cluster run"], sizes: Float[ndarray, "cluster run"], *, ends: tuple[float, float]
) -> tuple[Float[ndarray, " run"], Float[ndarray, " run"]]:
    """Return both ends of the bootstrap interval of Σ sums / Σ sizes, whole clusters drawn with replacement.

    Percentiles, widened for few clusters as Student's t is wider than the normal. Before drawing, two clusters of
    mean size are added, one at each end of what a value can be: a plain bootstrap knows nothing of what it has not
    seen, and its interval of rare events is far too short (with nothing seen, it has no width).
    Source: Davison & Hinkley 1997, section 3.8; widening: Hesterberg 2015, "What teachers should know about the
    bootstrap", section 3.3; the two clusters: Bonett & Price 2012 for paired proportions (Laplace's adjustment),
    carried over to clusters by us and checked by simulation.

    Args:
        sums: sum of the values of each cluster; the second axis is for many data sets at once.
        sizes: number of values of each cluster.
        ends: smallest and largest value that there can be.
    """
    extra = sizes.mean(0, keepdims=True)
    both = np.concatenate([sums, ends[0] * extra, ends[1] * extra])
    weight = np.concatenate([sizes, extra, extra])
    count = len(both)
    drawn = []
    for start in range(0, RESAMPLES, step := max(1, _CELLS // count)):
        counts = _draws(count, start, min(RESAMPLES, start + step))
        drawn.append((counts @ both) / (counts @ weight))
    tail = NormalDist().cdf(-math.sqrt(count / (count - 1)) * student(count - 1))
    low, high = np.quantile(np.concatenate(drawn), [tail, 1 - tail], axis=0)
    share = sums.sum(0) / sizes.sum(0)
    return np.clip(np.minimum(low, share), *ends), np.clip(np.maximum(high, share), *ends)


def ratio_bootstrap(
    tops: Float[ndarray, " cluster"],
    bottoms: Float[ndarray, " cluster"],
    sizes: Float[ndarray, " cluster"],
    *,
    ends: tuple[float, float],
) -> tuple[float, float] | None:
    """Return both ends of the bootstrap interval of Σ tops / Σ bottoms, whole clusters drawn with replacement.

    Widened as in `cluster_bootstrap`, and with its two clusters: both have the mean size and the mean bottom, and a
    top at one end of what there can be. A draw whose bottoms do not sum to more than 0 knows nothing of the ratio: it
    counts beyond both ends; with too many of them there is no interval, and None is returned.

    Args:
        tops: sum of the values of each cluster.
        bottoms: the same of what they are divided by; their sum is positive.
        sizes: number of values of each cluster.
        ends: smallest and largest value that a top can have beside an average bottom.
    """
    size, bottom = sizes.mean(), bottoms.mean()
    both = np.stack([np.append(tops, [ends[0] * size, ends[1] * size]), np.append(bottoms, [bottom, bottom])], axis=1)
    count = len(both)
    steps = range(0, RESAMPLES, step := max(1, _CELLS // count))
    top, under = np.concatenate([_draws(count, start, min(RESAMPLES, start + step)) @ both for start in steps]).T
    known = under > 0
    ratios = np.divide(top, under, out=np.zeros_like(top), where=known)
    tail = NormalDist().cdf(-math.sqrt(count / (count - 1)) * student(count - 1))
    low = np.quantile(np.where(known, ratios, -np.inf), tail, method="lower")
    high = np.quantile(np.where(known, ratios, np.inf), 1 - tail, method="higher")
    if not np.isfinite([low, high]).all():
        return None
    share = tops.sum() / bottoms.sum()
    return float(min(low, share)), float(max(high, share))


@cache
def student(freedom: int) -> float:
    """Quantile of Student's t for 95 % two-sided, by bisection on its distribution function."""
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < LEVEL else (low, middle)
    return (low + high) / 2


def _within(t: float, freedom: int) -> float:
    """P(|T| ≤ t). Source: Abramowitz & Stegun 1964, 26.7.3 and 26.7.4."""
    if freedom > 1_000:
        return 2 * NormalDist().cdf(t * (1 - 1 / (4 * freedom)) / math.sqrt(1 + t * t / (2 * freedom))) - 1
    angle = math.atan(t / math.sqrt(freedom))
    cosine, term, total = math.cos(angle), 1.0, 1.0
    first = 1 if freedom % 2 == 0 else 2
    for k in range(first, freedom - 2, 2):
        term *= cosine**2 * k / (k + 1)
        total += term
    if freedom % 2 == 0:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * cosine * total if freedom > 1 else 0.0))


def _draws(count: int, first: int, last: int) -> Float[ndarray, "draw cluster"]:
    """How often each cluster is drawn; from the number of clusters alone, so the same for every data set of a size."""
    rows = last - first
    picked = np.random.default_rng([count, first]).integers(count, size=(rows, count))
    cells = np.bincount((picked + count * np.arange(rows)[:, None]).ravel(), minlength=rows * count)
    return cells.reshape(rows, count).astype(np.float64)


def _variance(sums: Float[ndarray, "cluster run"], sizes: Float[ndarray, "cluster run"]) -> Float[ndarray, " run"]:
    n, count = sizes.sum(0), len(sizes)
    residuals = sums - sums.sum(0) / n * sizes
    return count / (count - 1) * (residuals**2).sum(0) / n**2
