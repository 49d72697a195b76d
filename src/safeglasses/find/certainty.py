"""How sure evidence is: what would be found again, how far pure noise reaches, what else could explain it."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from safeglasses.data.examples import Example
from safeglasses.find.confounds import Confound, columns_of, explained
from safeglasses.find.engine import Finished
from safeglasses.find.evidence import Evidence
from safeglasses.find.pools import Pool
from safeglasses.find.selection import Selection
from safeglasses.find.statistic import HALF_A, LEFT_OUT, TOXIC, Samples
from safeglasses.find.uncertainty import noise, stability, stability_from_errors

MOST = 2048
"""Selected neurons that are looked at one by one: a random sample of more tells the same shares."""
WORK = 2**23
"""Values of selected neurons that are resampled, at most."""


def assess(
    evidence: Evidence,
    examples: Sequence[Example],
    samples: Samples,
    found: Finished,
    confounds: Sequence[Confound],
    *,
    q: float = 0.05,
    resamples: int = 200,
    seed: int = 0,
    alone: bool = True,
) -> dict[str, Any]:
    """Assess what a false discovery rate selects in each pool, above 0.5 on held-out examples too if there are any.

    Args:
        evidence: what was measured.
        examples: the find split.
        samples: who was counted in which group.
        found: gives the selected neurons' values (every process takes part in fetching them).
        confounds: the table of confounds.
        q: the false discovery rate.
        resamples: bootstrap resamples; 0 leaves stability out.
        seed: of the bootstrap, and of the sample of neurons if there are many.
        alone: compute; False fetches only, for another process.

    Returns:
        JSON-ready: ``confounds`` (a list) and ``pools`` (a list, with ``selected``, ``stability``, ``noise``,
        ``explained`` each).
    """
    flagged = [row.name for row in confounds if row.flagged]
    columns = {name: column for name, column in columns_of(examples, found.lengths).items() if name in flagged}
    pools = []
    for row, pool in enumerate(evidence.pools):
        toxic, non_toxic = evidence.samples[row]
        record: dict[str, Any] = {"pool": str(pool), "toxic": toxic, "non_toxic": non_toxic}
        pools.append(record)
        if not min(toxic, non_toxic):
            record |= {"selected": 0, "stability": None, "noise": None, "explained": []}
            continue
        passed = Selection.fdr(evidence, pool, q, held_out=False)
        chosen = passed if evidence.held_out is None else passed & Selection.fdr(evidence, pool, q)
        cutoff = _lowest(evidence, passed, row)
        looked = _some(chosen, len(samples), seed)
        values = found.values(looked) if looked else None
        if not alone:
            continue
        groups = samples.groups[row]
        halves = (int((groups == HALF_A).sum()), int((groups > TOXIC).sum()) - int((groups == HALF_A).sum()))
        null = _null(evidence, pool, row)
        record |= {
            "selected": len(chosen),
            "selected_before_held_out": len(passed),
            "false_discovery_rate": q,
            "cutoff": cutoff,
            "looked_at": len(looked),
            "noise": noise(null, halves, cutoff=cutoff, cutoff_counts=(toxic, non_toxic)).to_json()
            if min(halves) and len(null)
            else None,
            "stability": None,
            "explained": [],
        }
        if cutoff is None or not looked:
            continue
        if values is None or bool(values[row].isnan().any()):  # experts: not every sample has a value of each
            if resamples:
                record["stability"] = _approximate(evidence, row, looked, cutoff)
            continue
        counted = (groups != LEFT_OUT).nonzero()[:, 0]
        record |= _looked_at(
            values[row].index_select(1, counted), samples, row, counted, columns, cutoff, resamples, seed
        )
    return {"confounds": [row.to_json() for row in confounds], "pools": pools}


def _null(evidence: Evidence, pool: Pool, row: int) -> Tensor:
    """Return the AUROCs of benign against benign samples; where neurons met fewer, as far out as with all of them."""
    every = []
    for site, rated in evidence.rated(pool).items():
        off, met = evidence.columns["null"][site][row].double() - 0.5, evidence.met(site)
        if met is not None:  # chance goes as far as one over the root of the samples
            off = off * (met[1][row] / evidence.samples[row][1]).sqrt()
        every.append(0.5 + off[rated])
    return torch.cat(every)  # may be none


def _looked_at(
    values: Shaped[Tensor, "neuron counted"],
    samples: Samples,
    row: int,
    counted: Int[Tensor, " counted"],
    columns: dict[str, Any],
    cutoff: float,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    labels = samples.groups[row, counted] == TOXIC
    clusters = samples.clusters[counted]
    here = {name: _taken(column, counted) for name, column in columns.items()}
    again = None
    if resamples and len(torch.unique(clusters)) > 1:
        again = stability(values, labels, clusters, cutoff, resamples=resamples, seed=seed).to_json()
    return {"stability": again, "explained": [e.to_json() for e in explained(values, labels, here)]}


def _taken(column: Any, rows: Int[Tensor, " counted"]) -> Any:
    return column[rows] if isinstance(column, Tensor) else [column[i] for i in rows.tolist()]


def _approximate(evidence: Evidence, row: int, looked: Sequence[int], cutoff: float) -> dict[str, Any]:
    chosen = torch.tensor(looked)
    auroc = torch.cat([values[row] for values in evidence.auroc.values()])[chosen]
    error = torch.cat([evidence.standard_error(site)[row] for site in evidence.auroc])[chosen]
    return stability_from_errors(auroc, error, cutoff).to_json()


def _lowest(evidence: Evidence, chosen: Selection, row: int) -> float | None:
    """Return the smallest AUROC that the rule let in; None if it let none in."""
    inside = torch.cat([evidence.auroc[site][row][mask] for site, mask in chosen.masks.items()])
    return float(inside.min()) if len(inside) else None


def _some(chosen: Selection, samples: int, seed: int) -> list[int]:
    """Number the neurons of a set over all sites; a random part of them if they are many."""
    index = torch.cat(list(chosen.masks.values())).nonzero()[:, 0]
    most = max(256, min(MOST, WORK // max(1, samples)))
    if len(index) > most:
        picked = torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))[:most]
        index = index[picked].sort().values
    return index.tolist()
