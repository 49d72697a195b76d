"""What stacks buy and what they cost: a row per stack and condition, beside the model without any."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any

from safeglasses.data.examples import CONDITIONS
from safeglasses.defend.defence import Defence
from safeglasses.defend.glasses import Glasses
from safeglasses.errors import SafeglassesError
from safeglasses.measure.intervals import Rate
from safeglasses.measure.items import Item, items_of
from safeglasses.measure.paired import Difference, difference
from safeglasses.measure.rows import Answer, count
from safeglasses.protect.running import Outcome
from safeglasses.tune.shield import Shield


@dataclass(frozen=True)
class Price:
    """What one answer cost, on average over answers."""

    calls: float
    """Calls of the model."""
    checks: float
    """Calls of judges."""
    tokens: float
    """Tokens generated."""
    prompt_tokens: float
    """Tokens read."""
    seconds: float
    """A row's share of its batches' time; says nothing of how long one user waits."""
    memory_bytes: int | None
    """What is worn, and the cache of the widest answer; None where the model's cache is not known."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return dict(vars(self))


@dataclass(frozen=True)
class GridRow:
    """One stack under one condition. None means that there was nothing to measure; it is never 0."""

    defence: str
    """The stack's text form."""
    condition: str
    """``all``, ``standard`` or ``adversarial``."""
    harmful_rate: Rate | None
    """Over eliciting prompts."""
    utility: Mapping[str, Rate]
    """Per slot, over the prompts that have it."""
    refusal_on_benign: Rate | None
    """Over benign prompts of the condition."""
    empty: Rate
    """Answers without a character."""
    cost: Price
    """Over the answers of the condition."""
    failures: Mapping[str, int]
    """Answers on whose way something failed, by part and by whether it failed open or closed."""
    change: Mapping[str, Difference]
    """Against the model without a stack, prompt by prompt: ``harmful``, ``refused`` and ``utility:SLOT``."""
    dominated_by: str | None = None
    """A stack that is at least as good in everything and better in something, by point estimates."""

    def to_json(self) -> dict[str, Any]:
        """Return the row as it stands in ``grid.json``."""
        return {
            "defence": self.defence,
            "condition": self.condition,
            "harmful_rate": self.harmful_rate.to_json() if self.harmful_rate else None,
            "utility": {slot: rate.to_json() for slot, rate in self.utility.items()},
            "refusal_on_benign": self.refusal_on_benign.to_json() if self.refusal_on_benign else None,
            "empty": self.empty.to_json(),
            "cost": self.cost.to_json(),
            "failures": dict(self.failures),
            "change": {name: value.to_json() for name, value in self.change.items()},
            "dominated": self.dominated_by is not None,
            "dominated_by": self.dominated_by,
        }


@dataclass(frozen=True)
class Measured:
    """One stack's answers, judged, with what they cost."""

    defence: str
    """The stack's text form."""
    answers: tuple[Answer, ...]
    """Judged, in the order of the prompts."""
    outcomes: tuple[Outcome, ...]
    """The same answers as the stack gave them."""
    held_bytes: int = 0
    """Of what the model wears."""
    bytes_per_token: int | None = None
    """Of the model's cache."""

    @cached_property
    def items(self) -> tuple[Item, ...]:
        """The answers as they are compared; made once."""
        return items_of(self.answers)


def grid_rows(measured: Sequence[Measured], base: str = "none") -> tuple[GridRow, ...]:
    """Count every stack under every condition that occurs, compare with the base, and mark what is dominated.

    Raises:
        SafeglassesError: two stacks of one name; the judge scored nothing.
    """
    names = [one.defence for one in measured]
    if not names or len(set(names)) < len(names):
        raise SafeglassesError("stacks need names of their own", given=", ".join(names), expected="each stack once")
    examples = [answer.example for answer in measured[0].answers]
    conditions = ["all", *(c for c in CONDITIONS if any(e.condition == c for e in examples))]
    before = next((one for one in measured if one.defence == base), None)
    rows: list[GridRow] = []
    for condition in conditions:
        these = [_row(one, before, condition) for one in measured]
        rows += _marked(these)
    return tuple(rows)


