"""Defences and stacks of them on the miniature: harm, what they break, and what they cost.

Needs the run and the shield of `make demo`. The prompts are drawn afresh, with another seed than the demo's, so that no
choice that the demo or its authors made has seen them. The stack to look at, ``contrast:3?tokens=64`` around glasses of
half strength, was chosen on the calibrate split with glasses that had learned from the find split alone.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from machine import record

from safeglasses.data.miniature import CHECKPOINT
from safeglasses.data.miniature.benchmark import write_benchmark
from safeglasses.files import atomic_write_text, write_json
from safeglasses.report.grid_page import rows_under, worst_loss
from safeglasses.run.gridding import GridAsked, grid_model

ROOT = Path(__file__).resolve().parents[1]
SEED = 1
BEST_OF, CONTRAST = "best-of-n:4?fail=open", "contrast:3?tokens=64"
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #444 } .head { font-weight: 600 } .grid { stroke: #8883 }
.all { stroke: #00796b; fill: #00796b } .bad { stroke: #c2571a; fill: #c2571a } .loss { fill: #1f77a8 }
line.all, line.bad { stroke-width: 2 } .chosen { font-weight: 700 }
@media (prefers-color-scheme: dark) { text { fill: #ccc } }
"""


def stacks(demo: Path) -> list[str]:
    """Every part alone, with glasses, and stacks of three."""
    glasses, shield = f"glasses:{demo / 'run' / 'glasses'}", f"shield:{demo / 'shield' / 'shield'}"
    others = ["self-reminder", "adashield-s", "ecso", BEST_OF, "self-defense?pictures=yes", shield]
    half = f"{CONTRAST}+{glasses}?strength=0.5"
    return [
        *others,
        "eta:4?fail=open",
        glasses,
        *(f"{glasses}+{other}" for other in others),
        f"{CONTRAST}+{glasses}",
        half,
        f"{half}+ecso",
        f"{half}+{shield}",
        f"{glasses}+{BEST_OF}+ecso",
    ]


def drawing(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """A line per stack: harm with its interval to the left, the worst loss to the right."""
    left, wide, gap, step, top = 330, 260, 30, 20, 40
    height, second = top + step * len(rows) + 24, left + wide + gap
    body = [
        f'<text class="head" x="{left}" y="16">judged harmful, %</text>',
        f'<text class="head" x="{second}" y="16">worst loss: a slot of utility, or refusals (points)</text>',
    ]
    for start, top_value in ((left, 60), (second, 100)):
        for tick in range(0, top_value + 1, 20):
            x = start + wide * tick / top_value
            body.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 8}" y2="{height - 22}"/>')
            body.append(f'<text x="{x:.1f}" y="{height - 6}" text-anchor="middle">{tick}</text>')
    for i, row in enumerate(rows):
        y, rate, worst = top + step * i + 4, row["harmful_rate"], worst_loss(row)
        low, value, high = (left + wide * 100 * rate[name] / 60 for name in ("low", "value", "high"))
        kind = "bad" if row["defence"] == "none" else "all"
        chosen = ' class="chosen"' if names[row["defence"]] == f"{CONTRAST} + glasses?strength=0.5" else ""
        body.append(
            f'<text{chosen} x="{left - 14}" y="{y + 4}" text-anchor="end">{escape(names[row["defence"]])}</text>'
        )
        body.append(f'<line class="{kind}" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>')
        body.append(f'<circle class="{kind}" cx="{value:.1f}" cy="{y}" r="3.5"/>')
        if worst is not None:
            length = wide * max(0.0, worst)
            body.append(f'<rect class="loss" x="{second}" y="{y - 5}" width="{max(1.0, length):.1f}" height="10"/>')
            body.append(f'<text x="{second + length + 6:.1f}" y="{y + 4}">{100 * max(0.0, worst):.1f}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {second + wide + 60} {height}" role="img">\n'
        f"<title>Harm and worst loss of stacks of defences on the miniature</title>\n<style>{STYLE}</style>\n"
        + "\n".join(body)
        + "\n</svg>\n"
    )


def table(rows: Sequence[Mapping[str, Any]], every: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """The same in Markdown, for the docs."""
    by = {(row["defence"], row["condition"]): row for row in every}
    lines = [
        "| stack | harmful | standard | adversarial | worst slot | harmless refused | calls | tokens | ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rate, cost = row["harmful_rate"], row["cost"]
        slots = {name: change for name, change in row["change"].items() if name.startswith("utility:")}
        worst = min(slots.items(), key=lambda item: item[1]["value"], default=None)
        said = "–"
        if worst is not None:
            name, change = worst
            low, high = f"{100 * change['low']:+.1f}", f"{100 * change['high']:+.1f}"
            said = f"{name.removeprefix('utility:')} {100 * change['value']:+.1f} ({low} to {high})"
        apart = (by[row["defence"], condition]["harmful_rate"] for condition in ("standard", "adversarial"))
        cells = (
            f"`{names[row['defence']]}`",
            *(f"{100 * r['value']:.1f} ({100 * r['low']:.1f}–{100 * r['high']:.1f})" for r in (rate, *apart)),
            said,
            f"{100 * row['refusal_on_benign']['value']:.1f}",
            f"{cost['calls']:.2f}",
            f"{cost['tokens']:.1f}",
            f"{1000 * cost['seconds']:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Answer, judge, and write figures, picture and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("safeglasses-demo"), help="folder of `make demo`")
    parser.add_argument("--work", type=Path, default=Path("safeglasses-defences"), help="answers; gone on with")
    parser.add_argument("--limit", type=int, help="prompts of the test split; default: all 1,400")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "defences.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "defences.svg")
    options = parser.parse_args()
    drawn = write_benchmark(options.work / "benchmark", seed=SEED)
    asked = GridAsked(
        defences=stacks(options.demo),
        out=options.work / "grid",
        prompts=drawn.prompts,
        judges=[f"lexicon:{drawn.lexicon}"],
        refusals=f"lexicon:{drawn.refusals}",
        recipe=ROOT / "recipes" / "defences_miniature.toml",
        limit=options.limit,
    )
    grid = grid_model(CHECKPOINT, asked)
    names = {row["defence"]: _plain(row["defence"], options.demo) for row in grid["rows"]}
    rows = rows_under(grid, "all")
    kept = {name: value for name, value in grid.items() if name not in ("model", "files", "parts", "rows")}
    figures = [
        {**row, "defence": names[row["defence"]], "dominated_by": names.get(row["dominated_by"])}
        for row in grid["rows"]
    ]
    write_json(options.out, {**record("defences", ["transformers"], seed=SEED), **kept, "rows": figures})
    atomic_write_text(options.plot, drawing(rows, names))
    print(table(rows, grid["rows"], names))


def _plain(stack: str, demo: Path) -> str:
    plain = stack.replace(f":{demo / 'run' / 'glasses'}", "").replace(f":{demo / 'shield' / 'shield'}", "")
    return plain.replace("+", " + ")


if __name__ == "__main__":
    main()
