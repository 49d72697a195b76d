"""Fused experts taken apart into one `nn.Linear` per map, with a loop for a forward: what they are compared with."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from families import picture
from safeglasses.model.sites import Side, Site
from safeglasses.model.vlm import VLM, Chat

LINEARS: Mapping[Side, tuple[str, Side]] = {
    "gate": ("gate_proj", "out"),
    "up": ("up_proj", "out"),
    "in": ("down_proj", "in"),
    "out": ("down_proj", "out"),
}
"""Which side of which linear map each side of an expert is."""
NOT_OURS = "ignore:__array__ implementation:DeprecationWarning"
"""NumPy's remark on how transformers' GLM and Ernie processors make arrays of tensors."""


class Expert(nn.Module):
    """One expert."""

    def __init__(self, fused: Any, number: int) -> None:
        super().__init__()

        def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
            made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
            made.weight.data.copy_(weight)
            if bias is not None:
                made.bias.data.copy_(bias)
            return made

        both, down = fused.gate_up_proj[number], fused.down_proj[number]
        biases = (fused.gate_up_proj_bias[number], fused.down_proj_bias[number]) if fused.has_bias else (None, None)
        if fused.is_transposed:
            both, down = both.T, down.T
        half = len(both) // 2
        first, second = (
            (slice(half), slice(half, None)) if fused.is_concatenated else (slice(0, None, 2), slice(1, None, 2))
        )
        bias = biases[0]
        self.gate_proj = linear(both[first], None if bias is None else bias[first])
        self.up_proj = linear(both[second], None if bias is None else bias[second])
        self.down_proj = linear(down, biases[1])
        self.act_fn, self.limit = getattr(fused, "act_fn", None), getattr(fused, "limit", None)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.act_fn is not None:
            return self.down_proj(self.act_fn(gate) * up)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)  # as GPT-OSS says of itself
        return self.down_proj((up + 1) * gate * torch.sigmoid(1.702 * gate))


class Unrolled(nn.ModuleList):
    """Experts as modules; per token those that the router chose, one after the other."""

    def __init__(self, fused: Any) -> None:
        super().__init__([Expert(fused, number) for number in range(fused.num_experts)])
        self.sent: list[tuple[int, Tensor]] = []

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden)
        for number, expert in enumerate(self):
            rows, place = (top_k_index == number).nonzero(as_tuple=True)
            if len(rows):
                order = rows.argsort(stable=True)
                rows, place = rows[order], place[order]
                self.sent.append((number, rows))
                total = total.index_add(0, rows, expert(hidden[rows]) * top_k_weights[rows, place, None])
        return total


def unrolled(vlm: VLM) -> tuple[nn.Module, dict[str, Unrolled]]:
    """Return a copy of a model whose fused experts are taken apart, and these by path within the decoder."""
    model = copy.deepcopy(vlm.model)
    made = {}
    for path in vlm.anatomy.experts:
        parent, _, leaf = vlm.anatomy.absolute_path(path).rpartition(".")
        made[path] = Unrolled(getattr(model.get_submodule(parent), leaf))
        setattr(model.get_submodule(parent), leaf, made[path])
    return model, made


@contextmanager
def hooked(made: Mapping[str, Unrolled], visits: Mapping[Site, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    """Visit sites of experts that were taken apart, with PyTorch's own hooks."""
    handles = []
    for site, visit in visits.items():
        path, _, number = site.path.rpartition(".")
        name, side = LINEARS[site.side]
        target = made[path][int(number)].get_submodule(name)
        if side == "in":
            handles.append(target.register_forward_pre_hook(lambda _m, args, visit=visit: visit(args[0])))
        else:
            handles.append(target.register_forward_hook(lambda _m, _a, value, visit=visit: visit(value)))
    yield
    for handle in handles:
        handle.remove()


def chat(vlm: VLM, index: int, response: str = "") -> Chat:
    """Return a chat with a picture where the model takes one."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": "what is " * index + "this"}]
    if vlm.is_multimodal:
        parts.insert(0, {"type": "image", "image": picture(24, 24 + 4 * index, seed=index)})
    return Chat([{"role": "user", "content": parts}], response)
