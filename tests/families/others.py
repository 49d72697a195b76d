"""Idefics3, Mllama (pictures by cross-attention) and text-only models."""

from typing import Any

from transformers.processing_utils import ProcessorMixin

from families.parts import SIZE, VOCAB, Family, get, pil, text, vision

_IDEFICS_TOKENS = (
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
)


def _idefics3(ids: dict[str, int]) -> Any:
    return get("idefics3.Idefics3Config")(
        text_config={"model_type": "llama", **text()},
        vision_config=vision(patch_size=4),
        image_token_id=ids["<image>"],
        scale_factor=2,
        tie_word_embeddings=False,
    )


def _idefics3_processor(tokenizer: Any) -> ProcessorMixin:
    return get("idefics3.Idefics3Processor")(
        pil("idefics3", "Idefics3ImageProcessorPil")(size={"longest_edge": 48}, max_image_size={"longest_edge": 24}),
        tokenizer=tokenizer,
        image_seq_len=9,
    )


def _mllama(ids: dict[str, int]) -> Any:
    tiles = vision(num_global_layers=1, attention_heads=2, vision_output_dim=32, intermediate_layers_indices=[0])
    del tiles["num_attention_heads"]
    return get("mllama.MllamaConfig")(
        text_config=text(cross_attention_layers=[1]),
        vision_config=tiles,
        image_token_index=ids["<|image|>"],
    )


def _mllama_processor(tokenizer: Any) -> ProcessorMixin:
    images = pil("mllama", "MllamaImageProcessorPil")(size=SIZE, max_image_tiles=4)
    return get("mllama.MllamaProcessor")(image_processor=images, tokenizer=tokenizer)


def _llama(ids: dict[str, int]) -> Any:
    return get("llama.LlamaConfig")(**text())


def _gpt2(ids: dict[str, int]) -> Any:
    return get("gpt2.GPT2Config")(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_inner=48,
        n_positions=512,
        bos_token_id=1,
        eos_token_id=2,
    )


def _opt(ids: dict[str, int]) -> Any:
    options = text(ffn_dim=48, word_embed_proj_dim=32)
    del options["num_key_value_heads"], options["intermediate_size"]
    return get("opt.OPTConfig")(**options)


SPECS: dict[str, Family] = {
    "idefics3": Family(
        _idefics3,
        "Idefics3ForConditionalGeneration",
        _idefics3_processor,
        tokens=_IDEFICS_TOKENS,
        image="<image>",
    ),
    "mllama": Family(
        _mllama,
        "MllamaForConditionalGeneration",
        _mllama_processor,
        tokens=("<|python_tag|>",),
        named={"image_token": "<|image|>"},
        image="<|image|>",
    ),
    "llama": Family(_llama, "LlamaForCausalLM"),
    "gpt2": Family(_gpt2, "GPT2LMHeadModel"),
    "opt": Family(_opt, "OPTForCausalLM"),
}
