"""Picture tokens against a brute-force rule: change a picture, see which embeddings before the first layer change."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import families
from safeglasses.model.vlm import VLM, Batch, Chat

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # glm4v's processor
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


def one_message(pictures: list[Any]) -> list[dict[str, Any]]:
    images = [{"type": "image", "image": image} for image in pictures]
    return [{"role": "user", "content": [*images, {"type": "text", "text": "what is this"}]}]


def embedded(vlm: VLM, batch: Batch) -> Tensor:
    """Return what the first layer of what reads the prompt reads: ``[sample, token, hidden]``."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    @contextmanager
    def watched(layer: nn.Module) -> Any:
        handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
        yield
        handle.remove()

    with torch.no_grad(), watched(first_layer(vlm)):
        vlm.model(**batch.inputs, use_cache=False)
    (value,) = seen
    return value[0] if value.ndim == 4 else value  # Gemma 3n has several streams


def first_layer(vlm: VLM) -> nn.Module:
    encoder = vlm.anatomy.encoder_path
    if encoder is None:
        return vlm.model.get_submodule(vlm.anatomy.absolute_path(vlm.anatomy.layers_path) + ".0")
    inside = vlm.model.get_submodule(encoder)
    path = min((p for p, m in inside.named_modules() if p.endswith("layers.0") and "vision" not in p), key=len)
    return inside.get_submodule(path)


def changed(
    vlm: VLM, build: Callable[[list[Any]], list[dict[str, Any]]], count: int, which: int
) -> tuple[Batch, Tensor]:
    """Return a prompt with pictures, and the tokens whose embeddings change with one of them."""
    pictures = [families.picture(24, 24 + 12 * index, seed=index) for index in range(count)]
    others = [*pictures]
    others[which] = families.picture(*pictures[which].size, seed=100)
    first, second = (vlm.encode([Chat(build(chosen), "a dog")]) for chosen in (pictures, others))
    assert torch.equal(first.asked.inputs["input_ids"], second.asked.inputs["input_ids"])
    moved = (embedded(vlm, first) != embedded(vlm, second)).any(dim=-1)
    return first, moved


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
