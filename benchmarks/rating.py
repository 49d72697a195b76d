"""Exact AUROC beside sorting alone and beside other libraries, and a whole model's worth of it; parts of find.py."""

import importlib
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import peak_bytes, take_turns
from sklearn.metrics import roc_auc_score
from torch import Tensor

from safeglasses.find.auroc import auroc, auroc_rows

VALUES = {
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "bfloat16 in float32": (torch.bfloat16, torch.float32),
    "float16": (torch.float16, torch.float16),
    "float32": (torch.float32, torch.float32),
}
"""What is rated: rounded to the first type, kept in the second."""
COLUMNS = {"scikit-learn": 64, "torchmetrics": 64, "ml-aura": 640}
"""Columns that the others rate in a round."""
LLAVA = 32 * (11008 + 11008 + 4096)
"""MLP outputs of LLaVA-1.5-7B: gate, up and down projections of 32 layers."""

Other = Callable[[Tensor, Tensor], np.ndarray]
"""Rates columns of sample-major values."""


@dataclass(frozen=True)
class Rated:
    """One line: seconds per neuron."""

    values: str
    layout: str
    against: str
    threads: int
    ours: float
    theirs: float
    ratio: float
    """Theirs over ours, or ours over sorting."""
    difference: float
    """Largest between the two results; 0 for sorting."""


def sklearn_columns(values: Tensor, labels: Tensor) -> np.ndarray:
    """One column after the other."""
    target = labels.numpy()
    return np.array([roc_auc_score(target, column) for column in values.numpy().T])


@contextmanager
def others(ml_aura: Path | None, processes: int, clock: str) -> Iterator[tuple[dict[str, Other], dict[str, str]]]:
    """What can be had of the other libraries, and why not of the rest."""
    found: dict[str, Other] = {"scikit-learn": sklearn_columns}
    missing: dict[str, str] = {}
    try:
        from torchmetrics.functional.classification import multilabel_auroc
    except ImportError as error:
        missing["torchmetrics"] = f"not installed ({error})"
    else:
        found["torchmetrics"] = lambda values, labels: multilabel_auroc(
            values, labels[:, None].long().expand_as(values), num_labels=values.shape[1], average=None
        ).numpy()
    compute: Any = None
    if clock == "cpu":
        missing["ml-aura"] = "works in other processes, which this one's clock does not see"
    elif ml_aura is None:
        missing["ml-aura"] = "no --ml-aura PATH to a checkout of github.com/apple/ml-aura"
    else:
        sys.path.insert(0, str(ml_aura))
        try:
            compute = importlib.import_module("src.utils.auroc").compute_auroc
        except ImportError as error:
            missing["ml-aura"] = f"cannot be imported from {ml_aura}: {error}"
    if compute is None:
        yield found, missing
        return
    with multiprocessing.get_context("fork").Pool(processes) as pool:  # as its scripts/learn_aura.py does
        found["ml-aura"] = lambda values, labels: compute(
            responses=values.numpy(), labels=labels.numpy().astype(np.int64), chunk_size=10, pool=pool
        )
        yield found, missing


