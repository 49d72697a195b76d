"""``safeglasses measure``: how a model answers, with and without glasses."""

from pathlib import Path
from typing import Annotated

import typer

from safeglasses.cli import options
from safeglasses.cli.outcome import Outcome


def measure(
    model: options.Model,
    prompts: options.Prompts = None,
    glasses: Annotated[
        Path | None,
        typer.Option(help="A folder of glasses, or a shield: measures without and with it.", show_default=False),
    ] = None,
    strength: options.Strength = None,
    judge: options.Judges = None,
    refusals: options.Refusals = None,
    split: options.Split = options.Part.TEST,
    out: Annotated[
        Path | None,
        typer.Option(help="Write results and samples there; go on there after a kill.", show_default="nowhere"),
    ] = None,
    log_dir: Annotated[
        Path | None, typer.Option(help="Write Inspect logs there (extra `evals`).", show_default="nowhere")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="The prompts' id on the Hub, for .eval_results.", show_default="of the open benchmark"
        ),
    ] = None,
    max_new_tokens: options.MaxNewTokens = 64,
    seed: options.Seed = 0,
    limit: Annotated[int | None, typer.Option(help="Only the first N prompts.", show_default="all", min=1)] = None,
    batch_size: options.BatchSize = "auto",
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    skip_bad: options.SkipBad = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> Outcome:
    """Measure MODEL with and without glasses.

    Answers the prompts, sampled and greedy, and reports harm, utility, fluency and refusals with intervals.
    """
    size = options.batch_size(batch_size)
    from safeglasses.cli.progress import calm_libraries, shown
    from safeglasses.cli.tables import of_measurement
    from safeglasses.run.measuring import Asked, measure_model

    calm_libraries()
    asked = Asked(
        prompts=prompts,
        judges=judge,
        refusals=refusals,
        glasses=glasses,
        strength=strength,
        split=split.value,
        max_new_tokens=max_new_tokens,
        seed=seed,
        limit=limit,
        skip_bad=skip_bad,
        out=out,
        log_dir=log_dir,
        dataset=dataset,
    )
    with shown() as progress:
        record = measure_model(
            model,
            asked,
            batch_size=size,
            dtype=dtype,
            device_map=device_map,
            revision=revision,
            progress=progress,
        )
    return of_measurement(record)
