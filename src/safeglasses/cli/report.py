"""``safeglasses report``: look at a finished run again."""

from pathlib import Path
from typing import Annotated

import typer

from safeglasses.cli import options
from safeglasses.cli.outcome import Outcome
from safeglasses.errors import SafeglassesError


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    json: options.Json = False,
    debug: options.Debug = False,
) -> Outcome:
    """Show what a finished run measured, and draw its report again."""
    from safeglasses.files import read_json

    path = run / "summary.json"
    if not path.is_file():
        raise SafeglassesError(
            "not a finished run",
            given=str(run),
            expected="a folder with summary.json, as `safeglasses fit` and `safeglasses demo` leave it",
            do="run the same `safeglasses fit` again: it goes on where it was stopped",
        )
    summary = read_json(path)

    from safeglasses.cli.tables import of_ablation, of_run, of_shield
    from safeglasses.report.ablation_page import write_ablation_page
    from safeglasses.report.html import write_report
    from safeglasses.report.schema import validate
    from safeglasses.report.shield_page import write_shield_page
    from safeglasses.report.stored import stored

    if summary.get("kind") == "shield":
        write_shield_page(summary, run / "report.html")
        return of_shield(run, summary)
    if summary.get("kind") == "ablation":
        write_ablation_page(summary, run / "report.html")
        return of_ablation(run, summary)
    validate(summary)
    write_report(stored(run / "report.json"), run / "report.html")
    return of_run(run, summary)
