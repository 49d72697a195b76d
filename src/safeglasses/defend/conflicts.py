"""Where two glasses in one stack pull in opposite directions, and where both suppress the same neuron."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from safeglasses.defend.factors import Factors, in_order
from safeglasses.model.sites import Site

LISTED = 10
"""How many conflicts a report names."""


@dataclass(frozen=True)
class Neuron:
    """One neuron on which two glasses act."""

    neuron: str
    """Its address, e.g. ``layers.3.mlp.up_proj:out#7``."""
    factors: tuple[float, float]
    """What each of the two multiplies it by."""
    product: float
    """What the whole stack multiplies it by."""


@dataclass(frozen=True)
class Pair:
    """How two glasses of a stack meet.

    A conflict is a neuron that one of them amplifies (factor above 1) or flips (below 0) while the factor of
    the other is below 1.
    """

    names: tuple[str, str]
    """The two."""
    amplified: int
    """Conflicts without a change of sign."""
    flipped: int
    """Conflicts with a negative factor; two of them give a positive product."""
    by_layer: Mapping[int, int]
    """Conflicts per decoder layer; -1 outside any."""
    by_kind: Mapping[str, int]
    """Conflicts per kind of site, e.g. ``mlp.up_proj:out``."""
    largest: tuple[Neuron, ...]
    """At most `LISTED` conflicts, those first whose factors are farthest apart."""
    both_suppress: int
    """Neurons that both turn down (factor from 0 to below 1)."""
    jaccard: float
    """`both_suppress`, divided by the neurons that at least one turns down; 0 if none does."""
    deepest: Neuron | None
    """Of the neurons that both turn down, the one with the smallest product of the two."""
    identical: bool
    """Whether both change the very same neurons by the very same factors."""

    @property
    def conflicts(self) -> int:
        """All conflicts."""
        return self.amplified + self.flipped

    def record(self) -> dict[str, Any]:
        """Return the fields JSON-ready, neurons' factors by name."""
        found = {**asdict(self), "names": list(self.names), "conflicts": self.conflicts}
        found["by_layer"] = {str(layer): n for layer, n in self.by_layer.items()}
        found["largest"] = [self._named(neuron) for neuron in self.largest]
        found["deepest"] = None if self.deepest is None else self._named(self.deepest)
        return found

    def text(self) -> str:
        """Say the same in a few lines."""
        a, b = self.names
        lines = [
            f"{a} and {b}: {self.conflicts:,} conflicts, {self.both_suppress:,} neurons turned down by both "
            f"(Jaccard {self.jaccard:.2f})"
        ]
        if self.identical:
            lines.append("  both change the same neurons by the same factors: is one of them there twice?")
        if self.conflicts:
            lines.append(
                f"  {self.amplified:,} amplified by one and turned down by the other, {self.flipped:,} flipped"
            )
            lines.append("  layers: " + ", ".join(f"{layer} ({n:,})" for layer, n in self.by_layer.items()))
            lines.append("  kinds: " + ", ".join(f"{kind} ({n:,})" for kind, n in self.by_kind.items()))
            lines += [f"  {_told(neuron, self.names)}" for neuron in self.largest]
        if self.deepest is not None:
            lines.append(f"  turned down most by both: {_told(self.deepest, self.names)}")
        return "\n".join(lines)

    def _named(self, neuron: Neuron) -> dict[str, Any]:
        return {**asdict(neuron), "factors": dict(zip(self.names, neuron.factors, strict=True))}


def compare(names: tuple[str, str], a: Factors, b: Factors, product: Factors) -> Pair:
    """Compare factors as they act.

    Args:
        names: of the two.
        a: factors of the first.
        b: factors of the second.
        product: factors of the whole stack.
    """
    amplified = flipped = both_suppress = either = 0
    by_layer: Counter[int] = Counter()
    by_kind: Counter[str] = Counter()
    clashes: list[tuple[float, int, Neuron]] = []
    deepest: tuple[float, Neuron] | None = None
    identical = True
    for order, site in enumerate(in_order({**a, **b})):
        f = a.get(site, torch.ones(0))
        g = b[site] if site in b else torch.ones_like(f)
        f = f if site in a else torch.ones_like(g)
        identical &= torch.equal(f, g)
        down_f, down_g = (f >= 0) & (f < 1), (g >= 0) & (g < 1)
        either += int((down_f | down_g).sum())
        negative = ((f < 0) & (g < 1)) | ((g < 0) & (f < 1))
        against = _against(f, g)
        flipped += int(negative.sum())
        amplified += int((against & ~negative).sum())
        if n := int(against.sum()):
            by_layer[site.layer] += n
            by_kind[site.kind] += n
            apart = torch.where(against, (f.double() - g.double()).abs(), -1)
            first = apart.sort(descending=True, stable=True).indices[: min(n, LISTED)].tolist()
            clashes += [(-float(apart[i]), order, _neuron(site, i, f, g, product)) for i in first]
        both = down_f & down_g
        both_suppress += int(both.sum())
        if bool(both.any()):
            i = int(torch.where(both, f.double() * g.double(), torch.inf).argmin())
            low = float(f[i]) * float(g[i])
            if deepest is None or low < deepest[0]:
                deepest = (low, _neuron(site, i, f, g, product))
    clashes.sort(key=lambda clash: clash[:2])
    return Pair(
        names=names,
        amplified=amplified,
        flipped=flipped,
        by_layer=dict(sorted(by_layer.items())),
        by_kind=dict(sorted(by_kind.items())),
        largest=tuple(neuron for _, _, neuron in clashes[:LISTED]),
        both_suppress=both_suppress,
        jaccard=both_suppress / either if either else 0.0,
        deepest=None if deepest is None else deepest[1],
        identical=identical,
    )


def _against(f: Float[Tensor, " neuron"], g: Float[Tensor, " neuron"]) -> Bool[Tensor, " neuron"]:
    pushes_f, pushes_g = (f > 1) | (f < 0), (g > 1) | (g < 0)
    return (pushes_f & (g < 1)) | (pushes_g & (f < 1))


def _neuron(
    site: Site, index: int, f: Float[Tensor, " neuron"], g: Float[Tensor, " neuron"], product: Factors
) -> Neuron:
    return Neuron(site.address(index, len(f)), (float(f[index]), float(g[index])), float(product[site][index]))


def _told(neuron: Neuron, names: tuple[str, str]) -> str:
    each = ", ".join(f"{name} {factor:.3g}" for name, factor in zip(names, neuron.factors, strict=True))
    return f"{neuron.neuron}: {each}, together {neuron.product:.3g}"
