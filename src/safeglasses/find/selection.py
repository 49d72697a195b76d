"""Sets of neurons, and the rules that draw them from evidence."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from safeglasses.errors import SafeglassesError
from safeglasses.find.evidence import Evidence
from safeglasses.find.pools import Pool
from safeglasses.model.sites import Site


@dataclass(frozen=True, eq=False)
class Selection:
    """A set of neurons over known sites.

    >>> experts = Selection.fdr(evidence, Pool.parse("response:max")) - Selection.above(evidence, pool, 0.9)
    """

    masks: Mapping[Site, Bool[Tensor, " _neuron"]]
    """Per site which neurons belong to the set."""

    @classmethod
    def above(cls, evidence: Evidence, pool: Pool, threshold: float) -> "Selection":
        """Neurons whose AUROC exceeds a threshold; those of experts that met too few samples are left out."""
        row, rated = evidence.row(pool), evidence.rated(pool)
        return cls({site: (values[row] > threshold) & rated[site] for site, values in evidence.auroc.items()})

    @classmethod
    def fdr(cls, evidence: Evidence, pool: Pool, q: float = 0.05, *, held_out: bool = True) -> "Selection":
        """Neurons with AUROC above 0.5 at a false discovery rate.

        Args:
            evidence: what was measured.
            pool: which of its evidences.
            q: the rate, controlled over all neurons of that pool (Benjamini and Hochberg).
            held_out: also demand AUROC > 0.5 on the held-out examples.

        Raises:
            SafeglassesError: held-out values are asked for and there are none.
        """
        row, values, rated = evidence.row(pool), evidence.q_values(pool), evidence.rated(pool)
        masks = {site: (values[site] <= q) & rated[site] for site in values}
        if held_out:
            if evidence.held_out is None:
                raise SafeglassesError(
                    "the evidence has no held-out values",
                    do="measure it with held-out examples (a calibrate split), or pass held_out=False",
                )
            masks = {site: mask & (evidence.held_out[site][row] > 0.5) for site, mask in masks.items()}
        return cls(masks)

    @classmethod
    def top(cls, evidence: Evidence, pool: Pool, k: int) -> "Selection":
        """The k neurons with the highest AUROC, exactly k whatever the ties: earlier sites and indices first.

        Neurons of experts that met too few samples are left out.

        Raises:
            SafeglassesError: there are fewer than k neurons.
        """
        row, rated = evidence.row(pool), torch.cat(list(evidence.rated(pool).values()))
        scores = torch.cat([values[row] for values in evidence.auroc.values()]).masked_fill(~rated, -1)
        if not 0 <= k <= int(rated.sum()):
            raise SafeglassesError("no such number of neurons", given=f"k={k}", expected=f"0 to {int(rated.sum())}")
        chosen = torch.zeros(len(scores), dtype=torch.bool)
        chosen[torch.sort(scores, descending=True, stable=True).indices[:k]] = True
        widths = [values.shape[1] for values in evidence.auroc.values()]
        return cls(dict(zip(evidence.auroc, chosen.split(widths), strict=True)))

    def __len__(self) -> int:
        return sum(int(mask.sum()) for mask in self.masks.values())

    def __iter__(self) -> Iterator[tuple[Site, int]]:
        for site, mask in self.masks.items():
            for index in mask.nonzero()[:, 0].tolist():
                yield site, index

    def __contains__(self, neuron: object) -> bool:
        if not isinstance(neuron, tuple) or len(neuron) != 2 or neuron[0] not in self.masks:
            return False
        mask = self.masks[neuron[0]]
        return 0 <= neuron[1] < len(mask) and bool(mask[neuron[1]])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Selection):
            return NotImplemented
        return self.masks.keys() == other.masks.keys() and all(
            torch.equal(mask, other.masks[site]) for site, mask in self.masks.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def __and__(self, other: "Selection") -> "Selection":
        """Neurons in both."""
        self._check(other)
        return Selection({site: mask & other.masks[site] for site, mask in self.masks.items()})

    def __or__(self, other: "Selection") -> "Selection":
        """Neurons in either."""
        self._check(other)
        return Selection({site: mask | other.masks[site] for site, mask in self.masks.items()})

    def __sub__(self, other: "Selection") -> "Selection":
        """Neurons in this one alone."""
        self._check(other)
        return Selection({site: mask & ~other.masks[site] for site, mask in self.masks.items()})

    def matched(self, seed: int) -> "Selection":
        """Draw as many neurons of every site from those that are not in the set: the control of an ablation.

        Raises:
            SafeglassesError: a site has too few others.
        """
        generator = torch.Generator().manual_seed(seed)
        masks = {}
        for site, mask in self.masks.items():
            others, wanted = (~mask).nonzero()[:, 0], int(mask.sum())
            if len(others) < wanted:
                raise SafeglassesError(
                    "too few neurons are left to draw a control from",
                    given=f"{wanted} of {len(mask)} neurons of {site} are selected",
                    expected="at most half of every site",
                    do="select fewer neurons",
                )
            masks[site] = torch.zeros_like(mask)
            masks[site][others[torch.randperm(len(others), generator=generator)[:wanted]]] = True
        return Selection(masks)

    @property
    def identity(self) -> str:
        """SHA-256 over the sites with a selected neuron and which they are."""
        digest = hashlib.sha256()
        for site, mask in sorted(self.masks.items()):
            if mask.any():
                digest.update(f"{site} {len(mask)} {mask.nonzero()[:, 0].tolist()}\n".encode())
        return digest.hexdigest()

    def overlap(self, other: "Selection") -> dict[str, float | int | None]:
        """Compare two sets: sizes, Jaccard, and the directional shares (None for an empty set)."""
        both, either = len(self & other), len(self | other)
        return {
            "intersection": both,
            "union": either,
            "jaccard": both / either if either else None,
            "of_self": both / len(self) if len(self) else None,
            "of_other": both / len(other) if len(other) else None,
        }

    def table(self) -> list[dict[str, Any]]:
        """Count per site, JSON-ready; sites without a selected neuron included."""
        return [
            {
                "site": str(site),
                "layer": site.layer,
                "kind": site.kind,
                "selected": int(m.sum()),
                "neurons": len(m),
            }
            for site, m in self.masks.items()
        ]

    def _check(self, other: "Selection") -> None:
        same = self.masks.keys() == other.masks.keys()
        if not same or any(len(mask) != len(other.masks[site]) for site, mask in self.masks.items()):
            raise SafeglassesError(
                "selections over different sites cannot be combined",
                given=f"{len(self.masks)} and {len(other.masks)} sites",
                expected="the same sites with the same numbers of neurons",
            )
