"""A step of every mode on every family: what is worn is what is folded, and the base does not move."""

from pathlib import Path
from typing import Any

import pytest
import torch

import families
from safeglasses.find.selection import Selection
from safeglasses.model.vlm import load
from safeglasses.tune.config import TuneConfig
from safeglasses.tune.training import tune
from tune.conftest import examples_of, neurons_of

CONFIG = TuneConfig(rank=2, alpha=4, learning_rate=3e-2, batch=2, micro_batch=2, max_steps=2, warmup=0.0)
_PICTURED = [name for name, counts in families.PICTURES.items() if counts and 0 not in counts]
DENSE = [n for n in families.FAMILIES if n not in (*families.MIXTURES, *_PICTURED, "llava", "gpt2")]


@pytest.mark.parametrize("family", DENSE)
def test_every_dense_family_can_be_tuned(family: str, tmp_path: Path) -> None:
    vlm = load(families.build(family, tmp_path / family))
    crossing = set(getattr(vlm.model.config.get_text_config(decoder=True), "cross_attention_layers", None) or ())
    neurons = Selection({s: mask for s, mask in neurons_of(vlm).masks.items() if s.layer not in crossing})
    examples = examples_of(vlm, 4)
    before = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    mode: Any = "lora" if len(family) % 2 else "rows"
    shield = tune(vlm, neurons, examples, mode=mode, config=CONFIG)
    assert all(torch.equal(value, before[name]) for name, value in vlm.model.state_dict().items())
    batch = vlm.encode([example.chat() for example in examples[1::2]])
    with torch.no_grad():
        plain = vlm.forward(batch)
        with shield.worn(vlm):
            worn = vlm.forward(batch)
        shield.fold(vlm)
        assert float((worn - plain).abs().max()) > 1e-3
        torch.testing.assert_close(vlm.forward(batch), worn, rtol=0, atol=2e-4)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe"])
def test_half_precision_trains_in_float32(family: str, tmp_path: Path) -> None:
    vlm = load(families.build(family, tmp_path / "model"), dtype="bfloat16")
    shield = tune(vlm, neurons_of(vlm), examples_of(vlm), config=CONFIG)
    assert {change.a.dtype for change in shield.changes.values()} == {torch.float32}
    assert vlm.dtype == torch.bfloat16
    batch = vlm.encode([example.chat() for example in examples_of(vlm)[1::2]])
    with torch.no_grad():
        with shield.worn(vlm):
            worn = vlm.forward(batch)
        shield.fold(vlm)
        torch.testing.assert_close(vlm.forward(batch), worn, rtol=0.05, atol=0.05)


def test_gradient_checkpointing_changes_no_result(tiny: Path) -> None:
    vlm = load(tiny, dtype=torch.float64)
    found = [
        tune(vlm, neurons_of(vlm), examples_of(vlm), config=TuneConfig(**{**CONFIG.record(), **more}))
        for more in ({}, {"gradient_checkpointing": True})
    ]
    for path, change in found[0].changes.items():
        torch.testing.assert_close(found[1].changes[path].delta(), change.delta(), rtol=0, atol=1e-12)
    assert not vlm.model.is_activation_checkpointing
    assert not any(part._forward_hooks for part in vlm.model.modules())
