"""What all benchmarks share: which machine and versions they ran on, and turns of equal conditions."""

import importlib.metadata
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from safeglasses import __version__

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""Of the world, or of this process and its threads, for busy machines."""


def cpu() -> str:
    """Name of the processor, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    pairs = [line.split(":", 1) for line in info.read_text(encoding="utf-8").splitlines()] if info.exists() else []
    said = {pair[0].strip(): pair[1].strip() for pair in pairs if len(pair) == 2}
    if "model name" in said:
        return f"{said['model name']}, family {said.get('cpu family')}, model {said.get('model')}"
    return platform.processor() or platform.machine()


def record(benchmark: str, packages: Sequence[str] = (), **setting: Any) -> dict[str, Any]:
    """What stands at the head of a results file."""
    return {
        "benchmark": benchmark,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {
            "cpu": cpu(),
            "cores": os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
            "system": platform.system(),
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "safeglasses": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "setting": setting,
    }


def others_share() -> Callable[[], float]:
    """Begin to watch the processors; call what is returned for the share of them that other processes took."""

    def now() -> tuple[float, float, float]:
        whole = psutil.cpu_times()
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        ours = sum(use.ru_utime + use.ru_stime for use in used)
        return time.perf_counter(), whole.user + whole.nice + whole.system, ours

    start = now()

    def share() -> float:
        seconds, all_used, ours = (b - a for a, b in zip(start, now(), strict=True))
        return max(0.0, (all_used - ours) / (seconds * (os.cpu_count() or 1)))

    return share


def peak_bytes() -> int:
    """Most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


@dataclass(frozen=True)
class Turns:
    """Seconds of every condition, in every round."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        """Of one condition."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, base: str) -> float:
        """Median of each round's own ratio, so that a machine that slows down for a while slows both."""
        return statistics.median(a / b for a, b in zip(self.seconds[name], self.seconds[base], strict=True))


def take_turns(works: Mapping[str, Callable[[], Any]], *, clock: Callable[[], float], rounds: int) -> Turns:
    """Time conditions one after the other, in turning order; the first round only warms up."""
    names = list(works)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = clock()
            works[name]()
            seconds[name].append(clock() - start)
    return Turns({name: taken[1:] for name, taken in seconds.items()})
