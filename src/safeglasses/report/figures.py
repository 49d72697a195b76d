"""Figures of results: harm before and after, and what calibration had to choose from."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from safeglasses.report.plotting import LEGEND, NAMES, Figure, axis, layout
from safeglasses.report.record import TradeOff, Trial
from safeglasses.report.schema import DEFENCES
from safeglasses.report.summary import bands, row_of

_SYMBOLS = {"none": "circle-open", "aura": "diamond", "sgm": "square", "glasses": "circle"}
_SPREAD = 0.32
"""Half the height, in bands, over which the defences of one band are spread."""


@dataclass(frozen=True)
class _Point:
    """One harmful rate and where it is drawn."""

    y: float
    """Height, in bands from the top."""
    where: str
    """Condition and decoding, for hovering."""
    rate: Mapping[str, Any]
    """The summary's rate."""


def _points(summary: Mapping[str, Any], drawn: Sequence[tuple[str, str]]) -> dict[str, list[_Point]]:
    """Find each defence's points in the bands."""
    present = [d for d in DEFENCES if any(r["defence"] == d and r["harmful_rate"] for r in summary["rows"])]
    found: dict[str, list[_Point]] = {d: [] for d in present}
    for band, (condition, decoding) in enumerate(drawn):
        for rank, defence in enumerate(present):
            row = row_of(summary, defence, condition, decoding)
            if row is not None and row["harmful_rate"]:
                y = band + _SPREAD * (2 * rank / max(1, len(present) - 1) - 1)
                found[defence].append(_Point(y, f"{condition}, {decoding}", row["harmful_rate"]))
    return found


def _markers(defence: str, points: Sequence[_Point]) -> Figure:
    colour = f"@{defence}"
    return {
        "type": "scatter",
        "mode": "markers",
        "name": NAMES[defence],
        "x": [100 * p.rate["value"] for p in points],
        "y": [p.y for p in points],
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [100 * (p.rate["high"] - p.rate["value"]) for p in points],
            "arrayminus": [100 * (p.rate["value"] - p.rate["low"]) for p in points],
            "color": colour,
            "thickness": 2,
            "width": 5,
        },
        "marker": {
            "color": colour,
            "size": 9,
            "symbol": _SYMBOLS[defence],
            "line": {"width": 2, "color": colour},
        },
        "text": [
            f"{p.where}<br>{100 * p.rate['value']:.1f} % "
            f"({100 * p.rate['low']:.1f}–{100 * p.rate['high']:.1f})<br>"
            f"{p.rate['n']:,} answers, {p.rate['unscored']:,} unscored"
            for p in points
        ],
        "hovertemplate": "%{text}<extra>%{fullData.name}</extra>",
        "cliponaxis": False,
    }


def _bars(defence: str, points: Sequence[_Point], width: float) -> Figure:
    """Draw pale bars from 0 to the markers, so that lengths can be compared."""
    return {
        "type": "bar",
        "orientation": "h",
        "x": [100 * p.rate["value"] for p in points],
        "y": [p.y for p in points],
        "width": width,
        "marker": {"color": f"@{defence}", "opacity": 0.22, "line": {"width": 0}},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def harm(summary: Mapping[str, Any]) -> Figure | None:
    """Draw harmful rates with 95 % whiskers, a band per condition and decoding; None if there are none."""
    drawn = bands(summary)
    if not drawn:
        return None
    found = _points(summary, drawn)
    rule = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "line": {"color": "@line", "width": 1}}
    highest = max(100 * p.rate["high"] for points in found.values() for p in points)
    return {
        "data": [
            *(_bars(defence, points, 0.5 / len(found)) for defence, points in found.items()),
            *(_markers(defence, points) for defence, points in found.items()),
        ],
        "layout": layout(
            80 + len(drawn) * (20 + 14 * len(found)),
            axis("answers judged harmful", range=[-0.015 * highest, 1.04 * highest], ticksuffix=" %"),
            axis(
                tickvals=list(range(len(drawn))),
                ticktext=[f"<b>{condition}</b><br>{decoding}" for condition, decoding in drawn],
                range=[len(drawn) - 0.5, -0.5],
                showgrid=False,
                zeroline=False,
            ),
            showlegend=True,
            legend=LEGEND,
            barmode="overlay",
            shapes=[{**rule, "y0": i + 0.5, "y1": i + 0.5} for i in range(len(drawn) - 1)],
        ),
    }


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the Pareto front's indices, by first coordinate; lower is better in both."""
    best, kept = math.inf, []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if points[i][1] < best:
            best = points[i][1]
            kept.append(i)
    return kept


