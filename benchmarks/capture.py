"""What watching a model costs: forward passes that pool every wanted site, over bare passes of the batch.

Every round runs the batch both ways, in turning order, up to the pooled values in main memory; figures are
medians over rounds, and the ratio is the median of each round's own, so that a machine that slows down for a
while slows both.

    python benchmarks/capture.py                 # a random LLaVA of hidden size 512, 8 layers
    python benchmarks/capture.py --miniature     # the model that ships
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from auroc import cpu
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from wearing import random_llava

from safeglasses import __version__
from safeglasses.files import write_json
from safeglasses.find.capture import pooled_pass
from safeglasses.find.pools import Pool, Window
from safeglasses.model.anatomy import anatomy
from safeglasses.model.vlm import VLM, Batch, load

AIM = 1.05
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Watched:
    """Where a recipe looks, and how it pools."""

    sites: Literal["mlp", "linears"]
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


def measure(vlm: VLM, batch: Batch, watched: Watched, *, clock: Callable[[], float], rounds: int) -> dict[str, Any]:
    """Run the rounds; the first one only warms up."""
    sites = vlm.anatomy.sites(watched.sites)
    windows = [Window.of(batch, pool, [""] * len(batch.prompt_length)) for pool in watched.pools]
    dtype = torch.float32 if any(pool.how == "mean" for pool in watched.pools) else vlm.dtype
    last = batch.inputs["input_ids"].shape[1] - 1

    def bare() -> None:
        with torch.no_grad():
            vlm.forward(batch, logits_from=last)

    def watching() -> None:
        pooled_pass(vlm, batch, windows, sites, dtype).cpu()

    times: dict[str, list[float]] = {"bare": [], "capture": []}
    for number in range(rounds + 1):
        pair = [("bare", bare), ("capture", watching)]
        for name, work in pair if number % 2 else pair[::-1]:
            start = clock()
            work()
            times[name].append(clock() - start)
    times = {name: taken[1:] for name, taken in times.items()}
    return {
        "neurons": sum(map(vlm.anatomy.width, sites)),
        "pools": [str(pool) for pool in watched.pools],
        "seconds": {name: statistics.median(taken) for name, taken in times.items()},
        "ratio": statistics.median(b / a for a, b in zip(times["bare"], times["capture"], strict=True)),
        "rounds": times,
    }


def main() -> None:
    """Measure, print a table, write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--miniature", action="store_true", help="measure the model that ships")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, default=16, help="examples per batch")
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens beside the picture's")
    parser.add_argument("--response", type=int, default=32, help="tokens of the longest response")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: the process's own, for busy machines")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    name = "miniature" if given.miniature else f"random LLaVA {given.hidden} × {given.layers}"
    if given.miniature:
        from safeglasses.data.miniature import CHECKPOINT

        vlm = load(CHECKPOINT, dtype="float32")
    else:
        vlm = random_vlm(given.hidden, given.layers)
    batch = batch_for(vlm, rows=given.rows, prompt=given.prompt, response=given.response)
    figures = {
        recipe: measure(vlm, batch, watched, clock=CLOCKS[given.clock], rounds=given.rounds)
        for recipe, watched in RECIPES.items()
    }
    tokens = batch.inputs["input_ids"].shape[1]
    print(f"{name}: {given.rows} rows of {tokens} tokens, {given.threads} thread(s), {given.clock} clock")
    print(f"{'recipe':11}{'neurons':>9}{'bare, s':>9}{'capture, s':>12}{'ratio':>8}{'aim':>7}")
    for recipe, row in figures.items():
        bare, capture = row["seconds"]["bare"], row["seconds"]["capture"]
        print(f"{recipe:11}{row['neurons']:9,}{bare:9.3f}{capture:12.3f}{row['ratio']:8.3f}{AIM:7.2f}")
    if given.out is not None:
        write_json(
            given.out,
            {
                "benchmark": "capture",
                "date": datetime.now(UTC).date().isoformat(),
                "machine": {"cpu": cpu(), "system": platform.system(), "threads": given.threads},
                "versions": {
                    "safeglasses": __version__,
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                },
                "model": name,
                "setting": {n: getattr(given, n) for n in ("rounds", "rows", "prompt", "response", "clock")},
                "aim": AIM,
                "recipes": figures,
            },
        )


if __name__ == "__main__":
    main()
