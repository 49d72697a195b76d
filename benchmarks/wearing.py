"""What glasses cost while a model answers: worn (hooks) and folded (weights), over the model without them.

Every round generates the same answers three times, once per condition, in turning order; the figures are
medians over rounds, and the ratios are medians of each round's own ratio, so that a machine that slows down
for a while slows all three. All linear maps of the decoder are scaled: no recipe touches more.

    python benchmarks/wearing.py                 # a random LLaVA of hidden size 512, 8 layers
    python benchmarks/wearing.py --miniature     # the model that ships
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from machine import CLOCKS, record
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from safeglasses.defend.glasses import Glasses
from safeglasses.defend.weights import scale_weights
from safeglasses.files import write_json
from safeglasses.model.anatomy import anatomy
from safeglasses.model.vlm import load

AIM = {"worn": 1.05, "folded": 1.00}
IMAGE_TOKEN = 4
CONDITIONS = ("base", "worn", "folded")


def random_llava(hidden: int, layers: int) -> PreTrainedModel:
    """A LLaVA with random weights, small enough for a laptop, large enough that matrix products dominate."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=2048,
    )
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=96,
        patch_size=16,
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN, image_seq_length=36)
    return LlavaForConditionalGeneration(config).eval()


def inputs_for(model: PreTrainedModel, rows: int, prompt: int) -> dict[str, torch.Tensor]:
    """One picture and a random prompt per row."""
    generator = torch.Generator().manual_seed(1)
    config: Any = model.config
    size = config.vision_config.image_size
    pictures = (size // config.vision_config.patch_size) ** 2
    text = torch.randint(10, config.get_text_config().vocab_size, (rows, prompt), generator=generator)
    image = torch.full((rows, pictures), config.image_token_id)
    ids = torch.cat([image, text], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(rows, 3, size, size, generator=generator).to(model.dtype),
    }


def everything(model: PreTrainedModel) -> Glasses:
    """Glasses on every linear map of the decoder, most neurons changed a little."""
    generator, parts = torch.Generator().manual_seed(2), anatomy(model)
    factors = {s: 1 - 0.1 * torch.rand(parts.width(s), generator=generator) for s in parts.sites("linears")}
    return Glasses(factors, "sg1-benchmark", "benchmark")


@contextmanager
def conditions(model: PreTrainedModel) -> Iterator[dict[str, tuple[PreTrainedModel, Callable[[], Any]]]]:
    """The three conditions as a model and what to enter around generation."""
    glasses, folded = everything(model), copy.deepcopy(model)
    scale_weights(folded, anatomy(folded), glasses.effective())
    yield {
        "base": (model, nullcontext),
        "worn": (model, lambda: glasses.worn(model)),
        "folded": (folded, nullcontext),
    }


def seconds(
    clock: Callable[[], float],
    model: PreTrainedModel,
    around: AbstractContextManager,
    inputs: dict,
    tokens: int,
) -> float:
    """Time one generation; putting the glasses on is part of it."""
    generate: Any = model.generate
    start = clock()
    with around, torch.no_grad():
        generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return clock() - start


def measure(
    model: PreTrainedModel, *, clock: Callable[[], float], rounds: int, rows: int, prompt: int, tokens: int
) -> dict[str, Any]:
    """Run the rounds; the first one only warms up."""
    inputs = inputs_for(model, rows, prompt)
    times: dict[str, list[float]] = {name: [] for name in CONDITIONS}
    with conditions(model) as given:
        for number in range(rounds + 1):
            turned = CONDITIONS[number % 3 :] + CONDITIONS[: number % 3]
            taken = {name: seconds(clock, given[name][0], given[name][1](), inputs, tokens) for name in turned}
            for name in CONDITIONS if number else ():
                times[name].append(taken[name])
    ratios = {name: statistics.median(a / b for a, b in zip(times[name], times["base"], strict=True)) for name in AIM}
    return {
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "tokens_per_second": {n: rows * tokens / statistics.median(v) for n, v in times.items()},
        "ratio": ratios,
        "aim": AIM,
        "rounds": times,
    }


def main() -> None:
    """Measure, print a table, write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--miniature", action="store_true", help="measure the model that ships")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, default=4, help="answers per generation")
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens beside the picture's")
    parser.add_argument("--tokens", type=int, default=32, help="tokens per answer")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: the process's own, for busy machines")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.miniature:
        from safeglasses.data.miniature import CHECKPOINT

        model, name = load(CHECKPOINT, dtype="float32").model, "miniature"
    else:
        model, name = (
            random_llava(given.hidden, given.layers),
            f"random LLaVA {given.hidden} × {given.layers}",
        )
    setting = {n: getattr(given, n) for n in ("rounds", "rows", "prompt", "tokens")}
    figures = measure(model, clock=CLOCKS[given.clock], **setting)
    print(f"{name}: {given.rows} answers of {given.tokens} tokens, {given.rounds} rounds, {given.clock} clock")
    print(f"{'':8}{'seconds':>9}{'tokens/s':>10}{'ratio':>8}{'aim':>7}")
    for row in CONDITIONS:
        ratio = f"{figures['ratio'][row]:8.3f}{AIM[row]:7.2f}" if row in AIM else ""
        print(f"{row:8}{figures['seconds'][row]:9.3f}{figures['tokens_per_second'][row]:10.1f}{ratio}")
    if given.out is not None:
        write_json(
            given.out,
            {
                **record("wearing", **setting, clock=given.clock),
                "model": name,
                **figures,
            },
        )


if __name__ == "__main__":
    main()
