"""``safeglasses inspect``: what is there before anything is done to it."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safeglasses.cli import options
from safeglasses.cli.outcome import Outcome

_LEVELS = {"yes": "yes", "linear maps": "linear maps, not all neurons", "no": "no"}

if TYPE_CHECKING:
    from rich.console import Console

    from safeglasses.data.examples import Examples
    from safeglasses.find.estimate import Estimate
    from safeglasses.model.anatomy import Anatomy


def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint folder, a hub id, or a type such as qwen3_vl_moe.")
    ],
    pairs: Annotated[
        Path | None,
        typer.Option(help="Check these examples too, and estimate what finding on them costs.", show_default=False),
    ] = None,
    sites: options.Sites = None,
    pools: options.Pools = "prompt:last,response:max",
    memory: options.Memory = None,
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    skip_bad: options.SkipBad = False,
    weights: Annotated[
        bool,
        typer.Option("--weights/--no-weights", help="Read the config alone: nothing is downloaded but that."),
    ] = True,
    json: options.Json = False,
    debug: options.Debug = False,
) -> Outcome:
    """Show MODEL's neurons; with pairs, check them and estimate bytes and seconds of finding neurons.

    A type of model needs no checkpoint: its default config is built without weights.
    """
    from safeglasses.cli.progress import calm_libraries, shown
    from safeglasses.data.examples import check_pairs, read_examples
    from safeglasses.find.estimate import estimate
    from safeglasses.find.pools import parse_pools
    from safeglasses.find.sizes import free_disk, memory_budget
    from safeglasses.model.architectures import is_type
    from safeglasses.model.vlm import load

    calm_libraries()
    if not weights or (is_type(model) and not Path(model).exists()):
        return _without_weights(model, revision, pairs)
    wanted = parse_pools(pools)
    allowed = memory_budget(memory) if memory is not None else None
    cost: Estimate | None = None
    with shown() as progress:
        with progress.stage("load the model"):
            vlm = load(model, dtype=dtype, device_map=device_map, revision=revision)
        record: dict[str, Any] = {
            "model": vlm.source,
            "revision": vlm.revision,
            "base_fingerprint": vlm.fingerprint(),
            "multimodal": vlm.is_multimodal,
            "dtype": str(vlm.dtype).removeprefix("torch."),
            "parameters": sum(parameter.numel() for parameter in vlm.model.parameters()),
            "context_length": vlm.context_length,
            **_parts(vlm.model, vlm.anatomy),
        }
        if pairs is not None:
            with progress.stage("check the pairs"):
                examples = read_examples(pairs, skip_bad=skip_bad)
                check_pairs(examples, vlm)
            record["pairs"] = _census(examples)
            with progress.stage("estimate the cost of finding neurons"):
                held_out = examples.split("calibrate")
                cost = estimate(
                    vlm,
                    examples.split("find"),
                    held_out if held_out.toxic and held_out.non_toxic else (),
                    sites=vlm.anatomy.sites(options.where(sites)),
                    pools=wanted,
                    memory=memory_budget(None) if allowed is None else allowed,
                    disk=free_disk(Path.cwd()),
                )
            record["estimate"] = {"sites": options.where(sites), **cost.to_json()}

    def render(console: "Console") -> None:
        _render(console, record)
        if cost is not None:
            _render_estimate(console, cost)

    return Outcome(record, render)


def _without_weights(model: str, revision: str | None, pairs: Path | None) -> Outcome:
    from safeglasses.errors import SafeglassesError
    from safeglasses.model import loading
    from safeglasses.model.anatomy import anatomy
    from safeglasses.model.architectures import config_of, is_type, on_meta

    if pairs is not None:
        raise SafeglassesError(
            "pairs are checked with the model itself",
            given=f"--pairs {pairs} and {model} without weights",
            expected="a checkpoint with its weights, tokenizer and processor",
            do="leave --pairs out, or give a checkpoint",
        )
    note = ""
    if is_type(model) and not Path(model).exists():
        config, note = config_of(model)
    else:
        config = loading.load_config(loading.find_source(model), revision)
    built: Any = on_meta(config)
    record: dict[str, Any] = {
        "model": model,
        "revision": revision,
        "class": type(built).__name__,
        "multimodal": loading.is_multimodal(config),
        "parameters": sum(parameter.numel() for parameter in built.parameters()),
        "config": note or ("the default of the type" if is_type(model) else "the checkpoint's"),
        **_parts(built, anatomy(built)),
    }
    return Outcome(record, lambda console: _render(console, record))


def _parts(model: Any, parts: "Anatomy") -> dict[str, Any]:
    from safeglasses.model.architectures import picture_tokens
    from safeglasses.model.overview import overview
    from safeglasses.ship.support import support

    return {
        "addresses": f"{parts.layers_path}.LAYER.KIND:out#INDEX",
        "picture_tokens": picture_tokens(model.config),
        "anatomy": overview(parts),
        "support": [action.to_json() for action in support(model, parts)],
    }


def _census(examples: "Examples") -> dict[str, Any]:
    counts = Counter((row.split, row.label or "unlabelled") for row in examples)
    splits: dict[str, dict[str, int]] = {}
    for (split, label), n in sorted(counts.items()):
        splits.setdefault(split, {})[label] = n
    return {"rows": len(examples), "skipped": list(examples.skipped), "splits": splits}


def _render(console: "Console", record: dict[str, Any]) -> None:
    from rich.table import Table

    anatomy = record["anatomy"]
    facts = Table.grid(padding=(0, 2))
    shown = ("model", "class", "config", "base_fingerprint", "multimodal", "dtype", "parameters", "context_length")
    for name in (name for name in (*shown, "picture_tokens") if name in record):
        value = record[name]
        text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        facts.add_row(name.replace("_", " "), text)
    facts.add_row("decoder", f"{anatomy['decoder'] or 'the model itself'}, {anatomy['layers']} layers")
    named = {
        "linears": "linear outputs",
        "mlp": "MLP outputs",
        "ffn": "FFN neurons",
        "experts": "neurons of fused experts",
    }
    for name, n in anatomy["neurons"].items():
        if n or name != "experts":
            facts.add_row(named[name], f"{n:,}")
    for name in ("cross_attention_layers", "layers_without_neurons"):
        if anatomy[name]:
            facts.add_row(name.replace("_", " "), ", ".join(map(str, anatomy[name])))
    console.print(facts)
    table = Table(title="linear maps of the decoder", title_justify="left")
    table.add_column("kind")
    for name in ("layers", "in", "out"):
        table.add_column(name, justify="right")
    table.add_column("MLP")
    table.add_column("heads")
    for row in anatomy["linears"]:
        numbers = (_widths(row[name]) for name in ("layers", "in", "out"))
        table.add_row(row["kind"], *numbers, "yes" if row["mlp"] else "", _heads(row["kind"], anatomy))
    console.print(table)
    console.print(f"addresses of their outputs: {record['addresses']}", markup=False)
    if anatomy["outside"]:
        _render_outside(console, anatomy["outside"])
    if anatomy["experts"]:
        _render_experts(console, anatomy)
    elif anatomy["ffn_reason"]:
        console.print(f"no feed-forward neurons: {anatomy['ffn_reason']}", markup=False)
    for row in record["support"]:
        why = f": {row['why']}" if row["why"] else ""
        console.print(f"{row['action']}: {_LEVELS[row['level']]}{why}", markup=False)
    if "pairs" in record:
        _render_pairs(console, record["pairs"])


def _heads(kind: str, anatomy: dict[str, Any]) -> str:
    """Say how many heads × how wide lie on what a kind of map writes, or on what it reads."""
    found = [row for row in anatomy["heads"] if row["kind"].rpartition(":")[0] == kind]
    return ", ".join(f"{r['heads']} × {r['width']}{' read' * r['kind'].endswith(':in')}" for r in found)


def _render_outside(console: "Console", rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(title="linear maps beyond the decoder, on request (--sites)", title_justify="left")
    table.add_column("sites")
    table.add_column("kind")
    for name in ("maps", "in", "out"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row["region"], row["kind"], *(_widths(row[name]) for name in ("maps", "in", "out")))
    console.print(table)
    console.print(f"addresses of their outputs: {rows[0]['first']}#INDEX …", markup=False)


def _render_experts(console: "Console", anatomy: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="fused experts of the decoder", title_justify="left")
    for name in ("kind", "layers", "experts", "neurons", "reads and writes", "parameters", "which tokens"):
        table.add_column(name)
    for row in anatomy["experts"]:
        numbers = (_widths(row[name]) for name in ("layers", "experts", "width", "hidden"))
        parameters = f"{', '.join(row['parameters'])}: {row['layout']}"
        table.add_row(row["kind"], *numbers, escape(parameters), "routed" if row["routed"] else "all")
    console.print(table)
    kind = anatomy["experts"][0]["kind"]
    console.print(
        f"addresses of their neurons: {anatomy['layers_path']}.LAYER.{kind}.EXPERT:in#INDEX (also :out, :gate, :up)",
        markup=False,
    )


def _widths(value: int | list[int]) -> str:
    return f"{value:,}" if isinstance(value, int) else ", ".join(f"{one:,}" for one in value)


def _render_pairs(console: "Console", census: dict[str, Any]) -> None:
    console.print(f"pairs: {census['rows']:,} usable rows, {len(census['skipped'])} skipped", markup=False)
    for split, labels in census["splits"].items():
        console.print(f"  {split}: " + ", ".join(f"{n:,} {label}" for label, n in labels.items()), markup=False)
    for line in census["skipped"]:
        console.print(f"  skipped: {line}", markup=False)


def _render_estimate(console: "Console", found: "Estimate") -> None:
    from rich.table import Table

    from safeglasses.find.sizes import format_bytes, format_seconds

    cost, padding = found.cost, found.padded_tokens / found.tokens - 1
    table = Table.grid(padding=(0, 2))
    rows = {
        "neurons": f"{found.neurons:,} × {' and '.join(map(str, found.pools))}",
        "examples": f"{found.find:,} to find, {found.held_out:,} held out",
        "tokens": f"{found.tokens:,} (median {found.tokens_median:,}, longest {found.tokens_max:,}), "
        f"{padding:.0%} more with padding",
        "exact engine": f"{format_bytes(found.exact_bytes)} of memory or disk at a time, "
        f"{format_bytes(found.shards_bytes)} of shards if kept on disk",
        "histogram engine": f"{format_bytes(found.histogram_bytes)} of memory, whatever the number of examples",
        "evidence file": f"about {format_bytes(found.evidence_bytes)}",
        "engine taken": f"{found.choice.engine}: {found.choice.why}",
        "forward passes": f"{cost.forward_flops:.2e} FLOPs, about {format_seconds(cost.forward_seconds)} "
        f"(scaled by tokens from {cost.timed_tokens:,} in {cost.timed_seconds:.2f} s)",
        "sorting for AUROC": f"about {format_seconds(cost.auroc_seconds)} (exact engine, this CPU)",
    }
    for name, text in rows.items():
        table.add_row(name, text)
    console.print("what finding neurons on these pairs would cost", markup=False)
    console.print(table)
