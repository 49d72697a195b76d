"""Encoder–decoders: Florence-2 (BART, a convolutional tower), T5Gemma 2 (self- and cross-attention in one)."""

from typing import Any

from transformers.processing_utils import ProcessorMixin

from families.gemmas import GEMMA
from families.parts import IMAGE, SIZE, VOCAB, Family, get, pil, text, vision


def _florence2(ids: dict[str, int]) -> Any:
    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in _SIDE.items()}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    return get("florence2.Florence2Config")(
        text_config={
            "model_type": "bart",
            "vocab_size": VOCAB,
            "d_model": 32,
            "max_position_embeddings": 512,
            "forced_eos_token_id": None,
            **sides,
            **special,
        },
        vision_config={
            "depths": [1, 1],
            "patch_size": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "embed_dim": [8, 16],
            "num_heads": [2, 2],
            "num_groups": [2, 2],
            "window_size": 3,
            "projection_dim": 32,
        },
        image_token_id=ids["<image>"],
        **special,
    )


_SIDE = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}


def _florence2_processor(tokenizer: Any) -> ProcessorMixin:
    images = pil("clip", "CLIPImageProcessorPil")(size=SIZE, do_center_crop=False)
    images.image_seq_length = 10  # nine places and their mean
    return get("florence2.Florence2Processor")(images, tokenizer)


def _t5gemma2(ids: dict[str, int]) -> Any:
    options = text(
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=12,
        layer_types=["sliding_attention", "full_attention"],
        tie_word_embeddings=True,
    )
    places = {"image_token_index": ids["<image_soft_token>"], "boi_token_index": ids["<start_of_image>"]}
    return get("t5gemma2.T5Gemma2Config")(
        encoder={
            "text_config": options,
            "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **vision()},
            "mm_tokens_per_image": 9,
            "eoi_token_index": ids["<end_of_image>"],
            **places,
        },
        decoder=options,
        image_token_index=ids["<image_soft_token>"],
        eoi_token_index=ids["<end_of_image>"],
    )


def _t5gemma2_processor(tokenizer: Any) -> ProcessorMixin:
    return get("gemma3.Gemma3Processor")(
        image_processor=pil("gemma3", "Gemma3ImageProcessorPil")(size=SIZE), tokenizer=tokenizer, image_seq_length=9
    )


SPECS: dict[str, Family] = {
    "florence2": Family(
        _florence2, "Florence2ForConditionalGeneration", _florence2_processor, named=IMAGE, pictures=(0, 1)
    ),
    "t5gemma2": Family(
        _t5gemma2,
        "T5Gemma2ForConditionalGeneration",
        _t5gemma2_processor,
        named=GEMMA,
        image="<start_of_image>",
    ),
}
