"""How an activation is summarised over tokens: `span:how`, e.g. ``response:max``."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safeglasses.errors import BadRow, SafeglassesError
from safeglasses.model.chat import Batch, Span

How = Literal["max", "mean", "last", "mean-abs", "rms"]
MEANS: tuple[How, ...] = ("mean", "mean-abs", "rms")
"""What is summed, in float32."""


@dataclass(frozen=True, order=True)
class Pool:
    """Over which tokens an activation is summarised, and how."""

    span: Span
    """``image``, ``text`` (of the prompt), ``prompt`` (both), ``response`` (the answer), ``thought`` (what a thinking
    model writes before it) or ``all``; padding is in none."""
    how: How
    """``max``, ``mean``, ``last`` token of the span, ``mean-abs`` (of magnitudes) or ``rms`` (root mean square)."""

    def __str__(self) -> str:
        return f"{self.span}:{self.how}"

    @classmethod
    def parse(cls, text: str) -> "Pool":
        """Read ``response:max``.

        Raises:
            SafeglassesError: no such span or way.
        """
        for span in get_args(Span):
            for how in get_args(How):
                if text == f"{span}:{how}":
                    return cls(span, how)
        raise SafeglassesError(
            "not a way of pooling",
            given=repr(text),
            expected=f"SPAN:HOW with {' | '.join(get_args(Span))} : {' | '.join(get_args(How))}",
        )


def parse_pools(text: str) -> tuple[Pool, ...]:
    """Read several ways of pooling: ``prompt:last,response:max``.

    Raises:
        SafeglassesError: one of them is none.
    """
    return tuple(dict.fromkeys(Pool.parse(part.strip()) for part in text.split(",")))


@dataclass(frozen=True)
class Window:
    """Where the tokens of one pool lie in one batch; worked out once, used at every site."""

    how: How
    """How to summarise."""
    parts: tuple[tuple[slice, Bool[Tensor, "_sample _token 1"] | None], ...]
    """Runs of columns that hold the span, each with what lies outside in some row (None: nothing). Other
    columns are never read."""
    count: Int[Tensor, "sample 1"]
    """Tokens in each row's span."""
    last: Int[Tensor, " sample"]
    """Column of the last token of each row's span."""

    @classmethod
    def of(cls, batch: Batch, pool: Pool, ids: Sequence[str]) -> "Window":
        """Find a pool's tokens in a batch.

        Args:
            batch: encoded chats, best still on the CPU.
            pool: which tokens, and how they are summarised.
            ids: names of the rows for error messages.

        Raises:
            BadRow: a row has no token in the span.
        """
        span = batch.span(pool.span)
        count = span.sum(dim=1, keepdim=True)
        if not bool(count.all()):
            raise BadRow(
                f"nothing to pool {pool} over",
                given=f"example {ids[int(count.argmin())]!r} has no token in its {pool.span}",
                expected=f"at least one {pool.span} token in every example",
                do="complete or remove the row, or pool over another span",
            )
        last = (span * torch.arange(span.shape[1], device=span.device)).amax(dim=1)
        return cls(pool.how, tuple(_parts(span)), count, last)

    def mask(self, samples: int, tokens: int) -> Bool[Tensor, "sample token"]:
        """Return which tokens count: those of the span, or the last one of each row's."""
        found = torch.zeros(samples, tokens, dtype=torch.bool, device=self.last.device)
        if self.how == "last":
            found[torch.arange(samples, device=self.last.device), self.last] = True
            return found
        for run, outside in self.parts:
            found[:, run] = True if outside is None else ~outside[..., 0]
        return found

    def to(self, device: torch.device) -> "Window":
        """Return the window on a device."""
        parts = tuple((run, None if outside is None else outside.to(device)) for run, outside in self.parts)
        return Window(self.how, parts, self.count.to(device), self.last.to(device))

    def reduce(self, values: Float[Tensor, "sample token neuron"]) -> Float[Tensor, "sample neuron"]:
        """Summarise values over each row's span: float32 for means of any kind, else the values' own dtype."""
        if self.how == "last":
            return values[torch.arange(len(values), device=values.device), self.last]
        fill = -torch.inf if self.how == "max" else 0.0  # filled, not multiplied: padding may hold infinities
        runs = [
            values[:, run] if outside is None else values[:, run].masked_fill(outside, fill)
            for run, outside in self.parts
        ]
        if self.how == "max":
            return reduce(torch.maximum, [run.amax(dim=1) for run in runs])
        if self.how == "mean-abs":
            runs = [run.abs() for run in runs]
        elif self.how == "rms":
            runs = [run.float().square() for run in runs]  # half precision knows no squares above 255²
        mean = reduce(torch.add, [run.sum(dim=1, dtype=torch.float32) for run in runs]) / self.count
        return mean.sqrt() if self.how == "rms" else mean


def over_calls(
    calls: Sequence[Float[Tensor, "pool sample _neuron"]], pools: Sequence[Pool]
) -> Float[Tensor, "pool sample _neuron"]:
    """Summarise what a map that is computed several times per token gave: as over that many times the tokens.

    ``last`` is the last token's value in the last of the calls.
    """
    if len(calls) == 1:
        return calls[0]
    joined: list[Tensor] = []
    for pool, each in zip(pools, torch.stack(list(calls), dim=1), strict=True):
        if pool.how == "last":
            joined.append(each[-1])
        elif pool.how == "max":
            joined.append(each.amax(dim=0))
        elif pool.how == "rms":
            joined.append(each.square().mean(dim=0).sqrt())
        else:
            joined.append(each.mean(dim=0))
    return torch.stack(joined)


def _parts(
    span: Bool[Tensor, "sample token"],
) -> Iterator[tuple[slice, Bool[Tensor, "sample _token 1"] | None]]:
    """Cut the columns into runs that lie in every row's span, or only in some rows'; leave out the rest."""
    kinds = span.any(dim=0).long() + span.all(dim=0).long()
    kind, length = torch.unique_consecutive(kinds, return_counts=True)
    start = 0
    for in_rows, columns in zip(kind.tolist(), length.tolist(), strict=True):
        run = slice(start, start + columns)
        if in_rows:
            yield run, None if in_rows == 2 else ~span[:, run, None]
        start += columns
