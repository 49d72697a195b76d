"""Which tokens go to which of fused experts, in one forward of their module."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from safeglasses.errors import SafeglassesError


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
    whole: bool = True
    """Whether these are all pairs; False where experts compute one after the other, each showing its own."""
    scaled: Float[Tensor, "row read"] | None = None
    """What each row's expert reads where that is not what the module was given for its token: Llama 4 multiplies by
    the router's weight before. Shown with ``gate`` and ``up`` alone."""

    @property
    def read(self) -> Float[Tensor, "row read"]:
        """What the maps that make neurons read."""
        return self.given[self.row] if self.scaled is None else self.scaled

    @cached_property
    def slices(self) -> tuple[tuple[int, slice], ...]:
        """The experts that get a token, and their rows."""
        ends = self.ends.tolist()
        bounds = zip([0, *ends[:-1]], ends, strict=True)
        return tuple((expert, slice(first, last)) for expert, (first, last) in enumerate(bounds) if first < last)


def together(parts: Sequence[tuple[Routing, Tensor]]) -> tuple[Routing, Tensor]:
    """Put together what experts have shown one after the other."""
    expert, row = (torch.cat([getattr(routing, name) for routing, _ in parts]) for name in ("expert", "row"))
    order = expert.sort(stable=True).indices
    first = parts[0][0]
    ends = torch.searchsorted(expert[order], torch.arange(len(first.ends), device=expert.device), right=True)
    values = torch.cat([value for _, value in parts])
    return Routing(expert[order], row[order], ends, first.given), values[order]


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
