"""What `calibration.py` tells: hypervolumes with intervals, differences seed by seed, and the plot."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from safeglasses.measure.intervals import student

Run = Mapping[str, Any]
MEASURES = ("hypervolume", "hypervolume_kl")
GAPS = ("harmful", "damage")


def interval(values: Sequence[float]) -> dict[str, float]:
    """Return the mean with Student's 95 % interval; of a single value no interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean}
    half = student(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def compared(runs: Sequence[Run], methods: Sequence[str], ours: str) -> dict[str, Any]:
    """Summarise all seeds: areas of every method, ours minus each other's, and ours' gap."""
    areas = {
        measure: {name: [run["methods"][name][measure] for run in runs] for name in methods} for measure in MEASURES
    }
    summary: dict[str, Any] = {
        measure: {name: interval(values) for name, values in by.items()} for measure, by in areas.items()
    }
    if ours in methods:
        summary |= {
            f"{measure}_ahead": {
                name: interval([a - b for a, b in zip(by[ours], values, strict=True)])
                for name, values in by.items()
                if name != ours
            }
            for measure, by in areas.items()
        }
        gaps = [run["methods"][ours]["gap"] for run in runs if "gap" in run["methods"][ours]]
        summary["gap"] = {kind: interval([gap[kind] for gap in gaps]) for kind in GAPS if gaps}
    summary["tried"] = {name: statistics.fmean(run["methods"][name]["tried"] for run in runs) for name in methods}
    summary["seconds"] = {name: statistics.fmean(run["methods"][name]["seconds"] for run in runs) for name in methods}
    return summary


def printed(summary: Mapping[str, Any]) -> str:
    """Return the summary as lines for a terminal."""
    lines = [f"{'':27}{'harm, damage':>24}{'harm, KL':>24}{'tried':>8}{'seconds':>9}"]
    for name, area in summary["hypervolume"].items():
        lines.append(
            f"{name:27}{_text(area):>24}{_text(summary['hypervolume_kl'][name]):>24}"
            f"{summary['tried'][name]:8.1f}{summary['seconds'][name]:9.1f}"
        )
    lines += [f"ahead of {name:24}{_text(area):>24}" for name, area in summary.get("hypervolume_ahead", {}).items()]
    lines += [f"gap of {kind:20}{_text(gap):>24}" for kind, gap in summary.get("gap", {}).items()]
    return "\n".join(lines)


def _text(found: Mapping[str, float]) -> str:
    ends = f" ({found['low']:.3f} to {found['high']:.3f})" if "low" in found else ""
    return f"{found['mean']:.3f}{ends}"
