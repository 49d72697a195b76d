"""What the AUROC of a layer's neurons costs, beside scikit-learn's one column at a time.

The default is the size of one linear map of a 7-billion model on the examples of one study: 4,096 neurons ×
2,261 samples. Both take turns on the same cores; figures are medians, scikit-learn's over some columns only.

    python benchmarks/auroc.py --threads 1

numpy's AVX-512 sort of 32-bit integers is slow on AMD Zen 4, which is slow to store compressed vectors; there
``NPY_DISABLE_CPU_FEATURES="X86_V4 AVX512_ICL"`` (numpy ≥ 2.4; before, ``AVX512_SKX AVX512_ICL``) makes it
take its AVX2 sort, which is faster for float32 values.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import sklearn
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from safeglasses import __version__
from safeglasses.files import write_json
from safeglasses.find.auroc import auroc, auroc_rows

AIM = 100
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
VALUES = {
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "bfloat16 in float32": (torch.bfloat16, torch.float32),
    "float16": (torch.float16, torch.float16),
    "float32": (torch.float32, torch.float32),
}
"""What is rated: rounded to the first type, kept in the second."""


@dataclass(frozen=True)
class Row:
    """One line of the table; milliseconds per column, that is per neuron."""

    values: str
    layout: str
    ours: float
    scikit_learn: float
    times: float
    difference: float


def timed(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """Milliseconds of one call."""
    start = clock()
    work()
    return 1000 * (clock() - start)


def compare(
    name: str,
    layout: str,
    values: Tensor,
    labels: Tensor,
    *,
    clock: Callable[[], float],
    rounds: int,
    columns: int,
) -> Row:
    """Let both rate the same values in turn; the first round only warms up."""
    neurons = values.shape[1]
    some = range(0, neurons, max(1, neurons // columns))
    target, plain = labels.numpy(), [values[:, i].float().numpy() for i in some]
    rows = values.t().contiguous()
    ours, theirs = [], []
    found = auroc(values, labels)
    for number in range(rounds + 1):
        taken = timed(
            (lambda: auroc_rows(rows, labels)) if layout == "neuron-major" else (lambda: auroc(values, labels)),
            clock,
        )
        other = timed(lambda: [roc_auc_score(target, column) for column in plain], clock)
        if number:
            ours.append(taken / neurons)
            theirs.append(other / len(plain))
    expected = np.array([roc_auc_score(target, column) for column in plain])
    return Row(
        values=name,
        layout=layout,
        ours=statistics.median(ours),
        scikit_learn=statistics.median(theirs),
        times=statistics.median(b / a for a, b in zip(ours, theirs, strict=True)),
        difference=float(np.abs(found.numpy()[:: some.step] - expected).max()),
    )


def main() -> None:
    """Measure, print a table, write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--neurons", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=2261)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--columns", type=int, default=64, help="columns that scikit-learn rates per round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: the process's own, for busy machines")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(given.samples, generator=generator) < 0.5
    normal = torch.randn(given.samples, given.neurons, generator=generator)
    setting = {"clock": CLOCKS[given.clock], "rounds": given.rounds, "columns": given.columns}
    rows = [
        compare(name, layout, normal.to(rounded).to(kept), labels, **setting)
        for name, (rounded, kept) in VALUES.items()
        for layout in ("sample-major", "neuron-major")
    ]
    print(f"{given.neurons} neurons × {given.samples} samples, {given.threads} thread(s), {given.clock} clock")
    print(f"{'values':21}{'layout':14}{'ours, ms':>9}{'sklearn':>9}{'times':>7}{'aim':>5}{'difference':>12}")
    for row in rows:
        ours, theirs = row.ours * given.neurons, row.scikit_learn * given.neurons
        print(f"{row.values:21}{row.layout:14}{ours:9.1f}{theirs:9.0f}{row.times:7.0f}{AIM:5}{row.difference:12.1e}")
    if given.out is not None:
        write_json(
            given.out,
            {
                "benchmark": "auroc",
                "date": datetime.now(UTC).date().isoformat(),
                "machine": {
                    "cpu": cpu(),
                    "system": platform.system(),
                    "threads": given.threads,
                },
                "versions": {
                    "safeglasses": __version__,
                    "numpy": np.__version__,
                    "scikit-learn": sklearn.__version__,
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                },
                "setting": {n: getattr(given, n) for n in ("neurons", "samples", "rounds", "columns", "clock")},
                "aim": AIM,
                "rows": [asdict(row) for row in rows],
            },
        )


def cpu() -> str:
    """Name of the processor, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    pairs = [line.split(":", 1) for line in info.read_text(encoding="utf-8").splitlines()] if info.exists() else []
    said = {pair[0].strip(): pair[1].strip() for pair in pairs if len(pair) == 2}
    if "model name" in said:
        return f"{said['model name']}, family {said.get('cpu family')}, model {said.get('model')}"
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
