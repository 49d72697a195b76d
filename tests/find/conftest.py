"""Labelled examples with pictures, made on the spot."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from safeglasses.data.examples import Example, Picture, Text, Turn

WORDS = ["red", "dog", "blue", "cat", "green", "chair", "picture", "stupid", "worthless", "idiot", "kindly"]


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def example_of(seed: int, *, pictures: int = 1, response: str | None = "", split: str = "find") -> Example:
    """An example unlike the others: its picture, words and lengths come from the seed; odd ones are toxic."""
    random = np.random.default_rng(seed)
    words = [" ".join(random.choice(WORDS, random.integers(1, 9))) for _ in range(2)]
    content = (*(Picture(data=png(100 * seed + i)) for i in range(pictures)), Text(words[0]))
    return Example(
        id=f"row-{seed}",
        messages=(Turn("user", content),),
        response=words[1] if response == "" else response,
        label="toxic" if seed % 2 else "non-toxic",
        split=split,
    )


@pytest.fixture(scope="session")
def make() -> Callable[..., Example]:
    return example_of
