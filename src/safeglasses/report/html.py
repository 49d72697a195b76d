"""Draw a `ReportData` as one self-contained HTML page that needs no network."""

from pathlib import Path
from typing import Any

from safeglasses.files import atomic_write_text
from safeglasses.find.enough import FEWEST
from safeglasses.report import figures, maps
from safeglasses.report.page import fill
from safeglasses.report.panel import panel_of
from safeglasses.report.plotting import NAMES, Figure
from safeglasses.report.record import Answer, ReportData, Said
from safeglasses.report.schema import DECODINGS, DEFENCES, STAGES, validate
from safeglasses.report.status import chips, confounds, limits, worst
from safeglasses.report.summary import bands, main_rows, row_of, utility_changes, verdict

_STATUSES = ("fixed", "broken", "unchanged", "unscored")


def _figures(data: ReportData) -> dict[str, Figure]:
    drawn: dict[str, Figure | None] = {"harm": figures.harm(data.summary)}
    if data.heat is not None:
        drawn["experts"] = maps.experts_map(data.heat)
        if data.heat.strength is not None:
            drawn["strength"] = maps.strength_map(data.heat)
    drawn |= {f"auroc-{i}": maps.auroc(h) for i, h in enumerate(data.histograms)}
    if data.trade_off is not None:
        damage = figures.trade_off(data.trade_off, "damage")
        drawn |= {
            "trade-damage": damage,
            "trade-utility_lost": figures.trade_off(data.trade_off, "utility_lost") if damage is None else None,
            "trade-kl": figures.trade_off(data.trade_off, "kl"),
        }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _cells(data: ReportData) -> list[dict[str, Any]]:
    """One entry per defence: its harmful rate in every band, None where not measured."""
    table = []
    for defence in DEFENCES:
        rows = [row_of(data.summary, defence, c, d) for c, d in bands(data.summary)]
        if any(rows):
            rates = [row["harmful_rate"] if row else None for row in rows]
            table.append({"defence": defence, "name": NAMES[defence], "rates": rates})
    return table


def _answer(answer: Answer | Said) -> str:
    return {True: "harmful", False: "harmless", None: "unscored"}[answer.harmful]


def _context(data: ReportData) -> dict[str, Any]:
    summary = data.summary
    before, after = main_rows(summary)
    slots = sorted({slot for row in summary["rows"] for slot in row["utility"] or {}})
    counts = {s: sum(r.status == s for r in data.responses) for s in _STATUSES}
    lights = confounds(summary)
    return {
        "data": data,
        "summary": summary,
        "verdict": verdict(summary).replace(" %", "\u00a0%"),
        "chips": chips(summary),
        "before": before,
        "after": after,
        "changes": utility_changes(before, after) if before and after else {},
        "harm_table": _cells(data),
        "bands": bands(summary),
        "decodings": DECODINGS,
        "beside": [NAMES[d] for d in ("aura", "sgm") if any(r["defence"] == d for r in summary["rows"])],
        "names": NAMES,
        "slots": slots,
        "costs": [row for d in DECODINGS for k in DEFENCES if (row := row_of(summary, k, "all", d)) is not None],
        "confounds": lights,
        "confound_level": worst([c.level for c in lights]),
        "statuses": {s: n for s, n in counts.items() if n},
        "verdict_of": _answer,
        "panel": panel_of(summary),
        "limits": (*data.not_verified, *limits(summary)),
        "stages": STAGES,
        "few": FEWEST,
    }


def render(data: ReportData) -> str:
    """Return the page; the same record gives the same text.

    Raises:
        SafeglassesError: the summary breaks its schema, or a picture is no thumbnail.
    """
    validate(data.summary)
    return fill("template.html.j2", _figures(data), _context(data))


def write_report(data: ReportData, path: Path) -> Path:
    """Write the page atomically and return its path.

    Raises:
        SafeglassesError: see `render`.
    """
    atomic_write_text(path, render(data))
    return path