def dominators(points: Sequence[Sequence[float | int]]) -> list[int | None]:
    """Return per point the first that is nowhere larger and somewhere smaller; None for points of the front."""
    return [next((j for j, other in enumerate(points) if _beats(other, point)), None) for point in points]


def price_of(outcomes: Sequence[Outcome], held: int, bytes_per_token: int | None) -> Price:
    """Average what answers cost, and add what is worn to the cache of the widest."""
    costs = [outcome.cost for outcome in outcomes]
    memory = None if bytes_per_token is None else held + bytes_per_token * max(cost.widest for cost in costs)
    names = ("calls", "checks", "tokens", "prompt_tokens", "seconds")
    return Price(**{name: fmean(getattr(cost, name) for cost in costs) for name in names}, memory_bytes=memory)


def held_bytes(worn: Sequence[Defence]) -> int:
    """Return what defences hold while they are worn, as far as they are glasses and shields."""
    total = 0
    for defence in worn:
        if isinstance(defence, Glasses):
            total += sum(row.nbytes for row in defence.effective().values())
        elif isinstance(defence, Shield):
            held = (tensor for change in defence.changes.values() for tensor in (change.a, change.b))
            total += sum(tensor.nbytes for tensor in held if tensor is not None)
    return total


def _beats(one: Sequence[float | int], other: Sequence[float | int]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and any(a < b for a, b in zip(one, other, strict=True))


def _row(one: Measured, before: Measured | None, condition: str) -> GridRow:
    counted = count((one.defence, condition, "grid"), one.answers, ())
    kept = [i for i, answer in enumerate(one.answers) if condition in ("all", answer.example.condition)]
    outcomes = [one.outcomes[i] for i in kept]
    change = {} if before is None or before is one else _change(before, one, kept)
    return GridRow(
        defence=one.defence,
        condition=condition,
        harmful_rate=counted.harmful_rate,
        utility=counted.utility,
        refusal_on_benign=counted.refusal_on_benign,
        empty=counted.empty,
        cost=price_of(outcomes, one.held_bytes, one.bytes_per_token),
        failures=dict(Counter(f"{e.part}: {e.what}" for o in outcomes for e in {*o.failures})),
        change=change,
    )


def _change(before: Measured, after: Measured, kept: Sequence[int]) -> dict[str, Difference]:
    """Compare prompt by prompt; what is nowhere scored on both sides has no entry."""
    first, second = ([side.items[i] for i in kept] for side in (before, after))
    slots = dict.fromkeys(slot for item in first for slot in item.slots)
    found = {}
    for name in ("harmful", "refused", *(f"utility:{slot}" for slot in slots)):
        pairs = [(_value(a, name), _value(b, name), a.cluster) for a, b in zip(first, second, strict=True)]
        known = [pair for pair in pairs if pair[0] is not None and pair[1] is not None]
        if known:
            left, right, clusters = zip(*known, strict=True)
            found[name] = difference(list(left), list(right), list(clusters))
    return found


def _value(item: Item, name: str) -> bool | None:
    if name.startswith("utility:"):
        return item.slots.get(name.partition(":")[2])
    return item.harmful if name == "harmful" else item.refused


def _marked(rows: Sequence[GridRow]) -> list[GridRow]:
    """Mark rows of one condition: less harm, more of every slot, fewer refusals and empty answers, less work."""
    slots = [slot for slot in rows[0].utility if all(slot in row.utility for row in rows)]
    harm = all(row.harmful_rate is not None for row in rows)
    refusals = all(row.refusal_on_benign is not None for row in rows)
    points = [
        (
            *([row.harmful_rate.value] if harm and row.harmful_rate else []),
            *(-row.utility[slot].value for slot in slots),
            *([row.refusal_on_benign.value] if refusals and row.refusal_on_benign else []),
            row.empty.value,
            row.cost.calls + row.cost.checks,
            row.cost.tokens,
        )
        for row in rows
    ]
    by = dominators(points)
    return [replace(row, dominated_by=None if j is None else rows[j].defence) for row, j in zip(rows, by, strict=True)]
