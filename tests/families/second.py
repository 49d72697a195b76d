"""Families of the tests' second run: processors that need torchvision, or are about videos first of all."""

from typing import Any

from transformers.processing_utils import ProcessorMixin

from families.parts import IMAGE, SIZE, Family, get, pil, text, vision, with_video

_FILM = {**IMAGE, "video_token": "<video>"}
_IDEFICS_TOKENS = (
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
    "<global-img>",
    "<video>",
    *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
)
_GRID = [[24, 48], [48, 24], [48, 48]]
_LLAMA4_TOKENS = (
    "<|image_start|>",
    "<|image_end|>",
    "<|image|>",
    "<|patch|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
)
_KIMI_TOKENS = ("<|media_begin|>", "<|media_content|>", "<|media_end|>")


def _mistral3(ids: dict[str, int]) -> Any:
    return get("mistral3.Mistral3Config")(
        text_config={"model_type": "mistral", **text(head_dim=8)},
        vision_config={"model_type": "pixtral", **vision(image_size=48, patch_size=3, head_dim=8)},
        image_token_index=ids["[IMG]"],
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )


def _mistral3_processor(tokenizer: Any) -> ProcessorMixin:
    return get("pixtral.PixtralProcessor")(
        image_processor=pil("pixtral", "PixtralImageProcessorPil")(
            size={"longest_edge": 48}, patch_size={"height": 3, "width": 3}
        ),
        tokenizer=tokenizer,
        patch_size=3,
        spatial_merge_size=2,
    )


def _smolvlm(ids: dict[str, int]) -> Any:
    return get("smolvlm.SmolVLMConfig")(
        text_config={"model_type": "llama", **text()},
        vision_config=vision(patch_size=4),
        image_token_id=ids["<image>"],
        scale_factor=2,
        tie_word_embeddings=False,
    )


def _smolvlm_processor(tokenizer: Any) -> ProcessorMixin:
    sizes: dict[str, Any] = {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 24}}
    return with_video("smolvlm.SmolVLMProcessor", "smolvlm", "SmolVLMVideoProcessor", **sizes, num_frames=64, fps=1)(
        image_processor=pil("smolvlm", "SmolVLMImageProcessorPil")(**sizes), tokenizer=tokenizer, image_seq_len=9
    )


def _llava_next_video(ids: dict[str, int]) -> Any:
    return get("llava_next_video.LlavaNextVideoConfig")(
        text_config={"model_type": "llama", **text()},
        vision_config={"model_type": "clip_vision_model", "projection_dim": 16, **vision(image_size=32)},
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=[[32, 64], [64, 32]],
    )


