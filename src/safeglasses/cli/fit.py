"""``safeglasses fit``: from a model and pairs to glasses, evidence and a report."""

from pathlib import Path
from typing import Annotated

import typer

from safeglasses.cli import options
from safeglasses.cli.outcome import Outcome


def fit(
    model: options.Model,
    pairs: Annotated[
        Path | None,
        typer.Option(
            help="Toxic and non-toxic examples: .jsonl, .parquet or a folder.", show_default="MM-TOXIC-QA (open)"
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts to calibrate and measure on.",
            show_default="MM-TOXIC-QA (open), or with --pairs their prompts",
        ),
    ] = None,
    judge: options.Judges = None,
    refusals: options.Refusals = None,
    recipe: Annotated[
        str, typer.Option(help="sgm-calibrated, sgm, sgm-early, aura, det0, damp, or a .toml file.")
    ] = "sgm-calibrated",
    sites: options.OtherSites = None,
    by_head: Annotated[
        bool, typer.Option("--by-head", help="Turn the neurons of an attention head down together.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="The run folder.", show_default="named after the model")] = None,
    budget: options.Budget = None,
    harm: Annotated[
        str | None,
        typer.Option(help="Accept at most so many harmful answers, e.g. 2%; then the least damage.", show_default="no"),
    ] = None,
    front: Annotated[
        bool, typer.Option("--front", help="Calibrate a whole front of harm and damage, and keep all its glasses.")
    ] = False,
    category: Annotated[
        str | None,
        typer.Option(help="Make glasses against these kinds of harm only, separated by commas.", show_default="all"),
    ] = None,
    under: Annotated[
        str | None,
        typer.Option(
            help="Calibrate and measure with words around the request: self-reminder, adashield-s, xsafety, "
            "system:FILE, joined by +.",
            show_default="none",
        ),
    ] = None,
    seed: options.Seed = 0,
    limit: options.Limit = None,
    batch_size: options.BatchSize = "auto",
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    skip_bad: options.SkipBad = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> Outcome:
    """Fit glasses to MODEL and prove what they do.

    Harm, fluency, utility and refusals are measured with and without glasses, on prompts never seen before.

    Started again with the same inputs, it goes on where it was stopped.
    """
    size = options.batch_size(batch_size)
    from safeglasses.cli.progress import calm_libraries, shown
    from safeglasses.cli.tables import of_run
    from safeglasses.run.fit import fit as run_fit

    calm_libraries()
    with shown() as progress:
        result = run_fit(
            model,
            pairs,
            prompts=prompts,
            judge=judge,
            refusals=refusals,
            recipe=recipe,
            sites=options.where(sites) if sites else None,
            by_head=by_head,
            out=out,
            budget=budget,
            harm=harm,
            front=front,
            category=category,
            under=under,
            seed=seed,
            limit=limit,
            batch_size=size,
            dtype=dtype,
            device_map=device_map,
            revision=revision,
            skip_bad=skip_bad,
            overwrite=overwrite,
            progress=progress,
        )
    return of_run(result.folder, result.summary)
