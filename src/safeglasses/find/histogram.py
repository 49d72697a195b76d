"""AUROC from counts per class and bin: memory that does not grow, sums that merge, and a bound on the error.

Samples in different bins are ordered by their bins, exactly; of a pair in one bin nothing is known unless the
bin holds a single value, which makes it a tie. Counting such pairs half is the middle of what is possible.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from safeglasses.errors import SafeglassesError
from safeglasses.find.blocks import INTEGER, check_fit, in_blocks, nan_error, ordered
from safeglasses.find.edges import Edges, Keys, edges_of
from safeglasses.find.sorting import sort_rows
from safeglasses.find.statistic import GROUPS, HALF_A, HALF_B, LEFT_OUT, TOXIC, Columns, Samples

__all__ = ["Edges", "Histogram", "edges_of"]

_BLOCK = 2**18
"""Values and edges that are sorted at a time; with its temporaries a block stays in a core's cache."""
_SEARCHED = 2**22
"""Values that are looked up at a time where they are not sorted."""
_COLUMNS = 2**15 - 1
"""Samples that are counted at a time: a running count of two groups fits into 32 bits."""
_MOST = 2**31 - 1
"""Samples that 32-bit counts can hold."""


class Histogram:
    """Counts per bin and group, a `Statistic` whose memory depends on neither the number nor the order of samples.

    Columns: ``auroc`` and ``null`` as `Ranks` has them, with pairs in one bin counted half; and
    ``auroc_bound``: the exact AUROC lies within ``auroc`` ± ``auroc_bound``, whatever the data. That is half
    the share of the pairs that lie in one bin, bins of a single value left out: near 1 / (2 · bins) where the
    first sample was like the rest, and 0 for a neuron of few values.

    An `add` of fewer samples than there are bins costs as much as one of so many.
    """

    def __init__(self, edges: Edges) -> None:
        self.edges = edges
        pools, neurons, _ = edges.keys.shape
        self.counts: Int[Tensor, "pool neuron group bin"] = torch.zeros(
            pools, neurons, GROUPS, edges.bins, dtype=torch.int32, device=edges.keys.device
        )
        """int32; the sum of those of several histograms with the same edges is that of their merger."""

    @staticmethod
    def memory(neurons: int, pools: int, bins: int = 256, dtype: torch.dtype = torch.float32) -> int:
        """Return the bytes that counts and edges take, for values of some type."""
        return neurons * pools * (GROUPS * bins * 4 + (bins - 1) * dtype.itemsize)

    def add(self, values: Float[Tensor, "pool neuron sample"], samples: Samples) -> None:
        """Count a batch; where the values lie on a device, the counts move there.

        Raises:
            SafeglassesError: the shapes or types do not fit, a value of a counted sample is NaN (the counts
                are then of no more use), or there are more than 2³¹ − 1 samples.
        """
        check_fit(values, samples, (self.counts.shape[0], self.counts.shape[1]))
        if values.dtype != self.edges.dtype:
            raise SafeglassesError(
                "the bins were set for another type of values", given=str(values.dtype), expected=str(self.edges.dtype)
            )
        self.check_room((samples.groups != LEFT_OUT).sum(dim=1))
        if values.device != self.counts.device:
            self.counts, self.edges = self.counts.to(values.device), self.edges.to(values.device)
        sorts = values.device.type == "cpu" and values.dtype.itemsize <= 4
        for pool, groups in enumerate(samples.groups):
            for columns in (groups != LEFT_OUT).nonzero()[:, 0].split(_COLUMNS):
                if not len(columns):
                    continue
                some = values.detach()[pool]
                chosen = None if len(columns) == some.shape[1] else columns
                (self._add_sorted if sorts else self._add_searched)(pool, some, chosen, groups[columns])

    def part(self, pool: int, neurons: slice) -> "Histogram":
        """Return some neurons of one pool: what is added to them is added here, as long as it lies on the CPU."""
        made = Histogram.__new__(Histogram)
        made.edges = Edges(self.edges.keys[pool : pool + 1, neurons], self.edges.dtype)
        made.counts = self.counts[pool : pool + 1, neurons]
        return made

    def counted(self) -> Columns:
        """Return how many samples of each class every neuron has seen: ``n_toxic`` and ``n_non_toxic``."""
        groups = self.counts.sum(dim=3).double().cpu()
        return {"n_toxic": groups[..., TOXIC], "n_non_toxic": groups[..., HALF_A] + groups[..., HALF_B]}

    def seen(self) -> Int[Tensor, " pool"]:
        """Return how many samples were counted, on the CPU."""
        return self.counts[:, :1].sum(dim=(1, 2, 3)).cpu()

    def check_room(self, more: Int[Tensor, " pool"]) -> None:
        """Check that so many more samples can be counted.

        Raises:
            SafeglassesError: they cannot.
        """
        seen = self.seen() + more
        if (seen > _MOST).any():
            raise SafeglassesError(
                "too many samples for 32-bit counts",
                given=f"{int(seen.max()):,} samples",
                expected=f"at most {_MOST:,}",
                do="use fewer examples (--limit)",
            )

    def _add_searched(
        self,
        pool: int,
        values: Float[Tensor, "neuron sample"],
        columns: Int[Tensor, " some"] | None,
        groups: Int[Tensor, " some"],
    ) -> None:
        """Look up the bin of each value."""
        offsets = groups.to(values.device).long() * self.edges.bins
        height = max(1, _SEARCHED // len(groups))
        for start in range(0, len(values), height):
            some = values[start : start + height]
            some = some if columns is None else some.index_select(1, columns.to(values.device))
            keys = self.edges.keys[pool, start : start + height]
            places = torch.searchsorted(keys, ordered(some, start), right=True) + offsets
            counts = self.counts[pool, start : start + height].flatten(1)
            counts.scatter_add_(1, places, counts.new_ones(()).expand_as(places))

    def _add_sorted(
        self,
        pool: int,
        values: Float[Tensor, "neuron sample"],
        columns: Int[Tensor, " some"] | None,
        groups: Int[Tensor, " some"],
    ) -> None:
        """Sort values and edges together, which is several times faster than to look up each value."""
        integer, infinity = INTEGER[values.dtype]
        bits, edges, counts = values.view(integer), self.edges.keys[pool].numpy(), self.counts[pool].numpy()
        codes = groups.numpy() + 1

        def work(start: int, stop: int) -> None:
            block = bits[start:stop]
            some = (block if columns is None else block.index_select(1, columns)).numpy()
            _count(counts[start:stop], some, codes, edges[start:stop], infinity, start)

        in_blocks(work, len(values), max(16, _BLOCK // (len(groups) + self.edges.bins)))

    def merge(self, other: "Histogram") -> None:
        """Add another's counts.

        Raises:
            SafeglassesError: it has other bins, or together they hold more than 2³¹ − 1 samples.
        """
        if not self.edges.same(other.edges):
            raise SafeglassesError(
                "histograms with different bins cannot be merged",
                do="set the edges once, from one first sample, and give them to all",
            )
        self.check_room(other.seen())
        self.counts += other.counts.to(self.counts.device)

    def finish(self) -> Columns:
        """Return the estimates and the bound, on the CPU."""
        pools, neurons = self.counts.shape[:2]
        names = ("auroc", "auroc_bound", "null")
        columns = {name: torch.empty(pools, neurons, dtype=torch.float64) for name in names}
        for pool, start, stop in self._runs():
            counts = self.counts[pool, start:stop].long()
            single = self.edges.single(pool, start, stop)
            non_toxic = counts[:, HALF_A] + counts[:, HALF_B]
            auroc, bound = _auroc(counts[:, TOXIC], non_toxic, single)
            null, _ = _auroc(counts[:, HALF_A], counts[:, HALF_B], single)
            for name, found in zip(names, (auroc, bound, null), strict=True):
                columns[name][pool, start:stop] = found
        return columns

    def _runs(self) -> Iterator[tuple[int, int, int]]:
        pools, neurons = self.counts.shape[:2]
        for pool in range(pools):
            for start in range(0, neurons, 4096):
                yield pool, start, min(start + 4096, neurons)

    def state(self) -> dict[str, Tensor]:
        """Return all there is to it, in tensors that can be saved or sent."""
        return {
            "counts": self.counts,
            "edges": self.edges.keys,
            "like": torch.empty(0, dtype=self.edges.dtype),  # safetensors keeps the type of nothing, too
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "Histogram":
        """Return what `state` was taken of; it takes the tensors as they are, without a copy."""
        made = cls.__new__(cls)
        made.edges, made.counts = Edges(state["edges"], state["like"].dtype), state["counts"]
        return made


def _auroc(
    positive: Int[Tensor, "neuron bin"], negative: Int[Tensor, "neuron bin"], single: Tensor
) -> tuple[Float[Tensor, " neuron"], Float[Tensor, " neuron"]]:
    """Return the mid-rank estimate and half the share of pairs whose order the bins hide."""
    if not positive.numel():
        return torch.empty(len(positive)).double(), torch.empty(len(positive)).double()
    pairs = positive.sum(dim=1) * negative.sum(dim=1)  # below 2⁶⁰
    below = negative.cumsum(dim=1) - negative
    double_wins = (positive * (2 * below + negative)).sum(dim=1)
    hidden = (positive * negative).masked_fill(single, 0).sum(dim=1)
    one = pairs.clamp(min=1)
    auroc = torch.where(pairs > 0, double_wins.double() / (2 * one), 0.5)
    return auroc.cpu(), (hidden.double() / (2 * one)).cpu()


def _count(
    counts: np.ndarray[tuple[int, int, int], np.dtype[Any]],
    bits: Keys,
    codes: np.ndarray,
    edges: Keys,
    infinity: int,
    first: int,
) -> None:
    """Add a block of neurons, given as the bits of their values, to its counts ``[neuron, group, bin]``.

    The lowest two bits of a key are its group's code, 1 to 3; an edge has 0, so it comes before equal values.
    """
    n, width = bits.shape[1], edges.shape[1]
    keys = sort_rows(_keys(bits, codes, edges, infinity, first))
    codes = (keys & 3).astype(np.int32, copy=False)
    at = np.flatnonzero(codes == 0).reshape(len(keys), width)
    running = ((codes & 1) | (codes & 2) << 15).cumsum(axis=1, dtype=np.int32).ravel()  # two counts in one
    passed = np.zeros((len(keys), width + 2), np.int32)
    passed[:, 1:-1] = running[at]
    passed[:, -1] = running[n + width - 1 :: n + width]
    place = np.empty((len(keys), width + 2), np.int32)  # of the edges among the values
    place[:, 0], place[:, -1] = 0, n
    place[:, 1:-1] = at - np.arange(len(keys))[:, None] * (n + width) - np.arange(width)
    low, high, every = np.diff(passed & 0xFFFF), np.diff(passed >> 16), np.diff(place)
    counts[:, TOXIC] += every - high  # codes 1 and 3 have the low bit, 2 and 3 the high one
    counts[:, HALF_A] += every - low
    counts[:, HALF_B] += low + high - every


def _keys(bits: Keys, codes: np.ndarray, edges: Keys, infinity: int, first: int) -> Keys:
    """Return values and edges side by side as integers that compare like them, with codes in the lowest bits.

    The block's magnitudes are counted from each neuron's smallest (zero is 0, that one 1), and edges between
    zero and that one, or beyond the largest, are moved next to values where they separate the same. So most
    bfloat16 values fit 16 bits, codes included, and most float32 values 32.
    """
    top = 8 * bits.itemsize - 1
    magnitude = bits & (2**top - 1)
    high = magnitude.max(axis=1, keepdims=True)
    if high.max() > infinity:
        raise nan_error(first + int((high > infinity).argmax()))
    unsigned = f"u{bits.itemsize}"
    below = (magnitude.view(unsigned) - 1).min(axis=1, keepdims=True)  # 0 - 1 wraps to the top
    below = np.minimum(below, high.view(unsigned)).view(bits.dtype)
    np.maximum(magnitude, below, out=magnitude)
    magnitude -= below
    span = int((high - below).max())
    room = next(kind for kind in (np.int16, np.int32, np.int64) if 4 * (span + 2) <= np.iinfo(kind).max)
    n = bits.shape[1]
    keys = np.empty((len(bits), n + edges.shape[1]), room)
    sign = bits >> top  # 0 or -1
    magnitude ^= sign
    magnitude -= sign  # two's complement: -x = ~x + 1
    keys[:, :n] = magnitude
    above = (edges > 0).astype(edges.dtype)
    far = np.clip(np.abs(edges), below + above, high + above) - below
    keys[:, n:] = np.where(edges > 0, far, -far)
    keys <<= 2
    keys[:, :n] |= codes.astype(room)
    return keys
