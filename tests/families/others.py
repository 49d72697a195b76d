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


def _blip_2(ids: dict[str, int]) -> Any:
    """The processor puts a fixed number of placeholders before the prompt, whatever its template says."""
    options = text(ffn_dim=48, word_embed_proj_dim=32)
    del options["num_key_value_heads"], options["intermediate_size"]
    return get("blip_2.Blip2Config")(
        text_config={"model_type": "opt", **options},
        vision_config=vision(),
        qformer_config=vision(encoder_hidden_size=16),
        num_query_tokens=5,
        image_token_index=ids["<image>"],
    )


def _blip_2_processor(tokenizer: Any) -> ProcessorMixin:
    images = pil("blip", "BlipImageProcessorPil")(size=SIZE)
    return get("blip_2.Blip2Processor")(images, tokenizer, num_query_tokens=5)


def _idefics2(ids: dict[str, int]) -> Any:
    """A resampler asks each picture a fixed number of questions."""
    return get("idefics2.Idefics2Config")(
        text_config={"model_type": "mistral", **text(head_dim=8)},
        vision_config=vision(patch_size=4),
        perceiver_config={
            "hidden_size": 32,
            "resampler_n_latents": 5,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "num_key_value_heads": 2,
        },
        image_token_id=ids["<image>"],
        tie_word_embeddings=False,
    )


def _idefics2_processor(tokenizer: Any) -> ProcessorMixin:
    images = pil("idefics2", "Idefics2ImageProcessorPil")(size={"shortest_edge": 8, "longest_edge": 24})
    return get("idefics2.Idefics2Processor")(images, tokenizer=tokenizer, image_seq_len=5)


def _idefics(ids: dict[str, int]) -> Any:
    """Gated layers of cross-attention beside the decoder's, one before every other; open, as after training."""
    options = text(additional_vocab_size=0, cross_layer_interval=2, alpha_initializer="ones", use_resampler=False)
    del options["num_key_value_heads"], options["max_position_embeddings"]
    eyes = vision(embed_dim=16)
    del eyes["hidden_size"]
    return get("idefics.IdeficsConfig")(**{**options, "num_hidden_layers": 4}, vision_config=eyes)


def _idefics_processor(tokenizer: Any) -> ProcessorMixin:
    images = pil("idefics", "IdeficsImageProcessorPil")(image_size=24)
    return get("idefics.IdeficsProcessor")(images, tokenizer=tokenizer, image_size=24)


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


def _phi(ids: dict[str, int]) -> Any:
    """Attention and feed-forward read the same norm, side by side; biases everywhere."""
    return get("phi.PhiConfig")(**text(partial_rotary_factor=0.5))


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
    "blip_2": Family(_blip_2, "Blip2ForConditionalGeneration", _blip_2_processor, tokens=("<image>",), pictures=(1,)),
    "idefics2": Family(
        _idefics2,
        "Idefics2ForConditionalGeneration",
        _idefics2_processor,
        tokens=_IDEFICS_TOKENS,
        image="<image>",
    ),
    "idefics": Family(
        _idefics,
        "IdeficsForVisionText2Text",
        _idefics_processor,
        tokens=("<fake_token_around_image>", "<image>"),
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
    "phi": Family(_phi, "PhiForCausalLM"),
    "opt": Family(_opt, "OPTForCausalLM"),
}
