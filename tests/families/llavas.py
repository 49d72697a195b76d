"""LLaVA and the families made like it."""

from typing import Any

from transformers.processing_utils import ProcessorMixin

from families.parts import IMAGE, SIZE, Family, get, pil, text, vision, with_video

_GRID = [[24, 48], [48, 24], [48, 48]]
_INTERN = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


def _llava(ids: dict[str, int]) -> Any:
    return get("llava.LlavaConfig")(
        text_config={"model_type": "llama", **text()},
        vision_config={"model_type": "clip_vision_model", "projection_dim": 16, **vision()},
        image_token_index=ids["<image>"],
        image_seq_length=9,
        tie_word_embeddings=False,
    )


def _llava_processor(tokenizer: Any) -> ProcessorMixin:
    return get("llava.LlavaProcessor")(
        image_processor=pil("clip", "CLIPImageProcessorPil")(size={"shortest_edge": 24}, crop_size=SIZE),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _llava_next(ids: dict[str, int]) -> Any:
    return get("llava_next.LlavaNextConfig")(
        text_config={"model_type": "llama", **text()},
        vision_config={"model_type": "clip_vision_model", "projection_dim": 16, **vision()},
        image_token_index=ids["<image>"],
        image_grid_pinpoints=_GRID,
        image_seq_length=9,
        tie_word_embeddings=False,
    )


def _llava_next_processor(tokenizer: Any) -> ProcessorMixin:
    return get("llava_next.LlavaNextProcessor")(
        image_processor=pil("llava_next", "LlavaNextImageProcessorPil")(
            size={"shortest_edge": 24}, crop_size=SIZE, image_grid_pinpoints=_GRID
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _llava_onevision(ids: dict[str, int]) -> Any:
    return get("llava_onevision.LlavaOnevisionConfig")(
        text_config={"model_type": "qwen2", **text()},
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **vision()},
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=_GRID,
        tie_word_embeddings=False,
    )


def _llava_onevision_processor(tokenizer: Any) -> ProcessorMixin:
    package, name = "llava_onevision", "LlavaOnevisionVideoProcessor"
    return with_video("llava_onevision.LlavaOnevisionProcessor", package, name, size=SIZE)(
        image_processor=pil("llava_onevision", "LlavaOnevisionImageProcessorPil")(
            size=SIZE, image_grid_pinpoints=_GRID
        ),
        tokenizer=tokenizer,
        num_image_tokens=9,
        vision_feature_select_strategy="full",
    )


def _internvl(ids: dict[str, int]) -> Any:
    return get("internvl.InternVLConfig")(
        text_config={"model_type": "qwen2", **text()},
        vision_config={"model_type": "internvl_vision", **vision(image_size=[24, 24], patch_size=[4, 4])},
        image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=9,
        tie_word_embeddings=False,
    )


def _internvl_processor(tokenizer: Any) -> ProcessorMixin:
    return with_video("internvl.InternVLProcessor", "internvl", "InternVLVideoProcessor", size=SIZE)(
        image_processor=pil("got_ocr2", "GotOcr2ImageProcessorPil")(size=SIZE, crop_to_patches=True, max_patches=2),
        tokenizer=tokenizer,
        image_seq_length=9,
    )


def _aya_vision(ids: dict[str, int]) -> Any:
    """Attention and feed-forward read the same norm, side by side."""
    return get("aya_vision.AyaVisionConfig")(
        text_config={"model_type": "cohere2", **text(head_dim=8, sliding_window=12, logit_scale=1.0)},
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **vision(image_size=32)},
        image_token_index=ids["<|IMG_PATCH|>"],
        alignment_intermediate_size=32,
    )


def _aya_vision_processor(tokenizer: Any) -> ProcessorMixin:
    images = pil("got_ocr2", "GotOcr2ImageProcessorPil")(
        size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=2
    )
    return get("aya_vision.AyaVisionProcessor")(
        image_processor=images, tokenizer=tokenizer, patch_size=8, img_size=32, downsample_factor=2
    )


def _deepseek_vl(ids: dict[str, int]) -> Any:
    return get("deepseek_vl.DeepseekVLConfig")(
        text_config={"model_type": "llama", **text()},
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **vision()},
        image_token_id=ids["<image_placeholder>"],
        tie_word_embeddings=False,
    )


def _deepseek_vl_processor(tokenizer: Any) -> ProcessorMixin:
    images = pil("deepseek_vl", "DeepseekVLImageProcessorPil")(size=SIZE, min_size=8)
    return get("deepseek_vl.DeepseekVLProcessor")(image_processor=images, tokenizer=tokenizer, num_image_tokens=9)


def _video_llama_3(ids: dict[str, int]) -> Any:
    return get("video_llama_3.VideoLlama3Config")(
        text_config={"model_type": "qwen2", **text()},
        vision_config=vision(patch_size=4),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
    )


def _video_llama_3_processor(tokenizer: Any) -> ProcessorMixin:
    images = pil("video_llama_3", "VideoLlama3ImageProcessorPil")(
        patch_size=4, size={"shortest_edge": 64, "longest_edge": 1024}
    )
    size = {"shortest_edge": 64, "longest_edge": 1024}
    path, package, name = "video_llama_3.VideoLlama3Processor", "video_llama_3", "VideoLlama3VideoProcessor"
    whole = with_video(path, package, name, patch_size=4, size=size)
    return whole(image_processor=images, tokenizer=tokenizer)


SPECS: dict[str, Family] = {
    "llava": Family(_llava, "LlavaForConditionalGeneration", _llava_processor, named=IMAGE, image="<image>"),
    "llava_next": Family(
        _llava_next, "LlavaNextForConditionalGeneration", _llava_next_processor, named=IMAGE, image="<image>"
    ),
    "llava_onevision": Family(
        _llava_onevision,
        "LlavaOnevisionForConditionalGeneration",
        _llava_onevision_processor,
        named={**IMAGE, "video_token": "<video>"},
        image="<image>",
        video="<video>",
    ),
    "internvl": Family(
        _internvl,
        "InternVLForConditionalGeneration",
        _internvl_processor,
        named=_INTERN,
        image="<IMG_CONTEXT>",
        video="<video>",
    ),
    "aya_vision": Family(
        _aya_vision,
        "AyaVisionForConditionalGeneration",
        _aya_vision_processor,
        tokens=("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "TILE", "TILE_GLOBAL"),
        image="<image>",
    ),
    "deepseek_vl": Family(
        _deepseek_vl,
        "DeepseekVLForConditionalGeneration",
        _deepseek_vl_processor,
        named={"image_token": "<image_placeholder>"},
        image="<image_placeholder>",
    ),
    "video_llama_3": Family(
        _video_llama_3,
        "VideoLlama3ForConditionalGeneration",
        _video_llama_3_processor,
        named={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
        image="<|image_pad|>",
        video="<|video_pad|>",
    ),
}
