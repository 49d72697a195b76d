"""Where the bins of a histogram lie: set once per pool and neuron, from a first sample."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safeglasses.find.blocks import INTEGER, check_fit, in_blocks, ordered
from safeglasses.find.statistic import LEFT_OUT, TOXIC, Samples

Keys = np.ndarray[tuple[int, int], np.dtype[Any]]

_BLOCK = 2**17
"""Values of the first sample that are sorted at a time."""


@dataclass(frozen=True, eq=False)
class Edges:
    """Borders of bins; a value's bin is the number of edges that are not above it.

    An edge is kept as the integer that `ordered` gives it, which is exact for every type, and of its width.
    """

    keys: Int[Tensor, "pool neuron edge"]
    """Ascending; edges that are not needed lie one beyond infinity, at the end."""
    dtype: torch.dtype
    """Of the values."""

    @property
    def bins(self) -> int:
        """How many bins there are, empty ones included."""
        return self.keys.shape[2] + 1

    @property
    def infinity(self) -> int:
        """Key of the largest value."""
        return INTEGER[self.dtype][1]

    def to(self, device: torch.device) -> "Edges":
        """Return the same edges on a device."""
        return Edges(self.keys.to(device), self.dtype)

    def single(self, pool: int, start: int, stop: int) -> Bool[Tensor, "neuron bin"]:
        """Return which bins of a run of neurons can hold no two different values: their pairs are true ties."""
        keys = self.keys[pool, start:stop].long()
        lowest = keys.new_full((len(keys), 1), -self.infinity)
        beyond = keys.new_full((len(keys), 1), self.infinity + 1)
        return torch.cat([keys, beyond], dim=1) <= torch.cat([lowest, keys], dim=1) + 1  # differences can overflow

    def same(self, other: "Edges") -> bool:
        """Return whether another has the same bins."""
        return self.dtype == other.dtype and torch.equal(self.keys.cpu(), other.keys.cpu())


def edges_of(values: Float[Tensor, "pool neuron sample"], samples: Samples, bins: int = 256) -> Edges:
    """Set bins by the quantiles of a first sample, in which both classes weigh alike.

    A value that alone would fill a bin, such as the 0 of a rectified neuron, gets a bin of its own, which
    ends at the next float: pairs inside it are true ties. So does every value of a neuron that takes fewer
    values than half the bins. The quantiles are those of the rest. A sample never weighs more than a bin, so
    that a class of few samples does not draw all the edges.

    Args:
        values: as many samples as there are bins, or more; the better they represent the rest, the smaller
            the error bound.
        samples: who they are.
        bins: per neuron.

    Raises:
        SafeglassesError: the shapes do not fit, or a value of a counted sample is NaN.
    """
    check_fit(values, samples, None)
    integer, infinity = INTEGER[values.dtype]
    keys = torch.full((*values.shape[:2], bins - 1), infinity + 1, dtype=integer)
    for pool, groups in enumerate(samples.groups):
        columns = (groups != LEFT_OUT).nonzero()[:, 0]
        if not len(columns):
            continue
        toxic = (groups[columns] == TOXIC).numpy()

        def work(start: int, stop: int, pool=pool, columns=columns, toxic=toxic) -> None:
            some = values[pool, start:stop].index_select(1, columns.to(values.device))
            found = _quantiles(ordered(some, start).cpu().numpy(), toxic, bins, infinity + 1)
            keys[pool, start:stop] = torch.from_numpy(found)

        in_blocks(work, values.shape[1], max(1, _BLOCK // len(columns)))
    return Edges(keys, values.dtype)


def _quantiles(keys: Keys, toxic: np.ndarray, bins: int, beyond: int) -> Keys:
    """Do as `edges_of` for a block of neurons of one pool. A run is all samples of one value of one neuron."""
    order = np.argsort(keys.astype(np.promote_types(keys.dtype, np.int32), copy=False), axis=1)  # no 16-bit vectors
    keys = np.take_along_axis(keys, order, axis=1)
    starts = np.ones(keys.shape, bool)
    np.not_equal(keys[:, 1:], keys[:, :-1], out=starts[:, 1:])
    repeated = starts.copy()
    repeated[:, :-1] &= ~starts[:, 1:]
    repeated[:, -1] = False
    at = np.flatnonzero(starts)
    mass = np.zeros(keys.shape)  # of a run, where it starts; from counts, so the order of samples does not matter
    mass.ravel()[at] = _masses(toxic[order].ravel(), at, toxic, bins)

    most = (bins - 1) // 2
    few = starts.sum(axis=1, keepdims=True) <= most
    atom = few & starts | repeated & (mass >= 1 / bins)
    crowded = ~few & (atom.sum(axis=1, keepdims=True) > most)
    if crowded.any():
        atom &= ~crowded | (mass > 2.000001 / bins)  # fewer than half the bins can weigh so much
    left = bins - 1 - 2 * atom.sum(axis=1, keepdims=True)
    mass[atom] = 0
    after = mass.cumsum(axis=1)
    after *= (left + 1) / np.maximum(after[:, -1:], 1e-300)
    level = np.minimum(after, left).astype(np.int16 if bins < 2**15 else np.int32)
    times = 2 * atom.astype(np.int8)
    times[:, 1:] += level[:, 1:] != level[:, :-1]
    times[:, 0] += level[:, 0] > 0

    at = np.flatnonzero(times)
    count = times.ravel()[at]
    found = keys.ravel()[at].repeat(count)
    found[np.cumsum(count)[count == 2] - 1] += 1  # an atom's bin ends at the next float
    edges = np.full((len(keys), bins - 1), beyond, keys.dtype)
    edges[np.arange(bins - 1) < times.sum(axis=1, dtype=np.int64, keepdims=True)] = found
    return edges


def _masses(sorted_toxic: np.ndarray, starts: np.ndarray, toxic: np.ndarray, bins: int) -> np.ndarray:
    """Return the weight of each run; that of all runs of a neuron is 1."""
    sizes = np.array([toxic.sum(), (~toxic).sum()])
    weights = np.minimum(0.5 / np.maximum(sizes, 1), 1 / bins)
    weights /= (weights * sizes).sum()
    among = np.add.reduceat(sorted_toxic.astype(np.int32), starts)
    return among * weights[0] + (np.diff(starts, append=sorted_toxic.size) - among) * weights[1]
