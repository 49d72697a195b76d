"""Scale rows and columns of weights: the arithmetic of folding and what must hold before it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from safeglasses.defend.factors import Factors, changed, in_order
from safeglasses.defend.home import check_fit
from safeglasses.errors import SafeglassesError
from safeglasses.model.anatomy import Anatomy, module
from safeglasses.model.routing import by_module, check_reachable
from safeglasses.model.sites import Side, Site

PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Steps = tuple[tuple[int, Tensor], ...]
"""Axes of a weight and the factors along them, in the order in which they are multiplied; of fused experts factors
have as many axes as the weight, the first being the experts."""


def scale_weights(model: nn.Module, anatomy: Anatomy, factors: Factors) -> None:
    """Multiply factors into the weights, in place.

    Output side: f ∘ (W x + b) = (f ∘ W) x + f ∘ b. Input side: W (f ∘ x) + b = (W ∘ f) x + b.
    Each weight is multiplied in float32 (float64 stays float64) and rounded once, both sides of it included.

    Raises:
        PartialMatch: some site is missing or of another width.
        SafeglassesError: a weight is quantised, shared, or not loaded. Nothing is changed in these cases.
    """
    check_fit(anatomy, factors)
    acting = changed(factors)
    paths = list(dict.fromkeys(site.path for site in in_order(acting) if anatomy.expert(site) is None))
    fused = expert_steps(anatomy, acting)
    check_foldable(model, anatomy, paths, list(fused))
    with torch.no_grad():
        for name, steps in fused.items():
            parameter = model.get_parameter(name)
            parameter.copy_(multiplied(parameter, steps))
        for path in paths:
            _scale(module(model, anatomy, path), acting.get(Site(path, "out")), acting.get(Site(path, "in")))


def expert_steps(anatomy: Anatomy, factors: Factors) -> dict[str, Steps]:
    """Return how the parameters of fused experts are multiplied, by their names in the model.

    Neurons are columns of the down projection, outputs its rows, halves rows of what makes the neurons: all exact.

    Raises:
        SafeglassesError: some experts compute in a way of their own, so what their weights do is not known.
    """
    check_reachable(anatomy, factors)
    found: dict[str, Steps] = {}
    halves: dict[str, dict[Side, Tensor]] = {}
    for (path, side), numbers in by_module(anatomy, in_order(factors)).items():
        experts, name = anatomy.experts[path], anatomy.absolute_path(path)
        table = torch.ones(experts.n_experts, experts.size(side))
        for number, site in numbers.items():
            table[number] = factors[site]
        if side in ("gate", "up"):
            halves.setdefault(path, {})[side] = table
            continue
        axis = (side == "in") != experts.transposed  # whether factors lie along the weight's last axis
        down = f"{name}.{experts.down}"
        found[down] = (*found.get(down, ()), (0, table[:, None, :] if axis else table[:, :, None]))
        if side == "out" and experts.biased:
            found[f"{down}_bias"] = ((0, table),)
    for path, tables in halves.items():
        experts, name = anatomy.experts[path], anatomy.absolute_path(path)
        ones = torch.ones(experts.n_experts, experts.width)
        by_maker = {f"{side}_proj": table for side, table in tables.items()}
        if "gate_up_proj" in experts.makers:
            pair = [tables.get(side, ones) for side in ("gate", "up")]
            both = torch.stack(pair, dim=2).flatten(1) if experts.interleaved else torch.cat(pair, dim=1)
            by_maker = {"gate_up_proj": both}
        for maker, table in by_maker.items():
            found[f"{name}.{maker}"] = ((0, table[:, None, :] if experts.transposed else table[:, :, None]),)
            if experts.biased:
                found[f"{name}.{maker}_bias"] = ((0, table),)
    return found


def check_foldable(model: nn.Module, anatomy: Anatomy, paths: list[str], fused: Sequence[str] = ()) -> None:
    """Refuse to change these maps and parameters where that would change something else, or nothing at all.

    Raises:
        SafeglassesError: a weight is quantised, shared, or not loaded.
    """
    for path in paths:
        _check_plain(anatomy.absolute_path(path), module(model, anatomy, path))
    for path in dict.fromkeys(name.rpartition(".")[0] for name in fused):
        _check_plain(path, model.get_submodule(path))
    names = [anatomy.absolute_path(path) for path in paths]
    _check_untied(model, {*fused, *(f"{name}.{leaf}" for name in names for leaf in ("weight", "bias"))})


def steps_for(linear: nn.Module, out: Tensor | None, into: Tensor | None) -> Steps:
    """Return along which axes of a map's weight its factors are multiplied, outputs first."""
    axis = 1 if isinstance(linear, Conv1D) else 0  # Conv1D keeps (in, out)
    sides = ((axis, out), (1 - axis, into))
    return tuple((axis, factors) for axis, factors in sides if factors is not None)


