"""Read and scale the values at sites during a forward pass; outside the ``with`` block nothing is left.

At a linear map a value is ``[..., neuron]``, all tokens in their places. At one of fused experts it is
``[token, neuron]``: the tokens that were sent there, in their order; if there are none, nobody is called.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from safeglasses.errors import SafeglassesError
from safeglasses.model.anatomy import Anatomy, module
from safeglasses.model.experts import Experts
from safeglasses.model.routes import Routing, together, tokens_of
from safeglasses.model.routing import Visit as RoutedVisit
from safeglasses.model.routing import by_module, check_reachable, visited
from safeglasses.model.sites import Side, Site

Visit = Callable[[Tensor], Tensor | None]


@contextmanager
def tap(
    model: nn.Module, anatomy: Anatomy, sites: Iterable[Site], callback: Callable[[Site, Tensor], None]
) -> Iterator[None]:
    """Call ``callback(site, value)`` with each site's value (``[..., neuron]``) when a forward reaches it.

    The callback sees the very tensor that the model uses: it must not write into it. An exception in it ends
    the forward and removes the hooks. Nested in `scaled`, a site shows its value as scaled.

    Raises:
        PartialMatch: a site's module is missing (nothing is registered then).
    """
    linear, fused = _checked(anatomy, dict.fromkeys(sites))
    with ExitStack() as hooks:
        for site in linear:
            _attach(hooks, model, anatomy, site, _reader(site, callback))
        for (path, side), numbers in fused.items():

            def read(routing: Routing, value: Tensor, numbers: Mapping[int, Site] = numbers) -> None:
                for expert, rows in routing.slices:
                    if expert in numbers:
                        callback(numbers[expert], value[rows])

            hooks.enter_context(visited(model, anatomy, [(anatomy.experts[path], side, read)]))
        yield


@contextmanager
def tap_routed(
    model: nn.Module,
    anatomy: Anatomy,
    wanted: Iterable[tuple[Experts, Side]],
    callback: Callable[[Experts, Side, Routing, Tensor], None],
    *,
    tokens: int,
) -> Iterator[None]:
    """Call back with the values of all experts of a module at once (``[row, neuron]``), and say whose they are.

    Args:
        model: the model.
        anatomy: its anatomy.
        wanted: modules of fused experts, and which of their sides.
        callback: gets these, the routing, whose ``row`` counts tokens of the whole batch, and the values.
        tokens: tokens of a batch, padding included.

    Raises:
        SafeglassesError: some experts cannot be read (nothing is registered then).
    """
    with ExitStack() as hooks:
        for experts, side in wanted:
            given: dict[str, Tensor] = {}
            parts: list[tuple[Routing, Tensor]] = []

            def read(
                routing: Routing,
                value: Tensor,
                experts: Experts = experts,
                side: Side = side,
                given: Any = given,
                parts: list[tuple[Routing, Tensor]] = parts,
            ) -> None:
                if not routing.whole:
                    parts.append((routing, value))
                    return
                placed = replace(routing, row=tokens_of(routing, given.pop("whole", None), tokens))
                callback(experts, side, placed, value)

            def gather(
                _module: nn.Module, _args: Any, _output: Any, parts: Any = parts, read: Any = read
            ) -> None:  # experts that compute one after the other are read together, once the last has
                if parts:
                    found, parts[:] = list(parts), []
                    read(*together(found))

            hooks.enter_context(visited(model, anatomy, [(experts, side, read)]))
            holder = model.get_submodule(anatomy.absolute_path(experts.path))
            hooks.callback(holder.register_forward_hook(gather).remove)
            for path in _inside_layer(anatomy, experts):

                def keep(
                    _module: nn.Module, args: Any, kwargs: Any, experts: Any = experts, given: Any = given
                ) -> None:
                    for value in (*args, *kwargs.values()):
                        if isinstance(value, Tensor) and value.shape[-1:] == (experts.hidden,):
                            rows = value.reshape(-1, experts.hidden)
                            given.update({"whole": rows} if len(rows) == tokens else {})

                block = model.get_submodule(anatomy.absolute_path(path))
                hooks.callback(block.register_forward_pre_hook(keep, with_kwargs=True).remove)
        yield


@contextmanager
def scaled(model: nn.Module, anatomy: Anatomy, factors: Mapping[Site, Float[Tensor, " neuron"]]) -> Iterator[None]:
    """Multiply the value at each site by its factors, cast to the value's dtype and device.

    Gradients flow into factors that require them.

    Raises:
        PartialMatch: a site's module is missing (nothing is registered then).
        SafeglassesError: a site's factors have the wrong length (nothing is registered then).
    """
    linear, fused = _checked(anatomy, factors)
    for site, factor in factors.items():
        width = anatomy.width(site)
        if factor.shape != (width,):
            raise SafeglassesError(
                "factors do not fit their site",
                given=f"shape {tuple(factor.shape)} for {site}",
                expected=f"shape ({width},)",
                do="use factors made for this model",
            )
    with ExitStack() as hooks:
        for site in linear:
            _attach(hooks, model, anatomy, site, _scaler(factors[site]))
        for (path, side), numbers in fused.items():
            experts = anatomy.experts[path]
            scale = _routed_scaler(experts, side, {n: factors[site] for n, site in numbers.items()})
            hooks.enter_context(visited(model, anatomy, [(experts, side, scale)]))
        yield


@contextmanager
def replaced(model: nn.Module, anatomy: Anatomy, visits: Mapping[Site, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Put what a function makes of the value at each site (``[..., neuron]``) in its place; same shape and dtype.

    Raises:
        PartialMatch: a site's module is missing (nothing is registered then).
    """
    linear, fused = _checked(anatomy, visits)
    with ExitStack() as hooks:
        for site in linear:
            _attach(hooks, model, anatomy, site, visits[site])
        for (path, side), numbers in fused.items():
            put = _routed_replacer({n: visits[site] for n, site in numbers.items()})
            hooks.enter_context(visited(model, anatomy, [(anatomy.experts[path], side, put)]))
        yield


