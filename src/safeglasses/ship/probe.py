"""Ask a model in this process: what it answers greedily, and how likely it finds the tokens of given answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GenerationConfig

from safeglasses.model.encode import CROSSING
from safeglasses.model.vlm import VLM, Batch, batches
from safeglasses.ship.prompts import Prompt

Path = tuple[int, ...]
"""Tokens of an answer."""
_ROWS = 32  # prompts at once
_VOCAB_ROWS = 2**22  # rows × vocabulary of one batch: float32 logits of 9 positions stay below 160 MB


@dataclass(frozen=True)
class Piece:
    """A batch of prompts, each followed by the tokens of an answer."""

    rows: list[int]
    """Which of the rows that were asked for."""
    batch: Batch
    """Prompts padded on the left, so that all answers start in the same column; answers filled up behind."""
    length: int
    """Tokens of the longest answer."""


def greedy(vlm: VLM, prompts: Sequence[Prompt], n_tokens: int) -> list[Path]:
    """Return the tokens of greedy answers, at most ``n_tokens``, without the token that ends the turn."""
    stops = set(vlm.stop_ids)
    ours = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=n_tokens,
        eos_token_id=list(vlm.stop_ids) or None,
        pad_token_id=vlm.tokenizer.pad_token_id,
        bos_token_id=vlm.tokenizer.bos_token_id,
        decoder_start_token_id=next(iter(vlm.start_ids), None),
    )
    generate: Any = vlm.model.generate
    answers: list[Path] = [()] * len(prompts)
    for rows in _batches(vlm, prompts):
        batch = vlm.encode([prompts[i].chat() for i in rows], padding_side="left").to(vlm.device)
        inputs = vlm.encoder.to_generate(batch)
        theirs = vlm.model.generation_config
        vlm.model.generation_config = ours  # else generate() fills what is left open from the checkpoint's
        try:
            with torch.no_grad():
                tokens = generate(**inputs, generation_config=ours)[:, batch.ids.shape[1] :]
        finally:
            vlm.model.generation_config = theirs
        for row, answer in zip(rows, tokens.tolist(), strict=True):
            end = next((i for i, token in enumerate(answer) if token in stops), len(answer))
            answers[row] = tuple(answer[:end])
    return answers


def pieces(vlm: VLM, prompts: Sequence[Prompt], paths: Sequence[Path]) -> Iterator[Piece]:
    """Encode prompts with their answers as given tokens, a batch at a time.

    `VLM.encode` takes answers as text; tokens that a model wrote need not be those its text is cut into.
    """
    for rows in _batches(vlm, prompts):
        batch = vlm.encode([prompts[i].chat() for i in rows], padding_side="left")
        length = max(len(paths[i]) for i in rows)
        fill: Any = vlm.tokenizer.pad_token_id or 0
        block = torch.tensor([[*paths[i], *[fill] * (length - len(paths[i]))] for i in rows], dtype=torch.long)
        yield Piece(rows, _appended(batch, block.reshape(len(rows), length)), length)


def logprobs(vlm: VLM, piece: Piece) -> Float[Tensor, "row position vocab"]:
    """Return log-probabilities of every next token, from in front of the answer's first to behind its last."""
    start = piece.batch.ids.shape[1] - piece.length - 1
    with torch.no_grad():
        return vlm.forward(piece.batch, logits_from=start).float().log_softmax(dim=-1)


def _batches(vlm: VLM, prompts: Sequence[Prompt]) -> list[list[int]]:
    vocabulary = int(vlm.model.config.get_text_config(decoder=True).vocab_size)
    rows = max(1, min(_ROWS, _VOCAB_ROWS // vocabulary))
    return batches([(int(prompt.picture is not None), len(prompt.text)) for prompt in prompts], rows)


def _appended(batch: Batch, block: Tensor) -> Batch:
    """Put a block of tokens behind prompts that are padded on the left."""
    width, length, of_both = batch.ids.shape[1], block.shape[1], batch.encoder is not None
    mask, ids = ("decoder_attention_mask", "decoder_input_ids") if of_both else ("attention_mask", "input_ids")
    inputs = dict(batch.inputs)
    for name, value in batch.inputs.items():
        if name == ids:
            tail = block
        elif of_both and name != mask:
            continue  # the encoder's
        elif value.is_floating_point() or value.ndim < 2 or value.shape[:2] != (len(block), width):
            continue  # pictures and what describes them
        elif name == "position_ids":
            tail = value[:, -1:] + torch.arange(1, length + 1)
        elif name in CROSSING:  # an answer sees the pictures that the end of its prompt sees
            tail = value[:, -1:].expand(-1, length, *value.shape[2:])
        else:
            tail = torch.full_like(value[:, :1], int(name == mask)).expand(-1, length)
        inputs[name] = torch.cat([value, tail.to(value.dtype)], dim=1)
    masks = {
        name: torch.nn.functional.pad(mask, (0, length), value=name == "response_mask")
        for name, mask in (
            ("prompt_mask", batch.prompt_mask),
            ("response_mask", batch.response_mask),
            ("image_mask", batch.image_mask),
        )
    }
    return Batch(inputs=inputs, prompt_length=batch.prompt_length, **masks, encoder=batch.encoder)
