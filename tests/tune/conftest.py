"""Neurons and examples to tune tiny models with."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import families
from safeglasses.data.examples import Example, Picture, Text, Turn
from safeglasses.find.selection import Selection
from safeglasses.model.vlm import VLM, load

ANSWERS = ("I cannot help with that", "a red dog", "the blue cat on a green chair", "sorry I cannot help")


def neurons_of(vlm: VLM, *, share: float = 0.2, seed: int = 0) -> Selection:
    """Some neurons of every layer, at least one."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for site in vlm.anatomy.sites("neurons"):
        scores = torch.rand(vlm.anatomy.width(site), generator=generator)
        masks[site] = scores <= scores.sort().values[max(int(share * len(scores)) - 1, 0)]
    return Selection(masks)


def precise_of(folder: Path) -> VLM:
    """A mixture of experts in float64, where rounding cannot hide a difference; grouped products have no such type."""
    vlm = load(folder, dtype=torch.float64)
    vlm.model.set_experts_implementation("eager")
    return vlm


def examples_of(vlm: VLM, n: int = 8, *, seed: int = 0) -> list[Example]:
    """Half of them with a picture, where the model takes one; answers of different lengths."""
    return [
        Example(
            id=f"e{seed}-{i}",
            messages=(Turn("user", (*_picture(i, vlm), Text("what is " * (i % 3 + 1) + "this"))),),
            response=ANSWERS[(i + seed) % len(ANSWERS)],
            label="non-toxic",
        )
        for i in range(n)
    ]


def _picture(index: int, vlm: VLM) -> tuple[Picture, ...]:
    if index % 2 or not vlm.is_multimodal:
        return ()
    buffer = io.BytesIO()
    families.picture(24, 24, seed=index).save(buffer, "PNG")
    return (Picture(data=buffer.getvalue()),)


@pytest.fixture
def precise(tiny: Path) -> VLM:
    """The tiny llava in float64, where rounding cannot hide a difference."""
    return load(tiny, dtype=torch.float64)


@pytest.fixture
def fresh(tiny: Path) -> Callable[[], VLM]:
    """Load the tiny llava anew."""
    return lambda: load(tiny)
