"""Fused experts: modules that hold the feed-forward blocks of many experts as slices of 3-D parameters."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from safeglasses.model.sites import Side, Site


@dataclass(frozen=True)
class Experts:
    """One module of fused experts; an expert's path is the module's path and its number."""

    path: str
    """Decoder-relative path of the module: ``layers.3.mlp.experts``."""
    n_experts: int
    """How many experts it holds."""
    width: int
    """Neurons of one expert: what its down projection reads."""
    hidden: int
    """What an expert reads and writes; the residual stream's width, or less where experts work on a projection."""
    makers: tuple[str, ...]
    """Parameters whose outputs make the neurons: one of both halves, one without a gate, or gate and up apart."""
    down: str
    """The parameter of the down projections."""
    gated: bool
    """Whether neurons are products of a gate and an up half."""
    transposed: bool
    """Whether weights are kept ``[expert, in, out]``, and not ``[expert, out, in]`` as in ``nn.Linear``."""
    interleaved: bool
    """Whether gate and up outputs alternate in one parameter, and do not lie as two halves, gate first."""
    biased: bool
    """Whether there are biases (``gate_up_proj_bias`` …)."""
    routed: bool
    """Whether a router sends tokens to some experts; otherwise every token passes every expert."""
    dispatched: bool
    """Whether its forward goes through transformers' experts interface (``config._experts_implementation``)."""

    @property
    def layer(self) -> int:
        """Index of its decoder layer."""
        return Site(f"{self.path}.0", "in").layer

    def expert(self, number: int) -> str:
        """Return the path of one expert."""
        return f"{self.path}.{number}"

    def sites(self, *sides: Side) -> tuple[Site, ...]:
        """Return these sides of every expert, in order of number; ``gate`` only where there is one."""
        there: list[Side] = [side for side in sides if side != "gate" or self.gated]
        return tuple(Site(self.expert(number), side) for number in range(self.n_experts) for side in there)

    def size(self, side: Side) -> int:
        """Return how wide one expert's site is."""
        return self.hidden if side == "out" else self.width


def find_experts(decoder: nn.Module, layers_path: str) -> Mapping[str, Experts]:
    """Find the fused experts inside the layers, by path relative to the decoder, in the model's order.

    A module holds fused experts if parameters of its own are 3-D and named as transformers' experts interface
    wants: ``down_proj``, and ``gate_up_proj`` or ``up_proj``.
    Source: transformers ``integrations/moe.py``, ``use_experts_implementation``.
    """
    found = {}
    for path, child in decoder.named_modules():
        own = {name: tuple(p.shape) for name, p in child.named_parameters(recurse=False) if p.ndim == 3}
        makers = tuple(name for name in ("gate_up_proj", "gate_proj", "up_proj") if name in own)
        if path.startswith(layers_path + ".") and "down_proj" in own and makers not in ((), ("gate_proj",)):
            found[path] = _described(path, child, own, makers)
    return found


def _described(path: str, child: nn.Module, own: Mapping[str, tuple[int, ...]], makers: tuple[str, ...]) -> Experts:
    said: dict[str, Any] = vars(child)  # what transformers' decorator wrote into the module, if it did
    gated = makers != ("up_proj",)
    transposed = said.get("is_transposed", not _like_linear(own[makers[0]], own["down_proj"], makers))
    n_experts, *down = own["down_proj"]
    return Experts(
        path=path,
        n_experts=n_experts,
        width=down[0] if transposed else down[1],
        hidden=down[1] if transposed else down[0],
        makers=makers,
        down="down_proj",
        gated=gated,
        transposed=transposed,
        interleaved=not said.get("is_concatenated", True),
        biased=f"{makers[0]}_bias" in dict(child.named_parameters(recurse=False)),
        routed="top_k_index" in inspect.signature(type(child).forward).parameters,
        dispatched="is_transposed" in said,
    )


def _like_linear(maker: tuple[int, ...], down: tuple[int, ...], makers: tuple[str, ...]) -> bool:
    """Tell ``[expert, out, in]`` by shape: what makes the neurons has as many outputs as the down projection reads."""
    outputs = down[2] * (2 if makers[0] == "gate_up_proj" else 1)
    return maker[1:] == (outputs, down[1])
