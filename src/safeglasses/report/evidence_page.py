"""Draw evidence alone, before anything is fitted, as one self-contained HTML page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from safeglasses.files import atomic_write_text
from safeglasses.find.evidence import Aurocs, Evidence
from safeglasses.find.selection import Selection
from safeglasses.report import maps
from safeglasses.report.counts import heat_map, histogram
from safeglasses.report.page import fill
from safeglasses.report.plotting import Figure
from safeglasses.report.record import HeatMap, Histogram, Snippet
from safeglasses.report.status import Chip, confound_chip, confounds, grade

SHOWN = 12
"""Neurons listed per pool."""
LOST = (0.10, 0.25)
"""Selected neurons that unseen examples or other data would not confirm: good up to the first share, watch up to
the second."""
NOISE = (0.05, 0.10)
"""The same for as many neurons as noise brings beyond the cutoff, over those selected."""
_SPANS = {
    "image": "images",
    "text": "prompt texts",
    "prompt": "prompts",
    "response": "answers",
    "thought": "thoughts",
    "all": "examples",
}
_MEANINGS = {
    "auroc": "area under the ROC curve; toxic examples are the positive ones",
    "auroc_bound": "the exact AUROC lies within auroc ± this, whatever the data",
    "null": "AUROC of one random half of the non-toxic examples against the other: noise",
    "effect_size": "difference of the two means over the pooled standard deviation (Cohen's d)",
    "rms_change": "root mean square difference between the toxic and the non-toxic examples of a pair",
    "mean_toxic": "mean pooled activation on toxic examples",
    "mean_non_toxic": "the same on non-toxic ones",
    "mean_abs_toxic": "mean magnitude on toxic examples",
    "mean_abs_non_toxic": "the same on non-toxic ones",
    "rate_toxic": "share of toxic examples on which it is above 0",
    "rate_non_toxic": "the same for non-toxic ones",
}


@dataclass(frozen=True)
class _Neuron:
    """One line of a list of neurons."""

    address: str
    """E.g. ``layers.3.mlp.up_proj:out#41``."""
    auroc: float
    """On the find split."""
    error: float
    """Its standard error (Hanley and McNeil)."""
    held_out: float | None
    """On held-out examples."""
    q: float
    """Over all neurons of the pool."""
    effect_size: float | None
    """Cohen's d; None where there is none."""


@dataclass(frozen=True)
class _Pool:
    """What the page says of one way of pooling that has samples of both classes."""

    sure: Mapping[str, Any]
    """Its entry in the record: how many were selected, and how sure that is."""
    what: str
    """What it tells apart: ``answers``."""
    histogram: Histogram
    """How AUROCs are distributed."""
    heat: HeatMap
    """Where the selected neurons lie."""
    top: tuple[_Neuron, ...]
    """Highest AUROC first."""
    by_noise: float | None
    """Neurons that noise alone brings as far beyond 0.5 as the cutoff, in null standard deviations."""


def _flat(column: Aurocs, row: int) -> Float[Tensor, " neuron"]:
    return torch.cat([values[row].double() for values in column.values()])


def _top(evidence: Evidence, row: int) -> tuple[_Neuron, ...]:
    """List the neurons with the highest AUROC; among equals the largest effect, then the first."""
    auroc = _flat(evidence.auroc, row)
    error = torch.cat([evidence.standard_error(site)[row] for site in evidence.auroc])
    q = torch.cat(list(evidence.q_values(evidence.pools[row]).values()))
    held_out = _flat(evidence.held_out, row) if evidence.held_out is not None else None
    known = "effect_size" in evidence.columns
    effect = _flat(evidence.columns["effect_size"], row) if known else torch.full_like(auroc, math.nan)
    order = effect.nan_to_num(-math.inf, math.inf, -math.inf).sort(descending=True, stable=True).indices
    order = order[auroc[order].sort(descending=True, stable=True).indices]
    sites = list(evidence.auroc)
    ends = torch.tensor([values.shape[1] for values in evidence.auroc.values()]).cumsum(0)
    top = []
    for i in order[:SHOWN].tolist():
        which = int(torch.searchsorted(ends, i, right=True))
        first = int(ends[which - 1]) if which else 0
        top.append(
            _Neuron(
                address=sites[which].address(i - first, int(ends[which]) - first),
                auroc=float(auroc[i]),
                error=float(error[i]),
                held_out=None if held_out is None else float(held_out[i]),
                q=float(q[i]),
                effect_size=float(effect[i]) if math.isfinite(effect[i]) else None,
            )
        )
    return tuple(top)


