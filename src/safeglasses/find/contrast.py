"""What harmful and benign prompts do to every neuron, per language and risk type, and the sets drawn from it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from safeglasses.data.probes import RISKS, Cell, Risk, several_languages
from safeglasses.errors import SafeglassesError, WrongBase
from safeglasses.files import atomic_write_bytes
from safeglasses.find.averages import Averages
from safeglasses.find.enough import FEWEST
from safeglasses.find.rules import Rule, RuleName
from safeglasses.find.selection import Selection
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM

FILE = "contrast.safetensors"
"""What the file is called in a run folder."""
SCHEMA = 1
COLUMNS = ("mean", "mean_abs", "sd", "rms", "in_top")
"""Averages that are kept, float32; ``snip`` may come with them."""

Column = Mapping[Site, Float[Tensor, "cell class _neuron"]]
"""Per site and cell the values of harmful (0) and benign prompts (1)."""


@dataclass(frozen=True, eq=False)
class Contrast:
    """What was measured of each cell, and by which rules neurons are drawn from it.

    >>> contrast.neurons(Cell("en", "text-dominant")) & contrast.neurons(Cell("sw", "text-dominant"))
    """

    cells: tuple[Cell, ...]
    """First axis of the columns."""
    rules: tuple[Rule, ...]
    """The rules whose noise and stability were measured; the first is the one meant where none is named."""
    tokens: str
    """Over which tokens: ``last`` (of the prompt), ``prompt``, ``text`` or ``response``."""
    columns: Mapping[str, Column]
    """Per name, as in `COLUMNS`: what harmful and benign prompts do, one number per neuron."""
    weight_norms: Mapping[Site, Float[Tensor, " _neuron"]]
    """‖W_down[:, i]‖₂, float32."""
    prompts: tuple[tuple[int, int], ...]
    """Harmful and benign prompts, per cell."""
    base_fingerprint: str
    """The model that was looked at."""
    source_sha256: str
    """Hash of the probe."""
    frequency: Mapping[str, Mapping[Site, Float[Tensor, "cell _neuron"]]] = field(default_factory=dict)
    """Per rule the share of bootstrap resamples that select the neuron."""
    certainty: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Per rule and cell, JSON-ready: how many were found, what noise alone gives, would they be found again; see
    `steadiness.Steadiness.record`."""
    idle: Mapping[str, Sequence[Sequence[float | None]]] = field(default_factory=dict)
    """Per rule, cells down and across: which share of a set about nothing (one half of the benign prompts against
    the other) the other cell's holds. What overlap means is beyond that."""
    left_out: tuple[int, ...] = ()
    """Decoder layers that were not looked at: those that only cross-attend to pictures."""
    met: Mapping[Site, Sequence[tuple[int, int]]] = field(default_factory=dict)
    """Of fused experts, per cell: harmful and benign prompts with a token that the router sent there."""

    def rated(self, site: Site, row: int) -> bool:
        """Whether enough prompts of a cell met a site for its neurons to be selected: all, or `FEWEST` of each class.

        Args:
            site: one of those that were looked at.
            row: number of the cell.
        """
        if site not in self.met:
            return True
        both = zip(self.met[site][row], self.prompts[row], strict=True)
        return all(count >= min(FEWEST, every) for count, every in both)

    def neurons(self, cell: Cell, rule: RuleName | None = None) -> Selection:
        """Return the safety neurons of one language and risk type.

        Raises:
            SafeglassesError: no such cell, or a rule that was not measured.
        """
        row, by = self._row(cell), self.rule(rule)
        masks = {}
        for site, norm in self.weight_norms.items():
            if not self.rated(site, row):
                masks[site] = torch.zeros(len(norm), dtype=torch.bool)
            elif by.name == "snip":
                scores = self.columns["snip"][site][row].double()
                masks[site] = by.difference(scores[0], scores[1])
            else:
                masks[site] = by.chosen(self._averages(site, row, 0), self._averages(site, row, 1), norm.double())
        return Selection(masks)

    def sets(self, rule: RuleName | None = None) -> dict[Cell, Selection]:
        """Return the safety neurons of every cell."""
        return {cell: self.neurons(cell, rule) for cell in self.cells}

    def union(
        self,
        rule: RuleName | None = None,
        *,
        languages: Iterable[str] | None = None,
        risks: Iterable[Risk] | None = None,
    ) -> Selection:
        """Return the safety neurons of any of some languages and risk types (all by default).

        Raises:
            SafeglassesError: a language or risk type was not measured.
        """
        tongues = self.languages if languages is None else tuple(languages)
        if risks is None:  # a language need not have both
            for language in (language for language in tongues if language not in self.languages):
                self._row(Cell(language, RISKS[0]))
            cells = [cell for cell in self.cells if cell.language in tongues]
        else:
            cells = [Cell(language, risk) for language in tongues for risk in risks]
        return reduce(or_, [self.neurons(cell, rule) for cell in cells])

    def shared(self, language: str, rule: RuleName | None = None) -> Selection:
        """Return MS, the neurons that both risk types of a language have.

        Source: One Anchor for All, arXiv 2607.27917.

        Raises:
            SafeglassesError: one of the risk types was not measured.
        """
        image, text = Cell(language, "image-dominant"), Cell(language, "text-dominant")
        return self.neurons(image, rule) & self.neurons(text, rule)

    def multilingual(self, rule: RuleName | None = None, *, anchor: str = "en") -> Selection:
        """Return MLS: over all other languages, what each one's MS shares with the anchor's.

        Source: One Anchor for All, arXiv 2607.27917.

        Raises:
            SafeglassesError: there is one language only, or the anchor was not measured.
        """
        several_languages(self.languages, "the set shared with an anchor language")
        base = self.shared(anchor, rule)
        others = [language for language in self.languages if language != anchor]
        return reduce(or_, [self.shared(language, rule) & base for language in others])

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages, in the order of the cells."""
        return tuple(dict.fromkeys(cell.language for cell in self.cells))

    def rule(self, name: RuleName | None = None) -> Rule:
        """Return a rule that was measured; without a name the first.

        Raises:
            SafeglassesError: it was not.
        """
        found = next((rule for rule in self.rules if name in (None, rule.name)), None)
        if found is None:
            raise SafeglassesError(
                "neurons were not measured by this rule",
                given=repr(name),
                expected=" or ".join(rule.name for rule in self.rules),
                do="measure the contrast again with it",
            )
        return found

    def check(self, vlm: VLM) -> None:
        """Check that a model is the one that was looked at.

        Raises:
            WrongBase: it is another one.
        """
        found = vlm.fingerprint()
        if found != self.base_fingerprint:
            raise WrongBase(
                "these safety neurons are of another model",
                given=f"{vlm.source}, {found}",
                expected=self.base_fingerprint,
                do="load the model they were found in, or find them again in this one",
            )

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, atomically; the same contrast gives the same bytes."""
        header = {
            "schema": SCHEMA,
            "cells": [str(cell) for cell in self.cells],
            "rules": [rule.record() for rule in self.rules],
            "tokens": self.tokens,
            "columns": list(self.columns),
            "sites": [str(site) for site in self.weight_norms],
            "prompts": self.prompts,
            "base_fingerprint": self.base_fingerprint,
            "source_sha256": self.source_sha256,
            "frequency": list(self.frequency),
            "certainty": dict(self.certainty),
            "idle": dict(self.idle),
            "left_out": self.left_out,
            **({"met": {str(site): counts for site, counts in self.met.items()}} if self.met else {}),
        }
        data = save(
            {name: value.contiguous() for name, value in self._tensors().items()}, {"safeglasses": json.dumps(header)}
        )
        atomic_write_bytes(Path(path), data)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> "Contrast":
        """Read what `save` wrote: the file, or a folder that holds it under its usual name.

        Raises:
            SafeglassesError: no such file, not a contrast, or of another schema.
        """
        path = Path(path) / FILE if Path(path).is_dir() else Path(path)
        header, tensors = _read(path)
        sites = [Site.parse(text) for text in header["sites"]]
        names = [*header["columns"], *(f"frequency/{rule}" for rule in header["frequency"]), "weight-norm"]
        expected = {f"{name}/{site}" for name in names for site in sites}
        if expected != tensors.keys():
            raise SafeglassesError(
                "the file of safety neurons does not hold what it says",
                given=f"{path}, {len(expected ^ tensors.keys())} tensors missing or too many",
                expected=f"{len(expected)} tensors",
                do="find the neurons again",
            )

        def by_site(name: str) -> dict[Site, Tensor]:
            return {site: tensors[f"{name}/{site}"] for site in sites}

        return cls(
            cells=tuple(Cell.parse(text) for text in header["cells"]),
            rules=tuple(Rule(**fields) for fields in header["rules"]),
            tokens=header["tokens"],
            columns={name: by_site(name) for name in header["columns"]},
            weight_norms=by_site("weight-norm"),
            prompts=tuple((int(a), int(b)) for a, b in header["prompts"]),
            base_fingerprint=header["base_fingerprint"],
            source_sha256=header["source_sha256"],
            frequency={rule: by_site(f"frequency/{rule}") for rule in header["frequency"]},
            certainty=header["certainty"],
            idle=header["idle"],
            left_out=tuple(header["left_out"]),
            met={
                Site.parse(text): tuple((int(a), int(b)) for a, b in counts)
                for text, counts in header.get("met", {}).items()
            },
        )

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"{name}/{site}": value for name, column in self.columns.items() for site, value in column.items()}
        tensors |= {
            f"frequency/{rule}/{site}": v for rule, column in self.frequency.items() for site, v in column.items()
        }
        return tensors | {f"weight-norm/{site}": norm for site, norm in self.weight_norms.items()}

    def _averages(self, site: Site, row: int, kind: int) -> Averages:
        parts = {name: self.columns[name][site][row, kind].double() for name in COLUMNS}
        count = self.met[site][row][kind] if site in self.met else self.prompts[row][kind]
        return Averages(count=torch.tensor(float(count), dtype=torch.float64), **parts)

    def _row(self, cell: Cell) -> int:
        if cell not in self.cells:
            raise SafeglassesError(
                "no safety neurons were looked for there",
                given=str(cell),
                expected=", ".join(str(one) for one in self.cells),
                do="find them with a probe that holds such prompts",
            )
        return self.cells.index(cell)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("safeglasses", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except FileNotFoundError as error:
        raise SafeglassesError(
            "no file of safety neurons", given=str(path), do="make it with `safeglasses shield`, or Contrast.save"
        ) from error
    except (SafetensorError, OSError, ValueError) as error:
        raise SafeglassesError(
            "the file of safety neurons cannot be read", given=f"{path} ({error})", do="find the neurons again"
        ) from error
    if header.get("schema") != SCHEMA or "cells" not in header:
        raise SafeglassesError(
            "not a file of safety neurons that this version reads",
            given=f"{path}, schema {header.get('schema')}",
            expected=f"schema {SCHEMA}",
            do="find the neurons again, or use the version of safeglasses that wrote it",
        )
    return header, tensors
