"""Results of runs and measurements as a terminal shows them."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeglasses.cli.outcome import Outcome
from safeglasses.report.summary import console_table, verdict

if TYPE_CHECKING:
    from rich.console import Console


def of_run(folder: Path, summary: Mapping[str, Any]) -> Outcome:
    """Show what a run found and where its files are."""
    files = {
        name: str(path)
        for name, path in (("report", folder / "report.html"), ("glasses", folder / "glasses"))
        if path.exists()
    }

    def render(console: "Console") -> None:
        show_measured(console, summary)
        for name, path in files.items():
            console.print(f"{name + ':':9}{path}", markup=False, soft_wrap=True)

    return Outcome({"folder": str(folder), **files, "summary": dict(summary)}, render)


def show_measured(console: "Console", summary: Mapping[str, Any]) -> None:
    """Print the table, and the one sentence where there is a before and an after."""
    console.print(console_table(summary))
    if {"none", "glasses"} <= {row["defence"] for row in summary["rows"]}:
        console.print(verdict(summary), markup=False, soft_wrap=not console.is_terminal)
