"""Would the same safety neurons be found again, and how many does noise alone bring: one layer at a time."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safeglasses.find.averages import Averages, Values
from safeglasses.find.rules import Rule
from safeglasses.find.world import World
from safeglasses.model.sites import Site

HALVINGS = 20
"""How often a set is cut into random halves."""


@dataclass(frozen=True)
class Draws:
    """How often each prompt of a cell counts in each resample and in each half."""

    harmful: Float[Tensor, "resample prompt"]
    """Bootstrap resamples; the first row is the data as they are."""
    benign: Float[Tensor, "resample prompt_"]
    """The same resamples of the benign prompts: prompts of one item come together."""
    first_harmful: Float[Tensor, "half prompt"]
    """1 for harmful prompts in the first half."""
    first_benign: Float[Tensor, "half prompt_"]
    """1 for benign prompts in the first half; the others are in the second."""

    def met(self, harmful: Bool[Tensor, " prompt"], benign: Bool[Tensor, " prompt_"]) -> "Draws":
        """Return the same draws of those prompts that met an expert."""
        return Draws(
            self.harmful[:, harmful],
            self.benign[:, benign],
            self.first_harmful[:, harmful],
            self.first_benign[:, benign],
        )

    @classmethod
    def of(cls, harmful: Sequence[int], benign: Sequence[int], resamples: int, seed: str) -> "Draws":
        """Draw whole items: those with prompts of both classes, of one, of the other, each kind on its own.

        Args:
            harmful: number of each harmful prompt's item.
            benign: number of each benign prompt's item.
            resamples: bootstrap resamples.
            seed: the same seed gives the same draws.
        """
        items = list(dict.fromkeys([*harmful, *benign]))
        kinds: dict[tuple[bool, bool], list[int]] = {}
        for item in items:
            kinds.setdefault((item in set(harmful), item in set(benign)), []).append(item)
        rng = random.Random(seed)
        times = [dict.fromkeys(items, 1.0)]
        for _ in range(resamples):
            drawn = dict.fromkeys(items, 0.0)
            for group in kinds.values():
                for item in rng.choices(group, k=len(group)):
                    drawn[item] += 1
            times.append(drawn)
        first: list[dict[int, float]] = []
        for _ in range(HALVINGS):
            mixed = [item for group in kinds.values() for item in rng.sample(group, len(group))]
            first.append({item: float(number % 2) for number, item in enumerate(mixed)})

        def table(rows: list[dict[int, float]], prompts: Sequence[int]) -> Tensor:
            return torch.tensor([[row[item] for item in prompts] for row in rows], dtype=torch.float64)

        return cls(table(times, harmful), table(times, benign), table(first, harmful), table(first, benign))


@dataclass(frozen=True)
class Steadiness:
    """Counts of neurons; each process fills in the sites it has, and `gather` adds them up."""

    found: Int[Tensor, "rule cell site"]
    """Selected neurons."""
    noise: Int[Tensor, "rule cell site half"]
    """Neurons selected when one half of the benign prompts stands for harmful ones, against the other half."""
    at_half: Int[Tensor, "rule cell site half"]
    """Neurons selected from one half of the harmful prompts against the other half of the benign ones."""
    common: Int[Tensor, "rule cell resample resample_"]
    """Neurons that two resamples both select; the first resample is the data as they are."""
    idle: Int[Tensor, "rule half cell cell_"]
    """Neurons that the sets behind `noise` of two cells share: sets about nothing."""

    @classmethod
    def empty(cls, rules: int, cells: int, sites: int, resamples: int) -> "Steadiness":
        """Return counts of nothing."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(rules, cells, *shape, dtype=torch.int64)

        idle = torch.zeros(rules, HALVINGS, cells, cells, dtype=torch.int64)
        both = zeros(resamples + 1, resamples + 1)
        return cls(zeros(sites), zeros(sites, HALVINGS), zeros(sites, HALVINGS), both, idle)

    def add(
        self,
        place: tuple[int, int, int],
        rule: Rule,
        harmful: Values,
        benign: Values,
        draws: Draws,
        norm: Float[Tensor, " neuron"],
    ) -> tuple[Float[Tensor, " neuron"], Bool[Tensor, "half neuron"]]:
        """Take in a layer of one cell under one rule.

        Returns:
            The share of resamples that select each neuron, and the sets that one half of the benign prompts gives
            against the other.

        Args:
            place: number of the rule, the cell and the site.
            rule: the rule.
            harmful: values on the harmful prompts.
            benign: values on the benign prompts.
            draws: of these prompts.
            norm: ‖W_down[:, i]‖₂.
        """
        chosen = _chosen(rule, harmful.averages(draws.harmful), benign.averages(draws.benign), norm)
        masks = chosen.to(torch.float32)
        self.common[place[0], place[1]] += (masks @ masks.T).round().long()  # exact below 2²⁴ neurons
        self.found[place] = int(chosen[0].sum())
        one, other = benign.averages(draws.first_benign), benign.averages(1 - draws.first_benign)
        nothing = _chosen(rule, one, other, norm)
        self.noise[place] = nothing.sum(dim=1)
        self.at_half[place] = _chosen(rule, harmful.averages(draws.first_harmful), other, norm).sum(dim=1)
        return masks[1:].mean(dim=0) if len(masks) > 1 else masks[0], nothing

    def add_idle(self, rule: int, nothing: Bool[Tensor, "cell half neuron"]) -> None:
        """Take in what the sets about nothing of a layer share, under the rule of that number."""
        masks = nothing.transpose(0, 1).float()
        self.idle[rule] += (masks @ masks.transpose(1, 2)).round().long()

    def idle_shares(self, rule: int) -> list[list[float | None]]:
        """Return which share of a cell's set about nothing another's holds, JSON-ready: the mean over halvings."""
        sizes = self.idle[rule].diagonal(dim1=1, dim2=2)
        shares = (self.idle[rule].double() / sizes[:, :, None]).nanmean(dim=0)  # NaN where a set is empty
        return [[None if value != value else value for value in row] for row in shares.tolist()]

    def gather(self, world: World) -> None:
        """Add up what all processes have counted, in every one of them."""
        for part in fields(self):
            world.add(getattr(self, part.name))

    def record(
        self, place: tuple[int, int], rule: Rule, sites: Mapping[Site, int], rated: Sequence[bool]
    ) -> dict[str, Any]:
        """Return what is known of one rule and cell, JSON-ready.

        ``k``: important neurons that the set is drawn from, over all layers; shares are of k. ``noise``: share
        that benign prompts alone give, half against half. ``found_at_half``: share that harmful prompts give when
        there are as few of them; only what it has beyond ``noise`` is about harm. ``stability.jaccard``: between
        two bootstrap resamples; ``stability.again``: share of the set that a resample finds again. Intervals hold
        95 % of halvings or resamples. Of fused experts a layer has one entry, with how many were ``rated``.

        Args:
            place: number of the rule and the cell.
            rule: the rule.
            sites: neurons by site.
            rated: which of the sites were met by enough prompts; others are not counted.
        """
        ks = [rule.k(width) if there else 0 for width, there in zip(sites.values(), rated, strict=True)]
        total = max(sum(ks), 1)
        counts = (self.found[place][:, None], self.noise[place], self.at_half[place])
        found, noise, at_half = (part * torch.tensor(list(rated))[:, None] for part in counts)
        sizes = self.common[place].diagonal()
        union = sizes[:, None] + sizes[None] - self.common[place]
        pairs = torch.triu(torch.ones_like(union, dtype=torch.bool), diagonal=1)
        pairs[0] = False
        jaccard = (self.common[place].double() / union)[pairs & (union > 0)]
        again = (self.common[place][0, 1:].double() / sizes[0])[:] if int(sizes[0]) else torch.empty(0)
        blocks: dict[tuple[int, str], list[int]] = {}
        for number, site in enumerate(sites):
            blocks.setdefault((site.layer, site.kind), []).append(number)
        fused = {site.kind for site in sites if site.fused}

        def layer(number: int, kind: str, rows: list[int]) -> dict[str, Any]:
            k = sum(ks[row] for row in rows)
            return {
                "layer": number,
                **({"experts": len(rows), "rated": sum(rated[row] for row in rows)} if kind in fused else {}),
                "k": k,
                "found": int(found[rows].sum()),
                "noise": float(noise[rows].sum(dim=0).double().mean()) / k if k else None,
                "found_at_half": float(at_half[rows].sum(dim=0).double().mean()) / k if k else None,
            }

        return {
            "k": sum(ks),
            "found": int(found.sum()),
            "found_share": float(found.sum()) / total,
            "noise": _spread(noise.sum(dim=0) / total),
            "found_at_half": _spread(at_half.sum(dim=0) / total),
            "stability": {"resamples": len(sizes) - 1, "jaccard": _spread(jaccard), "again": _spread(again)},
            "layers": [layer(number, kind, rows) for (number, kind), rows in blocks.items()],
        }


def _chosen(
    rule: Rule, harmful: Averages, benign: Averages, norm: Float[Tensor, " neuron"]
) -> Bool[Tensor, "resample neuron"]:
    """Choose; nothing where one side has no prompt."""
    known = (harmful.count > 0) & (benign.count > 0)
    return rule.chosen(harmful, benign, norm) & known[:, None]


def _spread(values: Tensor) -> dict[str, float] | None:
    """Return mean and the middle 95 % of some values; None of none."""
    if not values.numel():
        return None
    low, high = np.quantile(values.double().numpy(), [0.025, 0.975]).tolist()
    return {"mean": float(values.double().mean()), "low": low, "high": high}
