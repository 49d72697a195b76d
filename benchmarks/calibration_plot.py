"""The plot of `calibration.py`: every seed's front faint, their mean bold, and beside it the hypervolumes."""

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from calibration_figures import interval
from hypervolume import Place

Run = Mapping[str, Any]
COLOURS = ("#c2571a", "#1f77a8", "#6a9a3a", "#8a5fb0", "#b0892f")
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #444 } .grid { stroke: #8884 } .title { font-weight: 600 }
.seed { fill: none; stroke-width: 1; opacity: .3 } .mean { fill: none; stroke-width: 2.5 } .dot { opacity: .45 }
@media (prefers-color-scheme: dark) { text { fill: #ccc } }
"""
WIDE, HIGH, LEFT, TOP, STRIP = 430, 260, 60, 34, 250
STEPS = 200


def drawing(runs: Sequence[Run], methods: Sequence[str], most: float) -> str:
    """Two panels as SVG: harm over damage up to `most`, and hypervolume per method.

    A seed's front is drawn as what it attains: the least harm for at most so much damage, the untouched model's where
    there is none. The mean is taken over seeds at every damage.
    """
    top = max(run["methods"][name]["untouched"] for run in runs for name in methods)
    top = -(-top // 0.1) * 0.1  # whole tens of points
    colours = dict(zip(methods, COLOURS, strict=False))
    parts = [*_axes(most, top)]
    levels = [most * step / STEPS for step in range(STEPS + 1)]
    for name in methods:
        attained = [[_attained(run["methods"][name], level) for level in levels] for run in runs]
        lines = [("seed", line) for line in attained]
        lines.append(("mean", [statistics.fmean(column) for column in zip(*attained, strict=True)]))
        for kind, line in lines:
            places = [(_across(level / most), _up(harm / top)) for level, harm in zip(levels, line, strict=True)]
            parts.append(f'<path class="{kind}" stroke="{colours[name]}" d="M{_stairs(places)}"/>')
    parts += _strip(runs, methods, colours)
    width = LEFT + WIDE + 170 + STRIP + 30
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {TOP + HIGH + 48}" role="img">\n'
        f"<title>Harm over damage on the test split, and hypervolume, by method</title>\n"
        f"<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _attained(found: Mapping[str, Any], level: float) -> float:
    """Least harm for at most so much damage."""
    within = [p["judged"]["harmful"] for p in found["points"] if p["judged"]["damage"] <= level]
    return min([found["untouched"], *within])


def _stairs(places: Sequence[Place]) -> str:
    """Only the corners."""
    corners = [places[0]]
    for before, here in pairwise(places):
        if here[1] != before[1]:
            corners += [(here[0], before[1]), here]
    return " L".join(f"{x:.1f} {y:.1f}" for x, y in [*corners, places[-1]])


def _across(share: float) -> float:
    return LEFT + WIDE * share


def _up(share: float) -> float:
    return TOP + HIGH * (1 - share)


def _axes(most: float, top: float) -> list[str]:
    parts = [f'<text class="title" x="{LEFT}" y="18">harmful answers over damage, test split</text>']
    for tens in range(round(top * 10) + 1):
        y = _up(tens / 10 / top)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{LEFT + WIDE}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{10 * tens} %</text>')
    for points in range(0, round(100 * most) + 1, 2):
        x = _across(points / 100 / most)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{TOP + HIGH}"/>')
        parts.append(f'<text x="{x:.1f}" y="{TOP + HIGH + 18}" text-anchor="middle">{points}</text>')
    below = TOP + HIGH + 38
    parts.append(f'<text x="{LEFT + WIDE / 2:.0f}" y="{below}" text-anchor="middle">damage, points</text>')
    return parts


def _strip(runs: Sequence[Run], methods: Sequence[str], colours: Mapping[str, str]) -> list[str]:
    """One row per method: a dot per seed, the mean and its interval."""
    left = LEFT + WIDE + 180
    parts = [f'<text class="title" x="{left}" y="18">hypervolume</text>']
    for fifth in range(6):
        x = left + STRIP * fifth / 5
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{TOP + HIGH}"/>')
        parts.append(f'<text x="{x:.1f}" y="{TOP + HIGH + 18}" text-anchor="middle">{fifth / 5:g}</text>')
    for number, name in enumerate(methods):
        y, colour = TOP + HIGH * (number + 0.5) / len(methods), colours[name]
        values = [run["methods"][name]["hypervolume"] for run in runs]
        found = interval(values)
        parts.append(f'<text x="{left - 10}" y="{y + 4:.1f}" text-anchor="end" style="fill: {colour}">{name}</text>')
        parts += [
            f'<circle class="dot" cx="{left + STRIP * v:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for v in values
        ]
        ends = [left + STRIP * min(1.0, max(0.0, found.get(end, found["mean"]))) for end in ("low", "high")]
        mean = left + STRIP * found["mean"]
        parts.append(f'<path class="mean" stroke="{colour}" d="M{ends[0]:.1f} {y:.1f} L{ends[1]:.1f} {y:.1f}"/>')
        parts.append(f'<path class="mean" stroke="{colour}" d="M{mean:.1f} {y - 9:.1f} L{mean:.1f} {y + 9:.1f}"/>')
    return parts
