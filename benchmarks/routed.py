"""What finding neurons of fused experts costs over a bare forward pass of the same batch: one table, one machine.

Random mixtures of experts of Qwen3's making, in float32 and bfloat16. The bare pass runs the experts as transformers
does by default; capture runs them through our entry in its interface, and pools what every expert was sent. Both take
turns; figures are medians over rounds, and a ratio is the median of each round's own. Capture stops behind the last
site, which saves a part of the last of few layers; so there is also a pass to the end, as the first of every run.

    python benchmarks/routed.py --out benchmarks/results/routed.json
"""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from capturing import Watched, measure
from machine import CLOCKS, others_share, record
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from safeglasses.files import write_json
from safeglasses.find.pools import Pool
from safeglasses.model.anatomy import anatomy
from safeglasses.model.chat import Batch
from safeglasses.model.vlm import VLM

AIM = 1.15
RECIPES = {
    "neurons, last + max": Watched("neurons", (Pool("prompt", "last"), Pool("response", "max"))),
    "aura: gate, up, out, max": Watched("mlp", (Pool("all", "max"),)),
}


@dataclass(frozen=True)
class Shape:
    """A mixture's size."""

    hidden: int
    width: int
    experts: int
    chosen: int
    layers: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """For the table."""
        kind = str(self.dtype).removeprefix("torch.")
        experts = f"{self.experts} × {self.width}, {self.chosen} a token"
        return f"hidden {self.hidden:,}, {experts}, {self.layers} layers, {kind}"


SHAPES = (
    Shape(2048, 768, 32, 8, 2, torch.float32),  # Qwen3-VL-30B-A3B's, a quarter of its experts, two of its 48 layers
    Shape(2048, 768, 32, 8, 2, torch.bfloat16),
    Shape(512, 256, 32, 4, 4, torch.float32),
)


def random_mixture(shape: Shape) -> VLM:
    """A model with random weights whose tokenizer is never asked for anything."""
    torch.manual_seed(0)
    make: Any = Qwen3MoeConfig
    config = make(
        vocab_size=4096,
        hidden_size=shape.hidden,
        intermediate_size=shape.hidden,
        moe_intermediate_size=shape.width,
        num_experts=shape.experts,
        num_experts_per_tok=shape.chosen,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64,
        num_key_value_heads=shape.hidden // 256,
        head_dim=64,
    )
    model: Any = Qwen3MoeForCausalLM(config)
    model = model.to(shape.dtype).eval()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"x": 0}, "x")),
        eos_token="x",  # noqa: S106
    )
    return VLM(model, tokenizer, anatomy(model), "random")


def batch_of(rows: int, prompt: int, response: int) -> Batch:
    """A prompt and a response per row; rows differ by half a response, as similar lengths do."""
    generator = torch.Generator().manual_seed(1)
    width = prompt + response
    lengths = torch.linspace(width - response // 2, width, rows).long()
    column = torch.arange(width).expand(rows, width)
    there = column < lengths[:, None]
    return Batch(
        inputs={
            "input_ids": torch.randint(10, 4000, (rows, width), generator=generator),
            "attention_mask": there.long(),
        },
        prompt_length=torch.full((rows,), prompt),
        prompt_mask=column < prompt,
        response_mask=there & (column >= prompt),
        image_mask=torch.zeros_like(there),
    )


def main() -> None:
    """Measure, print a table, write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8, help="examples per batch")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: the process's own, for busy machines")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    share, found = others_share(), []
    batch = batch_of(given.rows, prompt=96, response=32)
    for shape in SHAPES:
        vlm = random_mixture(shape)
        for recipe, watched in RECIPES.items():
            turns = measure(vlm, batch, watched, clock=CLOCKS[given.clock], rounds=given.rounds, whole=True)
            ratios = {name: turns.ratio(name, "bare") for name in ("capture", "whole")}
            seconds = {name: turns.median(name) for name in turns.seconds}
            kind = str(shape.dtype).removeprefix("torch.")
            found.append({**asdict(shape), "dtype": kind, "recipe": recipe, "seconds": seconds, "ratios": ratios})
            met = "met" if max(ratios.values()) <= AIM else "MISSED"
            said = "".join(f"{ratio:8.3f} ×" for ratio in ratios.values())
            print(f"{shape.name:66}{recipe:26}{1000 * seconds['bare']:7.0f} ms{said}  {met}", flush=True)
    taken = share()
    print(f"aim ≤ {AIM} ×; other processes took {taken:.0%} of the processors")
    if given.out is not None:
        setting = {n: getattr(given, n) for n in ("rounds", "rows", "clock")}
        head = record("routed", ["transformers"], **setting)
        write_json(given.out, {**head, "others_share_of_cpu": taken, "aim": AIM, "capture": found})


if __name__ == "__main__":
    main()
