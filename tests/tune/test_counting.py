"""Counts from shapes alone, and against what is really trained and changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlavaOnevisionConfig, MllamaConfig, PreTrainedConfig, Qwen3VLConfig

from safeglasses.errors import SafeglassesError
from safeglasses.model.architectures import on_meta
from safeglasses.model.vlm import VLM
from safeglasses.tune.config import TuneConfig
from safeglasses.tune.counting import count
from safeglasses.tune.training import tune
from tune.conftest import examples_of, neurons_of

QWEN3_8B = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_11B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 40,
    "num_attention_heads": 32, "num_key_value_heads": 8, "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
    "tie_word_embeddings": False,
}  # fmt: skip
SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "Qwen3-VL-8B": lambda: Qwen3VLConfig(
        text_config=QWEN3_8B,
        vision_config={"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "out_hidden_size": 4096},
        tie_word_embeddings=False,
    ),
    "Llama-3.2-11B-Vision": lambda: MllamaConfig(
        text_config=LLAMA_11B,
        vision_config={"hidden_size": 1280, "vision_output_dim": 7680, "image_size": 560, "max_num_tiles": 4},
    ),
    "LLaVA-OneVision-1.5-8B": lambda: LlavaOnevisionConfig(
        text_config={"model_type": "qwen3", **QWEN3_8B},
        vision_config={
            "model_type": "siglip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
            "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 560, "patch_size": 14,
        },
        tie_word_embeddings=False,
    ),
}  # fmt: skip
BILLIONS = {"Qwen3-VL-8B": 8.8, "Llama-3.2-11B-Vision": 10.7, "LLaVA-OneVision-1.5-8B": 8.5}


@pytest.mark.parametrize("name", SHAPES)
def test_the_papers_shares_come_out_of_the_shapes(name: str) -> None:
    model = on_meta(SHAPES[name]())
    plain = count(model, 0.014, mode="plain", config=TuneConfig(plain_rank=8), cross_attention=True)
    masked = count(model, 0.014, cross_attention=True)
    assert round(plain.model_parameters / 1e9, 1) == BILLIONS[name]
    assert f"{plain.trainable_share:.2%}" == "0.11%"
    assert f"{masked.trainable_share:.2%}" == "0.03%"
    assert masked.touched_share == pytest.approx(0.006, abs=0.0003)
    rows = count(model, 0.014, mode="rows", cross_attention=True)
    assert rows.optimiser_parameters == rows.touched_weights == masked.touched_weights
    matched = count(model, 0.014, mode="plain", cross_attention=True)
    assert matched.optimiser_parameters == pytest.approx(masked.optimiser_parameters, rel=0.01)
    if name == "Llama-3.2-11B-Vision":
        assert f"{count(model, 0.014).trainable_share:.3%}" == "0.021%"
    if name == "Qwen3-VL-8B":
        shares = [count(model, share).trainable_share for share in (0.002, 0.099)]
        assert {f"{share:.2%}" for share in shares} == {"0.03%"}


@pytest.mark.parametrize("mode", ["lora", "rows", "plain"])
def test_counts_are_what_is_trained_and_changed(mode: Any, fresh: Callable[[], VLM]) -> None:
    vlm = fresh()
    neurons = neurons_of(vlm)
    config = TuneConfig(rank=4, alpha=8, learning_rate=1e-2, batch=4, micro_batch=4, max_steps=3)
    shield = tune(vlm, neurons, examples_of(vlm), mode=mode, config=config)
    assert shield.counts == count(vlm.model, neurons, mode=mode, config=config)
    trained = sum(c.a.numel() + (0 if c.b is None else c.b.numel()) for c in shield.changes.values())
    changed = sum(int((change.delta() != 0).sum()) for change in shield.changes.values())
    assert shield.counts.optimiser_parameters == trained
    assert shield.counts.touched_weights == changed
    assert shield.counts.neurons == len(neurons)
    assert shield.counts.model_parameters == sum(p.numel() for p in vlm.model.parameters())
    if mode == "plain":
        other = count(vlm.model, neurons, config=config).optimiser_parameters
        assert abs(trained - other) <= sum(map(sum, [(32, 48)]))  # one rank of one map


def test_shares_of_nothing_are_refused(tiny_vlm: VLM) -> None:
    with pytest.raises(SafeglassesError, match="no such number of neurons"):
        count(tiny_vlm.model, 0.0)
    assert count(tiny_vlm.model, 3).neurons == 6
    assert count(tiny_vlm.model, 1.0, mode="rows").touched_share < 1
    assert torch.get_default_device().type == "cpu"
