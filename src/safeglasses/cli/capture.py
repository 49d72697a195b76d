"""``safeglasses capture``: find neurons without fitting anything, on one process or many."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from safeglasses.cli import options
from safeglasses.cli.outcome import Outcome

if TYPE_CHECKING:
    from rich.console import Console


def capture(
    model: options.Model,
    pairs: Annotated[Path, typer.Option(help="Toxic and non-toxic examples: .jsonl, .parquet or a folder.")],
    out: Annotated[Path | None, typer.Option(help="The run folder.", show_default="named after the model")] = None,
    sites: options.Sites = None,
    pools: options.Pools = "prompt:last,response:max",
    engine: Annotated[
        Literal["auto", "exact", "histogram"], typer.Option(help="exact keeps every value, histogram counts.")
    ] = "auto",
    memory: options.Memory = None,
    resamples: Annotated[int, typer.Option(help="Bootstrap resamples of pairs; 0 for none.", min=0)] = 200,
    processes: Annotated[
        int | None, typer.Option(help="Fail unless so many processes run.", show_default="as many as there are")
    ] = None,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Cut the weights over the processes.")] = False,
    keep_shards: Annotated[bool, typer.Option("--keep-shards", help="Leave every pooled value on disk.")] = False,
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
) -> Outcome | None:
    """Find the neurons of MODEL that tell toxic from non-toxic examples, and how sure that is.

    Many processes share the work: torchrun --nproc_per_node 8 -m safeglasses capture MODEL --pairs F --out DIR

    Started again with the same inputs, it goes on behind the last finished shard.
    """
    size = options.batch_size(batch_size)
    from safeglasses.cli.progress import calm_libraries, shown
    from safeglasses.find.pools import parse_pools
    from safeglasses.find.sizes import parse_bytes
    from safeglasses.run.capture import capture_evidence

    calm_libraries()
    with shown() as progress:
        result = capture_evidence(
            model,
            pairs,
            out,
            sites=options.where(sites),
            pools=parse_pools(pools),
            engine=engine,
            memory=parse_bytes(memory) if memory is not None else None,
            resamples=resamples,
            processes=processes,
            fsdp=fsdp,
            keep_shards=keep_shards,
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
    if result is None:
        return None
    files = {"evidence": str(result.folder / "evidence.safetensors"), "page": str(result.page)}
    record = {"folder": str(result.folder), **files, **result.record}
    return Outcome(record, lambda console: _render(console, record))


def _render(console: "Console", record: dict[str, Any]) -> None:
    from rich.table import Table

    console.print(f"{record['neurons']:,} neurons at {record['sites']} sites, {record['engine']} engine", markup=False)
    table = Table(title="expert neurons", title_justify="left")
    names = ("evidence", "toxic", "non-toxic", "FDR 5 %", "also held out", "AUROC from", "found again", "noise 99.9 %")
    for name in names:
        table.add_column(name, justify="left" if name == "evidence" else "right")
    for row in record["pools"]:
        table.add_row(row["pool"], f"{row['toxic']:,}", f"{row['non_toxic']:,}", *_cells(row))
    console.print(table)
    for row in record["pools"]:
        for found in row["explained"]:
            share = found["flagged"] / found["neurons"] if found["neurons"] else 0
            console.print(f"{row['pool']}: {share:.0%} of them say no more than {found['confound']} does", markup=False)
    flagged = [row for row in record["confounds"] if row["flagged"]]
    for row in flagged:
        console.print(
            f"confound: {row['name']} alone tells the classes apart, AUROC {row['auroc']:.2f} "
            f"({row['low']:.2f}–{row['high']:.2f})",
            markup=False,
        )
    if not flagged:
        console.print(f"none of {len(record['confounds'])} possible confounds tells the classes apart", markup=False)
    for name in ("page", "evidence"):
        console.print(f"{name}: {record[name]}", markup=False, soft_wrap=True)


def _cells(row: dict[str, Any]) -> list[str]:
    if row["noise"] is None and not row["selected"]:
        return ["0", "", "", "", ""]
    again, noise = row["stability"], row["noise"]
    interval = f" {again['low']:.0%}–{again['high']:.0%}" if again and again["low"] is not None else ""
    return [
        f"{row['selected_before_held_out']:,}",
        f"{row['selected']:,}",
        f"{row['cutoff']:.3f}" if row["cutoff"] is not None else "",
        f"{again['found_again']:.0%}{interval}" if again else "",
        f"{noise['high']:.3f}" if noise else "",
    ]
