"""Forward passes that pool every wanted site, beside bare passes of the same batch; a part of find.py."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from machine import Turns, take_turns
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from wearing import random_llava

from safeglasses.find.passes import Watch, pooled_pass
from safeglasses.find.pools import Pool
from safeglasses.find.streams import windows_of
from safeglasses.model.anatomy import anatomy
from safeglasses.model.vlm import VLM, Batch


@dataclass(frozen=True)
class Watched:
    """Where a recipe looks, and how it pools."""

    sites: Literal["mlp", "linears", "neurons"]
    pools: tuple[Pool, ...]


RECIPES = {
    "aura": Watched("mlp", (Pool("all", "max"),)),
    "sgm": Watched("linears", (Pool("prompt", "last"), Pool("response", "max"))),
    "sgm-early": Watched("mlp", (Pool("all", "mean"),)),
}


def random_vlm(hidden: int, layers: int) -> VLM:
    """A random LLaVA whose tokenizer is never asked for anything."""
    model = random_llava(hidden, layers)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"x": 0}, "x")),
        eos_token="x",  # noqa: S106
    )
    return VLM(model, tokenizer, anatomy(model), "random")


def batch_for(vlm: VLM, *, rows: int, prompt: int, response: int) -> Batch:
    """One picture, a prompt and a response per row; rows differ by half a response, as similar lengths do."""
    generator = torch.Generator().manual_seed(1)
    config: Any = vlm.model.config
    size = config.vision_config.image_size
    image = (size // config.vision_config.patch_size) ** 2
    width = image + prompt + response
    lengths = torch.linspace(width - response // 2, width, rows).long()
    column = torch.arange(width).expand(rows, width)
    ids = torch.randint(10, 400, (rows, width), generator=generator)
    ids[:, :image] = config.image_token_id
    attention = column < lengths[:, None]
    return Batch(
        inputs={
            "input_ids": ids,
            "attention_mask": attention.long(),
            "pixel_values": torch.randn(rows, 3, size, size, generator=generator).to(vlm.dtype),
        },
        prompt_length=torch.full((rows,), image + prompt),
        prompt_mask=column < image + prompt,
        response_mask=attention & (column >= image + prompt),
        image_mask=column < image,
    )


def measure(
    vlm: VLM, batch: Batch, watched: Watched, *, clock: Callable[[], float], rounds: int, whole: bool = False
) -> Turns:
    """Time ``bare`` and ``capture``, up to the pooled values in main memory; also ``whole``, if asked.

    The bare pass computes logits of the last token only. Capture stops behind the last site, as all passes of
    a run do but the first; ``whole`` is that first one.
    """
    sites = vlm.anatomy.sites(watched.sites)
    watch = Watch.on(vlm, sites, watched.pools)
    windows = windows_of(batch, watched.pools, {"decoder"}, [""] * len(batch.prompt_length))
    last = batch.ids.shape[1] - 1

    def bare() -> None:
        with torch.no_grad():
            vlm.forward(batch, logits_from=last)

    def capture() -> None:
        pooled_pass(vlm, batch, windows, watch, whole=False)[0].cpu()

    def to_the_end() -> None:
        pooled_pass(vlm, batch, windows, watch, whole=True)[0].cpu()

    works = {"bare": bare, "capture": capture} | ({"whole": to_the_end} if whole else {})
    return take_turns(works, clock=clock, rounds=rounds)
