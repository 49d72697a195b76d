"""Measure the evidence: one pass over the examples, every statistic, and how sure it all is."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from safeglasses.data.examples import Examples
from safeglasses.errors import SafeglassesError
from safeglasses.files import read_json, write_json
from safeglasses.find.capture import check_something
from safeglasses.find.certainty import assess
from safeglasses.find.confounds import confound_table
from safeglasses.find.engine import Engine, Finished, Job, Setup, shard_size
from safeglasses.find.enough import FEWEST
from safeglasses.find.estimate import DISK_SHARE, choose, exact_bytes
from safeglasses.find.evidence import Aurocs, Evidence
from safeglasses.find.passes import Watch
from safeglasses.find.pools import Pool
from safeglasses.find.sizes import format_bytes, free_disk, memory_budget
from safeglasses.find.statistic import Samples
from safeglasses.find.world import World
from safeglasses.model.anatomy import module
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM
from safeglasses.model.weights import whole

log = logging.getLogger(__name__)
_JOB = "job.json"


def measure_evidence(
    vlm: VLM,
    find: Examples,
    held_out: Examples | None = None,
    *,
    sites: Sequence[Site],
    pools: Sequence[Pool],
    setup: Setup | None = None,
    resamples: int = 200,
    world: World | None = None,
    progress: Callable[[int, int], None] | None = None,
    timed: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> Evidence:
    """Run the model once over the examples and rate every neuron.

    Args:
        vlm: the model.
        find: toxic and non-toxic examples that the neurons are found on.
        held_out: other examples of both classes, to see whether they separate there too.
        sites: where to look.
        pools: how activations are summarised.
        setup: engine, memory, folder; without one, `setup_for` chooses.
        resamples: bootstrap resamples behind "would be found again"; 0 for none.
        world: the processes that share the work; `Evidence.certainty` is worked out in the first one alone.
        progress: called with examples done and in all, held-out ones included.
        timed: opens a clock named ``capture`` or ``statistics`` around each.

    Raises:
        SafeglassesError: a class is missing, the folder holds another job, or what `Job.run` raises.
    """
    check_something(find, sites, pools)
    for name, examples in (("find", find), ("held-out", held_out)):
        if examples is not None and len({example.is_toxic for example in examples}) < 2:
            raise SafeglassesError(
                f"the {name} examples do not hold both classes",
                given=f"{len(examples.toxic)} toxic and {len(examples.non_toxic)} non-toxic examples",
                expected="at least one of each",
                do="add examples of the missing class",
            )
    world, watch = world or World(), Watch.on(vlm, sites, pools)
    setup = setup or setup_for(vlm, len(find), sites=sites, pools=pools)
    total = len(find) + (len(held_out) if held_out is not None else 0)
    if setup.folder is not None:
        with world.together():
            claim(setup.folder, identity_of(vlm, find, held_out, watch, setup), write=world.is_first)

    def examined(examples: Examples, part: str, before: int) -> tuple[Finished, Samples]:
        reached = 0

        def shifted(done: int, _: int) -> None:
            nonlocal reached
            if progress is not None and done > reached:
                reached = done
                progress(before + done, total)

        samples = Samples.of(examples, watch.pools, setup.seed)
        folder = setup.folder / part if setup.folder is not None else None
        ours = replace(setup, folder=folder, moments=setup.moments and part == "find")
        with timed("capture"):
            done = Job(vlm, examples, samples, watch, ours, world=world, progress=shifted).run()
        shifted(len(examples), total)  # shards of an earlier run, or of other processes
        return done, samples

    found, samples = examined(find, "find", 0)
    counts = samples.counts()
    for pool, count in zip(watch.pools, counts, strict=True):
        if not min(count) and world.is_first:
            log.warning("both classes share their prompts, so %s says nothing: every neuron gets 0.5", pool)
    others = examined(held_out, "held-out", len(find)) if held_out is not None else None
    widths = {site: vlm.anatomy.width(site) for site in watch.sites}

    def by_site(column: Float[Tensor, "pool _all"]) -> dict[Site, Float[Tensor, "pool _neuron"]]:
        parts = column.split(list(widths.values()), dim=1)
        return {site: part.contiguous() for site, part in zip(widths, parts, strict=True)}

    confounds = confound_table(find, found.lengths)
    evidence = Evidence(
        auroc=by_site(found.columns["auroc"]),
        held_out=by_site(others[0].columns["auroc"]) if others is not None else None,
        pools=watch.pools,
        samples=counts,
        held_out_samples=others[1].counts() if others is not None else None,
        base_fingerprint=vlm.fingerprint(),
        source_sha256=find.sha256,
        confounds={row.name: row.auroc for row in confounds},
        columns=_others(found, by_site),
        weight_norms={site: weight_norm(vlm, site) for site in watch.sites if site.side == "in"},
        engine=setup.engine,
    )
    if world.is_first:
        _say_what_met_few(evidence)
    with timed("statistics"):
        certainty = assess(
            evidence, find, samples, found, confounds, resamples=resamples, seed=setup.seed, alone=world.is_first
        )
    return replace(evidence, certainty=certainty)


def _say_what_met_few(evidence: Evidence) -> None:
    for pool in evidence.pools if "n_toxic" in evidence.columns else ():
        rated = torch.cat(list(evidence.rated(pool).values()))
        if not rated.all():
            log.warning(
                "%s: fewer than %d samples of a class have a value at %s of %s neurons: they are not selected",
                pool,
                FEWEST,
                f"{int((~rated).sum()):,}",
                f"{len(rated):,}",
            )


def setup_for(
    vlm: VLM,
    samples: int,
    *,
    sites: Sequence[Site],
    pools: Sequence[Pool],
    engine: Engine | Literal["auto"] = "auto",
    memory: int | None = None,
    folder: Path | None = None,
    batch_size: int | str = "auto",
    seed: int = 0,
    world: World | None = None,
) -> Setup:
    """Choose engine and shards for a job, the same in every process; a job that goes on keeps its own.

    Args:
        vlm: the model.
        samples: examples in the larger part.
        sites: where to look.
        pools: how activations are summarised.
        engine: ``auto`` takes the exact one where it fits.
        memory: bytes that each process may fill with values or counts (buffers take up to half as much again);
            without, a share of what is free.
        folder: where finished shards are kept.
        batch_size: examples per forward pass.
        seed: of the order of shards.
        world: the processes that share the work, and so the samples.

    Raises:
        SafeglassesError: neither engine fits.
    """
    world, watch = world or World(), Watch.on(vlm, sites, pools)
    neurons = sum(vlm.anatomy.width(site) for site in watch.sites)
    before = read_json(folder / _JOB) if folder is not None and (folder / _JOB).exists() else None
    before = world.all_say(before)[0]
    allowed = min(world.all_say(memory if memory is not None else memory_budget(None) // _neighbours()))
    # The folder may be one for all processes, and shards of the find split stay while the held-out ones come.
    disk = min(world.all_say(free_disk(folder))) // (2 * world.size) if folder is not None else 0
    if before is not None and engine in ("auto", before["engine"]):
        return Setup(before["engine"], allowed, folder, batch_size, before["shard"], seed=seed)
    each = -(-samples // world.size)
    choice = choose(neurons, len(watch.pools), each, watch.dtype.itemsize, allowed, disk)
    name = choice.engine if engine == "auto" else engine
    say = log.info if choice.engine == name else log.warning
    say("%s engine%s", name, f": {choice.why}" if engine == "auto" else f" as asked for; auto would say: {choice.why}")
    if name == "exact" and folder is not None and choice.where == "memory":
        needed = exact_bytes(neurons, len(watch.pools), each, watch.dtype.itemsize)
        if needed > DISK_SHARE * disk:
            log.warning(
                "%s of shards do not fit on the disk of %s: a kill will lose them", format_bytes(needed), folder
            )
            folder = None
    return Setup(name, allowed, folder, batch_size, shard_size(watch, neurons, allowed), seed=seed)


def weight_norm(vlm: VLM, site: Site) -> Float[Tensor, " _neuron"]:
    """Return ‖W[:, i]‖₂ over the outputs of the map that reads a site, in float32 on the CPU."""
    fused = vlm.anatomy.expert(site)
    if fused is not None:
        experts, number = fused
        weight = vlm.model.get_submodule(vlm.anatomy.absolute_path(experts.path)).get_parameter(experts.down)
        return whole(weight)[number].float().norm(dim=1 if experts.transposed else 0).cpu()
    linear = module(vlm.model, vlm.anatomy, site)
    outputs = 0 if isinstance(linear, torch.nn.Linear) else 1  # Conv1D keeps (in, out)
    return whole(linear.get_parameter("weight")).float().norm(dim=outputs).cpu()


def _others(found: Finished, by_site: Callable[[Tensor], dict[Site, Tensor]]) -> dict[str, Aurocs]:
    return {name: by_site(column.float()) for name, column in found.columns.items() if name != "auroc"}


def identity_of(
    vlm: VLM, find: Examples, held_out: Examples | None, watch: Watch, setup: Setup
) -> dict[str, str | int | list[str] | None]:
    """Return what decides a job's numbers, JSON-ready."""
    return {
        "model": vlm.fingerprint(),
        "dtype": str(watch.dtype),
        "find": find.sha256,
        "held_out": held_out.sha256 if held_out is not None else None,
        "sites": [str(site) for site in watch.sites],
        "pools": [str(pool) for pool in watch.pools],
        "engine": setup.engine,
        "shard": setup.shard,
        "batch_size": setup.batch_size,
        "bins": setup.bins,
        "seed": setup.seed,
    }


def claim(folder: Path, identity: Mapping[str, object], *, write: bool) -> None:
    """Write who owns a folder of shards, or see that it is the same job."""
    path = folder / _JOB
    if not path.exists():
        if write:
            write_json(path, identity)
        return
    before = read_json(path)
    different = [name for name, value in identity.items() if before.get(name) != value]
    if different:
        raise SafeglassesError(
            "the folder holds shards of another job",
            given=f"{folder}; different: {', '.join(different)}",
            expected="the same model, examples, sites, pools and setup, to go on",
            do="choose another folder, or delete this one",
        )


def _neighbours() -> int:
    """Processes of the job on this machine, which share its memory."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
