"""What finding neurons costs, beside the least it could cost and beside others; one table, one run, one machine.

Capture is compared with bare forward passes of the same batch, the exact AUROC with sorting alone and with
other libraries, and LLaVA-1.5-7B's MLPs are rated as a whole. Conditions take turns; figures are medians over
rounds, and a ratio is the median of each round's own. Others rate some columns only.

    python benchmarks/find.py                    # without torchmetrics and ml-aura, if they are not there
    python benchmarks/find.py --ml-aura PATH     # a checkout of github.com/apple/ml-aura
    python benchmarks/find.py --growth           # time and memory over the number of samples instead
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from capturing import RECIPES, batch_for, measure, random_vlm
from growth import main as growth
from machine import CLOCKS, others_share, record
from rating import Rated, others, over_others, over_sorting, whole_model

from safeglasses.data.miniature import CHECKPOINT
from safeglasses.files import write_json
from safeglasses.model.vlm import VLM, load

SHAPES = ((512, 8), (2048, 2))
"""Hidden size and layers of random LLaVAs. Pooling costs as much as the values pooled, a matrix product hidden-size
times that: a small model is the hard case."""
AIMS = {"forward": 1.05, "numpy.sort": 2.5, "scikit-learn": 150, "seconds": 10}
"""At most; of scikit-learn at least, and on two threads."""


@dataclass(frozen=True)
class Line:
    """One line of the table, ready to be read."""

    what: str
    against: str
    ours: str
    theirs: str
    ratio: str
    aim: str
    met: bool | None
    """None where there is no aim."""


def capture_lines(given: argparse.Namespace, into: list[dict[str, Any]]) -> Iterator[Line]:
    """Capture over bare forward passes; figures also go `into` a list."""
    models: dict[str, Callable[[], VLM]] = {
        f"random LLaVA {hidden} × {layers}": partial(random_vlm, hidden, layers) for hidden, layers in SHAPES
    }
    models["miniature"] = partial(load, CHECKPOINT, dtype="float32")
    for name, made in models.items():
        vlm = made()
        batch = batch_for(vlm, rows=given.rows, prompt=64, response=32)
        for recipe, watched in RECIPES.items():
            turns = measure(vlm, batch, watched, clock=CLOCKS[given.clock], rounds=3 * given.rounds)
            ratio = turns.ratio("capture", "bare")
            bare, capture = turns.median("bare"), turns.median("capture")
            into.append({"model": name, "recipe": recipe, "bare": bare, "capture": capture, "ratio": ratio})
            aim = AIMS["forward"]
            yield Line(
                f"capture, {name}, {recipe}",
                "bare forward",
                f"{1000 * capture:.0f} ms",
                f"{1000 * bare:.0f} ms",
                f"{ratio:.3f} ×",
                f"≤ {aim}",
                ratio <= aim,
            )


def rated_line(row: Rated) -> Line:
    """A line about the AUROC."""
    if row.against.startswith("numpy"):
        aim, met = f"≤ {AIMS['numpy.sort']}", row.ratio <= AIMS["numpy.sort"]
        if row.against != "numpy.sort":
            aim, met = "", None
        ratio = f"{row.ratio:.2f} ×"
    else:
        aim, met = "", None
        if row.against in AIMS and row.threads > 1:
            aim, met = f"≥ {AIMS[row.against]}", row.ratio >= AIMS[row.against]
        ratio = f"{row.ratio:.0f} × faster"
    return Line(
        f"AUROC, {row.values}, {row.layout}, {row.threads} thread{'s'[: row.threads - 1]}",
        row.against,
        f"{1e6 * row.ours:.1f} µs",
        f"{1e6 * row.theirs:.{1 if row.theirs < 1e-4 else 0}f} µs",
        ratio,
        aim,
        met,
    )


def whole_line(found: dict[str, Any]) -> Line:
    """The line about a whole model."""
    return Line(
        f"AUROC of LLaVA-1.5-7B, {found['neurons']:,} × {found['samples']:,} bfloat16",
        f"peak {found['peak_bytes'] / 1e9:.2f} GB",
        f"{found['seconds']:.2f} s",
        "",
        f"{found['cpu_seconds']:.1f} s of CPU",
        f"≤ {AIMS['seconds']} s",
        found["seconds"] <= AIMS["seconds"],
    )


def say(line: Line) -> None:
    """Print a line."""
    met = {True: "met", False: "MISSED", None: ""}[line.met]
    print(
        f"{line.what:62}{line.against:20}{line.ours:>9}{line.theirs:>10}{line.ratio:>16}{line.aim:>8}  {met}",
        flush=True,
    )


def main() -> None:
    """Measure, print a table, write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--neurons", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=2261)
    parser.add_argument("--rounds", type=int, default=5, help="of the AUROC; capture takes three times as many")
    parser.add_argument("--rows", type=int, default=16, help="examples per batch")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: the process's own, for busy machines")
    parser.add_argument("--ml-aura", type=Path, metavar="PATH", help="checkout of github.com/apple/ml-aura")
    parser.add_argument("--growth", action="store_true", help="measure growth instead")
    parser.add_argument("--plot", type=Path, help="with --growth: draw it, as SVG")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.growth:
        growth(given.out, given.plot, given.clock)
        return
    clock, share = CLOCKS[given.clock], others_share()
    print(f"{given.threads} thread(s), {given.clock} clock; AUROC: {given.samples} samples, time per neuron")
    say(Line("", "against", "ours", "theirs", "ratio", "aim", None))
    captured: list[dict[str, Any]] = []
    for line in capture_lines(given, captured):
        say(line)
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(given.samples, generator=generator) < 0.5
    normal = torch.randn(given.samples, given.neurons, generator=generator)
    rated: list[Rated] = []
    with others(given.ml_aura, given.threads, given.clock) as (libraries, missing):
        for rows in (
            over_sorting(normal, labels, clock=clock, rounds=given.rounds),
            over_others(normal, labels, libraries, clock=clock, rounds=given.rounds),
        ):
            for row in rows:
                rated.append(row)
                say(rated_line(row))
    whole = whole_model(given.samples)
    say(whole_line(whole))
    print(f"largest difference to scikit-learn: {max([r.difference for r in rated if r.against == 'scikit-learn'])}")
    taken = share()
    print(f"other processes took {taken:.0%} of the processors")
    for name, why in missing.items():
        print(f"{name}: {why}")
    if given.out is not None:
        setting = {n: getattr(given, n) for n in ("neurons", "samples", "rounds", "rows", "clock")}
        packages = ["numpy", "scikit-learn", *({"torchmetrics"} & set(libraries))]
        write_json(
            given.out,
            {
                **record("find", packages, **setting),
                "others_share_of_cpu": taken,
                "aims": AIMS,
                "capture": captured,
                "auroc": [asdict(row) for row in rated],
                "llava-1.5-7b": whole,
                "missing": missing,
            },
        )


if __name__ == "__main__":
    main()
