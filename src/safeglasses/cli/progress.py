"""Progress on stderr: bars with the time left on a terminal, lines anywhere else."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from safeglasses.progress import Advance, Progress

SILENCE = 20.0
"""Seconds between the lines of a long stage."""


@contextmanager
def shown() -> Iterator[Progress]:
    """Give a `Progress` for the terminal at hand; stages stay inside the block."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield Lines()
        return
    bars = Bars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
    with bars:
        yield Live(bars)


class Live:
    """Bars on a terminal."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """Show a bar for as long as the block lasts; it stays, full, when the block ends well."""
        task = self._bars.add_task(name, total=total)
        counts = [0, total or 1]

        def advance(done: int, total: int) -> None:
            counts[:] = done, total
            self._bars.update(task, completed=done, total=total)

        try:
            yield advance
        except BaseException:
            self._bars.stop_task(task)
            raise
        self._bars.update(task, completed=counts[1], total=counts[1])
        self._bars.stop_task(task)

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self._bars.console.print(text, markup=False, highlight=False)


class Lines:
    """Plain lines for logs and pipes."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """Write one line when the stage ends, with its seconds, and some before if it is long."""
        start = said = self._clock()

        def advance(done: int, total: int) -> None:
            nonlocal said
            now = self._clock()
            if now - said >= SILENCE and 0 < done < total:
                said = now
                left = (now - start) / done * (total - done)
                self.say(f"{name}: {done:,} of {total:,}, about {left:.0f} s left")

        yield advance
        self.say(f"{name}: {self._clock() - start:.1f} s")

    def say(self, text: str) -> None:
        """Write a line."""
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def calm_libraries() -> None:
    """Silence what libraries show of their own beside our progress (warnings and errors stay)."""
    import optuna
    from transformers.utils import logging as transformers_logging

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    transformers_logging.disable_progress_bar()
    logging.getLogger("datasets").setLevel(logging.ERROR)
