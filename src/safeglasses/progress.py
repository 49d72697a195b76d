"""What long work tells whoever waits for it; rooms take plain callables, only `run` and `cli` know this."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable

Advance = Callable[[int, int], None]
"""Called as ``advance(done, total)`` in one unit; the total may change while the work goes on."""


@runtime_checkable
class Progress(Protocol):
    """Where a run reports its stages; the command line shows bars with an estimate of the time left."""

    def stage(self, name: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """Open a stage that lasts as long as the block, and give the callable that moves it.

        Args:
            name: what is being done, as a person would say it: ``capture``, ``answer test prompts``.
            total: units of work if they are known before the first call of ``advance``.
        """
        ...

    def say(self, text: str) -> None:
        """Tell one line: a plan, an estimate, a finding."""
        ...


class Quiet:
    """Progress that nobody watches: the default of library calls."""

    def stage(self, name: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """Do nothing with the stage."""
        return nullcontext(_nothing)

    def say(self, text: str) -> None:
        """Drop the line."""


def _nothing(done: int, total: int) -> None:
    pass
