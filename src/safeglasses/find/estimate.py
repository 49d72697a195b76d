"""What finding costs, before anything long runs: bytes of either engine, FLOPs, seconds, and the engine that fits."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from safeglasses.data.examples import Example
from safeglasses.errors import SafeglassesError
from safeglasses.find.auroc import auroc_rows
from safeglasses.find.capture import check_something
from safeglasses.find.engine import shard_size
from safeglasses.find.histogram import Histogram
from safeglasses.find.passes import Watch, passes, plan
from safeglasses.find.pools import Pool
from safeglasses.find.shards import cut
from safeglasses.find.sizes import format_bytes
from safeglasses.find.statistic import GROUPS, Samples
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM

BINS = 256
"""Bins of a histogram."""
DISK_SHARE = 0.8
"""Share of the free disk that shards may fill."""
CALIBRATION = 30.0
"""Seconds that the timed passes should take together, at most; a single row each takes as long as it takes."""
COLUMNS = 9
"""Statistics beside the AUROC in an evidence file: those of `Moments`, and the null."""
_TIMED = 3
_SORTED = 2**21


def exact_bytes(neurons: int, pools: int, samples: int, itemsize: int) -> int:
    """Return the bytes of all pooled values, in memory or in shards on disk: neurons × pools × samples × itemsize."""
    return neurons * pools * samples * itemsize


def histogram_bytes(neurons: int, pools: int, itemsize: int, bins: int = BINS) -> int:
    """Return the bytes of counts and edges: neurons × pools × (3 groups × bins × 4 + (bins − 1) × itemsize)."""
    return Histogram.memory(neurons, pools, bins, {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[itemsize])


@dataclass(frozen=True)
class Choice:
    """Which engine takes a job, and why."""

    engine: Literal["exact", "histogram"]
    """``exact`` keeps every pooled value, ``histogram`` counts per class."""
    where: Literal["memory", "disk"]
    """Where the values or counts lie while the job runs."""
    why: str
    """The reason, as a person would say it."""


def choose(neurons: int, pools: int, samples: int, itemsize: int, memory: int, disk: int) -> Choice:
    """Choose the engine: exact in memory, else exact on disk, else histogram, whichever fits first.

    Args:
        neurons: at all sites.
        pools: ways of pooling.
        samples: examples.
        itemsize: bytes of a pooled value.
        memory: bytes that may be used.
        disk: free bytes of the output folder; `DISK_SHARE` of them may be used.

    Raises:
        SafeglassesError: none fits.
    """
    exact, histogram = exact_bytes(neurons, pools, samples, itemsize), histogram_bytes(neurons, pools, itemsize)
    usable = int(DISK_SHARE * disk)
    if exact <= memory:
        return Choice(
            "exact", "memory", f"all values, {format_bytes(exact)}, fit into {format_bytes(memory)} of memory"
        )
    beyond = f"all values, {format_bytes(exact)}, exceed {format_bytes(memory)} of memory"
    if exact <= usable:
        return Choice("exact", "disk", f"{beyond} but not {format_bytes(usable)} of disk")
    beyond += f" and {format_bytes(usable)} of disk"
    if histogram <= memory:
        return Choice("histogram", "memory", f"{beyond}; the counts, {format_bytes(histogram)}, fit into memory")
    raise SafeglassesError(
        "neither engine has the room that it needs",
        given=f"{neurons:,} neurons × {pools} ways of pooling × {samples:,} examples: "
        f"{format_bytes(exact)} exact, {format_bytes(histogram)} as histograms of {BINS} bins",
        expected=f"at most {format_bytes(memory)} of memory, or for exact values {format_bytes(usable)} of disk "
        f"({DISK_SHARE:.0%} of what is free)",
        do=_what_fits(neurons, pools, itemsize, memory, usable),
    )


def _what_fits(neurons: int, pools: int, itemsize: int, memory: int, disk: int) -> str:
    """Say how far each way of shrinking the job would have to go, where it can help at all."""
    per_neuron = histogram_bytes(1, 1, itemsize)
    bins = (memory // (neurons * pools) + itemsize) // (GROUPS * 4 + itemsize)
    samples = max(memory, disk) // exact_bytes(neurons, pools, 1, itemsize)
    fits = [
        (memory // (pools * per_neuron), "{:,} of the neurons (fewer --sites)"),
        (memory // (neurons * per_neuron), "{:,} of the ways of pooling"),
        (bins if bins >= 2 else 0, "{:,} bins"),
        (samples if samples >= 2 else 0, "{:,} of the examples exactly"),
    ]
    told = [text.format(n) for n, text in fits if n]
    enough = histogram_bytes(neurons, pools, itemsize) * 101 // 100  # rounded to three digits it is still enough
    more = f"give --memory {format_bytes(enough).replace(' ', '')} or more"
    return f"{more}; what fits now is one of: {'; '.join(told)}" if told else more


@dataclass(frozen=True)
class Cost:
    """What forward passes cost, measured on a few and scaled by tokens."""

    forward_flops: int
    """Of all passes: those of one example, per token. Attention grows faster than that, so long examples are
    counted a little low."""
    forward_seconds: float
    """Of all passes on this device, decoding of pictures included."""
    auroc_seconds: float
    """Of sorting all values for the exact engine, on this machine's CPU; measured on 131,072 samples at most,
    beyond which each takes a few times longer."""
    timed_tokens: int
    """Tokens, padding included, behind `forward_seconds`."""
    timed_seconds: float
    """What those took."""


@dataclass(frozen=True)
class Estimate:
    """What finding neurons would cost."""

    neurons: int
    """At the sites asked for."""
    pools: tuple[Pool, ...]
    """Ways of pooling."""
    find: int
    """Examples that neurons are found on."""
    held_out: int
    """Examples that they are checked on."""
    tokens_median: int
    """Tokens of a typical example, pictures included."""
    tokens_max: int
    """Tokens of the longest."""
    tokens: int
    """Tokens of all examples."""
    padded_tokens: int
    """The same with the padding of the batches."""
    itemsize_bytes: int
    """Bytes of a pooled value: the model's dtype, or 4 if a pool is a mean."""
    memory_bytes: int
    """Memory that may be used."""
    disk_bytes: int
    """Disk that is free where results would be written."""
    exact_bytes: int
    """Memory of the exact engine for the larger part, or shards on disk."""
    shards_bytes: int
    """Disk of the exact engine for both parts, where it keeps shards."""
    histogram_bytes: int
    """Memory of the histogram engine, whatever the number of examples."""
    evidence_bytes: int
    """The evidence file: neurons × pools × (8 for each part's AUROC + 4 for each of `COLUMNS` others)."""
    choice: Choice
    """The engine that would be used."""
    cost: Cost
    """The work."""

    def to_json(self) -> dict[str, Any]:
        """Return a flat record; names end in their unit."""
        record = {**vars(self), **vars(self.choice), **vars(self.cost), "pools": [str(pool) for pool in self.pools]}
        return {name: value for name, value in record.items() if name not in ("choice", "cost")}


