"""Read and scale the values at sites during a forward pass; outside the ``with`` block nothing is left."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from safeglasses.errors import SafeglassesError
from safeglasses.model.anatomy import Anatomy, module
from safeglasses.model.sites import Site

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
    wanted = tuple(dict.fromkeys(sites))
    anatomy.require_linear(wanted)
    with ExitStack() as hooks:
        for site in wanted:
            _attach(hooks, model, anatomy, site, _reader(site, callback))
        yield


@contextmanager
def scaled(model: nn.Module, anatomy: Anatomy, factors: Mapping[Site, Float[Tensor, " neuron"]]) -> Iterator[None]:
    """Multiply the value at each site by its factors, cast to the value's dtype and device.

    Gradients flow into factors that require them.

    Raises:
        PartialMatch: a site's module is missing (nothing is registered then).
        SafeglassesError: a site's factors have the wrong length (nothing is registered then).
    """
    anatomy.require_linear(factors)
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
        for site, factor in factors.items():
            _attach(hooks, model, anatomy, site, _scaler(factor))
        yield


@contextmanager
def replaced(model: nn.Module, anatomy: Anatomy, visits: Mapping[Site, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Put what a function makes of the value at each site (``[..., neuron]``) in its place; same shape and dtype.

    Raises:
        PartialMatch: a site's module is missing (nothing is registered then).
    """
    anatomy.require_linear(visits)
    with ExitStack() as hooks:
        for site, visit in visits.items():
            _attach(hooks, model, anatomy, site, visit)
        yield


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
