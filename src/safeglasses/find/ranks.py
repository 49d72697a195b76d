"""Exact AUROC of every neuron, from all values at once."""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from safeglasses.errors import SafeglassesError
from safeglasses.find.auroc import auroc_rows
from safeglasses.find.blocks import check_fit, check_shape, nan_error
from safeglasses.find.statistic import HALF_A, LEFT_OUT, TOXIC, Columns, Samples

_CHUNK = 2**27
"""Bytes of values that are put side by side at a time where blocks or left-out samples call for a copy."""


class Ranks:
    """Exact AUROC, a `Statistic`; it keeps the batches that it is given, without copying them.

    Columns: ``auroc`` (toxic = positive) and ``null``, the AUROC of one random half of the non-toxic samples
    against the other, which shows what pure noise looks like in these data. Both are 0.5 where a class is
    missing in a pool. Neither depends on the order of samples, not even in its last bit.
    """

    def __init__(self) -> None:
        self._blocks: list[tuple[Tensor, Samples]] = []

    @property
    def _shape(self) -> tuple[int, int] | None:
        return (self._blocks[0][0].shape[0], self._blocks[0][0].shape[1]) if self._blocks else None

    def add(self, values: Float[Tensor, "pool neuron sample"], samples: Samples) -> None:
        """Keep a batch; it must not be written to before `finish`, which is where a NaN is noticed.

        Raises:
            SafeglassesError: the shapes do not fit.
        """
        check_fit(values, samples, self._shape)
        self._blocks.append((values.detach(), samples))

    def merge(self, other: "Ranks") -> None:
        """Keep another's batches too.

        Raises:
            SafeglassesError: it has seen other pools or neurons.
        """
        if other._shape is not None:
            check_shape(other._shape, self._shape)
        self._blocks += other._blocks

    def finish(self) -> Columns:
        """Rank all values.

        Raises:
            SafeglassesError: nothing was added, or a value of a counted sample is NaN.
        """
        if self._shape is None:
            raise SafeglassesError("there is nothing to rank", given="no batch", expected="at least one")
        groups = torch.cat([samples.groups for _, samples in self._blocks], dim=1)
        auroc = [self._auroc(pool, row != LEFT_OUT, row == TOXIC) for pool, row in enumerate(groups)]
        null = [self._auroc(pool, row > TOXIC, row == HALF_A) for pool, row in enumerate(groups)]
        return {"auroc": torch.stack(auroc), "null": torch.stack(null)}

    def _auroc(
        self, pool: int, counted: Bool[Tensor, " sample"], positive: Bool[Tensor, " sample"]
    ) -> Float[Tensor, " neuron"]:
        labels = positive[counted]
        neurons = self._blocks[0][0].shape[1]
        if not 0 < int(labels.sum()) < len(labels):
            return torch.full((neurons,), 0.5, dtype=torch.float64)
        rated = torch.empty(neurons, dtype=torch.float64)
        for start, values in self._chunks(pool, counted):
            try:
                rated[start : start + len(values)] = auroc_rows(values, labels)
            except SafeglassesError:
                nan = values.isnan().any(dim=1)
                if nan.any():
                    raise nan_error(start + int(nan.int().argmax())) from None
                raise
        return rated

    def _chunks(
        self, pool: int, counted: Bool[Tensor, " sample"]
    ) -> Iterator[tuple[int, Float[Tensor, "some counted"]]]:
        """Yield runs of neurons with the values of counted samples: one run, and no copy, if that can be had."""
        if len(self._blocks) == 1 and bool(counted.all()):
            yield 0, self._blocks[0][0][pool]
            return
        sizes = [values.shape[2] for values, _ in self._blocks]
        parts = [
            (values[pool], None if bool(some.all()) else some.nonzero()[:, 0].to(values.device))
            for (values, _), some in zip(self._blocks, counted.split(sizes), strict=True)
            if bool(some.any())
        ]
        first = parts[0][0]
        height = max(1, _CHUNK // (int(counted.sum()) * first.element_size()))
        for start in range(0, len(first), height):
            rows = [
                values[start : start + height]
                if columns is None
                else values[start : start + height].index_select(1, columns)
                for values, columns in parts
            ]
            yield start, torch.cat(rows, dim=1) if len(rows) > 1 else rows[0]
