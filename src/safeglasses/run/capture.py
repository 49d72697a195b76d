"""Finding alone: examples → evidence, over one process or many, with a folder that a killed run goes on from."""

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from safeglasses.data.checks import check_pairs
from safeglasses.data.examples import Examples, read_examples
from safeglasses.defend.recipes import RECIPES
from safeglasses.errors import SafeglassesError
from safeglasses.files import write_json
from safeglasses.find.engine import Engine
from safeglasses.find.evidence import Evidence
from safeglasses.find.finding import measure_evidence, setup_for
from safeglasses.find.passes import Watch
from safeglasses.find.pools import Pool
from safeglasses.find.world import World, say_once
from safeglasses.model.anatomy import What
from safeglasses.model.sharding import shard
from safeglasses.model.vlm import VLM, load
from safeglasses.progress import Progress, Quiet
from safeglasses.report.evidence_page import write_evidence_page
from safeglasses.run.folder import RunFolder
from safeglasses.run.inputs import content_of, limited

DEFAULT = RECIPES["sgm-calibrated"]


@dataclass(frozen=True)
class CaptureResult:
    """What `capture_evidence` gives back."""

    evidence: Evidence
    """As saved in ``folder/evidence.safetensors``."""
    record: dict[str, Any]
    """The content of ``folder/evidence.json``."""
    page: Path
    """The same to look at: ``folder/evidence.html``."""
    folder: Path
    """The run folder."""


