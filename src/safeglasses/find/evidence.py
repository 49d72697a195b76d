"""What is known of every neuron: its AUROC per way of pooling, on the find split and held out."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from safeglasses.data.examples import Example, Examples
from safeglasses.errors import SafeglassesError
from safeglasses.files import atomic_write_bytes
from safeglasses.find.auroc import auroc_rows
from safeglasses.find.capture import Activations, capture
from safeglasses.find.pools import Pool
from safeglasses.find.statistics import benjamini_hochberg, p_values, standard_error
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM

log = logging.getLogger(__name__)
SCHEMA = 1
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

    def standard_error(self, site: Site) -> Float[Tensor, "pool _neuron"]:
        """Hanley and McNeil's standard error of `auroc`; 0.5 where a pool says nothing."""
        errors = [
            standard_error(row, *n) if min(n) else torch.full_like(row, 0.5)
            for row, n in zip(self.auroc[site], self.samples, strict=True)
        ]
        return torch.stack(errors)

    def q_values(self, pool: Pool) -> dict[Site, Float[Tensor, " _neuron"]]:
        """Benjamini–Hochberg q-values of AUROC > 0.5, over all neurons of the pool."""
        row = self.row(pool)
        flat = torch.cat([values[row] for values in self.auroc.values()])
        n = self.samples[row]
        q = benjamini_hochberg(p_values(flat, *n)) if min(n) else torch.ones_like(flat)
        return dict(zip(self.auroc, q.split([v.shape[1] for v in self.auroc.values()]), strict=True))

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, atomically; the same evidence gives the same bytes."""
        tensors = {f"find/{site}": values for site, values in self.auroc.items()}
        tensors |= {f"held-out/{site}": values for site, values in (self.held_out or {}).items()}
        header = {
            "schema": SCHEMA,
            "sites": [str(site) for site in self.auroc],
            "pools": [str(pool) for pool in self.pools],
            "samples": self.samples,
            "held_out_samples": self.held_out_samples,
            "base_fingerprint": self.base_fingerprint,
            "source_sha256": self.source_sha256,
            "confounds": dict(self.confounds),
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
        parts = ["find"] if counts is None else ["find", "held-out"]
        names = {f"{part}/{site}" for part in parts for site in sites}
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
        )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("safeglasses", "{}"))
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except FileNotFoundError as error:
        raise SafeglassesError("no such evidence file", given=str(path), do="make it with `safeglasses fit`") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise SafeglassesError(
            "the evidence file cannot be read", given=f"{path} ({error})", do="measure it again"
        ) from error


def measure_evidence(
    vlm: VLM,
    find: Examples,
    held_out: Examples | None = None,
    *,
    sites: Sequence[Site],
    pools: Sequence[Pool],
    batch_size: int | str = "auto",
    progress: Callable[[int, int], None] | None = None,
    timed: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> Evidence:
    """Capture the examples and rate every neuron.

    Args:
        vlm: the model.
        find: toxic and non-toxic examples that the neurons are found on.
        held_out: other examples of both classes, to see whether they separate there too.
        sites: where to look.
        pools: how activations are summarised.
        batch_size: examples per pass.
        progress: called with examples done and in all, held-out ones included.
        timed: opens a clock named ``capture`` or ``statistics`` around each.

    Raises:
        SafeglassesError: a class is missing; or as in `capture` and `auroc`.
    """
    total = len(find) + (len(held_out) if held_out is not None else 0)
    for name, examples in (("find", find), ("held-out", held_out)):
        if examples is not None and len({example.is_toxic for example in examples}) < 2:
            raise SafeglassesError(
                f"the {name} examples do not hold both classes",
                given=f"{len(examples.toxic)} toxic and {len(examples.non_toxic)} non-toxic examples",
                expected="at least one of each",
                do="add examples of the missing class",
            )

    def examined(examples: Examples, before: int) -> tuple[dict[Site, Tensor], Activations, Counts]:
        def shifted(done: int, _: int) -> None:
            if progress is not None:
                progress(before + done, total)

        with timed("capture"):
            found = capture(vlm, examples, sites=sites, pools=pools, batch_size=batch_size, progress=shifted)
        chosen = [samples_of(pool, examples) for pool in pools]
        counts = tuple((int(found.labels[rows].sum()), int((~found.labels[rows]).sum())) for rows in chosen)
        with timed("statistics"):
            rated = rate(found, chosen)
        return rated, replace(found, values={}), counts  # the held-out pass needs the room

    auroc, seen, counts = examined(find, 0)
    for pool, count in zip(pools, counts, strict=True):
        if not min(count):
            log.warning("both classes share their prompts, so %s says nothing: every neuron gets 0.5", pool)
    others = examined(held_out, len(find)) if held_out is not None else (None, None, None)
    return Evidence(
        auroc=auroc,
        held_out=others[0],
        pools=tuple(pools),
        samples=counts,
        held_out_samples=others[2],
        base_fingerprint=vlm.fingerprint(),
        source_sha256=find.sha256,
        confounds=confounds(find, seen),
    )


def samples_of(pool: Pool, examples: Sequence[Example]) -> Int[Tensor, " _sample"]:
    """Choose the examples that are samples of a pool.

    Over the response, or over everything, each example is one. What is pooled before the response depends on
    the prompt alone: there each distinct prompt is one sample, and it is toxic if any of its responses is.
    Otherwise members of a same-prompt pair would tie at every neuron and pull every AUROC towards 0.5.
    """
    if pool.span not in ("prompt", "image"):
        return torch.arange(len(examples))
    first: dict[str, int] = {}
    for label in (True, False):
        for index, example in enumerate(examples):
            if example.is_toxic is label:
                first.setdefault(example.prompt_key, index)
    return torch.tensor(sorted(first.values()))


def rate(
    activations: Activations, samples: Sequence[Int[Tensor, " _sample"]]
) -> dict[Site, Float[Tensor, "pool _neuron"]]:
    """Return the AUROC of every neuron, 0.5 for a pool whose samples hold one class alone.

    Raises:
        SafeglassesError: as in `auroc`, with the site's name.
    """
    rated: dict[Site, Tensor] = {}
    for site, values in activations.values.items():
        rows = []
        for pooled, chosen in zip(values, samples, strict=True):
            labels = activations.labels[chosen]
            if not 0 < int(labels.sum()) < len(labels):
                rows.append(torch.full((len(pooled),), 0.5, dtype=torch.float64))
                continue
            whole = len(chosen) == pooled.shape[1]
            try:
                rows.append(auroc_rows(pooled if whole else pooled.index_select(1, chosen), labels))
            except SafeglassesError as error:
                raise SafeglassesError(
                    error.what, given=f"{error.given} of {site}", expected=error.expected, do=error.do
                ) from error
        rated[site] = torch.stack(rows)
    return rated


def _pairs(counts: Sequence[Sequence[int]]) -> Counts:
    return tuple((int(toxic), int(non_toxic)) for toxic, non_toxic in counts)


def confounds(examples: Sequence[Example], activations: Activations) -> dict[str, float]:
    """Rate properties that should not tell the classes apart the way neurons are rated: 0.5 is good.

    Returns:
        AUROC of the lengths of response and prompt, and of the number of picture tokens.
    """
    columns = dict(activations.lengths)
    columns["response_characters"] = torch.tensor([len(e.response or "") for e in examples])
    rated = auroc_rows(torch.stack(list(columns.values())).double(), activations.labels)
    return dict(zip(columns, rated.tolist(), strict=True))
