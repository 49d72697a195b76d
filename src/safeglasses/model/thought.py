"""What a model thinks before it answers: where the thought ends, in a text and in its tokens."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

MARKS = (
    # Qwen3-VL, Qwen3.5, GLM-4.1V to 4.6V, Kimi K2.5, Ernie-VL, Step, InternVL3.5, MiMo-VL, DeepSeek, Hunyuan, Exaone
    ("<think>", "</think>"),
    ("<mm:think>", "</mm:think>"),  # MiniMax M3
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("◁think▷", "◁/think▷"),  # Kimi-VL
    ("[THINK]", "[/THINK]"),  # Magistral, Ministral 3
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Cohere's Command A; the answer stands in a block of its own
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<|content_thinking|>", "<|content_text|>"),  # Inkling: blocks that say what they are
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # GPT-OSS
)
"""What stands before and behind a thought. Source: the chat templates of these models, and what vLLM's and llama.cpp's
parsers of reasoning look for. Not told: thoughts in plain words ("Here is my thought process:", Granite 3.2), Kimi K3's
nested blocks, and the marks of models whose templates were not to be had (Muse)."""
_PIECES = ("<|channel|>", "<|message|>", "<|channel>")
"""Special tokens that are a part of a mark."""


def answer_at(text: str) -> int:
    """Return where in a response the answer begins: behind the last thought's mark and the space after it.

    0 where there is no thought; the length of the text where a thought began and never ended.
    """
    ends = [at + len(close) for _, close in MARKS if (at := text.rfind(close)) >= 0]
    if ends:
        return len(text) - len(text[max(ends) :].lstrip())
    return len(text) if text.lstrip().startswith(tuple(start for start, _ in MARKS)) else 0


def parted(text: str) -> tuple[str, str]:
    """Return a response's thought, its marks included, and its answer; a text without a thought is left as it is."""
    at = answer_at(text)
    return (text[:at].strip(), text[at:].strip()) if at else ("", text)


def opened(prompt: str) -> str:
    """Return the mark of a thought with which a prompt ends, as some templates let every answer begin; else nothing."""
    return next((start for start, _ in MARKS if prompt.rstrip().endswith(start)), "")


def thought_tokens(tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int]) -> int:
    """Return how many of a response's tokens belong to its thought."""
    at = answer_at(text)
    if at in (0, len(text)):
        return len(ids) if at else 0
    encode: Any = tokenizer
    if not tokenizer.is_fast:  # no offsets: a thought ends in a token of its own, so its text alone has the same tokens
        return len(encode(text[:at], add_special_tokens=False)["input_ids"])
    offsets = encode(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return sum(start < at for start, _ in offsets)


def written(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return generated tokens as text, special ones left out but for the marks of thoughts."""
    special = set(tokenizer.all_special_ids)
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    marks = {added[name] for pair in (*MARKS, _PIECES) for name in pair if name in added} & special
    if not marks.intersection(ids):
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))
    kept = [token for token in ids if token not in special or token in marks]
    return str(tokenizer.decode(kept, skip_special_tokens=False))