def over_sorting(normal: Tensor, labels: Tensor, *, clock: Callable[[], float], rounds: int) -> Iterator[Rated]:
    """Compare with ``numpy.sort`` of the same bytes, neuron-major, on one thread each: numpy has no more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, values, rows in _kinds(normal):
        bits = rows.view(torch.int16 if rows.itemsize == 2 else torch.int32).numpy()
        works: dict[str, Callable[[], Any]] = {
            "sample-major": lambda values=values: auroc(values, labels),
            "neuron-major": lambda rows=rows: auroc_rows(rows, labels),
            "numpy.sort": lambda bits=bits: np.sort(bits, axis=1),
        }
        if rows.itemsize == 2:
            works["numpy.sort (radix)"] = lambda bits=bits: np.sort(bits, axis=1, kind="stable")
        turns = take_turns(works, clock=clock, rounds=rounds)
        for layout in ("sample-major", "neuron-major"):
            for sort in [work for work in works if work.startswith("numpy")]:
                ours, theirs = (turns.median(work) / len(rows) for work in (layout, sort))
                yield Rated(name, layout, sort, 1, ours, theirs, turns.ratio(layout, sort), 0.0)
    torch.set_num_threads(threads)


def over_others(
    normal: Tensor, labels: Tensor, libraries: Mapping[str, Other], *, clock: Callable[[], float], rounds: int
) -> Iterator[Rated]:
    """Compare with what others offer, on all threads; they get the values in float32."""
    for name, values, rows in _kinds(normal):
        found = auroc(values, labels)
        some = {
            library: slice(None, None, max(1, len(rows) // COLUMNS[library])) for library in libraries
        }  # every so many columns
        plain = {library: values[:, chosen].float().contiguous() for library, chosen in some.items()}
        works: dict[str, Callable[[], Any]] = {
            "sample-major": lambda values=values: auroc(values, labels),
            "neuron-major": lambda rows=rows: auroc_rows(rows, labels),
        }
        for library, rate in libraries.items():
            works[library] = lambda rate=rate, library=library, plain=plain: rate(plain[library], labels)
        turns = take_turns(works, clock=clock, rounds=rounds)
        for library, rate in libraries.items():
            difference = np.abs(found.numpy()[some[library]] - rate(plain[library], labels)).max()
            for layout in ("sample-major", "neuron-major"):
                scale = plain[library].shape[1] / len(rows)
                ours, theirs = turns.median(layout) / len(rows), turns.median(library) / plain[library].shape[1]
                times = turns.ratio(library, layout) / scale
                yield Rated(name, layout, library, torch.get_num_threads(), ours, theirs, times, float(difference))


def _kinds(normal: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield each kind of values, sample-major and neuron-major."""
    for name, (rounded, kept) in VALUES.items():
        values = normal.to(rounded).to(kept)
        yield name, values, values.t().contiguous()


def whole_model(samples: int, neurons: int = LLAVA, rounds: int = 3) -> dict[str, Any]:
    """Rate a model's worth of neurons in a process of its own, so that its peak memory is its own."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    child = multiprocessing.get_context("spawn").Process(
        target=_rate_whole, args=(there, samples, neurons, rounds, torch.get_num_threads())
    )
    child.start()
    there.close()
    try:
        return here.recv()
    finally:
        child.join()


def _rate_whole(answer: Connection, samples: int, neurons: int, rounds: int, threads: int) -> None:
    """Fill a matrix with neurons that differ in place, spread and separation; time its rating alone."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(samples, generator=generator) < 0.5
    values = torch.empty(neurons, samples, dtype=torch.bfloat16)
    for block in values.split(4096):
        place, spread, gap = torch.randn(3, len(block), 1, generator=generator)
        block.copy_(
            torch.randn(block.shape, generator=generator).add_(0.2 * gap * labels).mul_(spread.exp()).add_(place)
        )
    before, seconds, cpu = peak_bytes(), [], []
    rated = torch.empty(0)
    for _ in range(rounds):
        start, used = time.perf_counter(), time.process_time()
        rated = auroc_rows(values, labels)
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
    checked = torch.randint(neurons, (64,), generator=generator)
    expected = sklearn_columns(values[checked].float().t(), labels)
    answer.send(
        {
            "neurons": neurons,
            "samples": samples,
            "seconds": sorted(seconds)[len(seconds) // 2],
            "rounds": seconds,
            "cpu_seconds": sorted(cpu)[len(cpu) // 2],
            "matrix_bytes": values.numel() * values.itemsize,
            "peak_bytes": peak_bytes(),
            "beyond_matrix_bytes": peak_bytes() - before,
            "difference": float(np.abs(rated[checked].numpy() - expected).max()),
        }
    )
