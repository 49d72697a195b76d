"""What the statistics of many neurons share: blocks that stay in cache, floats as integers, two errors."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from jaxtyping import Float, Int
from torch import Tensor

from safeglasses.errors import SafeglassesError
from safeglasses.find.statistic import Samples

INTEGER = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F80_0000),
    torch.float64: (torch.int64, 0x7FF0_0000_0000_0000),
}
"""Per float type the integer of its width, and the bits of infinity: NaN has larger ones."""


def ordered(values: Float[Tensor, "neuron sample"], first: int = 0) -> Int[Tensor, "neuron sample"]:
    """Return integers in the order of the values, without gaps: the next float has the next integer, both zeros 0.

    Args:
        values: of any float type.
        first: number of the first neuron, to be named in an error.

    Raises:
        SafeglassesError: a value is NaN.
    """
    integer, infinity = INTEGER[values.dtype]
    bits = values.detach().contiguous().view(integer)
    magnitude = bits & torch.iinfo(integer).max
    nan = (magnitude > infinity).any(dim=1)
    if nan.any():
        raise nan_error(first + int(nan.int().argmax()))
    return torch.where(bits < 0, -magnitude, magnitude)


def in_blocks(work: Callable[[int, int], None], rows: int, height: int) -> None:
    """Call `work` with the bounds of each block of rows, on as many threads as torch uses."""
    starts = range(0, rows, height)
    workers = min(torch.get_num_threads(), len(starts))

    def one(start: int) -> None:
        work(start, min(start + height, rows))

    if workers <= 1:
        for start in starts:
            one(start)
        return
    with ThreadPoolExecutor(workers) as pool:  # numpy lets go of the interpreter while it sorts
        for _ in pool.map(one, starts):
            pass


def check_fit(values: Float[Tensor, "pool neuron sample"], samples: Samples, shape: tuple[int, int] | None) -> None:
    """Check that values are of these samples, and of the pools and neurons that were seen before.

    Raises:
        SafeglassesError: they are not.
    """
    pools, neurons, n = values.shape
    if tuple(samples.groups.shape) != (pools, n) or len(samples.clusters) != n:
        raise SafeglassesError(
            "the samples do not fit the values",
            given=f"groups {tuple(samples.groups.shape)} and clusters {tuple(samples.clusters.shape)}",
            expected=f"groups {(pools, n)} and clusters {(n,)} for values {tuple(values.shape)}",
        )
    check_shape((pools, neurons), shape)


def check_shape(given: tuple[int, int], expected: tuple[int, int] | None) -> None:
    """Check that pools and neurons are as many as were seen before, if any were.

    Raises:
        SafeglassesError: they are not.
    """
    if expected is not None and given != expected:
        raise SafeglassesError(
            "these are other neurons than before",
            given=f"{given[0]} pools × {given[1]} neurons",
            expected=f"{expected[0]} pools × {expected[1]} neurons",
        )


def nan_error(neuron: int) -> SafeglassesError:
    """Return the error about a value that is not a number."""
    return SafeglassesError(
        "a value is not a number (NaN)",
        given=f"neuron {neuron}",
        do="look for overflow: load the model in bfloat16 or float32",
    )
