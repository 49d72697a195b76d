"""Batches of values with samples of every group, drawn by hypothesis, and ways to cut them up."""

from typing import Literal

import torch
from hypothesis import strategies as st
from torch import Tensor

from safeglasses.find.statistic import HALF_A, HALF_B, LEFT_OUT, TOXIC, Samples

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
WIDTHS: dict[torch.dtype, Literal[16, 32, 64]] = {
    torch.bfloat16: 32,
    torch.float16: 16,
    torch.float32: 32,
    torch.float64: 64,
}
FEW = [0.0, -0.0, 1.0, 1.0078125, -1.0, 6e-8, -6e-8, 1e30, float("inf"), -float("inf")]
"""Values that tie often, from every corner of the number line."""


@st.composite
def batches(draw: st.DrawFn, finite: bool = False) -> tuple[Tensor, Samples]:
    """Values ``[pool, neuron, sample]`` of any type, with ties, both zeros and (unless finite) infinities."""
    dtype = draw(st.sampled_from(FLOATS))
    pools, neurons, n = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 30))
    anything = st.floats(allow_nan=False, width=WIDTHS[dtype])
    value = draw(st.sampled_from([anything, st.sampled_from(FEW)]))
    if finite:
        value = draw(st.sampled_from([st.floats(-10, 10, width=16), st.sampled_from([0.0, 0.1, -3.0])]))
    size = pools * neurons * n
    values = torch.tensor(draw(st.lists(value, min_size=size, max_size=size)), dtype=torch.float64).to(dtype)
    group = st.sampled_from([LEFT_OUT, TOXIC, HALF_A, HALF_B])
    groups = torch.tensor(draw(st.lists(group, min_size=pools * n, max_size=pools * n)), dtype=torch.int8)
    clusters = torch.tensor(draw(st.lists(st.integers(0, n // 2), min_size=n, max_size=n)))
    return values.view(pools, neurons, n), Samples(groups.view(pools, n), clusters)


@st.composite
def cuts(draw: st.DrawFn, samples: Samples, most: int = 4) -> list[Tensor]:
    """Rows of parts that hold whole clusters, each in an order of its own; some parts may be empty."""
    part = {int(c): draw(st.integers(0, most - 1)) for c in samples.clusters.unique()}
    where = torch.tensor([part[int(c)] for c in samples.clusters])
    rows = [(where == i).nonzero()[:, 0].tolist() for i in range(most)]
    return [torch.tensor(draw(st.permutations(part)), dtype=torch.int64) for part in rows]
