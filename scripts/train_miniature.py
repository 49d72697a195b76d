"""Train the miniature, the small vision-language model that ships with the package.

    python scripts/train_miniature.py               # train (goes on from --state where it exists)
    python scripts/train_miniature.py --evaluate    # measure the shipped weights, write the card

Two stages, as LLaVA was made from CLIP: first the vision tower alone learns to classify emoji, backgrounds
and places (its heads are thrown away), then everything learns end to end. Every batch of the second stage
is a function of seed and step.
"""

import argparse
import csv
import json
import logging
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from miniature_checkpoint import IMAGE_TOKENS, SPECIAL, build_model, build_processor, save_checkpoint
from safetensors import safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from safeglasses.data.miniature.world import LANGUAGES, PLACES, Scene, Task, Turn, World, load
from safeglasses.files import atomic_write_bytes

log = logging.getLogger("train_miniature")
CHECKPOINT = Path(__file__).resolve().parents[1] / "src/safeglasses/data/miniature/checkpoint"
SHARES: dict[Task, float] = {
    "describe": 0.35,
    "adversarial": 0.16,
    "picture": 0.10,
    "joint": 0.12,
    "harm": 0.09,
    "alike": 0.05,
    "check": 0.08,
    "caption": 0.05,
}
CHUNK = 8  # batches drawn at once and sorted by length, so that padding is short


@dataclass(frozen=True)
class Batch:
    """Tensors of one step of training."""

    pixels: Tensor
    """(sample, 3, height, width), in [-1, 1]."""
    ids: Tensor
    """(sample, token)."""
    mask: Tensor
    """(sample, token), 1 where a token stands."""
    labels: Tensor
    """(sample, token): the token to be predicted here, or -100."""


class Batches:
    """Draw batches of turns; the same seed and step give the same batch."""

    def __init__(self, world: World, tokenizer: PreTrainedTokenizerFast, size: int, seed: int) -> None:
        self.world, self.size, self.seed = world, size, seed
        self.tokenizer = tokenizer
        self._cache: dict[str, list[int]] = {}
        names = ("<s>", "</s>", "<pad>", "<image>", "<|user|>", "<|assistant|>")
        ids = [SPECIAL.index(name) for name in names]
        self.bos, self.eos, self.pad, self.image, self.user, self.assistant = ids

    def encode(self, text: str) -> list[int]:
        """Tokenize a text, remembering what was seen."""
        found = self._cache.get(text)
        if found is None:
            found = self.tokenizer.encode(text, add_special_tokens=False)
            if len(self._cache) < 200_000:
                self._cache[text] = found
        return found

    def from_step(self, step: int) -> Iterator[Batch]:
        """Yield batches from a step on."""
        chunk = step // CHUNK
        skip = step % CHUNK
        while True:
            rng = random.Random(f"{self.seed}-{chunk}")
            tasks = rng.choices(list(SHARES), list(SHARES.values()), k=self.size * CHUNK)
            turns = [self.world.turn(task, rng.choice(LANGUAGES), rng) for task in tasks]
            coded = sorted((self._sequence(turn) for turn in turns), key=lambda c: len(c[0]) + len(c[1]))
            batches = [coded[i : i + self.size] for i in range(0, len(coded), self.size)]
            rng.shuffle(batches)
            for batch in batches[skip:]:
                yield self._tensors(batch)
            chunk, skip = chunk + 1, 0

    def _sequence(self, turn: Turn) -> tuple[list[int], list[int], Scene]:
        prompt = [
            self.bos,
            self.user,
            *[self.image] * IMAGE_TOKENS,
            *self.encode(turn.prompt),
            self.assistant,
        ]
        return prompt, [*self.encode(turn.response), self.eos], turn.scene

    def _tensors(self, coded: list[tuple[list[int], list[int], Scene]]) -> Batch:
        longest = max(len(p) + len(a) for p, a, _ in coded)
        ids = np.full((len(coded), longest), self.pad)
        mask = np.zeros((len(coded), longest), dtype=np.int64)
        labels = np.full((len(coded), longest), -100)
        for row, (prompt, answer, _) in enumerate(coded):
            end = len(prompt) + len(answer)
            ids[row, :end] = prompt + answer
            mask[row, :end] = 1
            labels[row, len(prompt) - 1 : end - 1] = answer
        pixels = pixels_of(self.world, [scene for _, _, scene in coded])
        return Batch(pixels, torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(labels))


def pixels_of(world: World, scenes: list[Scene]) -> Tensor:
    """Draw scenes as the image processor would hand them over."""
    drawn = np.stack([world.draw(scene) for scene in scenes])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def answer_loss(model: LlavaForConditionalGeneration, batch: Batch) -> Tensor:
    """Cross-entropy of the answers; only their positions pass through the head."""
    hidden = model.model(
        input_ids=batch.ids, attention_mask=batch.mask, pixel_values=batch.pixels, use_cache=False
    ).last_hidden_state
    wanted = batch.labels != -100
    logits = model.lm_head(hidden[wanted])
    return nn.functional.cross_entropy(logits.float(), batch.labels[wanted])


def rate_at(step: int, cycles: Sequence[int], top: float) -> float:
    """Learning rate: a cosine to 2 % per cycle, with a short warm-up; from the second on half as high.

    Warm restarts are those of SGDR (Loshchilov and Hutter, 2017).
    """
    cycle = 0
    while cycle + 1 < len(cycles) and step >= cycles[cycle]:
        step -= cycles[cycle]
        cycle += 1
    top = top / 2 if cycle else top
    if step < 200:
        return top * (step + 1) / 200
    share = min(1.0, (step - 200) / max(1, cycles[cycle] - 200))
    return top * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))


