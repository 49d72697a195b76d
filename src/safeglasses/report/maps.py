"""Figures of evidence: where experts lie, and how their AUROC is distributed."""

import html
import math
from itertools import pairwise

from safeglasses.errors import SafeglassesError
from safeglasses.report.plotting import LEGEND, Figure, axis, layout, short_kind
from safeglasses.report.record import Grid, HeatMap, Histogram

_FLOOR = 0.5
"""Lower end of a logarithmic axis of counts."""
_NUMBERS_UP_TO = 8
"""Layers up to which the cells carry numbers; beyond, a colour bar explains them."""


def _cells(heat: HeatMap, shares: tuple[tuple[float | None, ...], ...], what: str) -> list[list[str]]:
    """Write what hovering over each cell says."""
    changed = heat.changed

    def turned(i: int, j: int) -> str:
        return "" if changed is None else f", {changed[i][j]:,.0f} changed"

    return [
        [
            f"layer {_number(layer)}<br>{html.escape(kind)}<br>{heat.experts[i][j]:,.0f} experts"
            f"{turned(i, j)} of {heat.total[i][j]:,.0f}<br>"
            f"{what}: {100 * (shares[i][j] or 0):.1f} %"
            for j, layer in enumerate(heat.layers)
        ]
        for i, kind in enumerate(heat.kinds)
    ]


def _number(layer: int) -> str:
    """Write the number of a layer; a projector is in none."""
    return "–" if layer < 0 else str(layer)


def _heat(heat: HeatMap, grid: Grid, what: str, colour: str) -> Figure:
    shares = heat.share(grid)
    flat = [v for row in shares for v in row if v is not None]
    top = max((abs(v) for v in flat), default=0) or 1
    turned_up = min(flat, default=0) < -1e-9
    numbers = len(heat.layers) <= _NUMBERS_UP_TO
    trace = {
        "type": "heatmap",
        "z": [[None if v is None else 100 * v for v in row] for row in shares],
        "text": _cells(heat, shares, what),
        "hovertemplate": "%{text}<extra></extra>",
        "hoverongaps": False,
        "colorscale": [[0, "@none"], [0.5, "@cell"], [1, colour]] if turned_up else [[0, "@cell"], [1, colour]],
        "zmin": -100 * top if turned_up else 0,
        "zmax": 100 * top,
        "xgap": 2,
        "ygap": 2,
        "showscale": not numbers,
        "colorbar": {"thickness": 10, "outlinewidth": 0, "ticksuffix": " %", "tickfont": {"size": 11}},
    }
    notes = [
        {
            "x": j,
            "y": i,
            "text": f"{100 * v:.0f}",
            "showarrow": False,
            "font": {"size": 12, "color": "@on-strong" if abs(v) > 0.55 * top else "@ink"},
        }
        for i, row in enumerate(shares)
        for j, v in enumerate(row)
        if numbers and v is not None
    ]
    every = max(1, math.ceil(len(heat.layers) / 16))
    plain = {"showgrid": False, "zeroline": False, "showline": False, "ticks": ""}
    xaxis = axis(
        "decoder layer",
        tickvals=list(range(0, len(heat.layers), every)),
        ticktext=[_number(layer) for layer in heat.layers[::every]],
        **plain,
    )
    yaxis = axis(
        tickvals=list(range(len(heat.kinds))),
        ticktext=[html.escape(short_kind(kind)) for kind in heat.kinds],
        autorange="reversed",
        tickfont={"family": "ui-monospace, monospace", "size": 12},
        **plain,
    )
    return {"data": [trace], "layout": layout(80 + 32 * len(heat.kinds), xaxis, yaxis, annotations=notes)}


def experts_map(heat: HeatMap) -> Figure:
    """Draw which share of each cell's neurons the evidence selected."""
    return _heat(heat, heat.experts, "experts", "@expert")


