"""One page for what compares several things: a headline, lights, and sections of tables and figures."""

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safeglasses.files import atomic_write_text
from safeglasses.report.page import fill
from safeglasses.report.plotting import LEGEND, Figure, axis, layout
from safeglasses.report.status import Chip


@dataclass(frozen=True)
class Cell:
    """A number and what stands beside it, small: its interval, its count."""

    text: str
    """What is read first."""
    beside: str = ""
    """Interval or count."""


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head; the first column names the row."""

    head: tuple[str, ...]
    """Column titles, that of the first column included."""
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    """Name of each row, and its cells."""
    strong: frozenset[str] = frozenset()
    """Names of rows that stand out."""


@dataclass(frozen=True)
class Card:
    """Texts of a model about one prompt, covered until a reader wants to see them."""

    id: str
    """Of the prompt."""
    tags: tuple[str, ...]
    """What stands beside it."""
    asked: str
    """The prompt."""
    texts: tuple[tuple[str, str], ...]
    """Heading and text, side by side."""


@dataclass(frozen=True)
class Section:
    """A part of the page: text, then a table, then figures side by side."""

    id: str
    """Anchor, and the link in the bar: one word."""
    title: str
    """Heading."""
    lead: str
    """What is shown, and how to read it."""
    table: Table | None = None
    """Shown above the figures."""
    figures: tuple[tuple[str, Figure], ...] = ()
    """Caption and figure."""
    cards: tuple[Card, ...] = ()
    """Shown below the figures."""
    small: str = ""
    """What a careful reader wants to know."""


@dataclass(frozen=True)
class Study:
    """Everything on the page; plain text and numbers."""

    kind: str
    """What it is: ``Ablation``."""
    subject: str
    """The model."""
    headline: str
    """One sentence that says what came out."""
    chips: tuple[Chip, ...]
    """Traffic lights."""
    sections: tuple[Section, ...]
    """In order."""
    facts: Mapping[str, str]
    """How it was made: name and value."""
    limits: tuple[str, ...]
    """What it does not say."""


def render_study(study: Study) -> str:
    """Return the page; the same record gives the same text."""
    figures = {
        f"{section.id}-{i}": figure for section in study.sections for i, (_, figure) in enumerate(section.figures)
    }
    covered = any(section.cards for section in study.sections)
    return fill("study.html.j2", figures, {"study": study, "covered": covered})


def write_study(study: Study, path: Path) -> Path:
    """Write the page atomically and return its path."""
    atomic_write_text(path, render_study(study))
    return path


def _escaped(names: Iterable[str]) -> list[str]:
    return [html.escape(name) for name in names]  # plotly would read their markup


def rate_cell(rate: Mapping[str, Any] | None) -> Cell:
    """Write a rate as ``48.3 %`` with its interval beside it; an en dash for None."""
    if rate is None:
        return Cell("–")
    return Cell(f"{100 * rate['value']:.1f}\u00a0%", f"{100 * rate['low']:.1f}–{100 * rate['high']:.1f}")


def grid_figure(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], *, what: str, colour: str
) -> Figure:
    """Draw shares (0 to 1) as a heat map with the percentage in each cell.

    Args:
        rows: names, from above.
        columns: names, from the left.
        values: one row each; None leaves a hole.
        what: said on hovering.
        colour: token of the strongest cell.
    """
    flat = [v for row in values for v in row if v is not None]
    top = max(flat, default=0) or 1
    plain = {"showgrid": False, "zeroline": False, "showline": False, "ticks": ""}
    notes = [
        {
            "x": j,
            "y": i,
            "text": f"{100 * v:.0f}",
            "showarrow": False,
            "font": {"size": 12, "color": "@on-strong" if v > 0.55 * top else "@ink"},
        }
        for i, row in enumerate(values)
        for j, v in enumerate(row)
        if v is not None and len(flat) <= 400
    ]
    trace = {
        "type": "heatmap",
        "z": [[None if v is None else 100 * v for v in row] for row in values],
        "hovertemplate": f"%{{y}} → %{{x}}<br>{what}: %{{z:.1f}} %<extra></extra>",
        "hoverongaps": False,
        "colorscale": [[0, "@cell"], [1, colour]],
        "zmin": 0,
        "zmax": 100 * top,
        "xgap": 2,
        "ygap": 2,
        "showscale": not notes,
        "colorbar": {"thickness": 10, "outlinewidth": 0, "ticksuffix": " %", "tickfont": {"size": 11}},
    }
    xaxis = axis(tickvals=list(range(len(columns))), ticktext=_escaped(columns), side="top", tickangle=-35, **plain)
    yaxis = axis(tickvals=list(range(len(rows))), ticktext=_escaped(rows), autorange="reversed", **plain)
    longest = max(map(len, columns), default=0)
    top_margin = 24 + round(4.2 * longest)  # of slanted labels, which plotly does not make room for
    margin = {"l": 8, "r": 48, "t": top_margin, "b": 8, "autoexpand": True}
    height = top_margin + 40 + 28 * len(rows)
    return {"data": [trace], "layout": layout(height, xaxis, yaxis, annotations=notes, margin=margin)}


def rates_figure(rates: Sequence[tuple[str, Mapping[str, Any] | None, str]], *, title: str) -> Figure:
    """Draw rates with their intervals, one line each.

    Args:
        rates: name, rate and colour token, from above; those without a rate are left out.
        title: of the axis.
    """
    known = [(name, rate, colour) for name, rate, colour in rates if rate is not None]
    highest = max((100 * rate["high"] for _, rate, _ in known), default=1.0) or 1.0
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "x": [100 * rate["value"]],
            "y": [i],
            "error_x": {
                "type": "data",
                "symmetric": False,
                "array": [100 * (rate["high"] - rate["value"])],
                "arrayminus": [100 * (rate["value"] - rate["low"])],
                "color": colour,
                "thickness": 2,
                "width": 5,
            },
            "marker": {"color": colour, "size": 9},
            "hovertemplate": f"%{{x:.1f}} % ({100 * rate['low']:.1f}–{100 * rate['high']:.1f})<extra></extra>",
            "cliponaxis": False,
        }
        for i, (_, rate, colour) in enumerate(known)
    ]
    xaxis = axis(title, range=[-0.02 * highest, 1.04 * highest], ticksuffix=" %")
    yaxis = axis(
        tickvals=list(range(len(known))),
        ticktext=_escaped(name for name, _, _ in known),
        range=[len(known) - 0.5, -0.5],
        showgrid=False,
        zeroline=False,
    )
    return {"data": traces, "layout": layout(80 + 26 * len(known), xaxis, yaxis)}


def curve_figure(
    curves: Sequence[tuple[str, str, Sequence[tuple[float, Mapping[str, Any]]]]], *, x: str, y: str
) -> Figure:
    """Draw rates over a dose, with their intervals.

    Args:
        curves: name, colour token, and dose with rate.
        x: title of the dose.
        y: title of the rate.
    """
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": html.escape(name),
            "x": [dose for dose, _ in points],
            "y": [100 * rate["value"] for _, rate in points],
            "error_y": {
                "type": "data",
                "symmetric": False,
                "array": [100 * (rate["high"] - rate["value"]) for _, rate in points],
                "arrayminus": [100 * (rate["value"] - rate["low"]) for _, rate in points],
                "color": colour,
                "thickness": 1.5,
                "width": 4,
            },
            "line": {"color": colour, "width": 2},
            "marker": {"color": colour, "size": 8},
        }
        for name, colour, points in curves
    ]

    return {
        "data": traces,
        "layout": layout(
            340, axis(x), axis(y, ticksuffix=" %", rangemode="tozero"), showlegend=len(traces) > 1, legend=LEGEND
        ),
    }
