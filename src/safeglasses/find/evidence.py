"""What is known of every neuron, per way of pooling: its AUROC, what else was measured, and how sure it is."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from safeglasses.errors import SafeglassesError
from safeglasses.files import atomic_write_bytes
from safeglasses.find.enough import FEWEST
from safeglasses.find.pools import Pool
from safeglasses.find.statistics import benjamini_hochberg, p_values, standard_error
from safeglasses.model.sites import Site

SCHEMA = 2
Counts = tuple[tuple[int, int], ...]
Aurocs = Mapping[Site, Float[Tensor, "pool _neuron"]]


@dataclass(frozen=True, eq=False)
class Evidence:
    """Expertise of every neuron at the sites that were looked at."""

    auroc: Aurocs
    """AUROC on the find split (toxic = positive), float64."""
    held_out: Aurocs | None
    """The same on held-out examples, or None."""
    pools: tuple[Pool, ...]
    """First axis of both."""
    samples: Counts
    """Toxic and non-toxic samples behind `auroc`, per pool; see `samples_of`."""
    held_out_samples: Counts | None
    """The same behind `held_out`."""
    base_fingerprint: str
    """The model that was looked at."""
    source_sha256: str
    """Hash of the examples' file."""
    confounds: Mapping[str, float] = field(default_factory=dict)
    """AUROC of properties that should not tell the classes apart: 0.5 is good."""
    columns: Mapping[str, Aurocs] = field(default_factory=dict)
    """What else the same pass gave, float32: ``null``, ``effect_size``, ``rms_change``, ``mean_toxic`` …; with
    the histogram engine ``auroc_bound``, within which the exact AUROC lies; where samples may lack a value (at fused
    experts to which no token of theirs was sent, on the vision side without a picture, at sites whose tokens are not in
    the span) ``n_toxic`` and ``n_non_toxic``, the samples that have one."""
    weight_norms: Mapping[Site, Float[Tensor, " _neuron"]] = field(default_factory=dict)
    """Per input site the length of each neuron's outgoing weights, ‖W[:, i]‖₂."""
    engine: str = "exact"
    """``exact`` or ``histogram``."""
    certainty: Mapping[str, Any] = field(default_factory=dict)
    """JSON-ready: the table of confounds, and per pool how many neurons would be found again and how far pure
    noise reaches; see `certainty.assess`."""

    def row(self, pool: Pool) -> int:
        """Index of a pool.

        Raises:
            SafeglassesError: it was not measured.
        """
        if pool not in self.pools:
            raise SafeglassesError(
                "the evidence was not measured for this way of pooling",
                given=str(pool),
                expected=" or ".join(map(str, self.pools)),
            )
        return self.pools.index(pool)

    def gini(self, site: Site) -> Float[Tensor, "pool _neuron"]:
        """Gini coefficient 2 (AUROC − 0.5)."""
        return 2 * (self.auroc[site] - 0.5)

    def met(self, site: Site) -> tuple[Float[Tensor, "pool _neuron"], Float[Tensor, "pool _neuron"]] | None:
        """Return how many toxic and non-toxic samples each neuron has met; None where all met all of `samples`."""
        if "n_toxic" not in self.columns:
            return None
        return self.columns["n_toxic"][site].double(), self.columns["n_non_toxic"][site].double()

    def rated(self, pool: Pool) -> dict[Site, Bool[Tensor, " _neuron"]]:
        """Return which neurons have met enough samples to be selected: all of them, or `FEWEST` of each class."""
        row, found = self.row(pool), {}
        for site, values in self.auroc.items():
            met = self.met(site)
            found[site] = torch.ones(values.shape[1], dtype=torch.bool)
            for counts, every in zip(met or (), self.samples[row], strict=False):
                found[site] &= counts[row] >= min(FEWEST, every)
        return found

    def standard_error(self, site: Site) -> Float[Tensor, "pool _neuron"]:
        """Hanley and McNeil's standard error of `auroc`; 0.5 where a pool says nothing."""
        met = self.met(site)
        if met is not None:
            known = torch.minimum(*met) > 0
            return torch.where(known, standard_error(self.auroc[site], *(n.clamp(min=1) for n in met)), 0.5)
        errors = [
            standard_error(row, *n) if min(n) else torch.full_like(row, 0.5)
            for row, n in zip(self.auroc[site], self.samples, strict=True)
        ]
        return torch.stack(errors)

    def q_values(self, pool: Pool) -> dict[Site, Float[Tensor, " _neuron"]]:
        """Benjamini–Hochberg q-values of AUROC > 0.5, over all neurons of the pool that are `rated`; others have 1."""
        row = self.row(pool)
        flat = torch.cat([values[row] for values in self.auroc.values()])
        q = torch.ones_like(flat, dtype=torch.float64)
        if min(self.samples[row]):
            rated = torch.cat(list(self.rated(pool).values()))
            n: list[Any] = list(self.samples[row])
            if "n_toxic" in self.columns:
                both = [self.met(site) for site in self.auroc]
                n = [torch.cat([met[i][row] for met in both if met is not None])[rated] for i in (0, 1)]
            q[rated] = benjamini_hochberg(p_values(flat[rated], *n))
        return dict(zip(self.auroc, q.split([v.shape[1] for v in self.auroc.values()]), strict=True))

    def importance(
        self, site: Site, of: Literal["toxic", "non_toxic"] = "toxic", *, signed: bool = True
    ) -> Float[Tensor, "pool _neuron"]:
        """Return |mean activation| · ‖W[:, i]‖ of the neurons that a linear map reads.

        Source: Precise Shield, arXiv 2604.08881 (signed); One Anchor for All, arXiv 2607.27917 (mean of |a|).
        Here means go over pooled values, one per sample; with ``prompt:last`` that is the papers' own.

        Args:
            site: an input site.
            of: the class whose activations are meant.
            signed: the mean may cancel; else the mean of absolute values.

        Raises:
            SafeglassesError: an output site, or evidence without these columns.
        """
        name = f"mean_{of}" if signed else f"mean_abs_{of}"
        if site not in self.weight_norms or name not in self.columns:
            raise SafeglassesError(
                "no importance is known there",
                given=str(site),
                expected="one of " + (", ".join(map(str, list(self.weight_norms)[:3])) or "no site of this evidence"),
                do="measure the evidence at the neurons' own sites: sites = neurons",
            )
        return self.columns[name][site].double().abs() * self.weight_norms[site].double()

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, atomically; the same evidence gives the same bytes."""
        tensors = {f"find/{site}": values for site, values in self.auroc.items()}
        tensors |= {f"held-out/{site}": values for site, values in (self.held_out or {}).items()}
        tensors |= {f"{name}/{site}": v for name, column in self.columns.items() for site, v in column.items()}
        tensors |= {f"weight-norm/{site}": values for site, values in self.weight_norms.items()}
        header = {
            "schema": SCHEMA,
            "sites": [str(site) for site in self.auroc],
            "pools": [str(pool) for pool in self.pools],
            "samples": self.samples,
            "held_out_samples": self.held_out_samples,
            "base_fingerprint": self.base_fingerprint,
            "source_sha256": self.source_sha256,
            "confounds": dict(self.confounds),
            "columns": list(self.columns),
            "weight_norms": [str(site) for site in self.weight_norms],
            "engine": self.engine,
            "certainty": dict(self.certainty),
        }
        data = save({name: t.contiguous() for name, t in tensors.items()}, {"safeglasses": json.dumps(header)})
        atomic_write_bytes(Path(path), data)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> "Evidence":
        """Read what `save` wrote.

        Raises:
            SafeglassesError: no such file, not evidence, or of another schema.
        """
        path = Path(path)
        header, tensors = _read(path)
        if header.get("schema") != SCHEMA:
            raise SafeglassesError(
                "not evidence that this version reads",
                given=f"{path}, schema {header.get('schema')}",
                expected=f"schema {SCHEMA}",
                do="measure it again, or use the version of safeglasses that wrote it",
            )
        sites = [Site.parse(text) for text in header["sites"]]
        counts = header["held_out_samples"]
        parts = ["find", *([] if counts is None else ["held-out"]), *header["columns"]]
        names = {f"{part}/{site}" for part in parts for site in sites}
        names |= {f"weight-norm/{text}" for text in header["weight_norms"]}
        if names != tensors.keys():
            raise SafeglassesError(
                "the evidence file does not hold what it says",
                given=f"{path}, {len(names ^ tensors.keys())} tensors missing or too many",
                expected=f"{len(names)} tensors",
                do="measure it again",
            )
        return cls(
            auroc={site: tensors[f"find/{site}"] for site in sites},
            held_out=None if counts is None else {site: tensors[f"held-out/{site}"] for site in sites},
            pools=tuple(Pool.parse(text) for text in header["pools"]),
            samples=_pairs(header["samples"]),
            held_out_samples=None if counts is None else _pairs(counts),
            base_fingerprint=header["base_fingerprint"],
            source_sha256=header["source_sha256"],
            confounds=header["confounds"],
            columns={name: {site: tensors[f"{name}/{site}"] for site in sites} for name in header["columns"]},
            weight_norms={Site.parse(text): tensors[f"weight-norm/{text}"] for text in header["weight_norms"]},
            engine=header["engine"],
            certainty=header["certainty"],
        )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("safeglasses", "{}"))
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except FileNotFoundError as error:
        raise SafeglassesError(
            "no such evidence file", given=str(path), do="make it with `safeglasses capture` or `safeglasses fit`"
        ) from error
    except (SafetensorError, OSError, ValueError) as error:
        raise SafeglassesError(
            "the evidence file cannot be read", given=f"{path} ({error})", do="measure it again"
        ) from error


def _pairs(counts: Sequence[Sequence[int]]) -> Counts:
    return tuple((int(toxic), int(non_toxic)) for toxic, non_toxic in counts)
