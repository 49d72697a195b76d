"""Forward passes over examples, each pooled at every wanted site; nothing else of a pass is kept."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from safeglasses.data.examples import Example
from safeglasses.errors import SafeglassesError
from safeglasses.find.pools import MEANS, Pool, Window, over_calls
from safeglasses.find.routed import Span
from safeglasses.find.streams import Windows, check_numbers, pooled_patches, streams_of, windows_of
from safeglasses.model.experts import Experts
from safeglasses.model.hooks import before_layers, tap, tap_routed
from safeglasses.model.outside import Stream
from safeglasses.model.routes import Routing
from safeglasses.model.routing import by_module, check_reachable
from safeglasses.model.sharding import is_sharded
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
    streams: Mapping[Site, Stream] = field(default_factory=dict)
    """Whose tokens are at each site; not named: the decoder's."""

    @classmethod
    def on(cls, vlm: VLM, sites: Sequence[Site], pools: Sequence[Pool]) -> "Watch":
        """Choose the dtype for a model; sites named twice count once.

        Raises:
            SafeglassesError: a site belongs to experts that cannot be read, or no pool has tokens there.
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
        every = tuple(dict.fromkeys(sites))
        return cls(every, tuple(pools), dtype, streams_of(vlm.anatomy, every, pools))

    @property
    def patches(self) -> tuple[Site, ...]:
        """The sites whose tokens are patches of pictures."""
        return tuple(site for site, stream in self.streams.items() if stream == "picture")

    def rows(self, batch_size: int | str) -> int | str:
        """Return how many examples a pass may hold: patches of several chats cannot be told apart."""
        if self.patches and batch_size not in (1, "auto"):
            log.info("sites on the vision side: one example per pass, not %s", batch_size)
        return 1 if self.patches else batch_size


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
    keys = [(e.layout, n, pixels) for e, n, pixels in zip(examples, lengths, area, strict=True)]
    return batches(keys, AUTO_ROWS, AUTO_TOKENS) if batch_size == "auto" else batches(keys, int(batch_size))


def passes(vlm: VLM, examples: Sequence[Example], watch: Watch, batches: Sequence[list[int]]) -> Iterator[Pass]:
    """Run the batches and yield what was pooled.

    Pictures of the next batch are decoded and encoded while the model runs. A pass that runs out of memory is
    tried again in halves, and no later pass is larger. The first runs to the model's end; if no site was reached
    several times (Gemma 3n asks a router before and behind every layer), the others stop behind the last site.

    Raises:
        SafeglassesError: no memory for a single example, or a site that does not hold one vector per token.
        BadRow: an example without a token in a span, or whose picture has gone.
    """
    sharded = is_sharded(vlm.model)
    waiting = list(batches)[::-1]
    whole = True
    with ThreadPoolExecutor(_DECODERS) as decoders, ThreadPoolExecutor(1) as encoder:
        wanted: set[Stream] = {*watch.streams.values()} or {"decoder"}

        def encode(rows: list[int]) -> tuple[Batch, Windows]:
            batch = vlm.encode(list(decoders.map(lambda i: examples[i].chat(), rows)))
            return batch, windows_of(batch, watch.pools, wanted, [examples[i].id for i in rows])

        ahead = encoder.submit(encode, waiting[-1]) if waiting else None  # one thread: tokenizers are not to be shared
        while ahead is not None:
            rows = waiting.pop()
            batch, windows = ahead.result()
            ahead = encoder.submit(encode, waiting[-1]) if waiting else None
            pooled, again = None, False
            try:
                pooled, again = pooled_pass(vlm, batch.to(vlm.device), windows, watch, whole=whole)
                pooled = pooled.cpu()
            except torch.OutOfMemoryError as error:
                if len(rows) == 1 or sharded:
                    raise _no_memory(examples[rows[0]], len(rows)) from error
            if pooled is not None:
                spans = (batch.response_mask, batch.asked.prompt_mask, batch.asked.image_mask)
                yield Pass(rows, pooled, torch.stack([span.sum(dim=1) for span in spans]))
                whole = sharded or again
                continue
            most = (len(rows) + 1) // 2
            log.warning("out of memory with %d examples per pass: going on with %d", len(rows), most)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # not above: the error holds on to the tensors
            waiting = [part[i : i + most] for part in [*waiting, rows] for i in range(0, len(part), most)[::-1]]
            ahead = encoder.submit(encode, waiting[-1])


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
        expected=f"{samples} examples × {tokens} tokens",
        do="look elsewhere: --sites mlp --sites attention, or in a recipe sites = ['mlp', 'attention']",
    )


def pooled_pass(
    vlm: VLM, batch: Batch, windows: Windows, watch: Watch, *, whole: bool = True
) -> tuple[Float[Tensor, "pool neuron sample"], bool]:
    """Run the model once and pool at every site, where the values lie; NaN where a sample has no value.

    That is where no token reached an expert, where a pool has no tokens of a site's stream, and on the vision side of a
    chat without pictures.

    Args:
        vlm: the model.
        batch: on the model's device.
        windows: where the tokens of each pool lie in the batch.
        watch: what to read.
        whole: run to the model's end; else stop once every site was reached.

    Returns:
        The values, as of `over_calls`, and whether a site was reached several times.

    Raises:
        SafeglassesError: a site is not reached, or does not hold one vector per token; a value is NaN where that means
            a missing one.
    """
    samples = len(batch.ids)
    sizes: dict[Stream, int] = {"decoder": batch.ids.shape[1], "encoder": batch.asked.ids.shape[1]}
    found: dict[Site, Tensor] = {}
    calls: dict[Site, list[Tensor]] = {}
    patches: dict[Site, list[Tensor]] = {site: [] for site in watch.patches}
    waiting = set(watch.sites)
    local: dict[tuple[Stream, torch.device], list[Window | None]] = {}

    def seen(sites: Iterable[Site]) -> None:
        waiting.difference_update(sites)
        if not whole and not waiting:
            raise _SeenAllError

    def pool(site: Site, value: Tensor) -> None:
        if site in patches:  # a tower may come in several runs: it is done when the decoder begins
            patches[site].append(value)
            waiting.discard(site)
            return
        stream: Stream = watch.streams.get(site, "decoder")
        tokens = sizes[stream]
        key: tuple[Stream, torch.device] = (stream, value.device)
        if value.numel() != samples * tokens * value.shape[-1]:
            raise _not_per_token(site, f"of shape {tuple(value.shape)}", samples, tokens)
        if key not in local:
            local[key] = [None if window is None else window.to(value.device) for window in windows[stream]]
        rows = value.reshape(samples, tokens, -1)
        pooled: list[Tensor] = []
        for window in local[key]:
            if window is None:
                pooled.append(torch.full((samples, rows.shape[-1]), torch.nan, dtype=watch.dtype, device=value.device))
                continue
            pooled.append(window.reduce(rows).to(watch.dtype))
            if None in local[key]:
                check_numbers(site, pooled[-1])
        calls.setdefault(site, []).append(torch.stack(pooled).to(vlm.device))
        seen([site])

    fused = by_module(vlm.anatomy, watch.sites)
    spans: dict[torch.device, list[Span]] = {}
    tokens = sizes["decoder"]

    def pool_experts(experts: Experts, side: Side, routing: Routing, value: Tensor) -> None:
        numbers, device = fused[experts.path, side], value.device
        if any(site in found for site in numbers.values()):
            raise _not_per_token(next(iter(numbers.values())), "reached twice", samples, tokens)
        if device not in spans:
            spans[device] = [Span.of(w, samples, tokens, device) for w in windows["decoder"] if w is not None]
        pooled = [span.reduce(value, routing, experts, side).to(watch.dtype) for span in spans[device]]
        every = torch.stack(pooled).to(vlm.device)  # [pool, expert, sample, neuron]
        found.update({site: every[:, number] for number, site in numbers.items()})
        seen(numbers.values())

    experts: list[tuple[Experts, Side]] = [(vlm.anatomy.experts[path], side) for path, side in fused]
    linear = [site for site in watch.sites if vlm.anatomy.expert(site) is None]
    with (
        torch.no_grad(),
        suppress(_SeenAllError),
        tap(vlm.model, vlm.anatomy, linear, pool),
        tap_routed(vlm.model, vlm.anatomy, experts, pool_experts, tokens=samples * tokens),
        before_layers(vlm.model, vlm.anatomy, lambda: seen(())) if patches else nullcontext(),
    ):
        vlm.forward(batch, logits_from=tokens - 1)  # the fewest logits that can be asked for
    found |= {site: over_calls(each, watch.pools) for site, each in calls.items()}
    if bool(batch.asked.image_mask.any()):
        patches = {site: values for site, values in patches.items() if values}
    else:  # Idefics's tower also runs where there is no picture, on zeros
        patches = {site: [] for site in patches}
    for site, values in patches.items():
        width = vlm.anatomy.width(site)
        found[site] = pooled_patches(site, values, watch.pools, width, watch.dtype).to(vlm.device)
    for site in watch.sites:
        if site not in found and vlm.anatomy.expert(site) is not None:  # no token was sent to any of its module
            nothing = torch.full((len(watch.pools), samples, vlm.anatomy.width(site)), torch.nan, dtype=watch.dtype)
            found[site] = nothing.to(vlm.device)
    missing = [str(site) for site in watch.sites if site not in found]
    if missing:
        raise SafeglassesError(
            "the forward pass does not reach some sites",
            given=", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else ""),
            do="leave these sites out",
        )
    pooled = torch.cat([found[site] for site in watch.sites], dim=2).movedim(1, 2).contiguous()
    return pooled, any(len(each) > 1 for each in calls.values())
