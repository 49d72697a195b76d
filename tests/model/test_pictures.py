"""Picture tokens against a brute-force rule: change a picture, see which embeddings before the first layer change."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import families
from circle import changed, embedded, one_message
from safeglasses.model.vlm import VLM, Chat

PICTURED = [
    pytest.param(name, marks=pytest.mark.torchvision) if name in families.NEED_TORCHVISION else name
    for name in families.EVERY
    if families.PICTURES[name]
]
CROSSING = ("idefics", "mllama")
"""Pictures enter by cross-attention alone: no embedding changes, and the span is the placeholder."""


AROUND = {
    "internvl": "<img> </img>",
    "aya_vision": "<|START_OF_IMG|> TILE _ 1 2 TILE_GLOBAL <|END_OF_IMG|>",
    "gemma3": "Ċ <start_of_image> <end_of_image>",
    "idefics": "<fake_token_around_image>",
    "idefics2": "<fake_token_around_image> Ġwhat",  # without a picture the words begin otherwise: "what"
    "idefics3": "<fake_token_around_image> <global-img> Ċ <row_1_col_1> <row_1_col_2> <row_2_col_1> <row_2_col_2>",
    "florence2": "<s> </s>",  # its prompt without a picture has none of a text's
    "t5gemma2": "Ċ <start_of_image> <end_of_image>",
    "mistral3": "[IMG_BREAK] [IMG_END]",
    "smolvlm": "<fake_token_around_image> <global-img> Ċ <row_1_col_1> <row_1_col_2> <row_2_col_1> <row_2_col_2>",
    "cohere2_vision": "<|START_OF_IMG|> <|IMG_LINE_BREAK|> <|END_OF_IMG|>",
    "lfm2_vl": "<|image_start|> <|image_end|>",
    "llama4": "<|image_start|> <|tile_x_separator|> <|tile_y_separator|> <|image|> <|image_end|>",
    "kimi_k25": "<|media_begin|> i m a g e <|media_content|> <|media_end|>",
}
"""What else a prompt has because of its picture, where no id tells: marks, and line breaks."""


def turns(pictures: list[Any]) -> list[dict[str, Any]]:
    """Return a conversation of as many turns of the user as pictures, each with one."""
    talk: list[dict[str, Any]] = []
    for index, image in enumerate(pictures):
        if talk:
            talk.append({"role": "assistant", "content": [{"type": "text", "text": "a red dog"}]})
        parts = [{"type": "text", "text": "what is " * index + "in"}, {"type": "image", "image": image}]
        talk.append({"role": "user", "content": [*parts, {"type": "text", "text": "this"}]})
    return talk


@pytest.mark.parametrize("name", PICTURED)
def test_the_span_is_what_changes_with_the_picture(family: Callable[[str], VLM], name: str) -> None:
    """Tokens of the span that do not change all hold one vector: what a model ends a row of patches with."""
    vlm = family(name)
    for build, count in [(one_message, n) for n in families.PICTURES[name] if n] + [(turns, 2)]:
        if count > max(families.PICTURES[name]):
            continue
        moved = torch.zeros(1, 1, dtype=torch.bool)
        for which in range(count):
            batch, one = changed(vlm, build, count, which)
            assert which == 0 or not (one & moved).any(), "a token belongs to one picture"
            moved = moved | one
        span = batch.asked.image_mask
        assert bool(span.any())
        if name in CROSSING:
            assert not moved.any()
            assert int(span.sum()) == count
            continue
        assert not (moved & ~span).any()
        fixed = embedded(vlm, batch)[span & ~moved]
        assert len(fixed) < 0.4 * int(span.sum())
        assert len(fixed.unique(dim=0)) <= 1


@pytest.mark.parametrize("name", PICTURED)
def test_without_a_known_id_the_span_holds_the_same_tokens(family: Callable[[str], VLM], name: str) -> None:
    """By types of tokens, or by what the prompt lacks without its pictures: that is also what stands around them."""
    if 0 not in families.PICTURES[name]:
        pytest.skip("there is no prompt without pictures to compare with")
    vlm = family(name)
    chats = [Chat(families.messages(index), "a dog") for index in (1, 3)]
    known = vlm.encode(chats).asked
    found = replace(vlm.encoder, picture_ids=frozenset()).encode(chats, "right").asked.image_mask
    assert not (known.image_mask & ~found).any()
    more = known.ids[found & ~known.image_mask].tolist()
    assert set(vlm.tokenizer.convert_ids_to_tokens(more)) == set(AROUND.get(name, "").split())


@pytest.mark.parametrize("name", PICTURED)
def test_no_picture_and_padding_on_either_side(family: Callable[[str], VLM], name: str) -> None:
    vlm = family(name)
    if 0 in families.PICTURES[name]:
        batch = vlm.encode([Chat(families.messages(index, pictures=0), "a dog") for index in (1, 3)])
        assert not batch.asked.image_mask.any()
        with torch.no_grad():
            assert bool(vlm.forward(batch).isfinite().all())
    chats = [Chat(families.messages(index), "a dog") for index in (1, 3)]
    right, left = (vlm.encode(chats, padding_side=side).asked for side in ("right", "left"))
    for row in range(2):
        kept = [batch.image_mask[row][batch.attention_mask[row].bool()] for batch in (right, left)]
        assert torch.equal(kept[0], kept[1])
    assert not bool((right.image_mask & ~right.attention_mask.bool()).any())
