"""From AUROC to factors: pure functions of tensors, and what they need of the evidence."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from safeglasses.defend.factors import Factors
from safeglasses.errors import PartialMatch
from safeglasses.find.evidence import Evidence
from safeglasses.find.pools import Pool
from safeglasses.find.selection import Selection
from safeglasses.model.sites import Site


def gini(auroc: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """Return 2 (AUROC − 0.5) in float64: 0 at chance, 1 when a neuron separates the classes fully."""
    return 2 * (auroc.double() - 0.5)


def gini_factors(
    auroc: Float[Tensor, "pool neuron"], selected: Bool[Tensor, "pool neuron"], *, clamp: bool
) -> Float[Tensor, " neuron"]:
    """Return 1 − the largest Gini of the evidences that select a neuron, 1 where none does; float32.

    Source: Suau et al. 2024, equation 4, where there is one evidence. The largest of several is ours.
    """
    largest = gini(auroc).masked_fill(~selected, -torch.inf).amax(dim=0)
    alpha = torch.where(selected.any(dim=0), 1 - largest, 1.0)
    return (alpha.clamp(0, 1) if clamp else alpha).float()


def constant_factors(selected: Bool[Tensor, "pool neuron"], constant: float) -> Float[Tensor, " neuron"]:
    """Return the constant for neurons that some evidence selects, 1 for the others; float32."""
    return torch.where(selected.any(dim=0), float(constant), 1.0).float()


def rows(evidence: Evidence, site: Site, pools: Sequence[Pool]) -> Float[Tensor, "pool neuron"]:
    """Return a site's AUROC for these pools, in their order.

    Raises:
        SafeglassesError: the evidence does not hold a pool.
    """
    return evidence.auroc[site][[evidence.row(pool) for pool in pools]]


def restrict(evidence: Evidence, sites: Sequence[Site]) -> Evidence:
    """Return the evidence of these sites only, so that ranks and false discovery rates count no others.

    Raises:
        PartialMatch: the evidence lacks some of them.
    """
    missing = [str(site) for site in sites if site not in evidence.auroc]
    if missing or not sites:
        raise PartialMatch(
            "the evidence does not cover the sites of the recipe",
            given=f"{len(missing)} of {len(sites)} sites missing: {', '.join(missing[:3])}",
            do="measure the evidence again at anatomy.sites(recipe.sites)",
        )
    held_out = evidence.held_out
    return replace(
        evidence,
        auroc={site: evidence.auroc[site] for site in sites},
        held_out=None if held_out is None else {site: held_out[site] for site in sites},
    )


def confirmed_by_held_out(evidence: Evidence) -> Evidence:
    """Return the evidence with the AUROC that lies nearer to 0.5, of find and held-out, or 0.5 if they disagree.

    Without held-out values it is returned as it is.
    """
    if evidence.held_out is None:
        return evidence
    auroc: dict[Site, Tensor] = {}
    for site, values in evidence.auroc.items():
        found, again = values.double() - 0.5, evidence.held_out[site].double() - 0.5
        nearer = torch.where(found.abs() < again.abs(), found, again)
        auroc[site] = torch.where(found * again > 0, 0.5 + nearer, 0.5)
    return replace(evidence, auroc=auroc)


def experts(
    evidence: Evidence,
    pools: Sequence[Pool],
    *,
    threshold: float | None = None,
    fdr: float | None = None,
    top_k: int | None = None,
) -> dict[Site, Bool[Tensor, "_pool _neuron"]]:
    """Return per site which neurons each evidence selects: those that meet all the criteria given.

    With a false discovery rate they must also have AUROC > 0.5 on held-out examples, if there are any.

    Raises:
        SafeglassesError: the evidence does not hold a pool, or has fewer than `top_k` neurons.
    """
    masks: dict[Pool, Selection] = {}
    for pool in pools:
        chosen = Selection.above(evidence, pool, threshold if threshold is not None else -1.0)
        if fdr is not None:
            chosen = chosen & Selection.fdr(evidence, pool, q=fdr, held_out=evidence.held_out is not None)
        if top_k is not None:
            chosen = chosen & Selection.top(evidence, pool, top_k)
        masks[pool] = chosen
    return {site: torch.stack([masks[pool].masks[site] for pool in pools]) for site in evidence.auroc}


def table_columns(evidence: Evidence, pools: Sequence[Pool]) -> dict[str, Factors]:
    """Return the evidence as columns of the table of neurons, per pool: AUROC, held-out AUROC, q, samples met."""
    columns: dict[str, Factors] = {}
    for pool in pools:
        row = evidence.row(pool)
        columns[f"auroc {pool}"] = {site: values[row].float() for site, values in evidence.auroc.items()}
        if evidence.held_out is not None:
            columns[f"held-out {pool}"] = {s: values[row].float() for s, values in evidence.held_out.items()}
        columns[f"q {pool}"] = {site: q.float() for site, q in evidence.q_values(pool).items()}
        for kind in ("toxic", "non_toxic") if "n_toxic" in evidence.columns else ():
            met = {site: evidence.columns[f"n_{kind}"][site][row].float() for site in evidence.auroc}
            columns[f"met-{kind.replace('_', '-')} {pool}"] = met
    return columns
