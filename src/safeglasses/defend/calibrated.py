"""Factors whose strengths are learned, in one of two granularities; the expertise decides the rest.

*group*: one strength per module kind × layer × term, a term being one side of one evidence, if asked of one category
of harm. *neuron*: one strength per expert neuron. Values of linear maps have no preferred sign, so a neuron that is low
on toxic examples (AUROC 0.2) knows as much as one that is high (0.8): two-sided rules count both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from safeglasses.defend.expertise import confirmed_by_held_out, experts, restrict, rows, table_columns
from safeglasses.defend.factors import by_head
from safeglasses.defend.glasses import Glasses
from safeglasses.errors import SafeglassesError
from safeglasses.find.evidence import Evidence
from safeglasses.find.pools import Pool
from safeglasses.model.sites import Site

Granularity = Literal["group", "neuron"]


@dataclass(frozen=True)
class CalibratedRule:
    """α = 1 − Σ_t λ_t · |Gini_t| · [the evidence of t selects the neuron], with everything but λ worked out.

    Per neuron there is one λ and the largest |Gini|; per group λ is shared by a module kind and layer, and
    there is one per term. The tensors are padded over sites, so that one call costs few tensor operations
    however many sites there are: calibration makes one per gradient step.
    """

    sites: tuple[Site, ...]
    """The sites, in the evidence's order."""
    widths: tuple[int, ...]
    """Neurons per site."""
    kinds: tuple[str, ...]
    """First axis of the strengths: module kinds such as ``mlp.down_proj:out``."""
    layers: tuple[int, ...]
    """Second axis: decoder layers that hold a site."""
    terms: tuple[str, ...]
    """Third axis: evidences, e.g. ``prompt:last``, and their lower sides, e.g. ``prompt:last below``; by category,
    e.g. ``prompt:last [hate]``."""
    granularity: Granularity
    """What shares a strength."""
    gain: Float[Tensor, "site term neuron"]
    """|Gini| of the selected neurons, 0 elsewhere and in the padding."""
    kind: Int[Tensor, " site"]
    """Which strength row each site takes."""
    layer: Int[Tensor, " site"]
    """Which strength column each site takes."""
    heads: Mapping[Site, int]
    """Sites whose neurons share strength and expertise head by head, and their numbers of heads; usually none."""
    clamp: bool
    """Whether factors are held in [0, 1]."""
    pools: tuple[Pool, ...]
    """The evidences behind the terms."""
    evidence: Evidence = field(repr=False, compare=False)
    """What the rule was made from."""
    _copies: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def from_evidence(
        cls,
        evidence: Evidence,
        *,
        pools: Sequence[Pool],
        threshold: float | None = 0.5,
        clamp: bool = True,
        fdr: float | None = None,
        sites: Sequence[Site] | None = None,
        two_sided: bool = False,
        granularity: Granularity = "group",
        confirmed: bool = False,
        categories: Mapping[str, Evidence] | None = None,
        heads: Mapping[Site, int] | None = None,
    ) -> "CalibratedRule":
        """Work out the part that does not depend on the strengths.

        Args:
            evidence: AUROC per neuron.
            pools: the evidences to weigh, at least one; each must be in the evidence.
            threshold: AUROC above which a neuron counts; below 0.5 Gini⁺ is 0 anyway.
            clamp: hold factors in [0, 1].
            fdr: in addition only neurons significant at this false discovery rate.
            sites: only these sites; without, all of the evidence's.
            two_sided: neurons with AUROC below 1 − threshold count as well.
            granularity: what shares a strength.
            confirmed: count only the expertise that held-out examples confirm, if there are any: the smaller
                of both |Gini|, and none where the two lie on different sides of chance.
            categories: evidence per category of harm, of the same sites; then there is a term per evidence and
                category, and `evidence` itself selects nothing.
            heads: sites of attention heads, and how many there are: all neurons of a head get the mean of what
                they would get.

        Raises:
            SafeglassesError: a pool or a site that the evidence does not hold.
            PartialMatch: the evidence of a category lacks a site.
        """
        evidence = evidence if sites is None else restrict(evidence, sites)
        chosen = tuple(evidence.auroc)
        widths = tuple(evidence.auroc[site].shape[1] for site in chosen)
        named = {"": evidence}
        if categories is not None:
            named = {f" [{name}]": restrict(one, chosen) for name, one in categories.items()}
        found = [_gains(one, pools, threshold, fdr, both=two_sided, confirmed=confirmed) for one in named.values()]
        gain = torch.cat(found, dim=1)
        if granularity == "neuron":
            gain = gain.amax(dim=1, keepdim=True)
        heads = {site: number for site, number in (heads or {}).items() if site in set(chosen)}
        gain = _averaged(gain, chosen, widths, heads)
        sides = ("", " below") if two_sided else ("",)
        kinds = tuple(dict.fromkeys(site.kind for site in chosen))
        layers = tuple(sorted({site.layer for site in chosen}))
        return cls(
            sites=chosen,
            widths=widths,
            kinds=kinds,
            layers=layers,
            terms=tuple(f"{pool}{side}{name}" for name in named for side in sides for pool in pools),
            granularity=granularity,
            pools=tuple(pools),
            gain=gain,
            kind=torch.tensor([kinds.index(site.kind) for site in chosen]),
            layer=torch.tensor([layers.index(site.layer) for site in chosen]),
            heads=heads,
            clamp=clamp,
            evidence=evidence,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the strengths: (kind, layer, term), or (site, neuron) with padding."""
        if self.granularity == "neuron":
            return self.gain.shape[0], self.gain.shape[2]
        return len(self.kinds), len(self.layers), len(self.terms)

    @property
    def n_strengths(self) -> int:
        """How many strengths act on any neuron: the scalars that calibration learns."""
        if self.granularity == "neuron":
            shared = {site: self.widths[i] // self.heads.get(site, self.widths[i]) for i, site in enumerate(self.sites)}
            acting = (self.gain > 0).any(dim=1).sum(dim=1).tolist()
            return sum(
                n // shared[site] if site in self.heads else n for site, n in zip(self.sites, acting, strict=True)
            )
        used = torch.zeros(self.shape, dtype=torch.bool)
        used[self.kind, self.layer] |= (self.gain > 0).any(dim=2)
        return int(used.sum())

    @property
    def n_experts(self) -> int:
        """How many neurons some evidence selects."""
        return int((self.gain > 0).any(dim=1).sum())

    def start(self, value: float | int) -> Float[Tensor, "*group"]:
        """Strengths that are all `value`; 1 with one evidence is the plain Gini rule."""
        return torch.full(self.shape, float(value))

    def factors(self, strengths: Float[Tensor, "*group"]) -> dict[Site, Float[Tensor, " _neuron"]]:
        """Return float32 factors per site on the strengths' device; gradients flow into the strengths.

        Raises:
            SafeglassesError: strengths of another shape.
        """
        if tuple(strengths.shape) != self.shape:
            raise SafeglassesError(
                "strengths of the wrong shape",
                given=str(tuple(strengths.shape)),
                expected=f"{self.shape}, for granularity {self.granularity}",
            )
        gain, kind, layer = self._on(strengths.device)
        if self.granularity == "neuron":
            alpha = 1 - strengths.to(gain.dtype) * gain[:, 0]
        else:
            weighed = strengths.to(gain.dtype)[kind, layer]  # site × term
            alpha = 1 - torch.einsum("st,stn->sn", weighed, gain)
        alpha = alpha.clamp(0, 1) if self.clamp else alpha
        rows = {s: row[:w] for s, row, w in zip(self.sites, alpha.unbind(), self.widths, strict=True)}
        return by_head(rows, self.heads) if self.heads else rows

    def table(self, strengths: Float[Tensor, "*group"]) -> dict[str, Any]:
        """Return the learned scalars with the names of their axes, JSON-ready; `strengths_from` reads it back.

        Strengths per neuron are not listed: the factors in ``neurons.parquet`` say the same.
        """
        summary = {"granularity": self.granularity, "learned_scalars": self.n_strengths}
        if self.granularity == "neuron":
            return summary
        return summary | {
            "kinds": list(self.kinds),
            "layers": list(self.layers),
            "terms": list(self.terms),
            "values": strengths.detach().cpu().tolist(),
        }

    def strengths_from(self, table: Mapping[str, Any]) -> Float[Tensor, "*group"]:
        """Read what `table` wrote, in whatever order its axes are.

        Raises:
            SafeglassesError: a kind, layer or term of this rule is missing from the table.
        """
        axes = {"kinds": list(self.kinds), "layers": list(self.layers), "terms": list(self.terms)}
        values = torch.tensor(table["values"], dtype=torch.float32)
        for dim, (axis, names) in enumerate(axes.items()):
            missing = [str(n) for n in names if n not in table[axis]]
            if missing:
                raise SafeglassesError(
                    "strengths were learned for other evidence",
                    given=f"{axis}: {', '.join(map(str, table[axis]))}",
                    expected=f"{axis} that include {', '.join(missing)}",
                )
            values = values.index_select(dim, torch.tensor([table[axis].index(n) for n in names]))
        return values

    def glasses(
        self,
        strengths: Float[Tensor, "*group"],
        *,
        recipe: str = "sgm-calibrated",
        notes: Mapping[str, Any] | None = None,
    ) -> Glasses:
        """Make glasses of these strengths.

        Raises:
            SafeglassesError: no neuron is changed.
        """
        glasses = Glasses(
            factors={site: row.detach().cpu().clone() for site, row in self.factors(strengths).items()},
            base_fingerprint=self.evidence.base_fingerprint,
            recipe=recipe,
            columns=table_columns(self.evidence, self.pools),
            notes=notes if notes is not None else {"strengths": self.table(strengths)},
        )
        if glasses.n_neurons == 0:
            raise SafeglassesError(
                "these glasses change no neuron: wearing them would silently do nothing",
                given=f"{self.n_experts} selected neurons, largest strength {strengths.max().item():.4g}",
                do="lower the threshold, or start from larger strengths",
            )
        return glasses

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._copies:
            self._copies[device] = (self.gain.to(device), self.kind.to(device), self.layer.to(device))
        return self._copies[device]


def _averaged(
    gain: Float[Tensor, "site term neuron"], sites: Sequence[Site], widths: Sequence[int], heads: Mapping[Site, int]
) -> Float[Tensor, "site term neuron"]:
    """Give all neurons of a head their mean gain."""
    for i, (site, width) in enumerate(zip(sites, widths, strict=True)):
        if site in heads:
            means = gain[i, :, :width].unflatten(1, (heads[site], -1)).mean(dim=2)
            gain[i, :, :width] = means.repeat_interleave(width // heads[site], dim=1)
    return gain


def _gains(
    evidence: Evidence,
    pools: Sequence[Pool],
    threshold: float | None,
    fdr: float | None,
    *,
    both: bool,
    confirmed: bool,
) -> Float[Tensor, "site term neuron"]:
    """|Gini| of the neurons that one evidence selects, 0 elsewhere; terms are the pools, then their lower sides."""
    judged = confirmed_by_held_out(evidence) if confirmed else evidence
    chosen = experts(judged, pools, threshold=threshold, fdr=fdr)
    rated = [judged.rated(pool) for pool in pools]
    widths = [mask.shape[1] for mask in chosen.values()]
    low = max(0.5, threshold if threshold is not None else 0.5)
    gain = torch.zeros(len(chosen), len(pools) * (1 + both), max(widths), dtype=torch.float32)
    for i, (site, mask) in enumerate(chosen.items()):
        auroc = rows(judged, site, pools).double()
        sides = [mask, (auroc < 1 - low) & torch.stack([known[site] for known in rated])] if both else [mask]
        ginis = (2 * (auroc - 0.5)).clamp(min=0), (2 * (0.5 - auroc)).clamp(min=0)
        found = [torch.where(side, g, 0.0) for side, g in zip(sides, ginis, strict=False)]
        gain[i, :, : widths[i]] = torch.cat(found).float()
    return gain
