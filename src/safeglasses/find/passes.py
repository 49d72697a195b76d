"""Forward passes over examples, each pooled at every wanted site; nothing else of a pass is kept."""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from safeglasses.data.examples import Example
from safeglasses.errors import SafeglassesError
from safeglasses.find.pools import MEANS, Pool, Window
from safeglasses.find.routed import Span
from safeglasses.model.experts import Experts
from safeglasses.model.hooks import tap, tap_routed
from safeglasses.model.routes import Routing
from safeglasses.model.routing import by_module, check_reachable
from safeglasses.model.sites import Side, Site
from safeglasses.model.vlm import VLM, Batch, batches

log = logging.getLogger(__name__)

AUTO_TOKENS = 2**14
"""Tokens per forward pass, padding included, that an automatic batch size aims at."""
AUTO_ROWS = 64
"""Most examples per forward pass of an automatic batch size."""
LENGTHS = ("response_tokens", "prompt_tokens", "image_tokens")
"""What is counted of every example."""
_DECODERS = 8
"""Threads that decode pictures."""


@dataclass(frozen=True)
class Watch:
    """What is read in every pass."""

    sites: tuple[Site, ...]
    """Where to look."""
    pools: tuple[Pool, ...]
    """Over which tokens values are summarised, and how."""
    dtype: torch.dtype
    """Of the pooled values: the model's, or float32 if any pool is a mean."""

    @classmethod
    def on(cls, vlm: VLM, sites: Sequence[Site], pools: Sequence[Pool]) -> "Watch":
        """Choose the dtype for a model; sites named twice count once.

        Raises:
            SafeglassesError: a site belongs to experts that cannot be read.
        """
        expert = next((s for s in sites if s.expert is not None and vlm.anatomy.expert(s) is None), None)
        if expert is not None:
            raise SafeglassesError(
                "neurons of experts that are modules of their own cannot be captured",
                given=f"{expert}: such a module does not say which tokens it was sent",
                expected="sites that every token passes, or fused experts",
                do="leave the site out",
            )
        check_reachable(vlm.anatomy, sites)
        dtype = torch.float32 if any(pool.how in MEANS for pool in pools) else vlm.dtype
        return cls(tuple(dict.fromkeys(sites)), tuple(pools), dtype)


@dataclass(frozen=True)
class Pass:
    """What one forward pass gave."""

    rows: list[int]
    """Indices of its examples."""
    values: Float[Tensor, "pool neuron sample"]
    """Pooled values, site after site, on the CPU."""
    lengths: Int[Tensor, "3 sample"]
    """As in `LENGTHS`."""


def plan(vlm: VLM, examples: Sequence[Example], batch_size: int | str = "auto") -> list[list[int]]:
    """Put examples of similar length, and among these of similar picture size, into batches.

    Args:
        vlm: whose tokens are counted.
        examples: what will be run.
        batch_size: examples per pass, or ``auto``: as many as fit `AUTO_TOKENS`, `AUTO_ROWS` at most.

    Raises:
        SafeglassesError: not a batch size.
    """
    if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
        raise SafeglassesError("not a batch size", given=repr(batch_size), expected="a positive number, or auto")

    @cache
    def blank(size: tuple[int, int]) -> Image.Image:
        return Image.new("RGB", size)

    lengths = vlm.lengths([e.chat_with(lambda picture: blank(picture.size)) for e in examples])  # sizes are enough
    area = [sum(picture.size[0] * picture.size[1] for picture in e.pictures) for e in examples]
    keys = [(e.n_images, n, pixels) for e, n, pixels in zip(examples, lengths, area, strict=True)]
    return batches(keys, AUTO_ROWS, AUTO_TOKENS) if batch_size == "auto" else batches(keys, int(batch_size))


def passes(vlm: VLM, examples: Sequence[Example], watch: Watch, batches: Sequence[list[int]]) -> Iterator[Pass]:
    """Run the batches and yield what was pooled.

    Pictures of the next batch are decoded and encoded while the model runs. A pass that runs out of memory is
    tried again in halves, and no later pass is larger. Only the first pass runs to the model's end, to see
    that no site is reached twice; the others stop behind the last site.

    Raises:
        SafeglassesError: no memory for a single example, or a site that does not hold one vector per token.
        BadRow: an example without a token in a span, or whose picture has gone.
    """
    sharded = is_sharded(vlm.model)
    waiting = list(batches)[::-1]
    first = True
    with ThreadPoolExecutor(_DECODERS) as decoders, ThreadPoolExecutor(1) as encoder:

        def encode(rows: list[int]) -> tuple[Batch, list[Window]]:
            batch = vlm.encode(list(decoders.map(lambda i: examples[i].chat(), rows)))
            return batch, [Window.of(batch, pool, [examples[i].id for i in rows]) for pool in watch.pools]

        ahead = encoder.submit(encode, waiting[-1]) if waiting else None  # one thread: tokenizers are not to be shared
        while ahead is not None:
            rows = waiting.pop()
            batch, windows = ahead.result()
            ahead = encoder.submit(encode, waiting[-1]) if waiting else None
            pooled = None
            try:
                pooled = pooled_pass(vlm, batch.to(vlm.device), windows, watch, whole=first or sharded).cpu()
            except torch.OutOfMemoryError as error:
                if len(rows) == 1 or sharded:
                    raise _no_memory(examples[rows[0]], len(rows)) from error
            if pooled is not None:
                spans = (batch.response_mask, batch.asked.prompt_mask, batch.asked.image_mask)
                yield Pass(rows, pooled, torch.stack([span.sum(dim=1) for span in spans]))
                first = False
                continue
            most = (len(rows) + 1) // 2
            log.warning("out of memory with %d examples per pass: going on with %d", len(rows), most)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # not above: the error holds on to the tensors
            waiting = [part[i : i + most] for part in [*waiting, rows] for i in _starts_last_first(part, most)]
            ahead = encoder.submit(encode, waiting[-1])


