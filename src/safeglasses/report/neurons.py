"""Safety neurons for people: how many, where, how sure; and heat maps of how far their sets overlap."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from safeglasses.data.probes import RISKS, Cell
from safeglasses.report.plotting import Figure, axis, layout

if TYPE_CHECKING:
    from safeglasses.find.contrast import Contrast
    from safeglasses.find.rules import RuleName

_NUMBERS_UP_TO = 16
"""Columns up to which cells carry numbers."""
Shares = Sequence[Sequence[float | None]]


def neuron_table(contrast: "Contrast", rule: "RuleName | None" = None) -> dict[str, Any]:
    """Return what was found by a rule, JSON-ready: per cell and layer, and what cells have in common.

    ``shared``: neurons that both risk types of a language have; ``multilingual``: One Anchor's set, with the first
    language as the anchor (None with one language or one risk type).
    """
    by = contrast.rule(rule)
    sets, sure = contrast.sets(by.name), contrast.certainty.get(by.name, {})
    widths = [len(norm) for norm in contrast.weight_norms.values()]
    cells = []
    for cell, (harmful, benign) in zip(contrast.cells, contrast.prompts, strict=True):
        known = sure.get(str(cell), {})
        blocks: dict[tuple[int, str], dict[str, int]] = {}
        for row in sets[cell].table():
            block = blocks.setdefault((row["layer"], row["kind"]), {"layer": row["layer"], "found": 0, "neurons": 0})
            block["found"], block["neurons"] = block["found"] + row["selected"], block["neurons"] + row["neurons"]
        cells.append(
            {
                "cell": str(cell),
                "language": cell.language,
                "modality": cell.risk,
                "harmful": harmful,
                "benign": benign,
                "k": known.get("k", sum(by.k(width) for width in widths)),
                "found": len(sets[cell]),
                **{name: known.get(name) for name in ("found_share", "noise", "found_at_half", "stability")},
                "layers": list(blocks.values()),
            }
        )
    both = [language for language in contrast.languages if {Cell(language, r) for r in RISKS} <= set(contrast.cells)]
    anchored = len(both) > 1 and both == list(contrast.languages)
    return {
        "rule": by.record(),
        "tokens": contrast.tokens,
        "base_fingerprint": contrast.base_fingerprint,
        "neurons": sum(widths),
        "cells": cells,
        "shared": {language: len(contrast.shared(language, by.name)) for language in both},
        "multilingual": (
            {"anchor": both[0], "neurons": len(contrast.multilingual(by.name, anchor=both[0]))} if anchored else None
        ),
        "union": len(contrast.union(by.name)),
        "left_out_layers": list(contrast.left_out),
    }


def overlap_map(record: Mapping[str, Any], measure: str = "directional") -> Figure:
    """Draw what share of each set (down) another one (across) holds, over all layers.

    Args:
        record: of `Atlas.record`.
        measure: ``directional`` or ``jaccard``.
    """
    names = [entry["name"] for entry in record["sets"]]
    chance = record["random"]["directional"]

    def hover(i: int, j: int) -> str:
        a, b = html.escape(names[i]), html.escape(names[j])
        if i == j:
            return f"{a}<br>{record['sets'][i]['neurons']:,} neurons"
        lines = [f"{a} → {b}", f"{record['common'][i][j]:,} of {record['sets'][i]['neurons']:,} neurons"]
        if chance["mean"][i][j] is not None:
            low, mean, high = (_percent(chance[name][i][j]) for name in ("low", "mean", "high"))
            lines.append(f"random sets: {mean} ({low}–{high})")
        idle = record["idle"]
        if idle is not None and idle[i][j] is not None:
            lines.append(f"sets about nothing: {_percent(idle[i][j])}")
        return "<br>".join(lines)

    shares = [[None if i == j else value for j, value in enumerate(row)] for i, row in enumerate(record[measure])]
    texts = [[hover(i, j) for j in range(len(names))] for i in range(len(names))]
    return _heat(shares, texts, rows=names, columns=names, title="")


def layers_map(record: Mapping[str, Any]) -> Figure:
    """Draw per set and layer the mean share of it that the sets of other languages and the same risk type hold."""
    names = [entry["name"] for entry in record["sets"]]
    cells = [Cell.parse(name) for name in names]
    shares: list[list[float | None]] = []
    texts: list[list[str]] = []
    for i, cell in enumerate(cells):
        others = [j for j, other in enumerate(cells) if other.risk == cell.risk and other.language != cell.language]
        row: list[float | None] = []
        said: list[str] = []
        for layer in record["by_layer"]:
            known = [layer["directional"][i][j] for j in others if layer["directional"][i][j] is not None]
            mean = sum(known) / len(known) if known else None
            random = [share for j in others if (share := layer["random_directional"][i][j]) is not None]
            row.append(mean)
            said.append(
                f"layer {layer['layer']}<br>{html.escape(names[i])}<br>held by other languages: {_percent(mean)}"
                + (f"<br>random sets: {_percent(sum(random) / len(random))}" if random else "")
            )
        shares.append(row)
        texts.append(said)
    layers = [str(layer["layer"]) for layer in record["by_layer"]]
    return _heat(shares, texts, rows=names, columns=layers, title="decoder layer")


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def _heat(
    shares: Shares, texts: Sequence[Sequence[str]], *, rows: Sequence[str], columns: Sequence[str], title: str
) -> Figure:
    numbers = len(columns) <= _NUMBERS_UP_TO
    trace = {
        "type": "heatmap",
        "z": [[None if v is None else 100 * v for v in row] for row in shares],
        "text": [list(row) for row in texts],
        "hovertemplate": "%{text}<extra></extra>",
        "hoverongaps": False,
        "colorscale": [[0, "@cell"], [1, "@expert"]],
        "zmin": 0,
        "zmax": 100,
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
            "font": {"size": 11, "color": "@on-strong" if v > 0.55 else "@ink"},
        }
        for i, row in enumerate(shares)
        for j, v in enumerate(row)
        if numbers and v is not None
    ]
    every = max(1, math.ceil(len(columns) / 16))
    plain = {"showgrid": False, "zeroline": False, "showline": False, "ticks": ""}
    xaxis = axis(
        title,
        tickvals=list(range(0, len(columns), every)),
        ticktext=[html.escape(name) for name in columns[::every]],
        **plain,
    )
    yaxis = axis(
        tickvals=list(range(len(rows))),
        ticktext=[html.escape(name) for name in rows],
        autorange="reversed",
        tickfont={"family": "ui-monospace, monospace", "size": 12},
        **plain,
    )
    return {"data": [trace], "layout": layout(110 + 26 * len(rows), xaxis, yaxis, annotations=notes)}
