"""Both methods on the model that ships: nothing to download, nothing to bring."""

from dataclasses import dataclass
from pathlib import Path

from safeglasses.data.miniature import CHECKPOINT
from safeglasses.data.miniature.benchmark import write_benchmark
from safeglasses.files import atomic_folder
from safeglasses.progress import Progress, Quiet
from safeglasses.run.fit import FitResult, fit
from safeglasses.run.shield import ShieldPlan, ShieldResult, shield
from safeglasses.tune.config import TuneConfig

LIMIT, TEST_LIMIT = 8, 12
"""Rows per label and cell of the second act, to tune with and to measure with: it is to take minutes."""
PLAN = ShieldPlan(controls=5, tune=TuneConfig(learning_rate=5e-3, epochs=4))
"""The learning rate comes from trials on the calibrate split; epochs and limits were set for the time they take."""


@dataclass(frozen=True)
class DemoResult:
    """What `demo` gives back."""

    fit: FitResult
    """First act: glasses against insults."""
    shield: ShieldResult
    """Second act: a shield against complying with harmful requests."""


def demo(
    out: str | Path = "safeglasses-demo",
    budget: str | None = None,
    seed: int = 0,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> DemoResult:
    """Fit glasses and a shield to the embedded miniature, through the same `fit` and `shield` that users call.

    Args:
        out: folder for the benchmark (``benchmark/``) and the runs (``run/`` and ``shield/``).
        budget: time for calibration, e.g. ``90s``.
        seed: of sampling, search and calibration; the benchmark is always the same.
        overwrite: delete earlier runs with other inputs.
        progress: where progress is shown.
    """
    show = progress or Quiet()
    here = Path.cwd()
    model = CHECKPOINT.relative_to(here) if CHECKPOINT.is_relative_to(here) else CHECKPOINT  # shorter in reports
    benchmark = Path(out) / "benchmark"
    if not benchmark.exists():
        with show.stage("draw the benchmark"), atomic_folder(benchmark) as folder:
            write_benchmark(folder)
    lexicon, refusals = (f"lexicon:{benchmark / name}" for name in ("lexicon.txt", "refusals.txt"))
    pairs, prompts, run = (benchmark / "pairs.jsonl", benchmark / "prompts.jsonl", Path(out) / "run")
    show.say(
        f"the same as: safeglasses fit {model} --pairs {pairs} --prompts {prompts} --judge {lexicon} "
        f"--refusals {refusals} --out {run}"
    )
    first = fit(
        model,
        pairs,
        prompts,
        judge=lexicon,
        refusals=refusals,
        out=run,
        budget=budget,
        seed=seed,
        overwrite=overwrite,
        progress=show,
    )
    probe, home = benchmark / "probe.jsonl", Path(out) / "shield"
    show.say(
        f"second act, the same as: safeglasses shield {model} --probe {probe} --prompts {prompts} "
        f"--refusals {refusals} --judge complied:{benchmark / 'refusals.txt'} --controls {PLAN.controls} "
        f"--learning-rate {PLAN.tune.learning_rate:g} --epochs {PLAN.tune.epochs:g} --limit {LIMIT} "
        f"--test-limit {TEST_LIMIT} --out {home}"
    )
    second = shield(
        model,
        probe,
        prompts,
        judge=f"complied:{benchmark / 'refusals.txt'}",
        out=home,
        plan=PLAN,
        refusals=refusals,
        seed=seed,
        limit=LIMIT,
        test_limit=TEST_LIMIT,
        overwrite=overwrite,
        progress=show,
    )
    return DemoResult(first, second)
