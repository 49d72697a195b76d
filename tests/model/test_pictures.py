"""Picture tokens against a brute-force rule: change a picture, see which embeddings before the first layer change."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import families
from circle import changed, embedded, one_message
from safeglasses.model.vlm import VLM, Chat

PICTURED = [name for name in families.FAMILIES if families.PICTURES[name]]
CROSSING = ("mllama",)
"""Pictures enter by cross-attention alone: no embedding changes, and the span is the placeholder."""


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
    """By types of tokens, or by what the prompt lacks without its pictures; marks around pictures may be in it too."""
    if 0 not in families.PICTURES[name]:
        pytest.skip("there is no prompt without pictures to compare with")
    vlm = family(name)
    chats = [Chat(families.messages(index), "a dog") for index in (1, 3)]
    expected = vlm.encode(chats).asked.image_mask
    found = replace(vlm.encoder, picture_ids=frozenset()).encode(chats, "right").asked.image_mask
    assert not (expected & ~found).any()
    more = (found & ~expected).sum(dim=1)
    assert int(more.max()) <= 4 * int(expected.sum(dim=1).max())


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
