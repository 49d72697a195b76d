"""Which neurons would be found again from other data, and what chance alone looks like."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safeglasses.errors import SafeglassesError
from safeglasses.find.auroc import auroc_rows
from safeglasses.find.statistics import null_sd, upper_tail

_BLOCK = 2**23
"""Numbers held at once: weights, or values that are sorted."""


@dataclass(frozen=True, eq=False)
class Stability:
    """How surely a selected set of neurons would be selected again from other data of the same kind.

    The shares are optimistic: resamples scatter around AUROCs that were selected for being high.
    """

    method: str
    """``bootstrap`` or ``normal approximation``."""
    cutoff: float
    """Smallest AUROC that the selection let in."""
    resamples: int
    """Bootstrap resamples; 0 for the approximation."""
    clusters: int
    """Independent items that were resampled; 0 for the approximation."""
    found_again: Float[Tensor, " neuron"]
    """Share of resamples in which each neuron reaches the cutoff."""
    standard_error: Float[Tensor, " neuron"]
    """Of each neuron's AUROC."""
    mean: float
    """Share of the set that is found again, on average."""
    low: float | None
    """2.5th percentile of that share over resamples; None for the approximation: it knows no correlations."""
    high: float | None
    """97.5th percentile."""

    def to_json(self) -> dict[str, Any]:
        """Return the scalars, JSON-ready."""
        return {
            "method": self.method,
            "neurons": len(self.found_again),
            "cutoff": self.cutoff,
            "resamples": self.resamples,
            "clusters": self.clusters,
            "found_again": self.mean,
            "low": self.low,
            "high": self.high,
            "standard_error": float(self.standard_error.median()),
        }