def is_sharded(model: nn.Module) -> bool:
    """Whether every forward pass of a model needs all processes (FSDP2)."""
    return any(isinstance(part, FSDPModule) for part in model.modules())


def _starts_last_first(rows: list[int], size: int) -> range:
    return range((len(rows) - 1) // size * size, -1, -size)


def _no_memory(example: Example, rows: int) -> SafeglassesError:
    if rows > 1:  # the processes of a sharded model run in step: one alone cannot go back and take halves
        return SafeglassesError(
            "out of memory in one process of a sharded model",
            given=f"{rows} examples per pass, {example.id!r} first",
            do=f"run it again with --batch-size {max(1, rows // 2)}",
        )
    return SafeglassesError(
        "out of memory on a single example",
        given=f"example {example.id!r}",
        do="use a larger device, spread the model with device_map, or leave the example out",
    )


class _SeenAllError(Exception):
    """Leaves a forward pass behind the last site."""


def _not_per_token(site: Site, seen: str, samples: int, tokens: int) -> SafeglassesError:
    return SafeglassesError(
        "this site does not hold one vector per token",
        given=f"{site}, {seen} in one pass",
        expected=f"{samples} examples × {tokens} tokens, once",
        do="leave the site out (cross-attention sees other tokens)",
    )


def pooled_pass(
    vlm: VLM, batch: Batch, windows: Sequence[Window], watch: Watch, *, whole: bool = True
) -> Float[Tensor, "pool neuron sample"]:
    """Run the model once and pool at every site, where the values lie; NaN where no token reached an expert.

    Args:
        vlm: the model.
        batch: on the model's device.
        windows: where the tokens of each pool lie in the batch.
        watch: what to read.
        whole: run to the model's end, and find out whether a site is reached twice.

    Raises:
        SafeglassesError: a site is not reached, or does not hold one vector per token; an expert's value is NaN.
    """
    samples, tokens = batch.ids.shape
    found: dict[Site, Tensor] = {}
    local: dict[torch.device, list[Window]] = {}

    def pool(site: Site, value: Tensor) -> None:
        if site in found or value.numel() != samples * tokens * value.shape[-1]:
            seen = "reached twice" if site in found else f"of shape {tuple(value.shape)}"
            raise _not_per_token(site, seen, samples, tokens)
        if value.device not in local:
            local[value.device] = [window.to(value.device) for window in windows]
        rows = value.reshape(samples, tokens, -1)
        pooled = [window.reduce(rows).to(watch.dtype) for window in local[value.device]]
        found[site] = torch.stack(pooled).to(vlm.device)
        if not whole and len(found) == len(watch.sites):
            raise _SeenAllError

    fused = by_module(vlm.anatomy, watch.sites)
    spans: dict[torch.device, list[Span]] = {}

    def pool_experts(experts: Experts, side: Side, routing: Routing, value: Tensor) -> None:
        numbers, device = fused[experts.path, side], value.device
        if any(site in found for site in numbers.values()):
            raise _not_per_token(next(iter(numbers.values())), "reached twice", samples, tokens)
        if device not in spans:
            spans[device] = [Span.of(window, samples, tokens, device) for window in windows]
        pooled = [span.reduce(value, routing, experts, side).to(watch.dtype) for span in spans[device]]
        every = torch.stack(pooled).to(vlm.device)  # [pool, expert, sample, neuron]
        found.update({site: every[:, number] for number, site in numbers.items()})
        if not whole and len(found) == len(watch.sites):
            raise _SeenAllError

    experts: list[tuple[Experts, Side]] = [(vlm.anatomy.experts[path], side) for path, side in fused]
    linear = [site for site in watch.sites if vlm.anatomy.expert(site) is None]
    with (
        torch.no_grad(),
        suppress(_SeenAllError),
        tap(vlm.model, vlm.anatomy, linear, pool),
        tap_routed(vlm.model, vlm.anatomy, experts, pool_experts, tokens=samples * tokens),
    ):
        vlm.forward(batch, logits_from=tokens - 1)  # the fewest logits that can be asked for
    for site in watch.sites:
        if site not in found and vlm.anatomy.expert(site) is not None:  # no token was sent to any of its module
            nothing = torch.full((len(windows), samples, vlm.anatomy.width(site)), torch.nan, dtype=watch.dtype)
            found[site] = nothing.to(vlm.device)
    missing = [str(site) for site in watch.sites if site not in found]
    if missing:
        raise SafeglassesError(
            "the forward pass does not reach some sites",
            given=", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else ""),
            do="leave these sites out",
        )
    return torch.cat([found[site] for site in watch.sites], dim=2).movedim(1, 2).contiguous()
