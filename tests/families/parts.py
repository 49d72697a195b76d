"""What the families are built from."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from transformers.processing_utils import ProcessorMixin
from transformers.utils import is_torchvision_available

from safeglasses.model import processors

VOCAB = 400
SIZE = {"height": 24, "width": 24}
MROPE = {"rope_type": "default", "type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
IMAGE = {"image_token": "<image>"}


@dataclass(frozen=True)
class Family:
    """What differs between families."""

    config: Callable[[dict[str, int]], Any]
    """Builds the config from the ids of the special tokens."""
    model: str
    """Class name of the model."""
    processor: Callable[[Any], ProcessorMixin] | None = None
    """Builds the processor around a tokenizer; None: text-only."""
    tokens: tuple[str, ...] = ()
    """Further special tokens."""
    named: dict[str, str] = field(default_factory=dict)
    """Named special tokens of the tokenizer (``image_token`` …)."""
    image: str = ""
    """What the chat template writes for a picture."""
    video: str = ""
    """What it writes for a video; nothing: the family takes none, as far as the tests go."""
    pictures: tuple[int, ...] = (0, 1, 2)
    """How many pictures one chat may hold, as far as the tests go."""


def get(path: str) -> Any:
    """Import ``llava.LlavaConfig`` from transformers' models without the rest of transformers."""
    package, name = path.split(".")
    return getattr(importlib.import_module("." + package, "transformers.models"), name)


def pil(package: str, name: str) -> Any:
    return getattr(importlib.import_module(f"transformers.models.{package}.image_processing_pil_{package}"), name)


def with_video(path: str, package: str, name: str, **options: Any) -> Any:
    """Return what makes a processor with its video half; without that half where there is no torchvision.

    Args:
        path: the processor's class.
        package: where the class of its video processor is.
        name: what that is called.
        options: what it is made with.
    """
    if not is_torchvision_available():
        return processors.without_video(get(path))
    module = importlib.import_module(f"transformers.models.{package}.video_processing_{package}")
    return partial(get(path), video_processor=getattr(module, name)(**options))


def text(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def vision(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 24,
        "patch_size": 8,
        **more,
    }
