"""Tables and figures of an attack's page: attacks from above, a column per stack."""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from safeglasses.report.grid_page import BASE, points_cell, short
from safeglasses.report.plotting import LEGEND, Figure, axis, layout
from safeglasses.report.study import Cell, Table, grid_figure, rate_cell

COLOURS = ("@glasses", "@sgm", "@aura", "@expert", "@quiet")
NAMES = {
    "plain": "no attack",
    "resample": "asked again without a suffix",
    "suffix-search": "suffix searched for each prompt",
    "suffix-again": "that suffix, asked once more",
    "random-suffix": "one random suffix for all",
    "universal-suffix": "one suffix for all, searched elsewhere",
}
MANY = ("resample", "suffix-search")


def title_of(name: str, record: Mapping[str, Any]) -> str:
    """Say what an attack is, with its queries, and whether calibration may have known it."""
    if name.startswith("wrapper:"):
        wrapper = name.partition(":")[2]
        known = any(one["name"] == wrapper and one["known"] for one in record["wrappers"])
        return f"wrapper {wrapper}" + (" (known)" if known else "")
    return NAMES[name] + (f", {record['suffixes']['queries']} queries" if name in MANY else "")


def distinct(rows: Iterable[Mapping[str, Any]], key: str) -> list[str]:
    """Return the values of a key, each once, in order."""
    return list(dict.fromkeys(row[key] for row in rows))


def of_stack(record: Mapping[str, Any], defence: str) -> dict[str, Mapping[str, Any]]:
    """Return the rows of one stack by attack."""
    return {row["attack"]: row for row in record["rows"] if row["defence"] == defence}


def stacks_in(record: Mapping[str, Any], *, base: bool = True) -> list[str]:
    """Name the stacks in order."""
    return [name for name in distinct(record["rows"], "defence") if base or name != BASE]


def harm_table(record: Mapping[str, Any], names: Sequence[str]) -> Table:
    """Harmful rates; controls stand out."""
    stacks = stacks_in(record)
    lines = [
        (title_of(name, record), tuple(rate_cell(of_stack(record, stack)[name]["harmful_rate"]) for stack in stacks))
        for name in names
    ]
    controls = {row["control"] for row in record["rows"]}
    strong = frozenset(title_of(name, record) for name in names if name in controls)
    return Table(("", *map(short, stacks)), tuple(lines), strong=strong)


def harm_map(record: Mapping[str, Any], names: Sequence[str]) -> Figure:
    """Draw the same as a heat map, a row per stack."""
    stacks = stacks_in(record)
    values = [[of_stack(record, stack)[name]["harmful_rate"]["value"] for name in names] for stack in stacks]
    columns = [name.removeprefix("wrapper:") for name in names]
    return grid_figure([short(stack) for stack in stacks], columns, values, what="harmful", colour="@none")


def share_table(record: Mapping[str, Any], names: Sequence[str], key: str) -> Table:
    """Shares with their intervals: what remains of gains, or what is prevented of harm."""
    stacks = stacks_in(record, base=False)
    lines = [
        (title_of(name, record), tuple(_share(of_stack(record, stack)[name][key]) for stack in stacks))
        for name in names
    ]
    return Table(("", *map(short, stacks)), tuple(lines))


def _share(share: Mapping[str, Any] | None) -> Cell:
    if share is None or share["value"] is None:
        return Cell("–", "no gain" if share else "no harm")
    return Cell(f"{100 * share['value']:.0f}\u00a0%", f"{100 * share['low']:.0f}–{100 * share['high']:.0f}")


def drawn(record: Mapping[str, Any], names: Sequence[str]) -> Iterable[tuple[str, Figure]]:
    """Draw what remains of the gains that there were."""
    stacks = [
        stack
        for stack in stacks_in(record, base=False)
        if any(row["remaining"] and row["remaining"]["value"] is not None for row in of_stack(record, stack).values())
    ]
    if stacks:
        yield "Share of the gain that remains, with 95 % intervals.", _whiskers(record, names[1:], stacks)


