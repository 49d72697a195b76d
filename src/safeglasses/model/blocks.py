"""Feed-forward blocks inside decoder layers, told from attention, convolutions and side paths by structure."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_ACTIVATION = re.compile(r"act(ivation)?(_fn)?|(silu|gelu|relu)\w*", re.IGNORECASE)


@dataclass(frozen=True)
class Block:
    """One feed-forward block of linear maps: what makes its neurons, and what reads them."""

    makers: tuple[str, ...]
    """Maps from the residual stream to the neurons: gate and up, both in one, or fc1. Empty if none fits."""
    down: str
    """The map that reads the neurons and writes the residual stream."""


@dataclass(frozen=True)
class Found:
    """The feed-forward blocks of a decoder."""

    blocks: tuple[Block, ...]
    """In the model's order; a layer may have several (experts, one beside them) or none (hybrids)."""
    reason: str
    """Why there is none."""


def find_blocks(
    decoder: nn.Module,
    layers_path: str,
    widths: Mapping[str, tuple[int, int]],
    hidden_size: int,
    fused: Iterable[str] = (),
) -> Found:
    """Find the feed-forward blocks of every layer.

    A block's down map writes the residual stream and reads as many numbers as another map beside it makes of
    the residual stream (or half as many: gate and up in one). Attention, by the name of a module or of its class,
    and whatever holds a 1-D convolution (recurrent and short-convolution layers) is no feed-forward block.

    Args:
        decoder: the decoder.
        layers_path: of its list of layers.
        widths: (inputs, outputs) of all linear maps in the layers, by path, in the model's order.
        hidden_size: of the residual stream.
        fused: paths of modules of fused experts.
    """
    layers = decoder.get_submodule(layers_path)
    by_layer: dict[str, list[str]] = {name: [] for name, _ in layers.named_children()}
    for path in widths:
        by_layer[path.removeprefix(layers_path + ".").partition(".")[0]].append(path)
    with_experts = tuple(fused)
    blocks: list[Block] = []
    doubts: list[str] = []
    for name, layer in layers.named_children():
        prefix = f"{layers_path}.{name}."
        others = _without_mixers(layer, prefix, by_layer[name])
        downs = [path for path in others if widths[path][1] == hidden_size]
        paired = _paired(layer, prefix, others, downs, widths)
        acting, beside_experts = _acting(layer, prefix, paired), any(path.startswith(prefix) for path in with_experts)
        if acting or beside_experts:  # where experts work on a projection, the maps there and back are no block
            paired = acting
        elif not paired and len({_parent(path) for path in downs}) == 1:
            paired = [Block((), downs[-1])]
        blocks += paired
        doubts += [] if paired or len(downs) < 2 else [f"layer {name} has {_several(downs)}"]
        if not downs:
            held = f" (only {', '.join(others[:3])})" if others else ""
            fused_too = "; fused experts are kept as one tensor, not as linear maps" if beside_experts else ""
            doubts.append(f"layer {name} has no linear map of width {hidden_size} outside attention{held}{fused_too}")
    return Found(tuple(blocks), "" if blocks else (doubts or ["the layers hold fused experts only"])[0])


def _without_mixers(layer: nn.Module, prefix: str, paths: list[str]) -> list[str]:
    mixing = tuple(
        f"{prefix}{inner}."
        for inner, child in layer.named_modules()
        if inner and (ATTENTION.search(type(child).__name__) or _convolves(child))
    )
    return [p for p in paths if not p.startswith(mixing) and not ATTENTION.search(p.removeprefix(prefix))]


def _convolves(part: nn.Module) -> bool:
    return any(isinstance(child, nn.Conv1d) for child in part.children())


def _paired(
    layer: nn.Module, prefix: str, others: list[str], downs: list[str], widths: Mapping[str, tuple[int, int]]
) -> list[Block]:
    found: dict[str, Block] = {}  # by parent; of square maps in one block the output comes last
    for down in downs:
        inner, outer = widths[down]
        fits = [p for p in others if p != down and widths[p][0] == outer and widths[p][1] in (inner, 2 * inner)]
        beside = [p for p in fits if _parent(p) == _parent(down)]
        alone = sum(_parent(p) == _parent(down) for p in others) == 1  # BERT keeps the two maps in modules of their own
        if beside or (alone and fits):
            found[_parent(down)] = Block(tuple(beside or fits[:1]), down)
    if len(found) > 1:  # beside a block of its own, a layer's direct maps are a side path (Gemma's per-layer inputs)
        found.pop(prefix.removesuffix("."), None)
    return list(found.values())


def _acting(layer: nn.Module, prefix: str, blocks: list[Block]) -> list[Block]:
    """Return the blocks whose two sides an activation parts; low-rank side paths have none (Gemma 3n's Laurel)."""
    parents = {block: (_parent(block.down) + ".").removeprefix(prefix).rstrip(".") for block in blocks}
    return [block for block in blocks if len(block.makers) > 1 or _acts(layer.get_submodule(parents[block]))]


def _acts(part: nn.Module) -> bool:
    return any(_ACTIVATION.fullmatch(name) or _is_activation(child) for name, child in part.named_children())


def _is_activation(child: nn.Module) -> bool:
    return type(child).__module__ in {"torch.nn.modules.activation", "transformers.activations"}


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _several(downs: list[str]) -> str:
    return (
        f"{len(downs)} maps that could end a feed-forward block ({downs[0]}, {downs[1]} …) "
        "and none that makes what they read"
    )
