"""Types by name: their configs, and shapes of real architectures that the tiny families lack."""

import pytest
from torch import nn
from transformers import AutoConfig, LlamaConfig

from safeglasses.errors import SafeglassesError
from safeglasses.model.anatomy import Anatomy, anatomy
from safeglasses.model.architectures import config_of, entry, is_type, on_meta, picture_tokens, picture_types
from safeglasses.model.sites import Site

TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
ROUTED = {"intermediate_size": 48, "num_key_value_heads": 2}


def of_text(model_type: str, **given: object) -> Anatomy:
    return anatomy(on_meta(AutoConfig.for_model(model_type, **{**TEXT, **given})))


def test_types() -> None:
    assert len(picture_types()) >= 90
    assert is_type("llava")
    assert is_type("opt")
    assert not is_type("llava/llava")
    assert config_of("aya_vision")[1].startswith("the default vision config has 14 heads")
    assert config_of("llava")[1] == ""
    assert picture_tokens(LlamaConfig()) == "no pictures"


def test_unknown_type() -> None:
    with pytest.raises(SafeglassesError) as caught:
        entry("no_such_type")
    assert caught.value.what == "no such type of model"
    assert caught.value.given == "'no_such_type'"


def test_a_model_that_writes_no_text() -> None:
    with pytest.raises(SafeglassesError, match="not a model that writes text"):
        on_meta(AutoConfig.for_model("clip_vision_model"))


def test_parallel_attention_and_feed_forward() -> None:
    found = of_text("phi", **ROUTED)
    assert found.mlp == tuple(f"layers.{layer}.mlp.{name}" for layer in range(2) for name in ("fc1", "fc2"))
    assert of_text("gpt_neox", intermediate_size=48).ffn == ("layers.0.mlp.dense_4h_to_h", "layers.1.mlp.dense_4h_to_h")


def test_widths_differ_between_layers() -> None:
    given = {"head_dim": 8, "num_key_value_heads": 2, "num_kv_shared_layers": 0}
    found = of_text("gemma3n_text", intermediate_size=[48, 64], **given)
    assert [found.width(site) for site in found.sites("neurons")] == [48, 64]
    assert {site.kind for site in found.sites("neurons")} == {"mlp.down_proj:in"}  # not Laurel, not per-layer inputs


def test_interleaved_transposed_experts_with_biases() -> None:
    found = of_text("gpt_oss", **ROUTED, num_local_experts=4, num_experts_per_tok=2, head_dim=8)
    (first, _) = found.experts.values()
    assert (first.interleaved, first.transposed, first.biased, first.dispatched) == (True, True, True, True)
    assert (first.n_experts, first.width, first.hidden) == (4, 48, 32)
    assert found.sites("neurons")[0] == Site("layers.0.mlp.experts.0", "in")


def test_experts_beside_a_dense_block() -> None:
    found = of_text(
        "deepseek_v3", **ROUTED, moe_intermediate_size=16, n_routed_experts=4, n_shared_experts=1,
        first_k_dense_replace=1, num_experts_per_tok=2, n_group=1, topk_group=1,
    )  # fmt: skip
    assert found.ffn == ("layers.0.mlp.down_proj", "layers.1.mlp.shared_experts.down_proj")
    assert list(found.experts) == ["layers.1.mlp.experts"]
    assert [str(site) for site in found.sites("neurons")] == [
        "layers.0.mlp.down_proj:in",
        "layers.1.mlp.shared_experts.down_proj:in",
        *(f"layers.1.mlp.experts.{expert}:in" for expert in range(4)),
    ]


def test_hybrids_of_linear_attention() -> None:
    found = of_text("qwen3_5_text", **ROUTED, head_dim=8, layer_types=["linear_attention", "full_attention"])
    assert found.ffn == ("layers.0.mlp.down_proj", "layers.1.mlp.down_proj")
    assert any(".linear_attn." in path for path in found.linears)


def test_an_encoder_beside_the_decoder_is_not_taken_for_it() -> None:
    found = entry("florence2")
    assert isinstance(found.model, nn.Module)
    assert found.anatomy is not None
    assert found.anatomy.layers_path == "decoder.layers"
    assert found.anatomy.beside == {"encoder.layers": 12}
    assert len(found.anatomy.cross_attention_keys) == 24
    assert not {site.path for site in found.anatomy.sites("linears")} & set(found.anatomy.cross_attention_keys)
