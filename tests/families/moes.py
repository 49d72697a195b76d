"""Mixtures of experts that transformers keeps as 3-D parameters: plain, transposed, interleaved, by modality."""

from dataclasses import replace
from typing import Any

from transformers.processing_utils import ProcessorMixin

from families import qwens
from families.parts import IMAGE, MROPE, Family, get, pil, text, vision, with_video


def _qwen3_vl_moe(ids: dict[str, int]) -> Any:
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
    return get("qwen3_vl_moe.Qwen3VLMoeConfig")(
        text_config=text(rope_parameters=MROPE, head_dim=8, **moe),
        vision_config=qwens.qwen3_vision(),
        tie_word_embeddings=False,
        **qwens.qwen_ids(ids),
    )


def _qwen3_5_moe(ids: dict[str, int]) -> Any:
    """One layer of linear attention, one of full; a shared expert beside the fused ones."""
    like = qwens.SPECS["qwen3_vl"].config(ids)
    names = ("depth", "hidden_size", "intermediate_size", "num_heads", "patch_size", "out_hidden_size")
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    linear = {f"linear_{name}": 8 for name in ("key_head_dim", "value_head_dim")}
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "shared_expert_intermediate_size": 24}
    options = text(head_dim=8, layer_types=["linear_attention", "full_attention"], **moe, **linear, **heads)
    del options["intermediate_size"]
    return get("qwen3_5_moe.Qwen3_5MoeConfig")(
        text_config={**options, "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}},
        vision_config={name: getattr(like.vision_config, name) for name in (*names, "num_position_embeddings")},
        tie_word_embeddings=False,
        **{name: getattr(like, name) for name in ("image_token_id", "video_token_id", "vision_start_token_id")},
        vision_end_token_id=like.vision_end_token_id,
    )


def _glm4v_moe(ids: dict[str, int]) -> Any:
    """A dense layer, then one of experts with a shared one."""
    moe = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
    like = qwens.SPECS["glm4v"].config(ids)
    names = ("depth", "hidden_size", "num_heads", "image_size", "patch_size", "out_hidden_size", "intermediate_size")
    rope = {**MROPE, "partial_rotary_factor": 1.0}
    return get("glm4v_moe.Glm4vMoeConfig")(
        text_config=text(rope_parameters=rope, n_group=1, topk_group=1, **moe),
        vision_config={name: getattr(like.vision_config, name) for name in names},
        tie_word_embeddings=False,
        **{name: getattr(like, name) for name in vars(like) if name.endswith("token_id") and name[0] in "iv"},
    )


def _ernie(ids: dict[str, int]) -> Any:
    """Other experts, of another width, for the tokens of pictures."""
    moe = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [24, 12], "moe_num_shared_experts": 1}
    return get("ernie4_5_vl_moe.Ernie4_5_VLMoeConfig")(
        text_config=text(
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
            mlp_layer_types=["dense", "sparse"],
            **moe,
        ),
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_merge_size": 2,
        },
        image_start_token_id=ids["<|IMAGE_START|>"],
        image_end_token_id=ids["<|IMAGE_END|>"],
        image_token_id=ids["<|IMAGE_PLACEHOLDER|>"],
        video_start_token_id=ids["<|VIDEO_START|>"],
        video_end_token_id=ids["<|VIDEO_END|>"],
        video_token_id=ids["<|VIDEO_PLACEHOLDER|>"],
        tie_word_embeddings=False,
    )


def _ernie_processor(tokenizer: Any) -> ProcessorMixin:
    images = pil("ernie4_5_vl_moe", "Ernie4_5_VLMoeImageProcessorPil")(
        patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1024}
    )
    size = {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 1024}, "draw_on_frames": False}
    path, package, name = "ernie4_5_vl_moe.Ernie4_5_VLMoeProcessor", "ernie4_5_vl_moe", "Ernie4_5_VLMoeVideoProcessor"
    return with_video(path, package, name, **size)(image_processor=images, tokenizer=tokenizer)


def _aria(ids: dict[str, int]) -> Any:
    """Weights are kept ``[expert, in, out]``."""
    moe = {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
    return get("aria.AriaConfig")(
        text_config={"model_type": "aria_text", **text(**moe)},
        vision_config={"model_type": "idefics3_vision", **vision(image_size=980, patch_size=98)},
        projector_patch_to_query_dict={100: 4},
        image_token_index=ids["<image>"],
    )


def _aria_processor(tokenizer: Any) -> ProcessorMixin:
    images = pil("aria", "AriaImageProcessorPil")()
    return get("aria.AriaProcessor")(images, tokenizer, size_conversion={980: 4})


def _gpt_oss(ids: dict[str, int]) -> Any:
    """Gate and up outputs alternate; weights are kept ``[expert, in, out]``; biases; a clamped gate."""
    return get("gpt_oss.GptOssConfig")(**text(head_dim=8, num_local_experts=4, num_experts_per_tok=2))


SPECS: dict[str, Family] = {
    "qwen3_vl_moe": replace(qwens.SPECS["qwen3_vl"], config=_qwen3_vl_moe, model="Qwen3VLMoeForConditionalGeneration"),
    "qwen3_5_moe": replace(qwens.SPECS["qwen3_vl"], config=_qwen3_5_moe, model="Qwen3_5MoeForConditionalGeneration"),
    "glm4v_moe": replace(qwens.SPECS["glm4v"], config=_glm4v_moe, model="Glm4vMoeForConditionalGeneration"),
    "ernie4_5_vl_moe": Family(
        _ernie,
        "Ernie4_5_VLMoeForConditionalGeneration",
        _ernie_processor,
        named={
            "image_token": "<|IMAGE_PLACEHOLDER|>",
            "image_start_token": "<|IMAGE_START|>",
            "image_end_token": "<|IMAGE_END|>",
            "video_token": "<|VIDEO_PLACEHOLDER|>",
            "video_start_token": "<|VIDEO_START|>",
            "video_end_token": "<|VIDEO_END|>",
        },
        image="<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
        video="<|VIDEO_START|><|VIDEO_PLACEHOLDER|><|VIDEO_END|>",
    ),
    "aria": Family(_aria, "AriaForConditionalGeneration", _aria_processor, named=IMAGE, image="<image>"),
    "gpt_oss": Family(_gpt_oss, "GptOssForCausalLM"),
}
