"""The main job on the model that ships: nothing to download, nothing to bring."""

from pathlib import Path

from safeglasses.data.miniature import CHECKPOINT
from safeglasses.data.miniature.benchmark import write_benchmark
from safeglasses.files import atomic_folder
from safeglasses.progress import Progress, Quiet
from safeglasses.run.fit import FitResult, fit


def demo(
    out: str | Path = "safeglasses-demo",
    budget: str | None = None,
    seed: int = 0,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> FitResult:
    """Fit glasses to the embedded miniature on its own benchmark, through the same `fit` that users call.

    Args:
        out: folder for the benchmark (``benchmark/``) and the run (``run/``).
        budget: time for calibration, e.g. ``90s``.
        seed: of sampling, search and calibration; the benchmark is always the same.
        overwrite: delete an earlier run with other inputs.
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
    return fit(
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
