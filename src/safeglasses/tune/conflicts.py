"""Where a shield and glasses of one model claim the same neurons: the one retrains what the other scales."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from safeglasses.defend.factors import changed
from safeglasses.defend.glasses import Glasses
from safeglasses.errors import WrongBase
from safeglasses.model.sites import Site
from safeglasses.tune.change import makers
from safeglasses.tune.shield import Shield

LISTED = 10


@dataclass(frozen=True)
class Claims:
    """Neurons that both a shield and glasses act on.

    A neuron is one coordinate of the feed-forward block, of one expert where these are fused; glasses act on it where
    they scale the input of *down*, or the output of a map that the shield changed (there: the expert's gate or up).
    """

    tuned: int
    """Neurons whose rows the shield changed."""
    scaled: int
    """Of all factors of the glasses that are not 1, those at these blocks."""
    both: int
    """Neurons that the shield changed and the glasses scale."""
    silenced: int
    """Of these, neurons that the glasses turn down below half: what was trained there is mostly lost."""
    by_layer: Mapping[int, int]
    """`both` per decoder layer."""
    lowest: tuple[tuple[str, float], ...]
    """At most `LISTED` of these neurons with the factors that they meet, the smallest first."""

    def record(self) -> dict[str, Any]:
        """Return the fields JSON-ready."""
        return {
            "tuned": self.tuned,
            "scaled": self.scaled,
            "both": self.both,
            "silenced": self.silenced,
            "by_layer": {str(layer): count for layer, count in self.by_layer.items()},
            "lowest": [{"neuron": name, "factor": factor} for name, factor in self.lowest],
        }

    def text(self) -> str:
        """Say the same in a few lines."""
        lines = [
            f"{self.both:,} of {self.tuned:,} tuned neurons are scaled by the glasses, {self.silenced:,} below half"
        ]
        if self.both:
            lines.append("  layers: " + ", ".join(f"{layer} ({n:,})" for layer, n in self.by_layer.items()))
            lines += [f"  {name}: {factor:.3g}" for name, factor in self.lowest]
        return "\n".join(lines)


def claims(shield: Shield, glasses: Glasses) -> Claims:
    """Compare what a shield changed with what glasses scale.

    Raises:
        WrongBase: they were made for different models.
    """
    if shield.base_fingerprint != glasses.base_fingerprint:
        raise WrongBase(
            "the glasses and the shield were made for different models",
            given=f"a shield for {shield.base_fingerprint}",
            expected=f"one for {glasses.base_fingerprint}, as the glasses",
        )
    acting = changed(glasses.effective())
    tuned = scaled = silenced = 0
    by_layer: Counter[int] = Counter()
    met: list[tuple[float, str]] = []
    made_by = makers(shield.changes, shield.neurons.masks)
    for site, mask in shield.neurons.masks.items():
        outputs = (Site(path, "out") for path in made_by[site])
        beside = (Site(site.path, "gate"), Site(site.path, "up")) if site.fused else outputs
        mine = ~mask if shield.mode == "freeze" else torch.ones_like(mask) if shield.mode == "plain" else mask
        factors = torch.ones(len(mask))
        for other in (site, *beside):
            if other in acting and len(acting[other]) % len(factors) == 0:
                factors = factors * acting[other].reshape(-1, len(factors)).prod(dim=0)  # gate and up may be one map
        both = mine & (factors != 1)
        tuned, scaled = tuned + int(mine.sum()), scaled + int((factors != 1).sum())
        silenced += int((both & (factors < 0.5)).sum())
        if count := int(both.sum()):
            by_layer[site.layer] += count
            met += [(float(factors[i]), site.address(i, len(both))) for i in both.nonzero().flatten().tolist()]
    met.sort()
    return Claims(
        tuned=tuned,
        scaled=scaled,
        both=len(met),
        silenced=silenced,
        by_layer=dict(sorted(by_layer.items())),
        lowest=tuple((name, factor) for factor, name in met[:LISTED]),
    )