def train_tower(model: LlavaForConditionalGeneration, world: World, steps: int, seed: int) -> None:
    """Teach the vision tower alone to classify emoji, background and place."""
    tower = model.model.vision_tower
    width = tower.config.hidden_size
    counts = (len(world.emoji), len(world.palette), len(PLACES))
    heads = nn.ModuleList([nn.Linear(width, count) for count in counts])
    optimizer = torch.optim.AdamW([*tower.parameters(), *heads.parameters()], lr=1e-3, weight_decay=0.02)
    rng = random.Random(f"tower-{seed}")
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1, (step + 1) / 100) * max(0.03, 1 - step / steps)
        scenes = [world.scene(rng) for _ in range(128)]
        hidden = tower(pixel_values=pixels_of(world, scenes)).last_hidden_state[:, 1:].mean(1)
        wanted = torch.tensor([(s.emoji, s.color, s.place) for s in scenes])
        outs = [head(hidden) for head in heads]
        loss = torch.stack([nn.functional.cross_entropy(o, wanted[:, i]) for i, o in enumerate(outs)]).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            right = [(out.argmax(1) == wanted[:, i]).float().mean().item() for i, out in enumerate(outs)]
            log.info("tower %5d  loss %.3f  right %s", step, loss.item(), [round(r, 2) for r in right])


def train(options: argparse.Namespace) -> None:
    """Train end to end until the steps or the minutes are used up."""
    torch.manual_seed(options.seed)
    world = load()
    processor = build_processor(world, options.seed)
    model = build_model(len(processor.tokenizer))
    log.info(
        "%.2f M parameters, %d tokens",
        sum(p.numel() for p in model.parameters()) / 1e6,
        len(processor.tokenizer),
    )
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.02}, {"params": rest, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    step, before, curve = 0, 0.0, []
    options.state.mkdir(parents=True, exist_ok=True)
    if (options.state / "state.safetensors").exists():
        progress = restore(model, optimizer, options.state)
        step, before, curve = progress["step"], progress["seconds"], progress["curve"]
        log.info("going on from step %d", step)
    else:
        train_tower(model, world, options.tower_steps, options.seed)
    model.train()
    start = saved = time.monotonic()
    for batch in Batches(world, processor.tokenizer, options.batch, options.seed).from_step(step):
        spent = time.monotonic() - start + before
        if step >= sum(options.cycles) or spent > options.minutes * 60:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, options.cycles, options.rate)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            loss = answer_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            curve.append({"step": step, "seconds": round(spent, 1), "loss": round(loss.item(), 4)})
            eta = (sum(options.cycles) - step) * spent / step / 60
            log.info("step %6d/%d  loss %.3f  ETA %.1f min", step, sum(options.cycles), loss.item(), eta)
        if time.monotonic() - saved > options.save_every * 60:
            save(model, optimizer, processor, {"step": step, "seconds": spent, "curve": curve}, options)
            saved = time.monotonic()
    spent = time.monotonic() - start + before
    save(model, optimizer, processor, {"step": step, "seconds": spent, "curve": curve}, options)
    log.info("trained %d steps", step)


def restore(model: LlavaForConditionalGeneration, optimizer: torch.optim.Optimizer, folder: Path) -> dict[str, Any]:
    """Put weights and moments back as `save` left them; return the progress."""
    with safe_open(folder / "state.safetensors", "pt") as file:
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.copy_(file.get_tensor(f"model.{name}"))
        moments: dict[int, dict[str, Tensor]] = {}
        for key in file.keys():  # noqa: SIM118  (not a dict)
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                moments.setdefault(int(index), {})[name] = file.get_tensor(key)
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        return json.loads(file.metadata()["progress"])


def save(
    model: LlavaForConditionalGeneration,
    optimizer: torch.optim.Optimizer,
    processor: LlavaProcessor,
    progress: dict[str, Any],
    options: argparse.Namespace,
) -> None:
    """Save what training needs to go on, the checkpoint and the learning curve."""
    tensors = {f"model.{name}": value.detach() for name, value in model.named_parameters()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
    header = {"progress": json.dumps(progress)}  # in the same file, so that both are of one step
    atomic_write_bytes(options.state / "state.safetensors", save_tensors(tensors, header))
    save_checkpoint(model, processor, options.out)
    with (options.state / "curve.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "seconds", "loss"])
        writer.writeheader()
        writer.writerows(progress["curve"])


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cycles", type=int, nargs="+", default=[5_200, 3_500, 2_600], help="steps of the second stage, by cycle"
    )
    parser.add_argument("--minutes", type=float, default=120.0, help="stop here even if steps are left")
    parser.add_argument("--tower-steps", type=int, default=1_600, help="of the first stage")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--save-every", type=float, default=5.0, help="minutes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--state", type=Path, default=Path("build/miniature"), help="resumable state")
    parser.add_argument("--out", type=Path, default=CHECKPOINT)
    parser.add_argument("--evaluate", action="store_true", help="measure --out, write its card")
    parser.add_argument("--remark", default="", help="a sentence about the training for the card")
    return parser.parse_args()


def main() -> None:
    """Train, or measure what was trained."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    options = parse()
    torch.set_num_threads(options.threads)
    if options.evaluate:
        from miniature_card import write_card

        write_card(options.out, options.state, options.seed, options.remark)
    else:
        train(options)


if __name__ == "__main__":
    main()
