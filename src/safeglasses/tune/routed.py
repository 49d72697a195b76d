"""Changes of fused experts at work: worn, and trained, by adding ΔW x where an expert's gate and up are computed.

No module computes with one expert's slice of a 3-D parameter alone, so what PEFT does for them is to make the whole
changed parameter in every forward. Here the change acts on the values of the tokens that were sent to the expert
(`model.routing`), as the change of a linear map acts on its output; what is trained are the rows of the selected
neurons, in one tensor for all experts of a parameter, so that an expert without a token in a step has gradient zero
there, as a slice of the parameter itself would have; so has a parameter of which no expert has one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from safeglasses.errors import PartialMatch
from safeglasses.model.anatomy import Anatomy
from safeglasses.model.experts import Experts
from safeglasses.model.routes import Routing
from safeglasses.model.routing import Visit, visited
from safeglasses.model.sites import Side
from safeglasses.model.weights import whole
from safeglasses.tune.change import Change
from safeglasses.tune.slices import Slice, shape_of, slice_of
from safeglasses.tune.targets import Target

NAME = "safeglasses_experts"
"""What the trained module is called inside the model while it trains."""


@dataclass(frozen=True, eq=False)
class _Pair:
    """A and B of one expert; the scale is in neither."""

    a: Float[Tensor, "rank in"]
    b: Float[Tensor, "row rank"] | None
    rows: Int[Tensor, " row"] | None
    scale: float

    def of(self, x: Tensor, index: Int[Tensor, " some"] | slice) -> Tensor:
        """Return some rows of ΔW x: those at these places among the rows that change."""
        if self.b is None:
            return functional.linear(x, self.a[index]) * self.scale
        return functional.linear(functional.linear(x, self.a), self.b[index]) * self.scale


_Pairs = Callable[[torch.device, torch.dtype], Mapping[int, _Pair]]
"""Gives A and B of some experts of one parameter, by the experts' numbers."""


