"""Fused experts from inside: a forward of our own in transformers' experts interface, with places to read and change.

No hook on a module sees the neurons of fused experts. Inside `visited` the model's experts run through an entry of
transformers' ``ALL_EXPERTS_FUNCTIONS`` that computes what its ``grouped_mm`` does and shows every intermediate;
outside nothing is left of it. Modules that nobody visits keep the implementation that the model had. Experts that do
not go through that interface run their own code, and `products` looks at it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.integrations import moe
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from safeglasses.errors import SafeglassesError
from safeglasses.model.anatomy import Anatomy
from safeglasses.model.experts import Experts
from safeglasses.model.products import Products
from safeglasses.model.routes import Routing
from safeglasses.model.sites import Side, Site

_IMPLEMENTATION = "_experts_implementation_internal"  # of a config; private as well, so it is looked for first
NAME = "safeglasses"
"""Of the entry in transformers' interface."""


Visit = Callable[[Routing, Tensor], Tensor | None]
"""Sees the values ``[row, neuron]`` of one side; what it returns takes their place."""


@dataclass
class _Before:
    """What a config said before the first of us came."""

    config: Any
    implementation: str | None
    users: int = 0


@dataclass
class _Watched:
    """Hooks around the forward of experts that compute in a way of their own."""

    handles: tuple[RemovableHandle, ...]
    users: int = 1


_WATCHED: WeakKeyDictionary[nn.Module, _Watched] = WeakKeyDictionary()
_VISITS: WeakKeyDictionary[nn.Module, list[tuple[Side, Visit]]] = WeakKeyDictionary()
_BEFORE: dict[int, _Before] = {}


@contextmanager
def visited(
    model: nn.Module, anatomy: Anatomy, visits: Iterable[tuple[Experts, Side, Visit]], *, first: bool = False
) -> Iterator[None]:
    """Call every visit with the values of its side of all experts of a module, whenever a forward reaches them.

    Visits of one side see each other's changes, in the order in which they came, or before all others that are there
    (``first``: what changes weights comes before what scales their products). A module that no token is sent to
    is not reached.

    Raises:
        SafeglassesError: some experts cannot be visited (nothing is changed then).
    """
    wanted = tuple(visits)
    modules = [_module(model, anatomy, experts) for experts, _, _ in wanted]
    with ExitStack() as leaving:
        for module, (experts, side, visit) in zip(modules, wanted, strict=True):
            entry = (side, visit)
            others = _VISITS.setdefault(module, [])
            others.insert(0 if first else len(others), entry)
            leaving.callback(_forget, module, entry)
            if experts.dispatched:
                _take_over(module.config)
                leaving.callback(_hand_back, module.config)
            else:
                _watch(module, experts)
                leaving.callback(_unwatch, module)
        yield


def check_reachable(anatomy: Anatomy, sites: Iterable[Site]) -> None:
    """Check that the fused experts among these sites can be read and changed, as far as can be told before they run.

    Raises:
        SafeglassesError: they neither go through transformers' experts interface nor may `Products` understand them.
    """
    for site in sites:
        found = anatomy.expert(site)
        if found is not None and not found[0].dispatched and found[0].biased:
            raise SafeglassesError(
                "these experts compute in a way of their own, with biases, which cannot be read or changed from inside",
                given=f"{site}: the model's code does not use transformers' experts interface",
                expected="experts that transformers decorates with use_experts_implementation, or without biases",
                do='use sites="linears", which leaves fused experts out',
            )


def _module(model: nn.Module, anatomy: Anatomy, experts: Experts) -> Any:
    check_reachable(anatomy, [Site(experts.expert(0), "in")])
    module: Any = model.get_submodule(anatomy.absolute_path(experts.path))
    if vars(module).get("_is_expert_parallel", False):
        raise SafeglassesError(
            "experts that are spread over processes cannot be read or changed from inside",
            given=f"{experts.path} holds a part of its experts",
            do="load the model without expert parallelism",
        )
    return module


def _forget(module: nn.Module, entry: tuple[Side, Visit]) -> None:
    kept = [other for other in _VISITS.get(module, ()) if other is not entry]
    if kept:
        _VISITS[module] = kept
    else:
        _VISITS.pop(module, None)


def _take_over(config: Any) -> None:
    if _IMPLEMENTATION not in vars(config):
        raise SafeglassesError(
            "this version of transformers keeps the implementation of experts elsewhere",
            given=f"transformers {transformers.__version__}: no {_IMPLEMENTATION} in {type(config).__name__}",
            expected="a version that safeglasses was tested with, such as 5.23",
            do='install that, or use sites="linears", which leaves fused experts out',
        )
    before = _BEFORE.setdefault(id(config), _Before(config, config._experts_implementation))
    before.users += 1
    setattr(config, _IMPLEMENTATION, NAME)  # as transformers sets it: the property would reach sub-configs


