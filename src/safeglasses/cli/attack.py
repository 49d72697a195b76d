"""``safeglasses attack``: how much of what stacks of defences gain remains when somebody works against them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safeglasses.cli import options
from safeglasses.cli.outcome import Outcome

if TYPE_CHECKING:
    from rich.console import Console


def attack(
    model: options.Model,
    defences: options.Defences,
    out: Annotated[Path, typer.Option(help="Folder of answers, attack.json, attack.html; gone on with after a kill.")],
    prompts: options.Prompts = None,
    judge: options.Judges = None,
    attacker: Annotated[
        Path | None, typer.Option(help="TOML: wrappers and words of the attacker.", show_default="what ships")
    ] = None,
    attacks: Annotated[
        list[str] | None,
        typer.Option(help="Of wrappers, universal, search: separated by commas.", show_default="all three"),
    ] = None,
    queries: Annotated[int, typer.Option(help="Answers per prompt in a search; suffixes in the universal one.")] = 16,
    suffix_words: Annotated[int, typer.Option(help="Words of a suffix.")] = 3,
    known: Annotated[
        list[Path] | None,
        typer.Option(help="Data that the defences were fitted on: no wrapper may occur there. May be given again."),
    ] = None,
    allow_known: Annotated[bool, typer.Option("--allow-known", help="Mark such wrappers, do not refuse them.")] = False,
    recipe: options.Stacks = None,
    defence_judge: options.DefenceJudge = None,
    on_failure: options.OnFailure = None,
    split: options.Split = options.Part.TEST,
    search_split: Annotated[
        options.Part, typer.Option(help="Where the universal suffix is searched.")
    ] = options.Part.CALIBRATE,
    search_limit: Annotated[int, typer.Option(help="At most N prompts there.")] = 48,
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
    """Attack stacks of defences on MODEL: held-back wrappers, searched suffixes.

    Every stack is attacked by itself, as a whole, and so is the model without any; asking again without a suffix is the
    control. Says how much of each stack's gain remains.
    """
    size = options.batch_size(batch_size)
    from safeglasses.cli.progress import calm_libraries, shown
    from safeglasses.run.attacking import KINDS, AttackAsked, attack_model

    calm_libraries()
    asked = AttackAsked(
        defences=options.listed(defences),
        out=out,
        prompts=prompts,
        judges=judge,
        recipe=recipe,
        defence_judge=defence_judge,
        on_failure=None if on_failure is None else on_failure.value,
        attacker=attacker,
        kinds=KINDS if attacks is None else options.listed(attacks),
        known=tuple(known or ()),
        allow_known=allow_known,
        queries=queries,
        suffix_words=suffix_words,
        split=split.value,
        search_split=search_split.value,
        search_limit=search_limit,
        greedy=greedy,
        max_new_tokens=max_new_tokens,
        seed=seed,
        limit=limit,
    )
    with shown() as progress:
        record = attack_model(
            model, asked, batch_size=size, dtype=dtype, device_map=device_map, revision=revision, progress=progress
        )
    return Outcome(record, lambda console: _show(console, record))


def _show(console: "Console", record: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from safeglasses.report.attack_page import headline, title_of
    from safeglasses.report.grid_page import short

    by = {(row["defence"], row["attack"]): row for row in record["rows"]}
    names = list(dict.fromkeys(row["defence"] for row in record["rows"]))
    table = Table(
        title=f"{record['prompts']:,} eliciting prompts, {record['decoding']['name']}: harmful, and gain that remains",
        title_justify="left",
    )
    table.add_column("attack", overflow="fold", min_width=24)
    for name in names:
        table.add_column(escape(short(name)), justify="right", overflow="fold")
    for attack in dict.fromkeys(row["attack"] for row in record["rows"]):
        cells = [_cell(by[name, attack]) for name in names]
        table.add_row(escape(title_of(attack, record)), *cells)
    console.print(table)
    for line in headline(record):
        console.print(line, markup=False, soft_wrap=not console.is_terminal)
    for name, path in record["files"].items():
        console.print(f"{name + ':':8}{path}", markup=False, soft_wrap=True)


def _cell(row: dict[str, Any]) -> str:
    rate, left = row["harmful_rate"], row["remaining"]
    said = f"{100 * rate['value']:.1f} % [dim]{100 * rate['low']:.1f}–{100 * rate['high']:.1f}[/dim]"
    if left is None:
        return said
    if left["value"] is None:
        return f"{said}\n[dim]no gain[/dim]"
    return f"{said}\n{100 * left['value']:.0f} % left [dim]{100 * left['low']:.0f}–{100 * left['high']:.0f}[/dim]"
