"""Which tensors on disk change, and how, when glasses or a shield are folded into a checkpoint of plain numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from safeglasses.defend.factors import Factors, changed, in_order
from safeglasses.defend.home import check_fit, check_widths
from safeglasses.defend.weights import PLAIN, Steps, expert_steps, multiplied, shared, steps_for
from safeglasses.errors import SafeglassesError
from safeglasses.model.anatomy import module
from safeglasses.model.sites import Site
from safeglasses.ship.checkpoint import Change, Checkpoint
from safeglasses.ship.naming import Conversion
from safeglasses.ship.stored import Stored
from safeglasses.tune.change import Change as Added
from safeglasses.tune.routed import check_slices
from safeglasses.tune.stack import Stack, stacked


@dataclass(frozen=True)
class Scaling:
    """A sum and factors along the axes of one tensor; can be applied to a run of its rows."""

    steps: Steps
    """Axes and factors, in order."""
    added: Added | Stack | None = None
    """What a shield adds before anything is scaled."""
    transposed: bool = False
    """Whether the tensor keeps (in, out)."""

    def __call__(self, tensor: Tensor) -> Tensor:
        """Change the whole tensor."""
        return self.rows(tensor, 0)

    def rows(self, block: Tensor, first: int) -> Tensor:
        """Change some of its rows.

        Args:
            block: the rows.
            first: index of the first of them.
        """
        steps = ((axis, f[first : first + len(block)] if axis == 0 else f) for axis, f in self.steps)
        if self.added is None:
            return multiplied(block, tuple(steps))
        total = block.to(torch.float64, copy=True)
        if self.transposed and isinstance(self.added, Added):
            total += self.added.delta().T[first : first + len(block)]
        else:
            self.added.add_to(total, first)
        return multiplied(total, tuple(steps)).to(block.dtype)


@dataclass(frozen=True, eq=False)
class Regrouping:
    """Scales tensors in memory of which a tensor on disk is only a part, or which are parts of it."""

    checkpoint: Checkpoint
    """Where everything is read."""
    conversion: Conversion
    """How the tensors in memory are made."""
    scalings: Mapping[str, Scaling]
    """What happens to them, by name in memory."""
    key: str
    """Which tensor on disk is wanted."""

    def __call__(self, tensor: Tensor) -> Tensor:
        """Convert, scale, and convert back.

        Raises:
            SafeglassesError: converting back does not give the very same numbers.
        """
        model, conversion = self.checkpoint.model, self.conversion
        stored = {source.stored.key: self.checkpoint.read(source.stored) for source in conversion.sources}
        stored[self.key] = tensor
        made = conversion.forward(model, lambda source: stored[source.key])
        self._check(stored, conversion.backward(model, made))
        scaled = {name: self.scalings[name](value) if name in self.scalings else value for name, value in made.items()}
        result = conversion.backward(model, scaled)
        self._check(scaled, conversion.forward(model, lambda source: result[source.key]))
        return result[self.key].contiguous()

    def _check(self, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
        for name, tensor in expected.items():
            other = found[name]
            if other.dtype != tensor.dtype or not torch.equal(other, tensor):
                raise SafeglassesError(
                    "transformers' own conversion of a weight cannot be turned round exactly",
                    given=f"{name} in {self.checkpoint.source} is another after there and back",
                    expected="a conversion that only moves numbers",
                    do="keep the adapter folder and wear it through PEFT",
                )


def plain_changes(
    checkpoint: Checkpoint, factors: Factors, added: Mapping[str, Added] = MappingProxyType({})
) -> list[Change]:
    """Find what to change on disk so that the loaded model has sums and factors in its weights and biases.

    Raises:
        PartialMatch: some site is missing or of another width.
        SafeglassesError: a weight is quantised, shared, or made by a conversion that has no reverse.
    """
    check_fit(checkpoint.anatomy, factors)
    linear = {path: change for path, change in added.items() if change.part is None}
    sizes = {Site(path, "out"): change.out for path, change in linear.items()}
    sizes |= {Site(path, "in"): change.into for path, change in linear.items()}
    check_widths(checkpoint.anatomy, sizes, "the shield fits")
    check_slices(checkpoint.anatomy, added)
    scalings = _scalings(checkpoint, changed(factors), added)
    changes: list[Change] = []
    done: set[str] = set()
    for name, scaling in scalings.items():
        if len(checkpoint.tied[name]) > 1:
            raise shared(name, next(other for other in checkpoint.tied[name] if other != name))
        place = checkpoint.places.get(name)
        if place is None:
            raise SafeglassesError(
                "the checkpoint lacks weights", given=f"{name} of {checkpoint.source}", expected="all weights"
            )
        for stored in place.stored:
            _check_plain(name, stored)
        if place.conversion is not None:
            if place.conversion.name not in done:
                done.add(place.conversion.name)
                changes += _regrouped(checkpoint, place.conversion, scalings)
            continue
        first, *others = place.stored
        if others:
            raise SafeglassesError(
                "two tensors of the checkpoint stand for one weight",
                given=f"{name}: {first.key} and {others[0].key} in {checkpoint.source}",
                expected="one tensor for every weight that the glasses scale",
                do="load the model with transformers, save it, and fold the copy",
            )
        changes.append(Change(first, scaling))
    return changes


def _scalings(checkpoint: Checkpoint, acting: Factors, added: Mapping[str, Added]) -> dict[str, Scaling]:
    """Return what happens to each weight and bias, by name in memory."""
    found = {}
    linear = [site.path for site in in_order(acting) if checkpoint.anatomy.expert(site) is None]
    for path in dict.fromkeys([*linear, *(path for path, change in added.items() if change.part is None)]):
        out, into = acting.get(Site(path, "out")), acting.get(Site(path, "in"))
        linear = module(checkpoint.model, checkpoint.anatomy, path)
        name = checkpoint.anatomy.absolute_path(path)
        steps = steps_for(linear, out, into)
        found[f"{name}.weight"] = Scaling(steps, added.get(path), isinstance(linear, Conv1D))
        if out is not None and "bias" in dict(linear.named_parameters(recurse=False)):
            found[f"{name}.bias"] = Scaling(((0, out),))
    steps_of, stacks = expert_steps(checkpoint.anatomy, acting), stacked(checkpoint.anatomy, added)
    return found | {name: Scaling(steps_of.get(name, ()), stacks.get(name)) for name in (*steps_of, *stacks)}


def _regrouped(checkpoint: Checkpoint, conversion: Conversion, scalings: Mapping[str, Scaling]) -> list[Change]:
    wanted = {name: scalings[name] for name in conversion.targets if name in scalings}
    empty = conversion.forward(checkpoint.model, lambda s: torch.empty(s.shape, dtype=_plain(s), device="meta"))
    conversion.backward(checkpoint.model, empty)  # refuses before anything is written
    return [
        Change(source.stored, Regrouping(checkpoint, conversion, wanted, source.stored.key))
        for source in conversion.sources
    ]


def _plain(stored: Stored) -> torch.dtype:
    return stored.dtype if isinstance(stored.dtype, torch.dtype) else torch.uint8


def _check_plain(name: str, stored: Stored) -> None:
    if stored.dtype not in PLAIN:
        raise SafeglassesError(
            "a quantised weight cannot be folded",
            given=f"{name}, stored as {stored.key}: {str(stored.dtype).removeprefix('torch.')}",
            expected="plain tensors of " + ", ".join(str(d).removeprefix("torch.") for d in PLAIN),
            do="fold into the unquantised checkpoint, then quantise the result; or keep the adapter folder and wear "
            "it through PEFT",
        )
