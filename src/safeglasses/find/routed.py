"""What fused experts hold, pooled and rated: per example and expert, over the tokens of a span that were sent there.

An example none of whose tokens in the span reached an expert has no value there: NaN. Everything else that is NaN
is refused here, so that further on NaN at such a site means this and nothing else.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safeglasses.errors import SafeglassesError
from safeglasses.find.blocks import nan_error
from safeglasses.find.edges import Edges, edges_of
from safeglasses.find.histogram import Histogram
from safeglasses.find.moments import Moments
from safeglasses.find.pools import Window
from safeglasses.find.statistic import LEFT_OUT, Columns, Samples, Statistic
from safeglasses.model.experts import Experts
from safeglasses.model.routes import Routing
from safeglasses.model.sites import Side, Site


@dataclass(frozen=True)
class Span:
    """The tokens of one pool in a batch, flat."""

    window: Window
    """How they are summarised."""
    tokens: Bool[Tensor, " token"]
    """Which tokens of the batch, row after row, count."""
    samples: int
    """Rows of the batch."""

    @classmethod
    def of(cls, window: Window, samples: int, width: int, device: torch.device) -> "Span":
        """Flatten a window; for ``last`` it is one token per example."""
        return cls(window, window.mask(samples, width).flatten().to(device), samples)

    def reduce(
        self, value: Float[Tensor, "row neuron"], routing: Routing, experts: Experts, side: Side
    ) -> Float[Tensor, "expert sample neuron"]:
        """Summarise the values of one side of all experts of a module.

        Raises:
            SafeglassesError: a value is NaN.
        """
        kept = self.tokens[routing.row].nonzero()[:, 0]
        rows = value if len(kept) == len(value) else value.index_select(0, kept)
        width = len(self.tokens) // self.samples
        place = routing.expert[kept] * self.samples + routing.row[kept] // width
        pooled = self._pooled(rows, place, experts.n_experts * self.samples)
        reached = torch.zeros(len(pooled), dtype=torch.bool, device=value.device).index_fill_(0, place, True)
        nan = pooled.isnan()
        if bool((nan.any(dim=1) & reached).any()):
            at, neuron = (nan & reached[:, None]).nonzero()[0].tolist()
            site = Site(experts.expert(at // self.samples), side)
            error = nan_error(neuron)
            raise SafeglassesError(error.what, given=site.neuron(neuron), do=error.do)
        return pooled.view(experts.n_experts, self.samples, -1)

    def _pooled(self, rows: Tensor, place: Int[Tensor, " row"], size: int) -> Float[Tensor, "place neuron"]:
        how = self.window.how
        if how in ("max", "last"):  # of `last` there is one row at most
            index = place[:, None].expand_as(rows)
            empty = rows.new_full((size, rows.shape[1]), torch.nan)
            return empty.scatter_reduce_(0, index, rows, "amax", include_self=False)
        rows = rows.float()
        rows = rows.abs() if how == "mean-abs" else rows.square() if how == "rms" else rows
        total = rows.new_zeros(size, rows.shape[1]).index_add_(0, place, rows)
        mean = total / torch.bincount(place, minlength=size)[:, None]  # 0 / 0 is NaN
        return mean.sqrt() if how == "rms" else mean


@dataclass(frozen=True)
class Part:
    """Neighbouring neurons in one pool that the same samples have values of, and these values."""

    pool: int
    """Which pool."""
    neurons: slice
    """Which neurons."""
    values: Float[Tensor, "1 _neuron some"]
    """Their values."""
    samples: Samples
    """Whose they are."""


def parts_of(
    values: Float[Tensor, "pool neuron sample"], samples: Samples, gaps: Bool[Tensor, " neuron"]
) -> Iterator[Part]:
    """Cut values into parts without gaps.

    Args:
        values: NaN where there is none.
        samples: who the samples are.
        gaps: at which neurons NaN means that; elsewhere it is a value.
    """
    for pool, rows in enumerate(values):
        whole = Samples(samples.groups[pool : pool + 1], samples.clusters)
        missing = rows.isnan() & gaps[:, None]
        edges = (missing[1:] != missing[:-1]).any(dim=1).nonzero()[:, 0] + 1
        bounds: Sequence[int] = [0, *edges.tolist(), len(rows)]
        for start, stop in pairwise(bounds):
            some = values[pool : pool + 1, start:stop]
            if not missing[start].any():
                yield Part(pool, slice(start, stop), some, whole)
                continue
            there = (~missing[start]).nonzero()[:, 0]
            yield Part(pool, slice(start, stop), some.index_select(2, there), whole.take(there))


def rate(
    values: Float[Tensor, "pool neuron sample"],
    samples: Samples,
    gaps: Bool[Tensor, " neuron"] | None,
    make: Callable[[], Sequence[Statistic]],
    naming: Callable[[int], AbstractContextManager[None]],
) -> Columns:
    """Finish statistics, each neuron over the samples that it has values of.

    Where there are gaps, besides their columns there are ``n_toxic`` and ``n_non_toxic``: how many samples these are.

    Args:
        values: all samples.
        samples: who they are.
        gaps: as in `parts_of`; None: there are none.
        make: gives fresh statistics.
        naming: says in errors which neuron is meant, given the number of the first.
    """
    columns: dict[str, Tensor] = {}
    if gaps is None:
        with naming(0):
            for statistic in make():
                statistic.add(values, samples)
                columns |= statistic.finish()
        return columns
    for part in parts_of(values, samples, gaps):
        toxic, others = part.samples.counts()[0]
        ones = torch.ones(1, part.values.shape[1], dtype=torch.float64)
        found: dict[str, Tensor] = {"n_toxic": ones * toxic, "n_non_toxic": ones * others}
        with naming(part.neurons.start):
            for statistic in make():
                statistic.add(part.values, part.samples)
                found |= statistic.finish()
        for name, column in found.items():
            whole = columns.setdefault(name, torch.zeros(values.shape[:2], dtype=torch.float64))
            whole[part.pool, part.neurons] = column[0]
    return columns


def add_parts(
    into: Histogram | Moments,
    values: Float[Tensor, "pool neuron sample"],
    samples: Samples,
    gaps: Bool[Tensor, " neuron"],
) -> None:
    """Count values with gaps: every neuron those that it has."""
    for part in parts_of(values, samples, gaps):
        if part.values.shape[2]:
            into.part(part.pool, part.neurons).add(part.values, part.samples)


def edges_with_gaps(
    values: Float[Tensor, "pool neuron sample"], samples: Samples, bins: int, gaps: Bool[Tensor, " neuron"] | None
) -> Edges:
    """Set bins as `edges_of` does, every neuron's by the values that it has; None: all have all.

    A neuron without values here gets bins of medium size, the medians of all others' edges: `auroc_bound` says what
    they are worth.
    """
    if gaps is None:
        return edges_of(values, samples, bins)
    keys: Tensor | None = None
    known = torch.zeros(values.shape[:2], dtype=torch.bool)
    for part in parts_of(values, samples, gaps):
        found = edges_of(part.values, part.samples, bins).keys
        keys = found.new_zeros(*values.shape[:2], bins - 1) if keys is None else keys
        keys[part.pool, part.neurons] = found[0]
        known[part.pool, part.neurons] = bool((part.samples.groups != LEFT_OUT).any())
    if keys is None:
        return edges_of(values, samples, bins)
    for pool, some in enumerate(known):
        if some.any() and not some.all():
            keys[pool, ~some] = keys[pool, some].median(dim=0).values
    return Edges(keys, values.dtype)
