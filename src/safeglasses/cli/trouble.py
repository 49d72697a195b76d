"""Errors as users meet them: what failed, what was given, what to do; no traceback unless asked."""

import json
import sys
import traceback
from pathlib import Path

import typer

from safeglasses.errors import SafeglassesError

_OURS = Path(__file__).parents[1]


def announce(error: SafeglassesError, *, as_json: bool) -> None:
    """Write an error to stderr, or to stdout as the one JSON object that ``--json`` promises."""
    if as_json:
        sys.stdout.write(json.dumps(error.record(), ensure_ascii=False) + "\n")
    else:
        sys.stderr.write(f"error: {error}\n")


def of_usage(error: Exception, verb: str | None) -> SafeglassesError:
    """Describe a command line that could not be parsed."""
    message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
    return SafeglassesError(
        "the command line is wrong", given=message, do=f"see `safeglasses {verb + ' ' if verb else ''}--help`"
    )


def of_system(error: OSError) -> SafeglassesError:
    """Describe what the operating system refused: no space, no permission, no such file."""
    where = ", ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    reason = error.strerror or str(error)
    return SafeglassesError("the operating system refused", given=f"{where}: {reason}" if where else reason)


def of_bug(error: BaseException) -> SafeglassesError:
    """Describe an exception that nobody foresaw by its last place in our own code."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if _OURS in Path(frame.filename).parents]
    where = f" (in {ours[-1].name}, {ours[-1].filename}:{ours[-1].lineno})" if ours else ""
    return SafeglassesError(
        "a bug in safeglasses, or a case that it does not know",
        given=f"{type(error).__name__}: {error}{where}",
        do="run it again with --debug and report the traceback",
    )
