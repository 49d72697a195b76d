"""``safeglasses demo``: the whole way on the model that ships with the package."""

from pathlib import Path
from typing import Annotated

import typer

from safeglasses.cli.options import Budget, Debug, Json, Overwrite, Seed
from safeglasses.cli.outcome import Outcome


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the benchmark and the run.")] = Path("safeglasses-demo"),
    budget: Budget = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    json: Json = False,
    debug: Debug = False,
) -> Outcome:
    """Fit and measure glasses on the shipped model.

    Needs no network and no GPU, and takes a few minutes on two cores.
    """
    from safeglasses.cli.progress import calm_libraries, shown
    from safeglasses.cli.tables import of_run
    from safeglasses.run.demo import demo as run_demo

    calm_libraries()
    with shown() as progress:
        result = run_demo(out=out, budget=budget, seed=seed, overwrite=overwrite, progress=progress)
    return of_run(result.folder, result.summary)
