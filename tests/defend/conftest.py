"""Models to wear glasses, and glasses for them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import families
from safeglasses.defend.glasses import Glasses
from safeglasses.model.vlm import VLM, Batch, Chat, load


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (24, 24, 3), dtype=np.uint8))


def chats_for(vlm: VLM, n: int = 2) -> list[Chat]:
    texts = ["what is in the picture", "describe what you see in the green picture"]
    pictures = [[{"type": "image", "image": picture(i)}] if vlm.is_multimodal else [] for i in range(n)]
    return [
        Chat([{"role": "user", "content": [*pictures[i], {"type": "text", "text": texts[i % 2]}]}], "a red dog")
        for i in range(n)
    ]


def batch_for(vlm: VLM) -> Batch:
    return vlm.encode(chats_for(vlm))


def logits_of(vlm: VLM, batch: Batch) -> Tensor:
    with torch.no_grad():
        return vlm.forward(batch)


def glasses_for(
    vlm: VLM, *, what: str | tuple[str, ...] = "linears", seed: int = 0, share: float = 0.5, **more: object
) -> Glasses:
    """Random factors from 0 to 1.2 for a share of the neurons of a family of sites."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for site in vlm.anatomy.sites(what):
        row = 1.2 * torch.rand(vlm.anatomy.width(site), generator=generator)
        factors[site] = torch.where(torch.rand(len(row), generator=generator) < share, row, 1.0)
    return Glasses(factors, vlm.fingerprint(), "test", **more)


@pytest.fixture
def fresh(tiny: Path) -> Callable[[], VLM]:
    """Load the tiny llava anew, for tests that change it."""
    return lambda: load(tiny)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Build a family once per session."""
    made: dict[str, Path] = {}

    def build(family: str) -> Path:
        if family not in made:
            made[family] = families.build(family, tmp_path_factory.mktemp(family) / family)
        return made[family]

    return build