def _llava_next_video_processor(tokenizer: Any) -> ProcessorMixin:
    sizes: dict[str, Any] = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    package, name = "llava_next_video", "LlavaNextVideoVideoProcessor"
    return with_video("llava_next_video.LlavaNextVideoProcessor", package, name, **sizes)(
        image_processor=pil("llava_next", "LlavaNextImageProcessorPil")(
            **sizes, image_grid_pinpoints=[[32, 64], [64, 32]]
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _video_llava(ids: dict[str, int]) -> Any:
    return get("video_llava.VideoLlavaConfig")(
        text_config={"model_type": "llama", **text()},
        vision_config={"model_type": "clip_vision_model", "projection_dim": 16, **vision()},
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_seq_length=9,
    )


def _video_llava_processor(tokenizer: Any) -> ProcessorMixin:
    sizes: dict[str, Any] = {"size": {"shortest_edge": 24}, "crop_size": SIZE}
    return with_video("video_llava.VideoLlavaProcessor", "video_llava", "VideoLlavaVideoProcessor", **sizes)(
        image_processor=get("video_llava.VideoLlavaImageProcessor")(**sizes), tokenizer=tokenizer, patch_size=8
    )


def _cohere2_vision(ids: dict[str, int]) -> Any:
    """Attention and feed-forward read the same norm, side by side."""
    return get("cohere2_vision.Cohere2VisionConfig")(
        text_config={"model_type": "cohere2", **text(head_dim=8, sliding_window=12, logit_scale=1.0)},
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **vision(image_size=32)},
        image_token_id=ids["<|IMG_PATCH|>"],
        alignment_intermediate_size=32,
    )


def _cohere2_vision_processor(tokenizer: Any) -> ProcessorMixin:
    images = get("cohere2_vision.Cohere2VisionImageProcessor")(
        size={"height": 32, "width": 32}, max_patches=2, patch_size=2
    )
    return get("cohere2_vision.Cohere2VisionProcessor")(image_processor=images, tokenizer=tokenizer)


def _lfm2_vl(ids: dict[str, int]) -> Any:
    """One layer of convolution, one of attention; towers of patches in rows."""
    return get("lfm2_vl.Lfm2VlConfig")(
        text_config={
            "model_type": "lfm2",
            **text(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
        },
        vision_config={"model_type": "siglip2_vision_model", "vision_use_head": False, **vision(num_patches=36)},
        image_token_id=ids["<image>"],
        projector_hidden_size=32,
    )


def _lfm2_vl_processor(tokenizer: Any) -> ProcessorMixin:
    images = get("lfm2_vl.Lfm2VlImageProcessor")(
        encoder_patch_size=8, tile_size=48, min_image_tokens=4, max_image_tokens=9, max_tiles=4
    )
    return get("lfm2_vl.Lfm2VlProcessor")(image_processor=images, tokenizer=tokenizer)


def _llama4(ids: dict[str, int]) -> Any:
    """A dense layer, then one of experts that every token is multiplied with."""
    moe = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_layers": [1], "intermediate_size_mlp": 48}
    return get("llama4.Llama4Config")(
        text_config=text(head_dim=8, attention_chunk_size=512, **moe),
        vision_config=vision(
            image_size=32,
            vision_output_dim=16,
            projector_input_dim=16,
            projector_output_dim=16,
            intermediate_size=64,
        ),
        boi_token_index=ids["<|image_start|>"],
        eoi_token_index=ids["<|image_end|>"],
        image_token_index=ids["<|patch|>"],
    )


def _llama4_processor(tokenizer: Any) -> ProcessorMixin:
    images = get("llama4.Llama4ImageProcessor")(size={"height": 32, "width": 32}, max_patches=4)
    return get("llama4.Llama4Processor")(image_processor=images, tokenizer=tokenizer, patch_size=8)


def _kimi_k25(ids: dict[str, int]) -> Any:
    """Keys and values from a low rank; a dense layer, then one of experts with a shared one.

    No videos: the forward of transformers 5.23 counts a chunk's features once a frame and finds one for all of them.
    """
    moe = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
    rank = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
    return get("kimi_k25.Kimi_K25Config")(
        text_config={
            "model_type": "deepseek_v3",
            **text(n_group=1, topk_group=1, num_mtp_layers=0, **moe, **rank) | {"num_key_value_heads": 4},
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 4,
            "pos_emb_height": 8,
            "pos_emb_width": 8,
        },
        projection_hidden_size=16,
        image_token_id=ids["<|media_pad|>"],
        video_token_id=ids["<|kimi_k25_video_placeholder|>"],
        vision_start_token_id=ids["<|media_begin|>"],
        vision_end_token_id=ids["<|media_end|>"],
        tie_word_embeddings=False,
    )


def _kimi_k25_processor(tokenizer: Any) -> ProcessorMixin:
    size: dict[str, Any] = {"patch_size": 4, "size": {"max_height": 32, "max_width": 32}}
    return with_video("kimi_k25.Kimi_K25Processor", "kimi_k25", "Kimi_K25VideoProcessor", **size)(
        image_processor=get("kimi_k25.Kimi_K25ImageProcessor")(**size), tokenizer=tokenizer
    )


SPECS: dict[str, Family] = {
    "mistral3": Family(
        _mistral3,
        "Mistral3ForConditionalGeneration",
        _mistral3_processor,
        tokens=("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        image="[IMG]",
    ),
    "smolvlm": Family(
        _smolvlm,
        "SmolVLMForConditionalGeneration",
        _smolvlm_processor,
        tokens=_IDEFICS_TOKENS,
        image="<image>",
        video="<video>",
    ),
    "llava_next_video": Family(
        _llava_next_video,
        "LlavaNextVideoForConditionalGeneration",
        _llava_next_video_processor,
        named=_FILM,
        image="<image>",
        video="<video>",
    ),
    "video_llava": Family(
        _video_llava,
        "VideoLlavaForConditionalGeneration",
        _video_llava_processor,
        named=_FILM,
        image="<image>",
        video="<video>",
    ),
    "cohere2_vision": Family(
        _cohere2_vision,
        "Cohere2VisionForConditionalGeneration",
        _cohere2_vision_processor,
        named={
            "boi_token": "<|START_OF_IMG|>",
            "eoi_token": "<|END_OF_IMG|>",
            "image_token": "<|IMG_PATCH|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
        },
        image="<|IMG_PATCH|>",
    ),
    "lfm2_vl": Family(
        _lfm2_vl,
        "Lfm2VlForConditionalGeneration",
        _lfm2_vl_processor,
        tokens=(
            "<|image_start|>",
            "<|image_end|>",
            "<|img_thumbnail|>",
            *(f"<|img_row_{row}_col_{column}|>" for row in (1, 2) for column in (1, 2)),
        ),
        named=IMAGE,
        image="<image>",
    ),
    "llama4": Family(
        _llama4, "Llama4ForConditionalGeneration", _llama4_processor, tokens=_LLAMA4_TOKENS, image="<|image|>"
    ),
    "kimi_k25": Family(
        _kimi_k25,
        "Kimi_K25ForConditionalGeneration",
        _kimi_k25_processor,
        tokens=_KIMI_TOKENS,
        named={"image_token": "<|media_pad|>", "video_token": "<|kimi_k25_video_placeholder|>"},
        image="<|media_begin|>image<|media_content|><|media_pad|><|media_end|>",
    ),
}