def _pools(evidence: Evidence, record: Mapping[str, Any]) -> list[_Pool]:
    made = []
    for row, (pool, sure) in enumerate(zip(evidence.pools, record["pools"], strict=True)):
        if not min(evidence.samples[row]):
            continue  # it says nothing
        noise = sure["noise"]
        q, both = sure["false_discovery_rate"], evidence.held_out is not None
        made.append(
            _Pool(
                sure=sure,
                what=_SPANS[pool.span],
                histogram=histogram(
                    evidence, row, selected=sure["selected"], noise=(noise["low"], noise["high"]) if noise else None
                ),
                heat=heat_map(Selection.fdr(evidence, pool, q, held_out=both)),
                top=_top(evidence, row),
                by_noise=noise["beyond"] * noise["neurons"] if noise and noise["beyond"] is not None else None,
            )
        )
    return made


def again(stability: Mapping[str, Any] | None) -> str:
    """Write how many would be found again: ``96 % (93–98)``, ``about 96 %`` without an interval."""
    if stability is None:
        return ""
    share = f"{100 * stability['found_again']:.0f}\u00a0%"
    if stability["low"] is None:
        return f"about {share}"
    return f"{share} ({100 * stability['low']:.0f}–{100 * stability['high']:.0f})"


def headline(pools: Sequence[_Pool], neurons: int, *, held_out: bool) -> str:
    """Say in one sentence what was found, by the pool that selected most."""
    if not pools:
        return f"Nothing can be said of {neurons:,} neurons: no way of pooling has examples of both classes."
    best = max(pools, key=lambda pool: pool.sure["selected"])
    n, rate = best.sure["selected"], best.sure["false_discovery_rate"]
    if not n:
        return f"None of {neurons:,} neurons tells toxic from non-toxic {best.what} beyond chance (FDR {rate:.0%})."
    unseen = ", on unseen examples too" if held_out else ""
    found = again(best.sure["stability"])
    return (
        f"{n:,} of {neurons:,} neurons tell{'s' * (n == 1)} toxic from non-toxic {best.what}{unseen}"
        + (f"; {found} of them would be found again" if found else "")
        + "."
    )


def _chips(pools: Sequence[_Pool], lights: Sequence[Any], *, held_out: bool) -> list[Chip]:
    """Grade the pool that selected most, and the confounds."""
    chips = []
    best = max(pools, key=lambda pool: pool.sure["selected"], default=None)
    if best is not None and best.sure["selected_before_held_out"]:
        before, after, stability = (best.sure[k] for k in ("selected_before_held_out", "selected", "stability"))
        name = best.sure["pool"]
        if held_out:
            label = {"good": "Holds on unseen examples", "watch": "Part fails on unseen examples"}
            level = grade(1 - after / before, LOST)
            why = f"{name}: {after:,} of {before:,} lie above 0.5 on held-out examples too (good from 90 %)."
            chips.append(Chip(level, label.get(level, "Much fails on unseen examples"), why))
        else:
            chips.append(Chip("unknown", "No unseen examples", "The calibrate split does not hold both classes."))
        if stability is not None:
            level = grade(1 - stability["found_again"], LOST)
            label = {"good": "Would be found again", "watch": "Part would not be found again"}
            why = f"{name}: {again(stability)} reach the cutoff in other data of the same kind (good from 90 %)."
            chips.append(Chip(level, label.get(level, "Much would not be found again"), why))
        if best.by_noise is not None and after:
            level = grade(best.by_noise / after, NOISE)
            label = {"good": "Far beyond noise", "watch": "Near noise"}.get(level, "Hardly beyond noise")
            why = f"{name}: noise brings {best.by_noise:,.0f} neurons as far, {after:,} were selected (good to 5 %)."
            chips.append(Chip(level, label, why))
    return [*chips, confound_chip(lights, "lengths, sources and the like tell")]


