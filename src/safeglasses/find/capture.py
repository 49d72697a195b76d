"""One pass over examples that pools every wanted site; nothing is kept but the pooled values."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache

import psutil
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from safeglasses.data.examples import Example
from safeglasses.errors import SafeglassesError
from safeglasses.find.pools import Pool, Window
from safeglasses.model.hooks import tap
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM, Batch, batches

log = logging.getLogger(__name__)

AUTO_TOKENS = 2**14
"""Tokens per forward pass, padding included, from which an automatic batch size starts."""
AUTO_ROWS = 64
"""Most examples per forward pass of an automatic batch size."""


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
    if not examples or not sites or not pools:
        raise SafeglassesError(
            "nothing to capture",
            given=f"{len(examples)} examples, {len(sites)} sites, {len(pools)} ways of pooling",
            expected="at least one of each",
        )
    sites, pools = tuple(dict.fromkeys(sites)), tuple(pools)
    dtype = torch.float32 if any(pool.how == "mean" for pool in pools) else vlm.dtype
    widths = [vlm.anatomy.width(site) for site in sites]
    check_memory(sum(widths), len(pools), len(examples), dtype)
    store = torch.empty(len(pools), sum(widths), len(examples), dtype=dtype)
    counts = torch.empty(3, len(examples), dtype=torch.int64)
    order: list[int] = []
    for rows, batch, pooled in _passes(vlm, examples, sites, pools, dtype, _plan(vlm, examples, batch_size)):
        columns = slice(len(order), len(order) + len(rows))
        store[:, :, columns] = pooled  # side by side, in cache lines; put in order at the end
        spans = (batch.response_mask, batch.prompt_mask, batch.image_mask)
        counts[:, columns] = torch.stack([span.sum(dim=1) for span in spans])
        order += rows
        if progress is not None:
            progress(len(order), len(examples))
    place = torch.tensor(order).argsort()
    for some in store.flatten(0, 1).split(1024):
        some.copy_(some.index_select(1, place))
    names = ("response_tokens", "prompt_tokens", "image_tokens")
    return Activations(
        values=dict(zip(sites, store.split(widths, dim=1), strict=True)),
        pools=pools,
        labels=torch.tensor([example.is_toxic for example in examples]),
        ids=tuple(example.id for example in examples),
        lengths=dict(zip(names, counts[:, place], strict=True)),
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


def _plan(vlm: VLM, examples: Sequence[Example], batch_size: int | str) -> list[list[int]]:
    """Put examples of similar length together."""

    @cache
    def blank(size: tuple[int, int]) -> Image.Image:
        return Image.new("RGB", size)

    chats = [example.chat_with(lambda picture: blank(picture.size)) for example in examples]
    lengths = vlm.lengths(chats)  # they depend on the pictures' sizes alone
    size = max(1, min(AUTO_ROWS, AUTO_TOKENS // max(lengths))) if batch_size == "auto" else batch_size
    if not isinstance(size, int) or size < 1:
        raise SafeglassesError("not a batch size", given=repr(batch_size), expected="a positive number, or auto")
    return batches([(e.n_images, n) for e, n in zip(examples, lengths, strict=True)], size)


def _passes(
    vlm: VLM,
    examples: Sequence[Example],
    sites: Sequence[Site],
    pools: Sequence[Pool],
    dtype: torch.dtype,
    plan: list[list[int]],
) -> Iterator[tuple[list[int], Batch, Float[Tensor, "pool neuron sample"]]]:
    """Yield the rows of each forward pass, their batch, and their pooled values on the CPU.

    The next batch is encoded while the model runs. A pass that runs out of memory is tried again in halves,
    and no later pass is larger.
    """

    def encode(rows: list[int]) -> tuple[Batch, list[Window]]:
        batch = vlm.encode([examples[i].chat() for i in rows])
        return batch, [Window.of(batch, pool, [examples[i].id for i in rows]) for pool in pools]

    waiting = plan[::-1]
    with ThreadPoolExecutor(1) as encoder:  # one thread: tokenizers are not to be shared
        ahead = encoder.submit(encode, waiting[-1])
        while waiting:
            rows = waiting.pop()
            batch, windows = ahead.result()
            if waiting:
                ahead = encoder.submit(encode, waiting[-1])
            pooled = None
            try:
                pooled = pooled_pass(vlm, batch.to(vlm.device), windows, sites, dtype).cpu()
            except torch.OutOfMemoryError as error:
                if len(rows) == 1:
                    raise _no_memory(examples[rows[0]]) from error
            if pooled is not None:
                yield rows, batch, pooled
                continue
            most = (len(rows) + 1) // 2
            log.warning("out of memory with %d examples per pass: going on with %d", len(rows), most)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # not above: the error holds on to the tensors
            waiting = [part[i : i + most] for part in [*waiting, rows] for i in _starts_last_first(part, most)]
            ahead = encoder.submit(encode, waiting[-1])


def _starts_last_first(rows: list[int], size: int) -> range:
    return range((len(rows) - 1) // size * size, -1, -size)


def _no_memory(example: Example) -> SafeglassesError:
    return SafeglassesError(
        "out of memory on a single example",
        given=f"example {example.id!r}",
        do="use a larger device, spread the model with device_map, or leave the example out",
    )


def pooled_pass(
    vlm: VLM, batch: Batch, windows: Sequence[Window], sites: Sequence[Site], dtype: torch.dtype
) -> Float[Tensor, "pool neuron sample"]:
    """Run the model once and pool at every site, where the values lie."""
    samples, tokens = batch.inputs["input_ids"].shape
    found: dict[Site, Tensor] = {}
    local: dict[torch.device, list[Window]] = {}

    def pool(site: Site, value: Tensor) -> None:
        if site in found or value.numel() != samples * tokens * value.shape[-1]:
            seen = "reached twice" if site in found else f"of shape {tuple(value.shape)}"
            raise SafeglassesError(
                "this site does not hold one vector per token",
                given=f"{site}, {seen} in one pass",
                expected=f"{samples} examples × {tokens} tokens, once",
                do="leave the site out (experts and cross-attention see other tokens)",
            )
        if value.device not in local:
            local[value.device] = [window.to(value.device) for window in windows]
        rows = value.reshape(samples, tokens, -1)
        pooled = [window.reduce(rows).to(dtype) for window in local[value.device]]
        found[site] = torch.stack(pooled).to(vlm.device)

    with torch.no_grad(), tap(vlm.model, vlm.anatomy, sites, pool):
        vlm.forward(batch, logits_from=tokens - 1)  # the fewest logits that can be asked for
    missing = [str(site) for site in sites if site not in found]
    if missing:
        raise SafeglassesError(
            "the forward pass does not reach some sites",
            given=", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else ""),
            do="leave these sites out",
        )
    return torch.cat([found[site] for site in sites], dim=2).movedim(1, 2).contiguous()
