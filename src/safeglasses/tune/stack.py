"""Changes of fused experts as changes of whole 3-D parameters: what folding adds."""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from safeglasses.model.anatomy import Anatomy
from safeglasses.tune.change import Change


@dataclass(frozen=True, eq=False)
class Stack:
    """Changes of some slices of one 3-D parameter."""

    changes: Mapping[int, Change]
    """By the experts' numbers."""

    def add_to(self, block: Float[Tensor, "_expert _a _b"], first: int) -> None:
        """Add them to a run of slices, in place and in the block's own type.

        Args:
            block: the slices; float64 keeps the sum exact enough to be rounded once.
            first: number of the first expert.
        """
        for number, change in self.changes.items():
            if change.part is not None and first <= number < first + len(block):
                matrix = block[number - first]
                change.add_to(matrix.T if change.part.transposed else matrix, 0)


def stacked(anatomy: Anatomy, changes: Mapping[str, Change]) -> dict[str, Stack]:
    """Return the changes of fused experts by the names of their parameters in the model."""
    found: dict[str, dict[int, Change]] = {}
    for change in changes.values():
        if change.part is not None:
            name = anatomy.absolute_path(change.part.parameter)
            found.setdefault(name, {})[change.part.number] = change
    return {name: Stack(parts) for name, parts in found.items()}
