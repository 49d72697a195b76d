"""Exact AUROC of many neurons at once, by sorting integers that carry the label in their lowest bit.

A float becomes an integer key of the same order, the label is appended as one more bit, and one sort of
plain integers tells for every positive sample how many negative ones lie below it: no indices, no ranks.
Within a tie the label bit puts negatives first, so that it counts as wins; what is too much are the pairs of
equal values, less the pairs that agree in the label too. All counts are integers until the one division.

Source: AUROC as Mann and Whitney's U over the number of pairs (Hanley and McNeil 1982, section 2).
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safeglasses.errors import SafeglassesError
from safeglasses.find.blocks import INTEGER, in_blocks, nan_error
from safeglasses.find.sorting import sort_rows

Keys = np.ndarray[tuple[int, int], np.dtype[Any]]

_BLOCK = 2**20
"""Bytes of keys in a block of neurons; with its temporaries they stay in the caches and calls of numpy are few."""
_TILE = 256
"""Samples that are transposed at a time."""
_REACH = 32
"""Places over which equal keys are counted in bytes."""
_FEW = 32
"""One in so many is few enough to be handled by place."""


def auroc(values: Float[Tensor, "sample neuron"], labels: Bool[Tensor, " _sample"]) -> Float[Tensor, " neuron"]:
    """Return how well each neuron separates positive from negative samples, ties counted half, exactly.

    0.5 is chance, 1 means that every positive value lies above every negative one. -0.0 equals 0.0;
    infinities are ordinary extremes.

    Returns:
        float64 on the CPU, wherever `values` lie.

    Raises:
        SafeglassesError: a value is NaN, one class is missing, or the shapes do not fit.
    """
    return auroc_rows(values.t(), labels)


def auroc_rows(values: Float[Tensor, "neuron sample"], labels: Bool[Tensor, " _sample"]) -> Float[Tensor, " neuron"]:
    """Do as `auroc` for neuron-major values, which need no transposition.

    Raises:
        SafeglassesError: as in `auroc`.
    """
    n = values.shape[1]
    if labels.shape != (n,):
        raise SafeglassesError("labels do not fit the values", given=f"{labels.numel()} labels", expected=f"{n} labels")
    n_pos = int(labels.sum())
    if not 0 < n_pos < n:
        raise SafeglassesError(
            "AUROC needs both classes",
            given=f"{n_pos} positive and {n - n_pos} negative samples",
            expected="at least one of each",
            do="add examples of the missing class",
        )
    values = values.detach()
    if values.device.type == "cpu" or values.dtype == torch.float64:
        wins = torch.from_numpy(_double_wins(values.cpu(), labels.cpu().numpy()))
    else:
        wins = _double_wins_on_device(values, labels.to(values.device))
    return wins.double() / (2 * n_pos * (n - n_pos))


def _double_wins(values: Float[Tensor, "neuron sample"], labels: np.ndarray) -> np.ndarray:
    """Return twice the number of (positive, negative) pairs that the positive wins; a tie is half a win."""
    integer, infinity = INTEGER[values.dtype]
    bits = values.view(integer).numpy()
    neurons, n = bits.shape
    wins = np.empty(neurons, np.int64)
    np.empty(16 * _BLOCK, np.uint8)  # freed at once: from then on glibc keeps temporaries, not unmaps them

    def work(start: int, stop: int) -> None:
        block = bits[start:stop]
        if not block.flags.c_contiguous:
            block = _transposed(block)
        wins[start:stop] = _block_wins(block, labels, infinity, start)

    in_blocks(work, neurons, max(16, _BLOCK // (n * bits.itemsize)))
    return wins


def _transposed(block: Keys) -> Keys:
    """Copy rows that are columns in memory, in tiles that are fetched as they lie.

    So whole cache lines are read at once: columns may lie a power of two apart, where caches hold few of them.
    """
    rows = np.empty(block.shape, block.dtype)
    for start in range(0, block.shape[1], _TILE):
        tile = slice(start, start + _TILE)
        rows[:, tile] = block[:, tile].copy(order="K")
    return rows


def _block_wins(bits: Keys, labels: np.ndarray, infinity: int, first: int) -> np.ndarray:
    """Do as `_double_wins` for a block of neurons, given as the bits of their values.

    Each neuron's magnitudes are counted from the smallest that occurs (zero is 0, that one 1), and bits that
    are 0 in all of them are dropped. So bfloat16 (also in wider floats) and most float16 values fit 16 bits,
    sign and label included, and nearly all float32 values 32.
    """
    width = 8 * bits.itemsize
    magnitude = bits & (2 ** (width - 1) - 1)
    high = magnitude.max(axis=1, keepdims=True)
    if high.max() > infinity:
        raise nan_error(first + int((high > infinity).argmax()))
    used = int(np.bitwise_or.reduce(magnitude, axis=None))
    spare = (used & -used).bit_length() - 1 if used else 0
    if spare:
        magnitude >>= spare
        high >>= spare
    below = magnitude.min(axis=1, keepdims=True) - 1
    if below.min() < 0:  # zeros: what counts is the smallest of the others; unsigned, 0 - 1 wraps to the top
        unsigned = f"u{bits.itemsize}"
        others = (magnitude.view(unsigned) - 1).min(axis=1, keepdims=True)
        below = np.minimum(others, high.view(unsigned)).view(bits.dtype)
        np.maximum(magnitude, below, out=magnitude)
    magnitude -= below
    sizes = np.searchsorted([2**14, 2**30, 2**62], (high - below)[:, 0], side="right")
    wins = np.empty(len(bits), np.int64)
    for size in set(sizes.tolist()):
        rows = np.flatnonzero(sizes == size) if (sizes != size).any() else slice(None)
        wins[rows] = _key_wins(_signed(magnitude[rows], bits[rows] >> (width - 1), size), labels)
    return wins


def _signed(magnitude: Keys, sign: Keys, size: int) -> Keys:
    """Return keys with their signs (0 or -1), of the narrowest type with a bit to spare."""
    keys = magnitude.astype((np.int16, np.int32, np.int64, np.int64)[size], copy=False)
    sign = sign.astype(keys.dtype, copy=False)
    keys ^= sign
    keys -= sign  # two's complement: -x = ~x + 1
    if size == 3:  # doubles over more than 1,022 octaves
        keys = np.stack([np.unique(row, return_inverse=True)[1] for row in keys])
    return keys


def _key_wins(keys: Keys, labels: np.ndarray) -> np.ndarray:
    """Do as `_double_wins` for integers that leave a bit to spare; overwrites them."""
    n_pos = int(labels.sum())
    keys += keys
    keys += labels.astype(keys.dtype)
    keys = sort_rows(keys)
    return 2 * _sum_of_marked(keys) - n_pos * (n_pos - 1) - _tied_pairs(keys)


def _tied_pairs(keys: Keys) -> np.ndarray:
    """Return per row of sorted keys how many pairs differ in the lowest bit alone: equal without it, not with it."""
    value = keys >> 1
    same = _same_as_left(value)
    if np.count_nonzero(same) > same.size // _FEW:
        return _equal_pairs(value, same) - _equal_pairs(keys, _same_as_left(keys))
    place, flat = np.flatnonzero(same), keys.reshape(-1)
    return _pairs_at(place, keys.shape) - _pairs_at(place[flat[place] == flat[place - 1]], keys.shape)


def _same_as_left(keys: Keys) -> np.ndarray:
    """Return, row after row, what equals its neighbour to the left; none begins a row, and one more entry is False."""
    same = np.zeros(keys.size + 1, np.bool_)
    np.equal(keys[:, 1:], keys[:, :-1], out=same[:-1].reshape(keys.shape)[:, 1:])
    return same


def _pairs_at(place: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return how many pairs of keys are equal, per row, given the few places of those that equal their left ones."""
    pairs = np.zeros(shape[0], np.int64)
    start = np.flatnonzero(np.diff(place, prepend=-1) != 1)
    length = np.diff(start, append=len(place))
    np.add.at(pairs, place[start] // shape[1], length * (length + 1) // 2)
    return pairs


def _equal_pairs(keys: Keys, same: np.ndarray) -> np.ndarray:
    """Return how many pairs of sorted keys are equal, per row: per key, its equals to the left.

    Keys are compared up to 1, 2, 4, … places to the left, while many runs of equals are longer; what the longer
    ones hold beyond that follows from where they begin and end.
    """
    count = same.view(np.int8)
    full = -count  # all bits set where all the places so far hold an equal
    reach = 1
    while reach < _REACH and np.count_nonzero(full) > full.size // _FEW:
        count[reach:] += full[reach:] & count[:-reach]
        full[reach:] &= full[:-reach]
        reach *= 2
    pairs = count[:-1].reshape(keys.shape).sum(axis=1, dtype=np.int32).astype(np.int64)
    edges = np.flatnonzero(full[1:] != full[:-1]) + 1
    start, length = edges[::2], edges[1::2] - edges[::2]
    np.add.at(pairs, start // keys.shape[1], length * (length - 1) // 2)
    return pairs


def _sum_of_marked(keys: Keys) -> np.ndarray:
    """Return per row the sum of the positions whose lowest bit is set."""
    kind = np.int32 if keys.shape[1] <= 2**16 else np.int64
    marked = (keys & 1).astype(kind, copy=False)
    position = np.arange(keys.shape[1], dtype=kind)
    return np.einsum("ij,j->i", marked, position).astype(np.int64)  # not by BLAS, whose threads get in the way


def _double_wins_on_device(
    values: Float[Tensor, "neuron sample"], labels: Bool[Tensor, " _sample"]
) -> Int[Tensor, " neuron"]:
    """Do as `_double_wins` where the values lie, in chunks that fit the device's free memory."""
    n = values.shape[1]
    n_pos = int(labels.sum())
    position = torch.arange(n, device=values.device)
    wins = []
    for keys in _device_keys(values, labels):
        order = keys.sort(dim=1).values
        total = ((order & 1) * position).sum(dim=1)
        order = (order ^ 1).sort(dim=1).values
        total += n * (n - 1) // 2 - ((order & 1) * position).sum(dim=1)
        wins.append((total - n_pos * (n_pos - 1)).cpu())
    return torch.cat(wins) if wins else torch.zeros(0, dtype=torch.int64)


def _device_keys(
    values: Float[Tensor, "neuron sample"], labels: Bool[Tensor, " _sample"]
) -> Iterator[Int[Tensor, "neuron sample"]]:
    integer, infinity = INTEGER[values.dtype]
    wide = torch.int32 if integer == torch.int16 else torch.int64
    per_value = 64  # bytes: keys, sorted keys, indices, the sort's workspace
    height = max(1, _free_bytes(values.device) // 2 // (per_value * values.shape[1]))
    for start in range(0, len(values), height):
        bits = values[start : start + height].contiguous().view(integer).to(wide)
        magnitude = bits & torch.iinfo(integer).max
        nan = (magnitude > infinity).any(dim=1)
        if nan.any():
            raise nan_error(start + int(nan.int().argmax()))
        yield torch.where(bits < 0, -magnitude, magnitude) * 2 + labels


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    return 2**30