def _whiskers(record: Mapping[str, Any], names: Sequence[str], stacks: Sequence[str]) -> Figure:
    """Draw what remains, a band per attack and a marker per stack."""
    traces, ends = [], [0.0, 100.0]
    for rank, stack in enumerate(stacks):
        rows = of_stack(record, stack)
        known = [
            (band, left) for band, name in enumerate(names) if (left := rows[name]["remaining"])["value"] is not None
        ]
        colour = COLOURS[rank % len(COLOURS)]
        ends += [100 * left[end] for _, left in known for end in ("low", "high")]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": html.escape(short(stack)),
                "x": [100 * left["value"] for _, left in known],
                "y": [band + 0.5 * ((rank + 1) / (len(stacks) + 1) - 0.5) for band, _ in known],
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [100 * (left["high"] - left["value"]) for _, left in known],
                    "arrayminus": [100 * (left["value"] - left["low"]) for _, left in known],
                    "color": colour,
                    "thickness": 2,
                    "width": 4,
                },
                "marker": {"color": colour, "size": 8},
                "hovertemplate": "%{x:.0f} % of the gain<extra>%{fullData.name}</extra>",
                "cliponaxis": False,
            }
        )
    low, high = max(-150.0, min(ends)), min(250.0, max(ends))
    pad = 0.03 * (high - low)
    rule = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "line": {"color": "@line", "width": 1.5, "dash": "dot"}}
    return {
        "data": traces,
        "layout": layout(
            110 + len(names) * (18 + 12 * len(stacks)),
            axis("gain that remains", range=[low - pad, high + pad], ticksuffix=" %"),
            axis(
                tickvals=list(range(len(names))),
                ticktext=[html.escape(title_of(name, record)) for name in names],
                range=[len(names) - 0.5, -0.5],
                showgrid=False,
                zeroline=False,
            ),
            showlegend=True,
            legend=LEGEND,
            shapes=[{**rule, "x0": 100, "x1": 100}],
        ),
    }


def added_table(record: Mapping[str, Any]) -> Table:
    """Points that attacks add to their controls."""
    stacks = stacks_in(record)
    pairs = list(dict.fromkeys((row["attack"], row["control"]) for row in record["rows"] if row["added"]))
    lines = [
        (
            title_of(name, record),
            (Cell(control), *(points_cell(of_stack(record, stack)[name]["added"]) for stack in stacks)),
        )
        for name, control in pairs
    ]
    return Table(("", "more than under", *map(short, stacks)), tuple(lines))


def cost_table(record: Mapping[str, Any]) -> Table:
    """Queries and what they cost, a line per stack and attack."""
    lines = []
    for row in record["rows"]:
        cost, failed = row["cost"], sum(row["failures"].values())
        cells = (
            Cell(f"{row['queries']:,}", f"at most {row['most_queries']} a prompt"),
            Cell(f"{row['unscored_queries']:,}"),
            Cell(f"{cost['calls']:.2f}"),
            Cell(f"{cost['tokens']:.1f}", f"{cost['prompt_tokens']:.0f} read"),
            Cell(f"{cost['seconds']:.3f}"),
            Cell(f"{failed:,}"),
        )
        lines.append((f"{short(row['defence'])}, {title_of(row['attack'], record)}", cells))
    lines += [
        (f"{short(name)}, search of the suffix for all", (Cell(f"{found['queries']:,}"), *[Cell("–")] * 5))
        for name, found in record["universal"].items()
    ]
    return Table(("", "queries", "unscored", "calls", "tokens", "seconds", "parts failed"), tuple(lines))


def witness_table(record: Mapping[str, Any], names: Sequence[str], witness: str) -> Table:
    """Rates by a judge that the attacker did not ask."""
    stacks = stacks_in(record)
    lines = [
        (title_of(name, record), tuple(rate_cell(of_stack(record, s)[name]["witnesses"][witness]) for s in stacks))
        for name in names
    ]
    return Table(("", *map(short, stacks)), tuple(lines))


def stack_table(record: Mapping[str, Any]) -> Table:
    """One line a stack: what attacks come to."""
    lines = []
    for one in record["stacks"]:
        worst, within, again = one["worst"], one["within"], one["resampled"]
        cells = (
            rate_cell(one["plain"]["harmful_rate"]),
            Cell("–") if worst is None else _named(worst, record),
            _kept(one, worst),
            Cell("–") if again is None else rate_cell(again["harmful_rate"]),
            Cell("–") if within is None else rate_cell(within["harmful_rate"]),
            _kept(one, within),
        )
        lines.append((short(one["defence"]), cells))
    many = f"{record['suffixes']['queries']} queries"
    head = ("", "no attack", "worst of one answer", "gain left", f"{many}, no suffix", f"{many}, suffix", "gain left")
    return Table(head, tuple(lines))


def _named(brief: Mapping[str, Any], record: Mapping[str, Any]) -> Cell:
    return Cell(rate_cell(brief["harmful_rate"]).text, title_of(brief["attack"], record).removeprefix("wrapper "))


def _kept(one: Mapping[str, Any], brief: Mapping[str, Any] | None) -> Cell:
    return Cell("–") if brief is None or one["defence"] == BASE else _share(brief["remaining"])
