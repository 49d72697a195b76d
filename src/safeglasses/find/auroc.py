"""Exact AUROC of many neurons at once, by sorting integers that carry the label in their lowest bit.

A float becomes an integer key of the same order, the label is appended as one more bit, and one sort of
plain integers tells for every positive sample how many negative ones lie below it: no indices, no ranks.
Within a tie the label bit puts negatives first; a second sort with the bit flipped puts them last, and the
mean of the two is the mid-rank statistic. All counts are integers until the one division at the end.

Source: AUROC as Mann and Whitney's U over the number of pairs (Hanley and McNeil 1982, section 2).
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safeglasses.errors import SafeglassesError

Keys = np.ndarray[tuple[int, int], np.dtype[Any]]

_INTEGER = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F80_0000),
    torch.float64: (torch.int64, 0x7FF0_0000_0000_0000),
}
"""Per float type the integer of its width, and the bits of infinity: NaN has larger ones."""
_BLOCK = 2**19
"""Bytes of keys in a block of neurons; with its temporaries it stays in a core's second-level cache."""
_WINDOW = 128
"""Keys that a vector sort holds in registers, for every width of key and vector."""


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
    integer, infinity = _INTEGER[values.dtype]
    bits = values.view(integer).numpy()
    neurons, n = bits.shape
    height = max(16, _BLOCK // (n * bits.itemsize))
    wins = np.empty(neurons, np.int64)
    np.empty(16 * _BLOCK, np.uint8)  # freed at once: from then on glibc keeps temporaries, not unmaps them

    def work(start: int) -> None:
        block = bits[start : start + height]
        if not block.flags.c_contiguous:
            block = block.copy(order="K")  # whole cache lines at once: columns may lie a power of two apart
            block = np.ascontiguousarray(block)
        wins[start : start + height] = _block_wins(block, labels, infinity, start)

    starts = range(0, neurons, height)
    workers = min(torch.get_num_threads(), len(starts))
    if workers <= 1:
        for start in starts:
            work(start)
    else:
        with ThreadPoolExecutor(workers) as pool:  # numpy lets go of the interpreter while it sorts
            for _ in pool.map(work, starts):
                pass
    return wins


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
        _raise_nan(first + int((high > infinity).argmax()))
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
    n = len(labels)
    n_pos = int(labels.sum())
    keys += keys
    keys += labels.astype(keys.dtype)
    # 16 bits: numpy's radix sort, equally fast on every processor; wider: its vector sort.
    keys.sort(axis=1, kind="stable" if keys.dtype == np.int16 else None)
    negatives_first = _sum_of_marked(keys)
    positives_first = negatives_first.copy()
    tied = np.flatnonzero(((keys[:, 1:] ^ keys[:, :-1]) == 1).any(axis=1))
    if tied.size:
        keys = keys[tied].astype(np.promote_types(keys.dtype, np.int32), copy=False)
        _flip_ties(keys)
        positives_first[tied] = n * (n - 1) // 2 - _sum_of_marked(keys)
    return negatives_first + positives_first - n_pos * (n_pos - 1)


def _flip_ties(keys: Keys) -> None:
    """Flip the label bit of sorted keys and sort them again, which moves none out of its tie.

    Rows without long ties are sorted in windows, twice, the second time across the borders of the first:
    numpy sorts so few integers several times faster, in registers.
    """
    half = _WINDOW // 2
    long = ((keys[:, half:] ^ keys[:, :-half]) >> 1 == 0).any(axis=1)
    keys ^= 1
    for offset in (0, half):
        length = (keys.shape[1] - offset) // _WINDOW * _WINDOW
        windows = keys[:, offset : offset + length].reshape(len(keys), -1, _WINDOW)
        windows.sort(axis=2)
        keys[:, offset + length :].sort(axis=1)
    if long.any():
        keys[long] = np.sort(keys[long], axis=1)


def _sum_of_marked(keys: Keys) -> np.ndarray:
    """Return per row the sum of the positions whose lowest bit is set."""
    kind = np.int32 if keys.shape[1] <= 2**16 else np.int64
    marked = (keys & 1).astype(kind, copy=False)
    return np.einsum("ij,j->i", marked, np.arange(keys.shape[1], dtype=kind)).astype(np.int64)


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
    integer, infinity = _INTEGER[values.dtype]
    wide = torch.int32 if integer == torch.int16 else torch.int64
    per_value = 64  # bytes: keys, sorted keys, indices, the sort's workspace
    height = max(1, _free_bytes(values.device) // 2 // (per_value * values.shape[1]))
    for start in range(0, len(values), height):
        bits = values[start : start + height].contiguous().view(integer).to(wide)
        magnitude = bits & torch.iinfo(integer).max
        nan = (magnitude > infinity).any(dim=1)
        if nan.any():
            _raise_nan(start + int(nan.int().argmax()))
        yield torch.where(bits < 0, -magnitude, magnitude) * 2 + labels


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    return 2**30


def _raise_nan(neuron: int) -> None:
    raise SafeglassesError(
        "a value is not a number (NaN)",
        given=f"neuron {neuron}",
        do="look for overflow: load the model in bfloat16 or float32",
    )
