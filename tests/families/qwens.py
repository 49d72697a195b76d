"""Qwen-VL and GLM-4V: rotary positions in three axes."""

from collections.abc import Callable
from typing import Any

from transformers.processing_utils import ProcessorMixin

from families.parts import MROPE, Family, get, pil, text, with_video

_QWEN = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
_QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>")
_GLM_TOKENS = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")


def qwen_ids(ids: dict[str, int]) -> dict[str, int]:
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }


def _qwen2_vl(ids: dict[str, int]) -> Any:
    return get("qwen2_vl.Qwen2VLConfig")(
        text_config=text(rope_parameters=MROPE),
        vision_config={
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "patch_size": 4,
            "mlp_ratio": 2,
        },
        tie_word_embeddings=False,
        **qwen_ids(ids),
    )


def _qwen2_5_vl(ids: dict[str, int]) -> Any:
    return get("qwen2_5_vl.Qwen2_5_VLConfig")(
        text_config=text(rope_parameters=MROPE),
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 4,
            "window_size": 16,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
        tie_word_embeddings=False,
        **qwen_ids(ids),
    )


def qwen3_vision() -> dict[str, Any]:
    return {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }


def _qwen3_vl(ids: dict[str, int]) -> Any:
    return get("qwen3_vl.Qwen3VLConfig")(
        text_config=text(rope_parameters=MROPE, head_dim=8),
        vision_config=qwen3_vision(),
        tie_word_embeddings=False,
        **qwen_ids(ids),
    )


def _qwen3_5(ids: dict[str, int]) -> Any:
    """One layer of linear attention, one of full."""
    heads = {f"linear_{name}": 8 for name in ("key_head_dim", "value_head_dim")}
    heads |= {f"linear_num_{name}_heads": 2 for name in ("key", "value")}
    tower = qwen3_vision()
    del tower["deepstack_visual_indexes"]
    return get("qwen3_5.Qwen3_5Config")(
        text_config=text(
            head_dim=8,
            layer_types=["linear_attention", "full_attention"],
            rope_parameters={**MROPE, "partial_rotary_factor": 1.0},
            **heads,
        ),
        vision_config=tower,
        tie_word_embeddings=False,
        **qwen_ids(ids),
    )


def _qwen_processor(path: str) -> Callable[[Any], ProcessorMixin]:
    images = pil("qwen2_vl", "Qwen2VLImageProcessorPil")(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024)
    third = "qwen3" in path
    package, name = ("qwen3_vl", "Qwen3VLVideoProcessor") if third else ("qwen2_vl", "Qwen2VLVideoProcessor")
    size = {"shortest_edge": 64, "longest_edge": 4096 if third else 1024}  # of all frames together, or of one
    more = {"cap_pixels_per_frame": False}

    def build(tokenizer: Any) -> ProcessorMixin:
        whole = with_video(path, package, name, patch_size=4, merge_size=2, size=size, **more)
        return whole(image_processor=images, tokenizer=tokenizer)

    return build


def _glm4v(ids: dict[str, int]) -> Any:
    return get("glm4v.Glm4vConfig")(
        text_config=text(rope_parameters={**MROPE, "partial_rotary_factor": 1.0}),
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "num_heads": 2,
            "image_size": 24,
            "patch_size": 4,
            "out_hidden_size": 32,
            "intermediate_size": 24,
        },
        image_token_id=ids["<|image|>"],
        video_token_id=ids["<|video|>"],
        image_start_token_id=ids["<|begin_of_image|>"],
        image_end_token_id=ids["<|end_of_image|>"],
        video_start_token_id=ids["<|begin_of_video|>"],
        video_end_token_id=ids["<|end_of_video|>"],
        tie_word_embeddings=False,
    )


def _glm4v_processor(tokenizer: Any) -> ProcessorMixin:
    images = pil("glm4v", "Glm4vImageProcessorPil")(
        patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 2048}
    )
    size = {"shortest_edge": 64, "longest_edge": 4096}
    whole = with_video("glm4v.Glm4vProcessor", "glm4v", "Glm4vVideoProcessor", patch_size=4, merge_size=2, size=size)
    return whole(image_processor=images, tokenizer=tokenizer)


def _glm46v(ids: dict[str, int]) -> Any:
    like = _glm4v(ids).to_dict()
    return get("glm46v.Glm46VConfig")(**{name: value for name, value in like.items() if name != "model_type"})


def _glm46v_processor(tokenizer: Any) -> ProcessorMixin:
    images = pil("glm46v", "Glm46VImageProcessorPil")(
        patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 2048}
    )
    size = {"shortest_edge": 64, "longest_edge": 4096}
    whole = with_video(
        "glm46v.Glm46VProcessor", "glm46v", "Glm46VVideoProcessor", patch_size=4, merge_size=2, size=size
    )
    return whole(image_processor=images, tokenizer=tokenizer)


SPECS: dict[str, Family] = {
    **{
        package: Family(
            config,
            f"{stem}ForConditionalGeneration",
            _qwen_processor(processor),
            tokens=_QWEN_TOKENS,
            named=_QWEN,
            image="<|vision_start|><|image_pad|><|vision_end|>",
            video="<|vision_start|><|video_pad|><|vision_end|>",
        )
        for package, stem, config, processor in (
            ("qwen2_vl", "Qwen2VL", _qwen2_vl, "qwen2_vl.Qwen2VLProcessor"),
            ("qwen2_5_vl", "Qwen2_5_VL", _qwen2_5_vl, "qwen2_5_vl.Qwen2_5_VLProcessor"),
            ("qwen3_vl", "Qwen3VL", _qwen3_vl, "qwen3_vl.Qwen3VLProcessor"),
            ("qwen3_5", "Qwen3_5", _qwen3_5, "qwen3_vl.Qwen3VLProcessor"),
        )
    },
    "glm4v": Family(
        _glm4v,
        "Glm4vForConditionalGeneration",
        _glm4v_processor,
        tokens=_GLM_TOKENS,
        named={"image_token": "<|image|>", "video_token": "<|video|>"},
        image="<|begin_of_image|><|image|><|end_of_image|>",
        video="<|begin_of_video|><|video|><|end_of_video|>",
    ),
    "glm46v": Family(
        _glm46v,
        "Glm46VForConditionalGeneration",
        _glm46v_processor,
        tokens=_GLM_TOKENS,
        named={"image_token": "<|image|>", "video_token": "<|video|>"},
        image="<|begin_of_image|><|image|><|end_of_image|>",
        video="<|begin_of_video|><|video|><|end_of_video|>",
    ),
}