def strength_map(heat: HeatMap) -> Figure:
    """Draw by how much each cell is turned down on average; turned up shows in the other hue.

    Raises:
        SafeglassesError: nothing was turned down yet.
    """
    if heat.strength is None:
        raise SafeglassesError("there is no strength to draw", given="a map of evidence alone", do="draw experts_map")
    return _heat(heat, heat.strength, "turned down by, on average", "@glasses")


def _bars(histogram: Histogram, middles: list[float], width: float) -> list[Figure]:
    """Draw the counts, those above 0.5 in the experts' colour, and the held-out counts as a line."""
    traces: list[Figure] = [
        {
            "type": "bar",
            "name": name,
            "x": [m for m in middles if (m > 0.5) == above],
            "y": [c or None for c, m in zip(histogram.counts, middles, strict=True) if (m > 0.5) == above],
            "width": 0.88 * width,
            "marker": {"color": colour, "line": {"width": 0}},
            "hovertemplate": "AUROC %{x:.3f}: %{y:,} neurons<extra></extra>",
        }
        for name, colour, above in (
            ("fire more on harmless", "@quiet", False),
            ("on toxic", "@expert", True),
        )
    ]
    if histogram.held_out is not None:
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": "on held-out",
                "line": {"shape": "hvh", "color": "@null", "width": 1.4},
                "x": middles,
                "y": [c or None for c in histogram.held_out],
                "hovertemplate": "held-out %{x:.3f}: %{y:,}<extra></extra>",
            }
        )
    return traces


def _chance(density: dict[float, float]) -> Figure:
    """Draw what as many neurons that know nothing would show."""
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "by chance",
        "line": {"color": "@none", "width": 2.5, "dash": "6px,3px"},
        "x": list(density),
        "y": list(density.values()),
        "hoverinfo": "skip",
    }


def _noise(ends: tuple[float, float], top: float) -> Figure:
    """Mark how far neurons get where there is nothing to find; measured, unlike `_chance`."""
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "99.8 % of noise",
        "line": {"color": "@aura", "width": 2, "dash": "2px,3px"},
        "x": [ends[0], ends[0], None, ends[1], ends[1]],
        "y": [_FLOOR, top, None, _FLOOR, top],
        "hovertemplate": "noise reaches %{x:.3f}<extra></extra>",
    }


def auroc(histogram: Histogram) -> Figure:
    """Draw one AUROC distribution on a log scale with the null density for the same sample sizes, and the noise."""
    edges, sd = histogram.edges, histogram.null_sd or 0.0
    width = edges[1] - edges[0]
    used = [i for i, c in enumerate(histogram.counts) if c] or [0]
    low = max(0.0, min(edges[used[0]], 0.5 - 4 * sd) - width)
    high = min(1.0, max(edges[used[-1] + 1], 0.5 + 4 * sd) + width)
    traces = _bars(histogram, [(a + b) / 2 for a, b in pairwise(edges)], width)
    peak = float(max(*histogram.counts, 1))
    if sd:
        density = {0.5 + sd * z / 20: math.exp(-z * z / 800) for z in range(-90, 91)}
        top = sum(histogram.counts) * width / (sd * math.sqrt(2 * math.pi))
        drawn = {x: top * y for x, y in density.items() if top * y >= 0.5 and low <= x <= high}
        traces.append(_chance(drawn))
        peak = max(peak, top)
    if histogram.noise is not None:
        traces.append(_noise(histogram.noise, peak))
    span = [math.log10(_FLOOR), math.log10(peak) + 0.2]
    return {
        "data": traces,
        "layout": layout(
            310 if histogram.noise is None else 340,  # one more line of legend
            axis("AUROC", range=[low, high], dtick=0.1, tickformat=".1f", showgrid=False, ticks="outside"),
            axis(
                "neurons per bin",
                type="log",
                range=span,
                dtick=1,
                tickformat=",d",
            ),
            bargap=0,
            showlegend=True,
            legend={**LEGEND, "font": {"size": 12}},
        ),
    }