def trade_off(record: TradeOff, cost: Literal["damage", "utility_lost", "kl"]) -> Figure | None:
    """Draw every candidate's harm against a cost, with the Pareto front and the chosen one.

    Args:
        record: the candidates.
        cost: ``damage`` or ``utility_lost`` (drawn in points), or ``kl`` (nats).

    Returns:
        None where the chosen candidate has no such cost.
    """
    lost = cost != "kl"
    scale = 100 if lost else 1
    values: list[float | None] = [getattr(trial, cost) for trial in record.trials]
    known = {i: scale * v for i, v in enumerate(values) if v is not None}
    if record.chosen not in known:
        return None
    xs, ys = list(known.values()), [100 * record.trials[i].harm for i in known]
    names = [html.escape(record.trials[i].name) for i in known]
    best, chosen = front(list(zip(xs, ys, strict=True))), list(known).index(record.chosen)
    hover = f"%{{text}}<br>harm %{{y:.1f}} %<br>{'lost' if lost else 'KL'} %{{x:.2f}}<extra></extra>"
    dots = {"type": "scatter", "mode": "markers", "hovertemplate": hover}
    traces = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "Pareto front",
            "x": [xs[i] for i in best],
            "y": [ys[i] for i in best],
            "line": {"color": "@quiet", "width": 2, "shape": "hv"},
            "hoverinfo": "skip",
        },
        {
            **dots,
            "name": "candidate",
            "x": xs,
            "y": ys,
            "text": names,
            "marker": {"color": "@cell", "size": 9, "line": {"color": "@sgm", "width": 2}},
            **(_whiskers([record.trials[i] for i in known]) if cost == "damage" else {}),
        },
        {
            **dots,
            "name": "chosen",
            "x": [xs[chosen]],
            "y": [ys[chosen]],
            "text": [names[chosen]],
            "marker": {"color": "@glasses", "size": 16, "symbol": "star"},
            "cliponaxis": False,
        },
    ]
    if record.limit is not None:
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": "limit",
                "x": [min(xs), max(xs)],
                "y": [100 * record.limit] * 2,
                "line": {"color": "@none", "width": 2, "dash": "dot"},
                "hoverinfo": "skip",
            }
        )
    top = max(*ys, 1.0)
    pad = 0.08 * ((max(xs) - min(xs)) or 1)
    title = {
        "damage": "damage: the worst loss in units of its guard, points",
        "utility_lost": "utility lost in the worst slot, points",
        "kl": "KL from the untouched model, nats",
    }[cost]
    return {
        "data": traces,
        "layout": layout(
            360,
            axis(title, range=[min(xs) - pad, max(xs) + pad]),
            axis("harmful answers", range=[-0.04 * top, 1.08 * top], ticksuffix=" %"),
            showlegend=True,
            legend=LEGEND,
        ),
    }


def _whiskers(trials: Sequence[Trial]) -> Figure:
    """One standard error in both directions, where they are known."""
    errors = [trial.errors or (0.0, 0.0) for trial in trials]
    bars = {"type": "data", "color": "@sgm", "thickness": 1, "width": 3}
    return {
        "error_x": {**bars, "array": [100 * damage for _, damage in errors]},
        "error_y": {**bars, "array": [100 * harm for harm, _ in errors]},
    }
