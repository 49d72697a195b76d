"""Fused experts from inside: a forward of our own in transformers' experts interface, with places to read and change.

No hook on a module sees the neurons of fused experts. Inside `visited` the model's experts run through an entry of
transformers' ``ALL_EXPERTS_FUNCTIONS`` that computes what its ``grouped_mm`` does and shows every intermediate;
outside nothing is left of it. Modules that nobody visits keep the implementation that the model had.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_linear

from safeglasses.errors import SafeglassesError
from safeglasses.model.anatomy import Anatomy
from safeglasses.model.experts import Experts
from safeglasses.model.sites import Side, Site

NAME = "safeglasses"
"""Of the entry in transformers' interface."""


@dataclass(frozen=True)
class Routing:
    """Which tokens one forward of fused experts sends to which of them: a row per pair, by expert, then by token."""

    expert: Int[Tensor, " row"]
    """Numbers of the experts, ascending."""
    row: Int[Tensor, " row"]
    """Which of the tokens that the module was given."""
    ends: Int[Tensor, " expert"]
    """Per expert the row behind its last one."""
    given: Float[Tensor, "token hidden"]
    """What the module was given."""

    @cached_property
    def slices(self) -> tuple[tuple[int, slice], ...]:
        """The experts that get a token, and their rows."""
        ends = self.ends.tolist()
        bounds = zip([0, *ends[:-1]], ends, strict=True)
        return tuple((expert, slice(first, last)) for expert, (first, last) in enumerate(bounds) if first < last)


Visit = Callable[[Routing, Tensor], Tensor | None]
"""Sees the values ``[row, neuron]`` of one side; what it returns takes their place."""


@dataclass
class _Before:
    """What a config said before the first of us came."""

    config: Any
    implementation: str | None
    users: int = 0


_VISITS: WeakKeyDictionary[nn.Module, list[tuple[Side, Visit]]] = WeakKeyDictionary()
_BEFORE: dict[int, _Before] = {}


@contextmanager
def visited(model: nn.Module, anatomy: Anatomy, visits: Iterable[tuple[Experts, Side, Visit]]) -> Iterator[None]:
    """Call every visit with the values of its side of all experts of a module, whenever a forward reaches them.

    Visits of one side see each other's changes, in the order in which they came. A module that no token is sent to
    is not reached.

    Raises:
        SafeglassesError: some experts cannot be visited (nothing is changed then).
    """
    wanted = tuple(visits)
    modules = [_module(model, anatomy, experts) for experts, _, _ in wanted]
    with ExitStack() as leaving:
        for module, (_, side, visit) in zip(modules, wanted, strict=True):
            entry = (side, visit)
            _VISITS.setdefault(module, []).append(entry)
            leaving.callback(_forget, module, entry)
            _take_over(module.config)
            leaving.callback(_hand_back, module.config)
        yield


def check_reachable(anatomy: Anatomy, sites: Iterable[Site]) -> None:
    """Check that the fused experts among these sites can be read and changed.

    Raises:
        SafeglassesError: they do not go through transformers' experts interface.
    """
    for site in sites:
        found = anatomy.expert(site)
        if found is not None and not found[0].dispatched:
            raise SafeglassesError(
                "these experts compute in a way of their own, which cannot be read or changed from inside",
                given=f"{site}: the model's code does not use transformers' experts interface"
                + ("" if found[0].routed else ", and every token passes every expert"),
                expected="experts that transformers decorates with use_experts_implementation",
                do='use sites="linears", which leaves fused experts out',
            )


def tokens_of(routing: Routing, whole: Float[Tensor, "token hidden"] | None, count: int) -> Int[Tensor, " row"]:
    """Return which of the tokens of a batch each row is of.

    Some models give their experts a part of the tokens only, such as those of pictures: these are found again in
    what the block around the experts was given.

    Args:
        routing: of one forward.
        whole: what the block was given, all tokens of the batch; None: not known.
        count: tokens of the batch, padding included.

    Raises:
        SafeglassesError: the tokens cannot be told.
    """
    if len(routing.given) == count:
        return routing.row
    if whole is not None and len(whole) == count:
        weights = torch.randint(2**62, (whole.shape[1],), generator=torch.Generator().manual_seed(0))
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[whole.dtype.itemsize]
        every, some = (
            (rows.detach().contiguous().view(integer).long() * weights.to(rows.device)).sum(dim=1)
            for rows in (whole, routing.given)
        )
        place = torch.isin(every, some).nonzero()[:, 0]
        if len(place) == len(some) and torch.equal(every[place], some):
            return place[routing.row]
    raise SafeglassesError(
        "it cannot be told which tokens these experts were given",
        given=f"{len(routing.given)} of {count} tokens",
        expected="all tokens, or a part of what their block was given, in order",
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
    before = _BEFORE.setdefault(id(config), _Before(config, config._experts_implementation))
    before.users += 1
    config._experts_implementation_internal = NAME  # as transformers sets it: the property would reach sub-configs


def _hand_back(config: Any) -> None:
    before = _BEFORE[id(config)]
    before.users -= 1
    if not before.users:
        config._experts_implementation_internal = before.implementation
        del _BEFORE[id(config)]


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
        for wanted, visit in visits:
            if wanted == side:
                changed = visit(routing, value)
                value = value if changed is None else changed
        return value

    def mapped(name: str, value: Tensor) -> Tensor:
        bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
        return _grouped_linear(value, getattr(module, name), ends, bias=bias, is_transposed=module.is_transposed)

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
