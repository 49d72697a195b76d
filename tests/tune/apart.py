"""What other processes do in the tests of resuming and of several processes."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from safeglasses.model.vlm import load
from safeglasses.tune import trainer
from safeglasses.tune.config import Mode, TuneConfig
from safeglasses.tune.training import tune
from tune.conftest import examples_of, neurons_of, precise_of

CONFIG = TuneConfig(
    rank=4, alpha=8, learning_rate=1e-2, weight_decay=0.01, batch=4, micro_batch=2, max_steps=12, checkpoint_every=3
)
TOGETHER = replace(CONFIG, dropout=0.0, clip=1e-2, batch=8, max_steps=20)  # dropout differs between processes
MODES: tuple[Mode, ...] = ("lora", "rows")


def train_slowly(model: Path, out: Path) -> None:
    """Tune, with time enough to be killed on the way."""
    plain = trainer.Watch.on_step_end

    def late(self: trainer.Watch, *args: Any, **more: Any) -> None:
        time.sleep(0.3)
        plain(self, *args, **more)

    trainer.Watch.on_step_end = late
    vlm = load(model, dtype=torch.float64)
    tune(vlm, neurons_of(vlm), examples_of(vlm), config=CONFIG, out=out)


def train_together(model: Path, mixture: Path, out: Path) -> None:
    """Tune in every mode, and a mixture of experts, as one of two processes."""
    vlm = load(model, dtype=torch.float64)
    for mode in MODES:
        tune(vlm, neurons_of(vlm), examples_of(vlm), mode=mode, config=TOGETHER, out=out / mode)
        assert torch.distributed.get_world_size() == 2
    experts = precise_of(mixture)
    tune(experts, neurons_of(experts), examples_of(experts), config=TOGETHER, out=out / "experts")
    torch.distributed.destroy_process_group()
