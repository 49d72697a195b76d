"""Which slice of a 3-D parameter a change of one of fused experts is of, and how PEFT keeps LoRAs of such parameters.

PEFT has one pair of tensors per parameter: A is ``[rank · expert, in]``, expert by expert, B ``[out, rank · expert]``,
rank by rank. What it takes for inputs and outputs is the order of the axes as the module says it (``is_transposed``);
where a module does not say that it keeps ``[expert, in, out]`` (Llama 4), PEFT's A is our B turned over, its B our A.

Source: PEFT 0.21, ``ParamWrapper`` in ``peft/tuners/lora/layer.py``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from safeglasses.model.anatomy import Anatomy
from safeglasses.model.experts import Experts
from safeglasses.model.sites import Side, Site

Pair = tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]


@dataclass(frozen=True)
class Slice:
    """One expert's slice of a 3-D parameter."""

    parameter: str
    """Path of the parameter, relative to the decoder: ``layers.3.mlp.experts.gate_up_proj``."""
    number: int
    """Which expert."""
    n_experts: int
    """How many the parameter holds."""
    transposed: bool
    """Whether it is kept ``[expert, in, out]``."""
    said: bool
    """Whether the module tells PEFT the order of its axes."""
    interleaved: bool
    """Whether rows of gate and up alternate."""

    @property
    def module(self) -> str:
        """Path of the module of fused experts, relative to the decoder."""
        return self.parameter.rpartition(".")[0]

    @property
    def expert(self) -> str:
        """Path of the expert: ``layers.3.mlp.experts.17``."""
        return f"{self.module}.{self.number}"

    @property
    def path(self) -> str:
        """What a change of this slice is called: ``layers.3.mlp.experts.17.gate_up_proj``."""
        return f"{self.expert}.{self.parameter.rpartition('.')[2]}"

    @property
    def sides(self) -> tuple[Side, ...]:
        """What the rows make: ``gate`` and ``up`` of a parameter of both, else the one of them."""
        leaf = self.parameter.rpartition(".")[2]
        return {"gate_up_proj": ("gate", "up"), "gate_proj": ("gate",)}.get(leaf, ("up",))

    @property
    def turned(self) -> bool:
        """Whether PEFT takes rows for columns."""
        return self.transposed and not self.said

    def rows(self, neurons: Int[Tensor, " neuron"], width: int) -> Int[Tensor, " row"]:
        """Return the rows that make some neurons, ascending in either half.

        Args:
            neurons: which.
            width: how many one expert has.
        """
        count = len(self.sides)
        if self.interleaved:
            return torch.cat([count * neurons + half for half in range(count)]).sort().values
        return torch.cat([neurons + half * width for half in range(count)])

    def neuron(self, rows: Int[Tensor, " row"], width: int) -> tuple[Int[Tensor, " row"], Int[Tensor, " row"]]:
        """Return the half (index into `sides`) and the neuron that each row makes."""
        count = len(self.sides)
        return (rows % count, rows // count) if self.interleaved else (rows // width, rows % width)


def slices_of(anatomy: Anatomy, site: Site) -> tuple[tuple[Slice, int, int], ...]:
    """Return the slices whose rows make one expert's neurons, each with its rows and columns; empty for linear maps."""
    found = anatomy.expert(site)
    if found is None:
        return ()
    experts, number = found
    return tuple((slice_of(experts, number, name), *shape_of(experts, name)) for name in experts.makers)


def slice_of(experts: Experts, number: int, name: str) -> Slice:
    """Return one expert's slice of a parameter."""
    interleaved = experts.interleaved and name == "gate_up_proj"
    where = (f"{experts.path}.{name}", number, experts.n_experts)
    return Slice(*where, experts.transposed, experts.dispatched, interleaved)


def shape_of(experts: Experts, name: str) -> tuple[int, int]:
    """Return rows and columns of one expert's slice of a parameter that makes neurons."""
    return experts.width * (2 if name == "gate_up_proj" else 1), experts.hidden


def packed(pairs: Mapping[int, Pair], part: Slice, rank: int) -> tuple[Tensor, Tensor]:
    """Return A and B of a whole parameter as PEFT keeps them, zero for the experts without a pair.

    Args:
        pairs: per expert A and B, of at most this rank.
        part: any slice of the parameter.
        rank: that both are padded to.
    """
    turned = {n: (b.T, a.T) if part.turned else (a, b) for n, (a, b) in pairs.items()}
    a, b = next(iter(turned.values()))
    first, second = a.new_zeros(part.n_experts, rank, a.shape[1]), b.new_zeros(b.shape[0], rank, part.n_experts)
    for number, (a, b) in turned.items():
        first[number, : len(a)] = a
        second[:, : b.shape[1], number] = b
    return first.flatten(0, 1), second.flatten(1)


def unpacked(a: Tensor, b: Tensor, part: Slice) -> Pair:
    """Return one expert's A and B out of PEFT's."""
    first = a.unflatten(0, (part.n_experts, -1))[part.number]
    second = b.unflatten(1, (-1, part.n_experts))[:, :, part.number]
    return (second.T, first.T) if part.turned else (first, second)


def keys_of(parameter: str, among: Sequence[str], prefix: str) -> tuple[str, str]:
    """Return the names of A and B in PEFT's file: of several parameters of one module the last is outermost.

    Args:
        parameter: its path, relative to the decoder.
        among: all that the adapter changes, in the order of the model.
        prefix: PEFT's, with the path of the decoder.
    """
    module = parameter.rpartition(".")[0]
    mates = [path for path in among if path.rpartition(".")[0] == module]
    inside = "base_layer." * (len(mates) - 1 - mates.index(parameter))
    return (f"{prefix}{module}.{inside}lora_A.weight", f"{prefix}{module}.{inside}lora_B.weight")
