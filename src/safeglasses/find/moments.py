"""Means, spreads, activation rates and paired changes of every neuron, from sums that merge."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from safeglasses.errors import SafeglassesError
from safeglasses.find.blocks import check_fit, check_shape, nan_error
from safeglasses.find.statistic import TOXIC, Columns, Samples

_BLOCK = 2**18
"""Values that are summed at a time; as float64 they stay in a core's cache."""


@dataclass
class _Sums:
    """What is kept; ``class`` is toxic, non-toxic. Counts are of all neurons (``each`` is 1) or of every one."""

    count: Int[Tensor, "pool class each"]
    """Samples."""
    mean: Float[Tensor, "pool class neuron"]
    """Mean value."""
    spread: Float[Tensor, "pool class neuron"]
    """Sum of squared differences from the mean."""
    absolute: Float[Tensor, "pool class neuron"]
    """Sum of magnitudes."""
    positive: Int[Tensor, "pool class neuron"]
    """Samples above 0."""
    change: Float[Tensor, "pool neuron"]
    """Sum over clusters that hold both classes of the squared difference of the classes' means."""
    clusters: Int[Tensor, "pool each"]
    """How many these are."""

    @classmethod
    def zeros(cls, pools: int, neurons: int, device: torch.device, each: int = 1) -> "_Sums":
        sums = torch.zeros(4, pools, 2, neurons, dtype=torch.float64, device=device)
        count = torch.zeros(pools, 2, each, dtype=torch.int64)
        change = torch.zeros(pools, neurons, dtype=torch.float64, device=device)
        return cls(count, sums[0], sums[1], sums[2], sums[3].long(), change, count[:, 0].clone())

    def join(self, pool: int, kind: int, run: slice, count: int | Tensor, mean: Tensor, spread: Tensor) -> None:
        """Take in mean and spread of more samples, for a run of neurons; `count` is left as it is.

        Source: Chan, Golub and LeVeque 1983, equations 2.1 (pairwise updating of means and sums of squares).
        """
        before = self.count[pool, kind] if self.count.shape[2] == 1 else self.count[pool, kind, run]
        first = (before == 0).to(mean.device)
        total = (before + count).clamp(min=1).double()
        gap = mean - self.mean[pool, kind, run]
        moved = self.mean[pool, kind, run] + gap * (count / total).to(mean.device)
        spread_there = self.spread[pool, kind, run]
        wider = spread_there + (spread + gap.square() * (before * count / total).to(mean.device))
        self.mean[pool, kind, run] = torch.where(first, mean, moved)
        self.spread[pool, kind, run] = torch.where(first, spread, wider)


@dataclass(frozen=True)
class _Rows:
    """The samples of a pool that are counted, toxic ones first, and the clusters that hold both classes."""

    order: Int[Tensor, " row"]
    """Where the rows lie in the batch."""
    toxic: int
    """How many of them are toxic."""
    paired: Int[Tensor, " some"]
    """Rows in a cluster that holds both classes."""
    cluster: Int[Tensor, " some"]
    """Its number, from 0."""
    share: Float[Tensor, " some"]
    """1 over the number of toxic rows in the cluster, or −1 over that of the others: the sum is the change."""
    clusters: int
    """How many there are."""

    @classmethod
    def of(cls, groups: Int[Tensor, " sample"], clusters: Int[Tensor, " sample"], device: torch.device) -> "_Rows":
        toxic, others = (groups == TOXIC).nonzero()[:, 0], (groups > TOXIC).nonzero()[:, 0]
        order = torch.cat([toxic, others])
        kind = (torch.arange(len(order)) >= len(toxic)).long()
        number, cluster = clusters[order].unique(return_inverse=True)
        sizes = torch.zeros(2, len(number), dtype=torch.int64)
        sizes.index_put_((kind, cluster), torch.ones((), dtype=torch.int64), accumulate=True)
        both = (sizes > 0).all(dim=0)
        paired = both[cluster].nonzero()[:, 0]
        share = (1 - 2 * kind).double() / sizes[kind, cluster]
        place = (both.cumsum(0) - 1)[cluster]
        parts = (part.to(device) for part in (order, paired, place[paired], share[paired]))
        order, paired, place, share = parts
        return cls(order, len(toxic), paired, place, share, int(both.sum()))