def estimate(
    vlm: VLM,
    find: Sequence[Example],
    held_out: Sequence[Example] = (),
    *,
    sites: Sequence[Site],
    pools: Sequence[Pool],
    memory: int,
    disk: int,
) -> Estimate:
    """Estimate what `measure_evidence` would cost; runs the model on a few of the examples.

    Args:
        vlm: the model.
        find: examples that neurons are found on.
        held_out: examples that they are checked on, after the others have left memory.
        sites: where to look.
        pools: over which tokens, and how.
        memory: bytes that may be used.
        disk: free bytes where results would be written.

    Raises:
        SafeglassesError: nothing to run, or neither engine has room (before the model runs); or as in `passes`.
    """
    check_something(find, sites, pools)
    watch = Watch.on(vlm, sites, pools)
    neurons, itemsize = sum(vlm.anatomy.width(site) for site in watch.sites), watch.dtype.itemsize
    larger, examples = max(len(find), len(held_out)), [*find, *held_out]
    choice = choose(neurons, len(pools), larger, itemsize, memory, disk)
    blank = cache(partial(Image.new, "RGB"))
    lengths = vlm.lengths([e.chat_with(lambda picture: blank(picture.size)) for e in examples])  # sizes are enough
    shard = shard_size(watch, neurons, memory)
    batches = _batches(vlm, find, watch, shard, 0) + _batches(vlm, held_out, watch, shard, len(find))
    return Estimate(
        neurons=neurons,
        pools=watch.pools,
        find=len(find),
        held_out=len(held_out),
        tokens_median=sorted(lengths)[len(lengths) // 2],
        tokens_max=max(lengths),
        tokens=sum(lengths),
        padded_tokens=_padded(batches, lengths),
        itemsize_bytes=itemsize,
        memory_bytes=memory,
        disk_bytes=disk,
        exact_bytes=exact_bytes(neurons, len(pools), larger, itemsize),
        shards_bytes=exact_bytes(neurons, len(pools), len(examples), itemsize),
        histogram_bytes=histogram_bytes(neurons, len(pools), itemsize),
        evidence_bytes=neurons * len(pools) * (8 * (2 if held_out else 1) + 4 * COLUMNS),
        choice=choice,
        cost=measure(vlm, examples, watch, batches, lengths),
    )


def measure(
    vlm: VLM,
    examples: Sequence[Example],
    watch: Watch,
    batches: Sequence[list[int]],
    lengths: Sequence[int],
    clock: Callable[[], float] = time.perf_counter,
) -> Cost:
    """Run one example, then three batches of short, typical and long examples, and scale by tokens.

    Raises:
        SafeglassesError: as in `passes`.
    """
    tried = _spread(batches, lengths)
    one = tried[len(tried) // 2][:1]
    cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the counter knows the others
    with FlopCounterMode(
        display=False, custom_mapping={cpu_attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    ) as counter:
        list(passes(vlm, examples, watch, [one]))
    start = clock()
    list(passes(vlm, examples, watch, [one]))  # warm by now
    rows = max(1, int(CALIBRATION / len(tried) / max(clock() - start, 1e-9)))
    tried = [batch[:rows] for batch in tried]
    start = clock()
    list(passes(vlm, examples, watch, tried))
    seconds = clock() - start
    timed, padded = _padded(tried, lengths), _padded(batches, lengths)
    neurons = sum(vlm.anatomy.width(site) for site in watch.sites)
    return Cost(
        forward_flops=round(counter.get_total_flops() / _padded([one], lengths) * padded),
        forward_seconds=seconds / timed * padded,
        auroc_seconds=_sorting(len(examples), watch.dtype, clock) * neurons * len(watch.pools) * len(examples),
        timed_tokens=timed,
        timed_seconds=seconds,
    )


def _batches(vlm: VLM, examples: Sequence[Example], watch: Watch, shard: int, first: int) -> list[list[int]]:
    """Return the batches that each shard is captured in, with rows numbered from `first` on."""
    shards = cut(Samples.of(examples, watch.pools).clusters, shard) if examples else []
    size = watch.rows("auto")
    return [
        [first + rows[i] for i in batch] for rows in shards for batch in plan(vlm, [examples[i] for i in rows], size)
    ]


def _padded(batches: Sequence[list[int]], lengths: Sequence[int]) -> int:
    return sum(len(rows) * max(lengths[i] for i in rows) for rows in batches)


def _spread(batches: Sequence[list[int]], lengths: Sequence[int]) -> list[list[int]]:
    """Return the batches at one sixth, a half and five sixths of all tokens, padding included."""
    ends: list[int] = []
    for rows in batches:
        ends.append(_padded([rows], lengths) + (ends[-1] if ends else 0))
    marks = [ends[-1] * (2 * i + 1) / (2 * _TIMED) for i in range(_TIMED)]
    return [next(rows for rows, end in zip(batches, ends, strict=True) if end >= mark) for mark in marks]


def _sorting(samples: int, dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """Return the seconds that ranking takes per value."""
    samples = min(max(samples, 2), _SORTED // 16)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(_SORTED // samples, samples, generator=generator).to(dtype)
    labels = torch.arange(samples) % 2 == 0
    times = []
    for _ in range(2):  # the first warms up
        start = clock()
        auroc_rows(values, labels)
        times.append(clock() - start)
    return times[-1] / values.numel()
