"""Pooled activations of a few thousand examples, in memory; `engine` is for more."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import psutil
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safeglasses.data.examples import Example
from safeglasses.errors import SafeglassesError
from safeglasses.find.passes import LENGTHS, Watch, passes, plan
from safeglasses.find.pools import Pool
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM


@dataclass(frozen=True)
class Activations:
    """Pooled activations, neuron-major: a neuron's samples lie together, as ranking them needs."""

    values: Mapping[Site, Float[Tensor, "pool _neuron sample"]]
    """Per site; in the model's dtype, float32 if any pool is a mean. On the CPU."""
    pools: tuple[Pool, ...]
    """First axis."""
    labels: Bool[Tensor, " sample"]
    """Whether each example is toxic."""
    ids: tuple[str, ...]
    """Ids of the examples, in the order they were given."""
    lengths: Mapping[str, Int[Tensor, " sample"]] = field(default_factory=dict)
    """``response_tokens``, ``prompt_tokens`` and ``image_tokens`` of each example."""


def capture(
    vlm: VLM,
    examples: Sequence[Example],
    *,
    sites: Sequence[Site],
    pools: Sequence[Pool],
    batch_size: int | str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Activations:
    """Pool the activations of the sites over each example's prompt and response.

    The model runs once over each example, whatever the number of sites and pools. Batches hold examples of
    similar length; results do not depend on them beyond rounding.

    Args:
        vlm: the model.
        examples: with responses and labels.
        sites: where to look; what is wider than a pooled value never leaves the device.
        pools: over which tokens, and how.
        batch_size: examples per pass, or ``auto``; halved when the device's memory runs out.
        progress: called with examples done and in all.

    Raises:
        SafeglassesError: nothing to capture, or not enough memory for the result or for a single example.
        BadRow: an example without a token in a span.
    """
    check_something(examples, sites, pools)
    watch = Watch.on(vlm, sites, pools)
    widths = [vlm.anatomy.width(site) for site in watch.sites]
    check_memory(sum(widths), len(pools), len(examples), watch.dtype)
    store = torch.empty(len(pools), sum(widths), len(examples), dtype=watch.dtype)
    counts = torch.empty(len(LENGTHS), len(examples), dtype=torch.int64)
    order: list[int] = []
    for done in passes(vlm, examples, watch, plan(vlm, examples, watch.rows(batch_size))):
        columns = slice(len(order), len(order) + len(done.rows))
        store[:, :, columns] = done.values  # side by side, in cache lines; put in order at the end
        counts[:, columns] = done.lengths
        order += done.rows
        if progress is not None:
            progress(len(order), len(examples))
    place = torch.tensor(order).argsort()
    for some in store.flatten(0, 1).split(1024):
        some.copy_(some.index_select(1, place))
    return Activations(
        values=dict(zip(watch.sites, store.split(widths, dim=1), strict=True)),
        pools=watch.pools,
        labels=torch.tensor([example.is_toxic for example in examples]),
        ids=tuple(example.id for example in examples),
        lengths=dict(zip(LENGTHS, counts[:, place], strict=True)),
    )


def check_something(examples: Sequence[Example], sites: Sequence[Site], pools: Sequence[Pool]) -> None:
    """Check that there is something to capture.

    Raises:
        SafeglassesError: there is not.
    """
    if not examples or not sites or not pools:
        raise SafeglassesError(
            "nothing to capture",
            given=f"{len(examples)} examples, {len(sites)} sites, {len(pools)} ways of pooling",
            expected="at least one of each",
        )


def check_memory(neurons: int, pools: int, samples: int, dtype: torch.dtype) -> None:
    """Check that a capture's result fits into this machine's memory.

    Raises:
        SafeglassesError: it does not.
    """
    needed, free = neurons * pools * samples * dtype.itemsize, psutil.virtual_memory().available
    if needed > 0.9 * free:
        raise SafeglassesError(
            "the pooled activations do not fit into memory",
            given=f"{neurons:,} neurons × {pools} ways of pooling × {samples:,} examples in {dtype}: "
            f"{needed / 2**30:.1f} GiB",
            expected=f"at most {0.9 * free / 2**30:.1f} GiB",
            do="use fewer examples (--limit), fewer sites (a recipe on the MLPs) or fewer ways of pooling",
        )