@contextmanager
def before_layers(model: nn.Module, anatomy: Anatomy, call: Callable[[], None]) -> Iterator[None]:
    """Call when the decoder's layers begin: vision towers, projectors and encoders have run then."""
    layers = model.get_submodule(anatomy.absolute_path(anatomy.layers_path))
    handle = next(layers.children()).register_forward_pre_hook(lambda *_: call())
    try:
        yield
    finally:
        handle.remove()


def _checked(
    anatomy: Anatomy, sites: Iterable[Site]
) -> tuple[list[Site], Mapping[tuple[str, Side], Mapping[int, Site]]]:
    """Check that all sites are there and can be hooked; sort them into linear maps and fused experts."""
    wanted = list(sites)
    linear = [site for site in wanted if anatomy.expert(site) is None]
    anatomy.require(*(site.path for site in linear))
    for site in wanted:
        anatomy.width(site)
    check_reachable(anatomy, wanted)
    return linear, by_module(anatomy, wanted)


def _inside_layer(anatomy: Anatomy, experts: Experts) -> list[str]:
    """Return the paths of the modules around fused experts, inside their layer, outermost first."""
    start = len(anatomy.layers_path.split(".")) + 2
    parts = experts.path.split(".")
    return [".".join(parts[:stop]) for stop in range(start, len(parts))]


def _reader(site: Site, callback: Callable[[Site, Tensor], None]) -> Visit:
    def read(value: Tensor) -> None:
        callback(site, value)

    return read


def _scaler(factor: Tensor) -> Visit:
    cast: dict[tuple[torch.device, torch.dtype], Tensor] = {}  # one cast per device and dtype, not one per token

    def scale(value: Tensor) -> Tensor:
        if factor.requires_grad:
            return value * factor.to(value.device, value.dtype)
        key = (value.device, value.dtype)
        if key not in cast:
            cast[key] = factor.to(value.device, value.dtype)
        return value * cast[key]

    return scale


def _routed_scaler(experts: Experts, side: Side, factors: Mapping[int, Tensor]) -> RoutedVisit:
    kept: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def table(value: Tensor) -> Tensor:
        ones = value.new_ones(experts.size(side))
        return torch.stack(
            [factors[n].to(value.device, value.dtype) if n in factors else ones for n in range(experts.n_experts)]
        )

    def scale(routing: Routing, value: Tensor) -> Tensor:
        if any(factor.requires_grad for factor in factors.values()):
            return value * table(value)[routing.expert]
        key = (value.device, value.dtype)
        if key not in kept:
            kept[key] = table(value)
        return value * kept[key][routing.expert]

    return scale


def _routed_replacer(visits: Mapping[int, Callable[[Tensor], Tensor]]) -> RoutedVisit:
    def put(routing: Routing, value: Tensor) -> Tensor | None:
        parts = [visits[n](value[rows]) if n in visits else value[rows] for n, rows in routing.slices]
        return torch.cat(parts) if parts else None

    return put


def _attach(hooks: ExitStack, model: nn.Module, anatomy: Anatomy, site: Site, visit: Visit) -> None:
    target = module(model, anatomy, site)
    handle: RemovableHandle
    if site.side == "out":

        def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
            return visit(output)

        handle = target.register_forward_hook(after)
    else:

        def before(_module: nn.Module, args: tuple[Any, ...]) -> Any:
            value = visit(args[0])
            return None if value is None else (value, *args[1:])

        handle = target.register_forward_pre_hook(before)
    hooks.callback(handle.remove)
