"""``safeglasses ablate``: what a model does without some of its neurons."""

from pathlib import Path
from typing import Annotated

import typer

from safeglasses.cli import options
from safeglasses.cli.outcome import Outcome
from safeglasses.errors import SafeglassesError


def ablate(
    model: options.Model,
    neurons: Annotated[
        Path,
        typer.Option(
            help="A run of `shield`, a shield, glasses, a file of safety neurons, or .txt with an address a line."
        ),
    ],
    prompts: Annotated[
        Path, typer.Option(help="Harmful and harmless requests; splits find (ordinary activations) and test.")
    ],
    tuned: Annotated[
        Path | None, typer.Option(help="A shield or glasses: patch its activations in, too.", show_default=False)
    ] = None,
    how: Annotated[str, typer.Option(help="Kinds of ablation, separated by commas.")] = "zero,mean,resample",
    controls: Annotated[int, typer.Option(help="Layer-matched random sets.", min=1)] = 5,
    judge: Annotated[str, typer.Option(help="Who says that a request was complied with.")] = "complied",
    refusals: options.Refusals = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 64,
    out: Annotated[Path, typer.Option(help="Folder for the report; an unfinished one is resumed.")] = Path(
        "safeglasses-ablation"
    ),
    seed: options.Seed = 0,
    limit: Annotated[
        int | None, typer.Option(help="At most N harmful and N harmless requests.", show_default="all", min=1)
    ] = None,
    batch_size: options.BatchSize = "auto",
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    skip_bad: options.SkipBad = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> Outcome:
    """Take neurons out of MODEL, and as many random ones, and count what it does then.

    Zero, mean and resample ablation, a dose–response curve, and with --tuned activation patching.
    """
    size = options.batch_size(batch_size)
    kinds = _kinds(how)
    from safeglasses.cli.progress import calm_libraries, shown
    from safeglasses.cli.tables import of_ablation
    from safeglasses.run.ablating import run_ablation

    calm_libraries()
    with shown() as progress:
        summary = run_ablation(
            model,
            neurons,
            prompts,
            out,
            tuned=tuned,
            kinds=kinds,
            controls=controls,
            judge=judge,
            refusals=refusals,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
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

    return of_ablation(out, summary)


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    known = ("zero", "mean", "resample")
    if not kinds or set(kinds) - set(known):
        raise SafeglassesError("not a kind of ablation", given=f"--how {text}", expected="some of " + ", ".join(known))
    return kinds
