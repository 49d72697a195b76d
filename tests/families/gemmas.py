"""Gemma and the families around it: prefixes read both ways, widths that differ by layer, embeddings per layer."""

from typing import Any

from transformers.processing_utils import ProcessorMixin

from families.parts import IMAGE, SIZE, VOCAB, Family, get, pil, text, vision, with_video

GEMMA = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
_GEMMA4 = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
}
_SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False}


def _gemma3(ids: dict[str, int]) -> Any:
    return get("gemma3.Gemma3Config")(
        text_config=text(
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=12,
            layer_types=["sliding_attention", "full_attention"],
            tie_word_embeddings=True,
        ),
        vision_config={**_SIGLIP, **vision()},
        mm_tokens_per_image=9,
        image_token_index=ids["<image_soft_token>"],
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
    )


def _gemma3_processor(tokenizer: Any) -> ProcessorMixin:
    return get("gemma3.Gemma3Processor")(
        image_processor=pil("gemma3", "Gemma3ImageProcessorPil")(size=SIZE),
        tokenizer=tokenizer,
        image_seq_length=9,
    )


def _gemma4(ids: dict[str, int]) -> Any:
    """Wider heads in the second layer; embeddings of each layer's own; pictures read both ways."""
    return get("gemma4.Gemma4Config")(
        text_config=text(
            head_dim=8,
            global_head_dim=16,
            sliding_window=12,
            layer_types=["sliding_attention", "full_attention"],
            hidden_size_per_layer_input=4,
            vocab_size_per_layer_input=VOCAB,
            num_kv_shared_layers=0,
            use_bidirectional_attention="vision",
            tie_word_embeddings=True,
        ),
        vision_config={
            "model_type": "gemma4_vision",
            **vision(
                patch_size=4, head_dim=8, num_key_value_heads=2, pooling_kernel_size=2, position_embedding_size=64
            ),
        },
        audio_config=None,
        image_token_id=ids["<|image|>"],
        boi_token_id=ids["<|image>"],
        eoi_token_id=ids["<image|>"],
        audio_token_id=ids["<|audio|>"],
        video_token_id=ids["<|video|>"],
    )


def _gemma4_processor(tokenizer: Any) -> ProcessorMixin:
    images = pil("gemma4", "Gemma4ImageProcessorPil")(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70)
    films = {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70}
    return with_video("gemma4.Gemma4Processor", "gemma4", "Gemma4VideoProcessor", **films)(
        feature_extractor=get("gemma4.Gemma4AudioFeatureExtractor")(), image_processor=images, tokenizer=tokenizer
    )


def _gemma3n(ids: dict[str, int]) -> Any:
    """Each layer has a width of its own; four streams side by side; low-rank side paths."""
    return get("gemma3n.Gemma3nTextConfig")(
        **{
            **text(head_dim=8, hidden_size_per_layer_input=4, vocab_size_per_layer_input=VOCAB, laurel_rank=4),
            "intermediate_size": [48, 24],
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 12,
            "num_kv_shared_layers": 0,
            "activation_sparsity_pattern": [0.0, 0.0],
            "tie_word_embeddings": True,
        }
    )


def _paligemma(ids: dict[str, int]) -> Any:
    return get("paligemma.PaliGemmaConfig")(
        text_config={"model_type": "gemma", **text(head_dim=8)},
        vision_config={**_SIGLIP, **vision()},
        image_token_index=ids["<image>"],
        projection_dim=32,
        hidden_size=32,
    )


def _paligemma_processor(tokenizer: Any) -> ProcessorMixin:
    images = pil("siglip", "SiglipImageProcessorPil")(size=SIZE)
    images.image_seq_length = 9
    return get("paligemma.PaliGemmaProcessor")(image_processor=images, tokenizer=tokenizer)


SPECS: dict[str, Family] = {
    "gemma3": Family(
        _gemma3, "Gemma3ForConditionalGeneration", _gemma3_processor, named=GEMMA, image="<start_of_image>"
    ),
    "gemma3n_text": Family(_gemma3n, "Gemma3nForCausalLM"),
    "gemma4": Family(
        _gemma4,
        "Gemma4ForConditionalGeneration",
        _gemma4_processor,
        tokens=("<|video|>",),
        named=_GEMMA4,
        image="<|image|>",
        video="<|video|>",
    ),
    "paligemma": Family(
        _paligemma,
        "PaliGemmaForConditionalGeneration",
        _paligemma_processor,
        named=IMAGE,
        image="<image>",
        pictures=(1, 2),
    ),
}