class ExpertRows(nn.Module):
    """What is trained of one parameter of fused experts: A and B of all its selected experts, one behind the other."""

    def __init__(self, targets: Sequence[Target], scale: float, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.targets, self.scale = tuple(targets), scale
        one_hot = targets[0].one_hot
        a = torch.empty(sum(target.rank for target in targets), targets[0].into, device=device, dtype=dtype)
        self.a = nn.Parameter(nn.init.zeros_(a) if one_hot else nn.init.kaiming_uniform_(a, a=5**0.5))  # as PEFT
        sizes = [target.n_rows * target.rank for target in targets]
        self.b = None if one_hot else nn.Parameter(torch.zeros(sum(sizes), device=device, dtype=dtype))

    def taken(self, a: Tensor, b: Tensor | None) -> list[tuple[Target, Tensor, Tensor | None]]:
        """Cut A and B into those of the experts."""
        firsts = a.split([target.rank for target in self.targets])
        if b is None:
            return [(target, one, None) for target, one in zip(self.targets, firsts, strict=True)]
        seconds = b.split([target.n_rows * target.rank for target in self.targets])
        return [
            (target, one, two.view(target.n_rows, target.rank))
            for target, one, two in zip(self.targets, firsts, seconds, strict=True)
        ]

    def pairs(self, device: torch.device, dtype: torch.dtype) -> Mapping[int, _Pair]:
        """Return A and B as they are now."""
        b = None if self.b is None else self.b.to(device, dtype)
        return {
            _part(target).number: _Pair(one, two, target.rows, self.scale)
            for target, one, two in self.taken(self.a.to(device, dtype), b)
        }

    def changes(self) -> dict[str, Change]:
        """Read what was trained, on the CPU."""
        a, b = whole(self.a).cpu(), None if self.b is None else whole(self.b).cpu()
        return {
            t.path: Change(
                t.out, t.into, one.clone(), None if two is None else two.clone(), t.rows, None, self.scale, t.part
            )
            for t, one, two in self.taken(a, b)
        }

    def rows_in(self, parameter: Tensor) -> Tensor:
        """Return the rows of the 3-D parameter that A is a change of (``rows``)."""
        parts = []
        for target in self.targets:
            part = _part(target)
            matrix = parameter[part.number].T if part.transposed else parameter[part.number]
            parts.append(matrix if target.rows is None else matrix[target.rows.to(matrix.device)])
        return torch.cat(parts)


@dataclass(frozen=True, eq=False)
class _Worn:
    """Changes of one parameter, cast once per device and dtype."""

    changes: Sequence[Change]
    cast: dict[tuple[torch.device, torch.dtype], Mapping[int, _Pair]]

    def pairs(self, device: torch.device, dtype: torch.dtype) -> Mapping[int, _Pair]:
        """Return A and B."""
        key = (device, dtype)
        if key not in self.cast:
            moved = [change.to(device, dtype) for change in self.changes]
            self.cast[key] = {_part(c).number: _Pair(c.a, c.b, c.rows, c.scale) for c in moved}
        return self.cast[key]


@contextmanager
def experts_worn(model: nn.Module, anatomy: Anatomy, changes: Mapping[str, Change]) -> Iterator[None]:
    """Let changes of fused experts act, before whatever else acts on these experts."""
    by_parameter: dict[str, list[Change]] = {}
    for change in changes.values():
        if change.part is not None:
            by_parameter.setdefault(change.part.parameter, []).append(change)
    with ExitStack() as leaving:
        for some in by_parameter.values():
            visits = _visits(anatomy, _part(some[0]), _Worn(some, {}).pairs)
            leaving.enter_context(visited(model, anatomy, visits, first=True))
        yield


@contextmanager
def experts_trained(
    model: PreTrainedModel, anatomy: Anatomy, targets: Sequence[Target], scale: float
) -> Iterator[Mapping[str, ExpertRows]]:
    """Put what is trained of fused experts into a model, at work, until the block ends; by the parameter's path."""
    by_parameter: dict[str, list[Target]] = {}
    for target in targets:
        if target.part is not None:
            by_parameter.setdefault(target.part.parameter, []).append(target)
    made: dict[str, ExpertRows] = {}
    with ExitStack() as leaving:
        for path, some in by_parameter.items():
            parameter = model.get_parameter(anatomy.absolute_path(path))
            kind = torch.promote_types(parameter.dtype, torch.float32)
            made[path] = ExpertRows(some, 1.0 if some[0].one_hot else scale, parameter.device, kind)
            visits = _visits(anatomy, _part(some[0]), made[path].pairs)
            leaving.enter_context(visited(model, anatomy, visits, first=True))
            experts = model.get_submodule(anatomy.absolute_path(_part(some[0]).module))
            leaving.callback(experts.register_forward_hook(_reaching(made[path])).remove)
        if made:
            model.add_module(NAME, nn.ModuleList(made.values()))
            leaving.callback(delattr, model, NAME)
        yield made


def check_slices(anatomy: Anatomy, changes: Mapping[str, Change]) -> None:
    """Refuse a model without these very slices of 3-D parameters.

    Raises:
        PartialMatch: naming them.
    """
    wrong = []
    for change in changes.values():
        part = change.part
        if part is None:
            continue
        experts, name = anatomy.experts.get(part.module), part.parameter.rpartition(".")[2]
        there = experts is not None and name in experts.makers and part.number < experts.n_experts
        if not there or experts is None:
            wrong.append(f"{part.path} (no such expert)")
        elif (slice_of(experts, part.number, name), shape_of(experts, name)) != (part, (change.out, change.into)):
            wrong.append(f"{part.path} (another size or layout)")
    if wrong:
        raise PartialMatch(
            "the shield fits only a part of this model",
            given=f"{len(wrong)} of {len(changes)} changes do not match: {', '.join(wrong[:8])}"
            + (f", and {len(wrong) - 8} more" if len(wrong) > 8 else ""),
            expected="fused experts of the same number, size and layout",
            do="wear it on the model it was made for; safeglasses inspect MODEL lists sites",
        )


def _reaching(rows: ExpertRows) -> Callable[..., Tensor]:
    """Return a hook by which every forward reaches what is trained, also where no selected expert has a token."""

    def reach(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        everything = torch.stack([parameter.sum() for parameter in rows.parameters()]).sum()
        return output + (everything * 0).to(output.dtype)

    return reach


def _part(one: Target | Change) -> Slice:
    if one.part is None:
        raise TypeError("not of fused experts")
    return one.part


def _visits(anatomy: Anatomy, part: Slice, source: _Pairs) -> list[tuple[Experts, Side, Visit]]:
    experts = anatomy.experts[part.module]
    return [(experts, side, _adder(source, part, half, experts.width)) for half, side in enumerate(part.sides)]


def _adder(source: _Pairs, part: Slice, half: int, width: int) -> Visit:
    """Return what adds one half of the changes of a parameter to the values of that half."""
    places: dict[int, tuple[Tensor, Tensor]] = {}

    def place(number: int, pair: _Pair, device: torch.device) -> tuple[Tensor, Tensor]:
        if number not in places:
            count = len(part.sides) * width
            rows = torch.arange(count, device=device) if pair.rows is None else pair.rows.to(device)
            halves, neurons = part.neuron(rows, width)
            index = (halves == half).nonzero()[:, 0]
            places[number] = (index, neurons[index])
        return places[number]

    def add(routing: Routing, value: Tensor) -> Tensor:
        kind = torch.promote_types(value.dtype, torch.float32)
        pairs, read = source(value.device, kind), routing.read
        ends, parts, done = routing.ends.tolist(), [], 0
        for number in sorted(pairs):
            first, last = (ends[number - 1] if number else 0), ends[number]
            if first == last:
                continue
            index, neurons = place(number, pairs[number], value.device)
            more = pairs[number].of(read[first:last].to(kind), index)
            parts += [value[done:first], value[first:last].to(kind).index_add(-1, neurons, more).to(value.dtype)]
            done = last
        return torch.cat([*parts, value[done:]])

    return add
