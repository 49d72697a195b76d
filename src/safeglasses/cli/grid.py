"""``safeglasses grid``: what stacks of defences buy and cost, side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safeglasses.cli import options
from safeglasses.cli.outcome import Outcome

if TYPE_CHECKING:
    from rich.console import Console


def grid(
    model: options.Model,
    defences: options.Defences,
    out: Annotated[Path, typer.Option(help="Folder of answers, grid.json, grid.html; gone on with after a kill.")],
    prompts: options.Prompts = None,
    judge: options.Judges = None,
    refusals: options.Refusals = None,
    recipe: options.Stacks = None,
    defence_judge: options.DefenceJudge = None,
    on_failure: options.OnFailure = None,
    split: options.Split = options.Part.TEST,
    greedy: options.Greedy = False,
    max_new_tokens: options.MaxNewTokens = 64,
    seed: options.Seed = 0,
    limit: options.Drawn = None,
    batch_size: options.BatchSize = "auto",
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> Outcome:
    """Compare stacks of defences on MODEL: harm, utility, over-refusal, cost.

    Marks what is dominated; the model without any defence is always a row.
    """
    size = options.batch_size(batch_size)
    from safeglasses.cli.progress import calm_libraries, shown
    from safeglasses.run.gridding import GridAsked, grid_model

    calm_libraries()
    asked = GridAsked(
        defences=options.listed(defences),
        out=out,
        prompts=prompts,
        judges=judge,
        refusals=refusals,
        recipe=recipe,
        defence_judge=defence_judge,
        on_failure=None if on_failure is None else on_failure.value,
        split=split.value,
        greedy=greedy,
        max_new_tokens=max_new_tokens,
        seed=seed,
        limit=limit,
    )
    with shown() as progress:
        record = grid_model(
            model, asked, batch_size=size, dtype=dtype, device_map=device_map, revision=revision, progress=progress
        )
    return Outcome(record, lambda console: _show(console, record))


def _show(console: "Console", record: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from safeglasses.report.grid_page import headline, rows_under, short

    every = rows_under(record, "all")
    slots = list(dict.fromkeys(slot for row in every for slot in row["utility"]))
    table = Table(title=f"{record['prompts']:,} prompts, {record['decoding']['name']}", title_justify="left")
    table.add_column("defence", overflow="fold", min_width=34)
    for name in ("harmful", "standard", "adversarial", *slots, "refused", "calls", "tokens", "s", "failed"):
        table.add_column(name, justify="right")
    by = {(row["defence"], row["condition"]): row for row in record["rows"]}
    for row in every:
        name, cost = row["defence"], row["cost"]
        here = [by.get((name, condition)) for condition in ("standard", "adversarial")]
        label = escape(short(name)) + (" [dim](dominated)[/dim]" if row["dominated"] else "")
        rate = row["harmful_rate"]
        beside = "" if rate is None else f" [dim]{100 * rate['low']:.1f}–{100 * rate['high']:.1f}[/dim]"
        table.add_row(
            label,
            _percent(rate) + beside,
            *(_percent(one["harmful_rate"] if one else None) for one in here),
            *(_percent(row["utility"].get(slot)) for slot in slots),
            _percent(row["refusal_on_benign"]),
            f"{cost['calls']:.2f}",
            f"{cost['tokens']:.1f}",
            f"{cost['seconds']:.3f}",
            f"{sum(row['failures'].values()):,}",
        )
    console.print(table)
    console.print(headline(record), markup=False, soft_wrap=not console.is_terminal)
    for name, path in record["files"].items():
        console.print(f"{name + ':':7}{path}", markup=False, soft_wrap=True)


def _percent(rate: dict[str, Any] | None) -> str:
    return "–" if rate is None else f"{100 * rate['value']:.1f} %"
