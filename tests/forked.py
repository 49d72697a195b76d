"""Processes that start at once: forked from a server that has imported what every command imports.

Starting Python, PyTorch and transformers costs more than what a test then does. What runs is a process of its own with
a clean copy of the modules, which can be killed like any other. Tests of how a command is started (``python -m``,
``torchrun``, another program's command line) start it that way instead.
"""

import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["safeglasses.run.fit", "safeglasses.run.capture", "safeglasses.tune.training"])


class Forked:
    """A process that runs a function, what it prints in files.

    Args:
        act: A function of a module; what it returns is the exit status (``None``: 0).
        given: Its arguments; they are pickled.
        said: The files, without the endings ``.out`` and ``.err``.
        environment: Variables added to its environment.
    """

    def __init__(
        self, act: Callable[..., Any], *given: Any, said: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self._said = said
        self._process = _forks.Process(target=_run, args=(act, given, said, dict(environment or {})))
        self._process.start()

    def poll(self) -> int | None:
        """Return its exit status, minus the signal if one ended it, or ``None`` while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float | None = None) -> int:
        """Wait for its end and return its exit status."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, f"still running: {self.err()[-3000:]}"
        return self._process.exitcode

    def wait_for(self, reached: Callable[[], Any]) -> None:
        """Wait until something is so; fail if the process ends before."""
        while not reached():
            assert self.poll() is None, f"it ended too early: {self.err()[-3000:]}"
            time.sleep(0.002)

    def kill(self) -> int:
        """End it as ``kill -9`` does, before it can do anything about it; return its exit status."""
        self._process.kill()
        return self.wait()

    def out(self) -> str:
        """Return what it printed."""
        return self._said.with_suffix(".out").read_text(errors="replace")

    def err(self) -> str:
        """Return what it printed as errors and progress."""
        return self._said.with_suffix(".err").read_text(errors="replace")


def ranks(count: int, act: Callable[..., Any], *given: Any, said: Path) -> list[Forked]:
    """Start the processes of one job, as ``torchrun --standalone`` sets them up on this machine."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    job = {"TORCHELASTIC_RUN_ID": port, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    every = [{**job, "LOCAL_WORLD_SIZE": count, "RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]
    return [
        Forked(act, *given, said=said.with_name(f"{said.name}-{rank}"), environment={k: str(v) for k, v in own.items()})
        for rank, own in enumerate(every)
    ]


def _run(act: Callable[..., Any], given: Sequence[Any], said: Path, environment: Mapping[str, str]) -> None:
    import torch

    for number, ending in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(said.with_suffix(ending), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(environment)
    torch.set_num_threads(1)
    raise SystemExit(act(*given) or 0)