def stability(
    values: Float[Tensor, "neuron sample"],
    labels: Bool[Tensor, " sample"],
    clusters: Int[Tensor, " sample"],
    cutoff: float,
    *,
    resamples: int = 200,
    seed: int = 0,
) -> Stability:
    """Resample whole clusters with replacement and count how often each neuron's AUROC reaches the cutoff.

    AUROCs are exact in every resample, mid-ranks included. A draw without one of the classes has no AUROC and
    is drawn again, so the result holds given that both are there.

    Args:
        values: of the selected neurons.
        labels: whether a sample is toxic.
        clusters: samples that share a number are drawn together, e.g. variants of one item.
        cutoff: smallest AUROC that the selection let in.
        resamples: how many.
        seed: of the draws, which do not depend on the neurons.

    Raises:
        SafeglassesError: no neuron, fewer than two clusters or resamples, or as in `auroc`.
    """
    _check_neurons(len(values))
    number = torch.unique(clusters, return_inverse=True)[1]
    n_clusters = int(number.max()) + 1 if len(number) else 0
    if n_clusters < 2 or resamples < 2:
        raise SafeglassesError(
            "nothing to resample",
            given=f"{n_clusters} clusters, {resamples} resamples",
            expected="at least two of each",
        )
    auroc = auroc_rows(values, labels)
    found, sums, squares = torch.zeros(3, len(values), dtype=torch.float64)
    shares: list[Tensor] = []
    for weights in _draws(labels, number, resamples, seed):
        share = torch.zeros(len(weights), dtype=torch.float64)
        start = 0
        for some in values.split(max(1, _BLOCK // max(len(labels), len(weights)))):
            here = slice(start, start := start + len(some))
            rated = _weighted_auroc(some, labels, weights)
            reached = (rated >= cutoff).double()
            found[here] += reached.sum(dim=1)
            share += reached.sum(dim=0)
            off = rated - auroc[here, None]  # sums of squares of small numbers lose nothing
            sums[here] += off.sum(dim=1)
            squares[here] += off.square().sum(dim=1)
        shares.append(share / len(values))
    share = torch.cat(shares)
    variance = (squares - sums.square() / resamples).clamp(min=0) / (resamples - 1)
    low, high = torch.quantile(share, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Stability(
        method="bootstrap",
        cutoff=cutoff,
        resamples=resamples,
        clusters=n_clusters,
        found_again=found / resamples,
        standard_error=variance.sqrt(),
        mean=float(share.mean()),
        low=low,
        high=high,
    )


def _check_neurons(n: int) -> None:
    if not n:
        raise SafeglassesError("no neuron was selected", do="select more loosely: an empty set has no stability")


def _draws(
    labels: Bool[Tensor, " sample"], number: Int[Tensor, " sample"], resamples: int, seed: int
) -> Iterator[Float[Tensor, "resample sample"]]:
    """Yield how often each sample was drawn, for some resamples at a time."""
    generator = torch.Generator().manual_seed(seed)
    n = int(number.max()) + 1
    toxic = torch.bincount(number[labels], minlength=n).double()
    other = torch.bincount(number[~labels], minlength=n).double()
    height = max(1, _BLOCK // len(labels))
    for start in range(0, resamples, height):
        drawn = torch.zeros(min(height, resamples - start), n, dtype=torch.float64)
        missing = torch.ones(len(drawn), dtype=torch.bool)
        while missing.any():  # soon over: even with one cluster of each class, half of all draws have both
            picks = torch.randint(n, (int(missing.sum()), n), generator=generator)
            ones = torch.ones((), dtype=torch.float64).expand(picks.shape)
            drawn[missing] = torch.zeros(picks.shape, dtype=torch.float64).scatter_add_(1, picks, ones)
            missing = (drawn @ toxic == 0) | (drawn @ other == 0)
        most = float((2 * (drawn @ toxic) * (drawn @ other)).max())
        exact = torch.float32 if most < 2**24 else torch.float64  # every sum below is a whole number up to this
        yield drawn.to(exact)[:, number]


def _weighted_auroc(
    values: Float[Tensor, "neuron sample"], labels: Bool[Tensor, " sample"], weights: Float[Tensor, "resample sample"]
) -> Float[Tensor, "neuron resample"]:
    """Return the AUROC of samples that count as often as their weights say.

    One sort per neuron serves all resamples: the weights of negatives, put in its order and summed up, are for
    each positive the weight that it beats (with both ends of a tie: twice, ties half).
    """
    rows = values if values.dtype == torch.float64 else values.float()  # exact; searchsorted knows no halves
    negative, order = rows[:, ~labels].sort(dim=1)
    positive = rows[:, labels].contiguous()
    ends = [torch.searchsorted(negative, positive, right=right) for right in (False, True)]
    w_neg, w_pos = weights[:, ~labels].t().contiguous(), weights[:, labels].t().contiguous()
    below = torch.zeros(len(w_neg) + 1, len(weights), dtype=weights.dtype)
    wins = torch.empty(len(values), len(weights), dtype=torch.float64)
    for i in range(len(values)):  # rows of resamples lie together: index_select copies them whole
        torch.cumsum(w_neg.index_select(0, order[i]), dim=0, out=below[1:])
        double = below.index_select(0, ends[0][i])
        double += below.index_select(0, ends[1][i])
        wins[i] = double.mul_(w_pos).sum(dim=0)
    return wins / (2 * w_pos.sum(dim=0).double() * w_neg.sum(dim=0).double())


def stability_from_errors(
    auroc: Float[Tensor, " neuron"], errors: Float[Tensor, " neuron"], cutoff: float
) -> Stability:
    """Approximate `stability` where no samples were kept: as if AUROCs scattered normally around what was found.

    Raises:
        SafeglassesError: no neuron.
    """
    _check_neurons(len(auroc))
    gap = cutoff - auroc.double()
    z = torch.where(errors > 0, gap / errors.double(), torch.where(gap > 0, math.inf, -math.inf))
    again = upper_tail(z)
    return Stability(
        method="normal approximation",
        cutoff=cutoff,
        resamples=0,
        clusters=0,
        found_again=again,
        standard_error=errors.double(),
        mean=float(again.mean()),
        low=None,
        high=None,
    )


@dataclass(frozen=True)
class Noise:
    """What AUROCs look like where there is nothing to find: one half of the non-toxic samples against the other."""

    neurons: int
    """How many were rated."""
    mean: float
    """Mean AUROC; away from 0.5 the neurons err together."""
    sd: float
    """Root mean square distance from 0.5."""
    expected_sd: float
    """What Mann and Whitney's null says of untied independent samples."""
    low: float
    """0.1 % of neurons lie below."""
    high: float
    """0.1 % of neurons lie above."""
    beyond: float | None
    """Share of neurons at least as far above 0.5, in null standard deviations, as the selection's cutoff."""
    expected_beyond: float | None
    """What the normal null says of it."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields, JSON-ready."""
        return dict(vars(self))


def noise(
    null: Float[Tensor, " neuron"],
    counts: tuple[int, int],
    *,
    cutoff: float | None = None,
    cutoff_counts: tuple[int, int] | None = None,
) -> Noise:
    """Summarise AUROCs of benign against benign samples.

    Args:
        null: the AUROCs.
        counts: samples in the two halves.
        cutoff: smallest AUROC that a selection let in.
        cutoff_counts: toxic and non-toxic samples behind it, `counts` if not given: with fewer samples chance
            goes further, so cutoffs compare in standard deviations only.

    Raises:
        SafeglassesError: no neuron, or an empty half.
    """
    if not len(null) or min(counts) < 1:
        raise SafeglassesError(
            "a null needs neurons and two halves",
            given=f"{len(null)} neurons, {counts[0]} and {counts[1]} samples",
            expected="at least one of each",
        )
    off = null.double() - 0.5
    sd = null_sd(*counts)
    low, high = np.quantile(null.double().numpy(), [0.001, 0.999]).tolist()  # torch's takes 2^24 values at most
    z = None if cutoff is None else (cutoff - 0.5) / null_sd(*(cutoff_counts or counts))
    return Noise(
        neurons=len(null),
        mean=float(null.double().mean()),
        sd=float(off.square().mean().sqrt()),
        expected_sd=sd,
        low=low,
        high=high,
        beyond=None if z is None else float((off / sd >= z).double().mean()),
        expected_beyond=None if z is None else float(upper_tail(torch.tensor(z, dtype=torch.float64))),
    )