class Moments:
    """Means and their like, a `Statistic`; an `add` must hold whole clusters.

    Columns, all float64 and per class of samples in the pool:

    - ``mean_toxic``, ``mean_non_toxic``; ``mean_abs_toxic``, ``mean_abs_non_toxic`` (of magnitudes);
      ``rate_toxic``, ``rate_non_toxic`` (share of samples above 0). NaN for a class without samples.
    - ``effect_size``: difference of the means over the pooled standard deviation, Cohen's d. 0 where the means
      are equal, infinite where only the values within each class are, NaN where a class is missing or both
      have one sample.
      Source: SafeNeuron, arXiv 2602.12158, activation effect size.
    - ``rms_change``: root mean square, over the clusters that hold both classes, of the difference between
      the mean of the toxic and that of the non-toxic samples; NaN where there is no such cluster.
      Source: the change score of Chen et al. 2024, arXiv 2406.14144. Theirs contrasts two checkpoints on the
      same completion, ours the two labels within a cluster.

    An infinite value makes its neuron's means and spreads infinite or NaN. Sums are the same to the last bit
    whichever neurons are added together, not so whichever samples are.
    """

    def __init__(self) -> None:
        self._sums: _Sums | None = None

    @property
    def _shape(self) -> tuple[int, int] | None:
        return None if self._sums is None else (self._sums.change.shape[0], self._sums.change.shape[1])

    def add(self, values: Float[Tensor, "pool neuron sample"], samples: Samples) -> None:
        """Take in a batch of whole clusters, where its values lie.

        Raises:
            SafeglassesError: the shapes do not fit, or a value of a counted sample is NaN (the sums are then
                of no more use).
        """
        check_fit(values, samples, self._shape)
        pools, neurons, n = values.shape
        if self._sums is None:
            self._sums = _Sums.zeros(pools, neurons, values.device)
        height = max(32, _BLOCK // max(n, 1))
        for pool, groups in enumerate(samples.groups):
            rows = _Rows.of(groups, samples.clusters, values.device)
            for start in range(0, neurons, height):
                some = values.detach()[pool, start : start + height].t().contiguous()
                _add_block(self._sums, pool, start, some.index_select(0, rows.order).double(), rows)
            self._sums.count[pool] += torch.tensor([rows.toxic, len(rows.order) - rows.toxic])[:, None]
            self._sums.clusters[pool] += rows.clusters

    def merge(self, other: "Moments") -> None:
        """Take in what another has seen.

        Raises:
            SafeglassesError: it has seen other pools or neurons.
        """
        theirs = other._sums
        if theirs is None or other._shape is None:
            return
        check_shape(other._shape, self._shape)
        if self._sums is None:
            self._sums = _Sums.zeros(*other._shape, theirs.change.device, theirs.count.shape[2])
        whole = slice(None)
        for pool, counts in enumerate(theirs.count):
            for kind, count in enumerate(counts):
                if count.any():
                    mean, spread = theirs.mean[pool, kind], theirs.spread[pool, kind]
                    self._sums.join(pool, kind, whole, count, mean, spread)
        for name in ("count", "absolute", "positive", "change", "clusters"):
            getattr(self._sums, name).add_(getattr(theirs, name))

    def finish(self) -> Columns:
        """Return the statistics, on the CPU; none if nothing was added."""
        sums = self._sums
        if sums is None:
            return {}
        count = sums.count.to(sums.mean.device).double()
        columns: dict[str, Tensor] = {}
        for kind, label in enumerate(("toxic", "non_toxic")):
            missing = count[:, kind] == 0
            columns[f"mean_{label}"] = sums.mean[:, kind].masked_fill(missing, torch.nan)
            columns[f"mean_abs_{label}"] = sums.absolute[:, kind] / count[:, kind]
            columns[f"rate_{label}"] = sums.positive[:, kind] / count[:, kind]
        gap = columns["mean_toxic"] - columns["mean_non_toxic"]
        sd = (sums.spread.sum(dim=1) / (count.sum(dim=1) - 2)).sqrt()
        columns["effect_size"] = torch.where(gap == 0, gap, gap / sd)
        columns["rms_change"] = (sums.change / sums.clusters.to(gap.device)).sqrt()
        return {name: column.cpu() for name, column in columns.items()}

    @classmethod
    def each(cls, pools: int, neurons: int) -> "Moments":
        """Return one that counts for every neuron which samples it has seen; add to it by `part`."""
        made = cls()
        made._sums = _Sums.zeros(pools, neurons, torch.device("cpu"), neurons)
        return made

    def part(self, pool: int, neurons: slice) -> "Moments":
        """Return some neurons of one pool of an `each`: what is added to them is added here."""
        if self._sums is None:
            raise SafeglassesError("nothing to take a part of", given="no sums", expected="Moments.each")
        views = {field.name: getattr(self._sums, field.name)[pool : pool + 1, ..., neurons] for field in fields(_Sums)}
        return Moments.from_state(views)

    def state(self) -> dict[str, Tensor]:
        """Return all there is to it, in tensors that can be saved or sent; none if nothing was added."""
        sums = self._sums
        return {} if sums is None else {field.name: getattr(sums, field.name).contiguous() for field in fields(sums)}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "Moments":
        """Return what `state` was taken of; it takes the tensors as they are, without a copy."""
        made = cls()
        made._sums = _Sums(**state) if state else None
        return made


def _add_block(sums: _Sums, pool: int, start: int, values: Float[Tensor, "row neuron"], rows: _Rows) -> None:
    run = slice(start, start + values.shape[1])
    for kind, some in enumerate((values[: rows.toxic], values[rows.toxic :])):
        if not len(some):
            continue
        # From the first value, so that large offsets do not cancel and equal values have no spread at all.
        off = some - some[0]
        mean = _total(off) / len(some)
        if mean.isnan().any() and (nan := some.isnan().any(dim=0)).any():
            raise nan_error(start + int(nan.int().argmax()))
        sums.join(pool, kind, run, len(some), some[0] + mean, _total(off.sub_(mean).square_()))
        sums.absolute[pool, kind, run] += _total(some.abs())
        sums.positive[pool, kind, run] += (some > 0).sum(dim=0)
    if rows.clusters:
        off = (values - values[0]).index_select(0, rows.paired).mul_(rows.share[:, None])
        change = off.new_zeros(rows.clusters, off.shape[1]).index_add_(0, rows.cluster, off)
        sums.change[pool, run] += _total(change.square_())


def _total(rows: Float[Tensor, "row neuron"]) -> Float[Tensor, " neuron"]:
    """Return the sum of rows, in an order that no other neuron and no number of threads has a say in."""
    while len(rows) > 1:
        half = len(rows) // 2
        halved = rows[:half] + rows[half : 2 * half]
        if len(rows) % 2:
            halved[0] += rows[-1]
        rows = halved
    return rows[0]
