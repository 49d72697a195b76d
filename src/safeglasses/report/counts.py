"""Count neurons for the figures: by layer and module, and by AUROC."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from safeglasses.find.evidence import Aurocs, Evidence
from safeglasses.find.selection import Selection
from safeglasses.model.sites import Site
from safeglasses.report.record import Grid, HeatMap, Histogram

BINS = 64
"""Of an AUROC distribution, from 0 to 1."""


def heat_map(selected: Selection, factors: Mapping[Site, Float[Tensor, " _neuron"]] | None = None) -> HeatMap:
    """Count neurons, experts and changes per module kind and layer.

    Args:
        selected: the experts.
        factors: what neurons are multiplied by, if glasses were made; a site that is missing is left alone.
    """
    sites = list(selected.masks)
    kinds = tuple(dict.fromkeys(site.kind for site in sites))
    layers = tuple(sorted({site.layer for site in sites}))

    def grid(amounts: Mapping[Site, float]) -> Grid:
        cells = [[0.0] * len(layers) for _ in kinds]
        for site, amount in amounts.items():
            cells[kinds.index(site.kind)][layers.index(site.layer)] += amount
        return tuple(tuple(row) for row in cells)

    inside = {site: row for site, row in (factors or {}).items() if site in selected.masks}
    return HeatMap(
        kinds=kinds,
        layers=layers,
        total=grid({site: float(len(mask)) for site, mask in selected.masks.items()}),
        experts=grid({site: float(mask.sum()) for site, mask in selected.masks.items()}),
        changed=None if factors is None else grid({site: float((row != 1).sum()) for site, row in inside.items()}),
        strength=None if factors is None else grid({site: float((1 - row).sum()) for site, row in inside.items()}),
    )


def histogram(
    evidence: Evidence, row: int, *, selected: int | None = None, noise: tuple[float, float] | None = None
) -> Histogram:
    """Count neurons by AUROC.

    Args:
        evidence: what was measured.
        row: index of the pool.
        selected: how many neurons it selected, if that is to be said.
        noise: see `Histogram.noise`.
    """
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)
    return Histogram(
        pool=str(evidence.pools[row]),
        edges=tuple(edges.tolist()),
        counts=_counts(evidence.auroc, row, edges),
        n_toxic=evidence.samples[row][0],
        n_non_toxic=evidence.samples[row][1],
        n_selected=selected,
        held_out=_counts(evidence.held_out, row, edges) if evidence.held_out is not None else None,
        noise=noise,
    )


def telling(evidence: Evidence) -> Sequence[int]:
    """Number the pools that say something: those with samples of both classes."""
    return [row for row, counts in enumerate(evidence.samples) if min(counts)]


def _counts(auroc: Aurocs, row: int, edges: Float[Tensor, " edge"]) -> tuple[int, ...]:
    values = torch.cat([values[row].double().cpu() for values in auroc.values()])
    return tuple(int(n) for n in torch.histogram(values, edges).hist)