def _explained(pools: Sequence[_Pool]) -> dict[str, list[Mapping[str, Any] | None]]:
    """Per confound what it explains in each pool; None where it was not compared."""
    found = [{entry["confound"]: entry for entry in pool.sure["explained"]} for pool in pools]
    names = dict.fromkeys(name for entries in found for name in entries)
    return {name: [entries.get(name) for entries in found] for name in names}


def _loading(evidence: Evidence, pools: Sequence[_Pool]) -> Snippet:
    names = [pool.sure["pool"] for pool in pools] or [str(pool) for pool in evidence.pools]
    options = "" if evidence.held_out is not None else ", held_out=False"
    lines = [
        "import safeglasses",
        "",
        'evidence = safeglasses.Evidence.load("evidence.safetensors")',
        f"pool = safeglasses.Pool.parse({names[-1]!r})",
        f"experts = safeglasses.Selection.fdr(evidence, pool, 0.05{options})",
        "for site, aurocs in evidence.auroc.items():",
        "    aurocs[evidence.row(pool)]               # one number per neuron of the site",
        "    experts.masks[site]                      # which of them count as experts",
    ]
    if "effect_size" in evidence.columns:
        lines.append('    evidence.columns["effect_size"][site]    # pool × neuron, like evidence.auroc[site]')
    return Snippet("load it in Python", "python", "\n".join(lines), "Start in the folder of this page.")


def _context(evidence: Evidence, record: Mapping[str, Any], pools: Sequence[_Pool]) -> dict[str, Any]:
    held_out = evidence.held_out is not None
    lights = confounds({"confounds": {row["name"]: row["auroc"] for row in record["confounds"]}})
    silent = [str(pool) for pool, counts in zip(evidence.pools, evidence.samples, strict=True) if not min(counts)]
    names = {"auroc": _MEANINGS["auroc"]}
    if held_out:
        names["held_out"] = "AUROC on the calibrate split"
    ordered = [
        *(name for name in _MEANINGS if name in evidence.columns),
        *(n for n in evidence.columns if n not in _MEANINGS),
    ]
    names |= {name: _MEANINGS.get(name, "") for name in ordered}
    if evidence.weight_norms:
        names["weight_norms"] = "length of each neuron's outgoing weights, at input sites"
    return {
        "record": record,
        "headline": headline(pools, record["neurons"], held_out=held_out),
        "chips": _chips(pools, lights, held_out=held_out),
        "pools": pools,
        "silent": silent,
        "held_out": held_out,
        "again": again,
        "method": next((p.sure["stability"]["method"] for p in pools if p.sure["stability"]), None),
        "confounds": list(zip(lights, record["confounds"], strict=True)),
        "explained": _explained(pools),
        "statistics": names,
        "sha256": evidence.source_sha256,
        "snippet": _loading(evidence, pools),
    }


def render_evidence(evidence: Evidence, record: Mapping[str, Any]) -> str:
    """Return the page; the same evidence and record give the same text.

    Args:
        evidence: what was measured.
        record: the content of ``evidence.json``.
    """
    pools = _pools(evidence, record)
    figures: dict[str, Figure] = {}
    for i, pool in enumerate(pools):
        figures[f"auroc-{i}"] = maps.auroc(pool.histogram)
        figures[f"experts-{i}"] = maps.experts_map(pool.heat)
    return fill("evidence.html.j2", figures, _context(evidence, record, pools))


def write_evidence_page(evidence: Evidence, record: Mapping[str, Any], path: Path) -> Path:
    """Write the page atomically and return its path; see `render_evidence`."""
    atomic_write_text(path, render_evidence(evidence, record))
    return path
