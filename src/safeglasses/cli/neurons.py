"""``safeglasses neurons``: which safety neurons were found, and how far their sets overlap."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safeglasses.cli import options
from safeglasses.cli.outcome import Outcome

if TYPE_CHECKING:
    from rich.console import Console

_SHORT = {"image-dominant": "image", "text-dominant": "text"}


def neurons(
    run: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="A shield run folder, or any with a contrast.safetensors, or that file."),
    ],
    overlap: Annotated[
        bool, typer.Option("--overlap", help="Also how far the sets of languages and modalities overlap.")
    ] = False,
    rule: Annotated[
        str | None, typer.Option(help="By which of the rules that were measured.", show_default="the first measured")
    ] = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> Outcome:
    """List the safety neurons of a run: per language, modality and layer, beside what noise alone gives.

    Nothing is measured, and no model is needed.
    """
    from safeglasses.find.contrast import Contrast
    from safeglasses.find.overlap import atlas_of
    from safeglasses.find.rules import Rule
    from safeglasses.report.neurons import neuron_table

    contrast = Contrast.load(run)
    name = Rule.named(rule).name if rule is not None else None
    record: dict[str, Any] = {"folder": str(run), **neuron_table(contrast, name)}
    if overlap:
        atlas = atlas_of(contrast, name)
        record["overlap"] = {"summary": atlas.summary(), **atlas.record()}
    return Outcome(record, lambda console: _render(console, record))


def _render(console: "Console", record: dict[str, Any]) -> None:
    from rich.table import Table

    rule = record["rule"]
    mean = f", {rule['mean']} means" if rule["name"] in ("precise-shield", "one-anchor") else ""
    console.print(
        f"{record['neurons']:,} neurons, rule {rule['name']}{mean}, p = {rule['share']:g}, tokens: {record['tokens']}",
        markup=False,
    )
    table = Table(title="safety neurons", title_justify="left")
    heads = ("prompts", "harmful + benign", "found", "of k", "noise alone", "as few prompts", "stable")
    for head in (*heads, "per layer"):
        table.add_column(head, justify="left" if head in ("prompts", "per layer") else "right")
    for row in record["cells"]:
        stability = row["stability"] or {}
        table.add_row(
            row["cell"],
            f"{row['harmful']} + {row['benign']}",
            f"{row['found']:,}",
            f"{row['found'] / row['k']:.0%}" if row["k"] else "",
            _spread(row["noise"]),
            _spread(row["found_at_half"]),
            _spread(stability.get("jaccard")),
            _layers([layer["found"] for layer in row["layers"]]),
        )
    console.print(table)
    console.print(
        "of k: of the neurons most important to harmful prompts. noise alone: one half of the benign prompts against "
        "the other; as few prompts: harmful ones against benign ones in such halves. stable: Jaccard index of two "
        "resamples of whole items.",
        markup=False,
    )
    anchor = record["multilingual"]
    shared = ", ".join(f"{language} {count}" for language, count in record["shared"].items())
    if shared:
        console.print(f"both modalities: {shared}", markup=False)
    if anchor is not None:
        console.print(f"shared with {anchor['anchor']} by any other language: {anchor['neurons']}", markup=False)
    console.print(f"any language or modality: {record['union']:,}", markup=False)
    if record["left_out_layers"]:
        layers = ", ".join(map(str, record["left_out_layers"]))
        console.print(f"not looked at: layers {layers}, which only cross-attend to pictures", markup=False)
    if "overlap" in record:
        _render_overlap(console, record["overlap"])


def _render_overlap(console: "Console", overlap: dict[str, Any]) -> None:
    from rich.table import Table

    names = [entry["name"] for entry in overlap["sets"]]
    table = Table(
        title="per cent of the set on the left that the one above holds", title_justify="left", padding=(0, 0, 0, 1)
    )
    table.add_column("", no_wrap=True)
    for name in names:
        language, _, risk = name.rpartition("/")
        table.add_column(f"{language}\n{_SHORT.get(risk, risk)}", justify="right")
    for i, name in enumerate(names):
        table.add_row(
            name, *("·" if i == j or v is None else f"{100 * v:.0f}" for j, v in enumerate(overlap["directional"][i]))
        )
    console.print(table)
    whats = {"cross_modal": "two modalities of a language", "cross_lingual": "two languages of a modality"}
    for kind, what in whats.items():
        found = overlap["summary"][kind]
        if found["directional"] is not None:
            share, jaccard, random = found["directional"], found["jaccard"], found["random_directional"]
            idle = found["idle_directional"]
            nothing = f"sets about nothing {_spread(idle)}, " if idle is not None else ""
            console.print(
                f"{what}: {share['mean']:.0%} ({share['low']:.0%}–{share['high']:.0%}), Jaccard {jaccard['mean']:.2f}; "
                f"{nothing}random sets {random['mean']:.0%}; {found['beyond_random']} of {found['pairs']} pairs share "
                "more than random ones",
                markup=False,
            )


def _spread(values: dict[str, float] | None) -> str:
    return "" if values is None else f"{values['mean']:.0%} ({values['low']:.0%}–{values['high']:.0%})"


def _layers(found: list[int]) -> str:
    return " ".join(map(str, found)) if len(found) <= 8 else f"{min(found)} to {max(found)}"