def capture_evidence(
    model: str | Path,
    pairs: str | Path,
    out: str | Path | None = None,
    *,
    sites: What | Sequence[What] = DEFAULT.sites,
    pools: Sequence[Pool] = DEFAULT.pools,
    engine: Engine | Literal["auto"] = "auto",
    memory: int | None = None,
    resamples: int = 200,
    processes: int | None = None,
    fsdp: bool = False,
    keep_shards: bool = False,
    seed: int = 0,
    limit: int | None = None,
    batch_size: int | str = "auto",
    dtype: str = "auto",
    device_map: str | None = None,
    revision: str | None = None,
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> CaptureResult | None:
    """Measure the evidence for a model and save it; every process of a job calls this.

    Args:
        model: checkpoint folder or hub id.
        pairs: toxic and non-toxic image-text pairs; the find split makes the evidence, the calibrate split
            (if it has both classes) checks it.
        out: run folder; a folder with the same inputs is resumed.
        sites: ``linears``, ``mlp`` …, or several; see `Anatomy.sites`.
        pools: over which tokens activations are summarised, and how.
        engine: ``exact``, ``histogram``, or ``auto``.
        memory: bytes that each process may fill with values or counts, beside the model.
        resamples: of the bootstrap; 0 for none.
        processes: how many there must be.
        fsdp: cut the model's weights over the processes (FSDP2), for models larger than one device.
        keep_shards: leave the pooled values of every example in ``folder/shards``.
        seed: of shards, halves and the bootstrap.
        limit: at most so many examples per split, for a quick look.
        batch_size: rows per forward pass, or ``auto``.
        dtype: ``auto`` or a torch dtype's name.
        device_map: as in transformers; without, each process of a job takes a GPU of its own where there are any.
        revision: of a hub model.
        skip_bad: skip unreadable rows and count them, instead of failing.
        overwrite: delete another run in `out`.
        progress: where progress is shown (by the first process).

    Returns:
        The result in the first process, None in the others.

    Raises:
        SafeglassesError: bad input, always before long work; or another process of the job died.
    """
    path = Path(out) if out is not None else Path(f"safeglasses-{Path(str(model)).name}-evidence")
    with World.join(processes) as world:
        show = progress if progress is not None and world.is_first else Quiet()
        inputs: dict[str, Any] = {
            "model": str(model),
            "revision": revision,
            "sites": sites if isinstance(sites, str) else list(sites),
            "pools": [str(pool) for pool in pools],
            "engine": engine,
            "resamples": resamples,
            "seed": seed,
            "limit": limit,
            "batch_size": batch_size,
            "dtype": dtype,
            "skip_bad": skip_bad,
        }
        with world.together():
            inputs["pairs"] = content_of(pairs)
            RunFolder.examine(path, inputs, overwrite=overwrite)
            with show.stage("load"):
                vlm = load(model, dtype=dtype, device_map=_device(world, device_map), revision=revision)
            with show.stage("read and check the data"):
                given = limited(read_examples(pairs, skip_bad=skip_bad), limit)
                check_pairs(given, vlm)
            Watch.on(vlm, vlm.anatomy.sites(sites), pools)  # says now what cannot be read, before a folder is claimed
        if fsdp:
            shard(vlm, world.size)
        with world.together():
            if world.is_first:
                RunFolder.open(path, inputs, overwrite=overwrite)
        try:
            evidence = _measured(
                vlm,
                given,
                path,
                world,
                show,
                sites=sites,
                pools=pools,
                engine=engine,
                memory=memory,
                resamples=resamples,
                batch_size=batch_size,
                seed=seed,
            )
        except SafeglassesError as error:
            raise say_once(path, error) from error
        if not world.is_first:
            return None
        folder = RunFolder(path, resumed=True)
        record = describe(evidence, vlm, folder.seconds(), skipped=len(given.skipped), processes=world.size)
        page = write_evidence_page(evidence, record, path / "evidence.html")
        write_json(path / "evidence.json", record)  # last: a folder that has it is finished
        for mark in path.glob(".ended-*"):
            mark.unlink()
        if not keep_shards:
            shutil.rmtree(path / "shards", ignore_errors=True)
        return CaptureResult(evidence, record, page, path)


def _measured(
    vlm: VLM,
    given: Examples,
    path: Path,
    world: World,
    show: Progress,
    *,
    sites: What | Sequence[What],
    pools: Sequence[Pool],
    engine: Engine | Literal["auto"],
    memory: int | None,
    resamples: int,
    batch_size: int | str,
    seed: int,
) -> Evidence:
    saved = path / "evidence.safetensors"
    if all(world.all_say(saved.exists())):
        return Evidence.load(saved)
    find, held_out = given.split("find"), given.split("calibrate")
    both = len({example.label for example in held_out}) == 2
    setup = setup_for(
        vlm,
        max(len(find), len(held_out)),
        sites=vlm.anatomy.sites(sites),
        pools=pools,
        engine=engine,
        memory=memory,
        folder=path / "shards",
        batch_size=batch_size,
        seed=seed,
        world=world,
    )
    show.say(f"{setup.engine} engine, {setup.shard:,} examples per shard, {world.size} process(es)")
    folder = RunFolder(path, resumed=True)
    total = len(find) + len(held_out) * both
    with show.stage("find expert neurons", total) as advance:
        evidence = measure_evidence(
            vlm,
            find,
            held_out if both else None,
            sites=vlm.anatomy.sites(sites),
            pools=pools,
            setup=setup,
            resamples=resamples,
            world=world,
            progress=advance,
            timed=folder.timed if world.is_first else lambda _: nullcontext(),
        )
    if world.is_first:
        evidence.save(saved)
    return evidence


def describe(
    evidence: Evidence, vlm: VLM, seconds: Mapping[str, float], *, skipped: int, processes: int
) -> dict[str, Any]:
    """Return what ``evidence.json`` holds: what was looked at, what was found, and how sure it is."""
    return {
        "schema": 1,
        "model": vlm.source,
        "base_fingerprint": evidence.base_fingerprint,
        "engine": evidence.engine,
        "processes": processes,
        "sites": len(evidence.auroc),
        "neurons": sum(values.shape[1] for values in evidence.auroc.values()),
        "statistics": ["auroc", *evidence.columns],
        "skipped_rows": skipped,
        "seconds": dict(seconds),
        **evidence.certainty,
    }


def _device(world: World, device_map: str | None) -> str | None:
    """Give each process of a job the GPU that is its own, unless the user places the model."""
    if device_map is None and world.size > 1 and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return device_map