def multiplied(weight: Tensor, steps: Steps) -> Tensor:
    """Return a weight with factors multiplied in, one step after the other in float32, and rounded once."""
    kind = torch.promote_types(weight.dtype, torch.float32)
    product = weight.detach().to(kind, copy=True)
    for axis, factors in steps:
        row = factors.to(weight.device, kind)
        product *= row.reshape([-1 if a == axis else 1 for a in range(product.ndim)]) if row.ndim == 1 else row
    return product.to(weight.dtype)


def shared(name: str, other: str) -> SafeglassesError:
    """Return the refusal of a weight that is another one as well."""
    return SafeglassesError(
        "a weight shared with another module cannot be folded: both would change",
        given=f"{name} shares its memory with {other}",
        expected="weights of their own for all maps that the glasses scale",
        do="keep the adapter folder and wear it through PEFT, which scales activations",
    )


def _scale(linear: nn.Module, out: Tensor | None, into: Tensor | None) -> None:
    weight, bias = linear.get_parameter("weight"), dict(linear.named_parameters(recurse=False)).get("bias")
    if out is not None and bias is not None:
        bias.copy_(multiplied(bias, ((0, out),)))
    weight.copy_(multiplied(weight, steps_for(linear, out, into)))


def _check_plain(name: str, linear: nn.Module) -> None:
    """Refuse weights whose numbers are not there to be multiplied."""
    for leaf, parameter in linear.named_parameters(recurse=False):
        if parameter.device.type == "meta":
            raise SafeglassesError(
                "a weight that is not loaded cannot be folded",
                given=f"{name}.{leaf} on the meta device (offloaded to disk or CPU)",
                expected="every decoder weight on a real device",
                do="load the model without offloading: device_map=None or more memory",
            )
        plain = type(parameter) in (nn.Parameter, Tensor) and type(parameter.data) is Tensor
        if not plain or parameter.dtype not in PLAIN:
            raise SafeglassesError(
                "a quantised or sharded weight cannot be folded",
                given=f"{name}.{leaf}: {type(parameter).__name__} of {parameter.dtype}",
                expected="plain tensors of " + ", ".join(str(d).removeprefix("torch.") for d in PLAIN),
                do="load the model unquantised (dtype=bfloat16), fold, then quantise the result; "
                "or keep the adapter folder and wear it through PEFT",
            )


def _check_untied(model: nn.Module, wanted: set[str]) -> None:
    """Refuse weights whose memory another parameter or buffer uses as well: scaling one would scale both."""
    spans = []
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        if tensor.device.type != "meta" and tensor.numel() and type(tensor.data) is Tensor:
            start = tensor.data_ptr()
            extent = sum((n - 1) * abs(s) for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            spans.append((str(tensor.device), start, start + extent * tensor.element_size(), name))
    spans.sort()
    furthest: tuple[str, int, int, str] | None = None
    for span in spans:
        if furthest is not None and furthest[0] == span[0] and span[1] < furthest[2]:
            pair = sorted((furthest[3], span[3]), key=lambda name: name not in wanted)
            if pair[0] in wanted:
                raise shared(*pair)
        if furthest is None or furthest[0] != span[0] or span[2] > furthest[2]:
            furthest = span