def _hand_back(config: Any) -> None:
    before = _BEFORE[id(config)]
    before.users -= 1
    if not before.users:
        setattr(config, _IMPLEMENTATION, before.implementation)
        del _BEFORE[id(config)]


def _by_expert(
    value: Tensor, weight: Tensor, ends: Tensor, *, bias: Tensor | None = None, is_transposed: bool = False
) -> Tensor:
    """Multiply every expert's rows by its weight, one after the other; `_grouped` in terms of what is public."""
    firsts = [0, *ends.tolist()]
    parts = [
        value[first:last] @ (matrix if is_transposed else matrix.T)
        for first, last, matrix in zip(firsts, firsts[1:], weight, strict=False)
    ]
    product = torch.cat(parts)
    return product if bias is None else product + bias


_grouped: Callable[..., Tensor] = getattr(moe, "_grouped_linear", _by_expert)  # private, and many times as fast


def _forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Do as transformers' ``grouped_mm_experts_forward``, showing intermediates to those who visit the module."""
    visits = _VISITS.get(module)
    if not visits:
        return _as_before(module)(module, hidden_states, top_k_index, top_k_weights)
    tokens, k = top_k_index.shape
    expert, order = torch.sort(top_k_index.reshape(-1), stable=True)
    numbers = torch.arange(module.num_experts, device=expert.device, dtype=expert.dtype)
    ends = torch.searchsorted(expert, numbers, right=True).to(torch.int32)
    routing = Routing(expert, order // k, ends, hidden_states)

    def shown(side: Side, value: Tensor) -> Tensor:
        return _visited(visits, side, routing, value)

    def mapped(name: str, value: Tensor) -> Tensor:
        bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
        product = _by_expert if value.dtype == torch.float64 else _grouped  # PyTorch's grouped one knows no float64
        return product(value, getattr(module, name), ends, bias=bias, is_transposed=module.is_transposed)

    value = mapped("gate_up_proj" if module.has_gate else "up_proj", hidden_states[routing.row])
    sides = {side for side, _ in visits}
    if module.has_gate:
        value = module._apply_gate(_halves_shown(module, value, shown) if sides & {"gate", "up"} else value)
    else:
        value = module.act_fn(shown("up", value))
    value = shown("out", mapped("down_proj", shown("in", value)))
    if vars(module).get("has_post_expert_norm", False):
        value = module.post_expert_norm(value)
    value = value * top_k_weights.reshape(-1)[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return value[back].view(tokens, k, -1).sum(dim=1).to(hidden_states.dtype)


def _visited(visits: Sequence[tuple[Side, Visit]], side: Side, routing: Routing, value: Tensor) -> Tensor:
    for wanted, visit in visits:
        if wanted == side:
            changed = visit(routing, value)
            value = value if changed is None else changed
    return value


def _watch(module: nn.Module, experts: Experts) -> None:
    """Look at the products of experts that compute in a way of their own, from the first of us on."""
    if module in _WATCHED:
        _WATCHED[module].users += 1
        return

    products = Products(module, experts, lambda side, routing, value: _visited(_VISITS[module], side, routing, value))
    _WATCHED[module] = _Watched(
        (
            module.register_forward_pre_hook(lambda _module, args: products.begin(args[0])),
            module.register_forward_hook(lambda *_: products.check()),
            module.register_forward_hook(lambda *_: products.end(), always_call=True),
        )
    )


def _unwatch(module: nn.Module) -> None:
    watched = _WATCHED[module]
    watched.users -= 1
    if not watched.users:
        for handle in watched.handles:
            handle.remove()
        del _WATCHED[module]


def _halves_shown(module: Any, value: Tensor, shown: Callable[[Side, Tensor], Tensor]) -> Tensor:
    if module.is_concatenated:
        gate, up = value.chunk(2, dim=-1)
        return torch.cat([shown("gate", gate), shown("up", up)], dim=-1)
    gate, up = value[..., 0::2], value[..., 1::2]
    return torch.stack([shown("gate", gate), shown("up", up)], dim=-1).flatten(-2)


def _as_before(module: Any) -> Callable[..., Tensor]:
    """Return what the module would run without us."""
    own = type(module).forward.__wrapped__  # the model's own, under transformers' decorator
    before = _BEFORE.get(id(module.config))
    if before is None or before.implementation is None:
        return own
    return ALL_EXPERTS_FUNCTIONS.get_interface(before.implementation, own)


def by_module(anatomy: Anatomy, sites: Iterable[Site]) -> Mapping[tuple[str, Side], dict[int, Site]]:
    """Sort sites of fused experts by module and side, then by number."""
    found: dict[tuple[str, Side], dict[int, Site]] = {}
    for site in sites:
        place = anatomy.expert(site)
        if place is not None:
            found.setdefault((place[0].path, site.side), {})[place[1]] = site
    return found


ALL_EXPERTS_FUNCTIONS.register(NAME, _forward)
