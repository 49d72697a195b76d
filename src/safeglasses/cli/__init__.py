"""The command line: one file per verb. Verbs import PyTorch themselves, so ``--help`` answers at once."""

import logging
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Annotated

import typer

from safeglasses import __version__
from safeglasses.cli.ablate import ablate
from safeglasses.cli.attack import attack
from safeglasses.cli.capture import capture
from safeglasses.cli.compare import compare
from safeglasses.cli.data import data
from safeglasses.cli.demo import demo
from safeglasses.cli.export import export
from safeglasses.cli.fit import fit
from safeglasses.cli.fold import fold
from safeglasses.cli.grid import grid
from safeglasses.cli.inspect import inspect
from safeglasses.cli.measure import measure
from safeglasses.cli.memory import keep_freed_memory
from safeglasses.cli.neurons import neurons
from safeglasses.cli.outcome import Outcome
from safeglasses.cli.report import report
from safeglasses.cli.shield import shield
from safeglasses.cli.stack import stack
from safeglasses.cli.trouble import announce, of_bug, of_system, of_usage
from safeglasses.cli.verify import verify
from safeglasses.errors import SafeglassesError

INTERRUPTED = 130
"""Exit status after Ctrl-C; typer returns it."""

app = typer.Typer(
    help="Fit safety glasses to a vision-language model, and prove what they did.",
    add_completion=False,
    rich_markup_mode=None,  # typer's rich help costs more than the rest of --help
    pretty_exceptions_enable=False,
)
VERBS = (
    demo,
    fit,
    shield,
    inspect,
    capture,
    neurons,
    ablate,
    measure,
    compare,
    grid,
    attack,
    stack,
    fold,
    export,
    verify,
    report,
)
for _verb in VERBS:
    app.command()(_verb)
app.add_typer(data, name="data")


def _say_version(asked: bool) -> bool:
    if asked:
        typer.echo(f"safeglasses {__version__}")
        raise typer.Exit
    return asked


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", help="Say the version and leave.", is_eager=True, callback=_say_version),
    ] = False,
) -> None:
    pass


def main() -> int:
    """Be the installed command: set the process up, make a bug a short message too (status 1), and `execute`."""
    keep_freed_memory()
    debug, as_json = "--debug" in sys.argv, "--json" in sys.argv
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("safeglasses").setLevel(logging.DEBUG if debug else logging.WARNING)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.WARNING if debug else logging.ERROR)
    if not debug:
        sys.excepthook = lambda kind, error, trace: announce(of_bug(error), as_json=as_json)
    return execute(sys.argv[1:])


def execute(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status: 0 done, 2 for the user to mend, 130 interrupted, or its own.

    With ``--json`` stdout carries one JSON object and nothing else, be it a result or an error. The two flags
    that shape errors are read from the raw arguments: a command line may be wrong before it can be parsed.
    """
    as_json, debug = "--json" in arguments, "--debug" in arguments
    command = typer.main.get_command(app)
    stdout = sys.stdout
    try:
        with redirect_stdout(sys.stderr if as_json and "--help" not in arguments else stdout):
            result = command(list(arguments) or ["--help"], prog_name="safeglasses", standalone_mode=False)
    except (SafeglassesError, typer.TyperException, OSError) as error:
        if getattr(error, "told_elsewhere", False):  # by another process of the same job
            return 2
        if debug:
            sys.stderr.write(traceback.format_exc())
        announce(_problem(error, arguments), as_json=as_json)
        return 2
    if isinstance(result, Outcome):
        result.show(as_json=as_json)
        return result.status
    if result == INTERRUPTED:
        stopped = SafeglassesError(
            "interrupted", do="run the same again: `fit`, `capture` and `demo` go on where they were"
        )
        announce(stopped, as_json=as_json)
    return result if isinstance(result, int) else 0


def _problem(error: Exception, arguments: Sequence[str]) -> SafeglassesError:
    if isinstance(error, SafeglassesError):
        return error
    if isinstance(error, OSError):
        return of_system(error)
    return of_usage(error, next((v.__name__ for v in VERBS if v.__name__ in arguments[:1]), None))
