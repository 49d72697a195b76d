"""Properties that should not tell the classes apart, and the neurons that only follow them."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safeglasses.data.examples import Example
from safeglasses.find.auroc import auroc_rows
from safeglasses.find.statistics import p_values, standard_error
from safeglasses.find.strata import Column, adjusted, comparable, strata_of

Kind = Literal["numeric", "category"]

MARGIN = 0.1
"""A property is flagged when its AUROC is further than this from 0.5, …"""
LEVEL = 0.01
"""… with a two-sided p-value below this."""
KEPT = 0.5
"""A neuron is explained by a property when less than this share of its Gini is left within strata, …"""
ADJUSTED_LEVEL = 0.05
"""… or when what is left is not significant at this one-sided level."""
FOLDS = 5
"""Parts of the data, each rated by what is known from the others."""
_PRIOR = 2.0
"""Samples that the overall share counts as, in the share of a category."""


@dataclass(frozen=True)
class Confound:
    """How well a property of the examples alone tells the classes apart."""

    name: str
    """Which property."""
    kind: Kind
    """``numeric`` (rated by its value) or ``category`` (by the share of toxic examples in other folds)."""
    auroc: float
    """0.5 is good; below 0.5 the toxic examples have the smaller numbers."""
    low: float
    """Lower end of the 95 % interval (Hanley and McNeil)."""
    high: float
    """Upper end."""
    p: float
    """Two-sided p-value of 0.5."""

    @property
    def flagged(self) -> bool:
        """Whether the property is a rival explanation of whatever separates the classes."""
        return abs(self.auroc - 0.5) > MARGIN and self.p < LEVEL

    def to_json(self) -> dict[str, Any]:
        """Return the fields, JSON-ready."""
        return {**vars(self), "flagged": self.flagged}


def columns_of(examples: Sequence[Example], lengths: Mapping[str, Int[Tensor, " sample"]]) -> dict[str, Column]:
    """Return the properties to be rated, one value per example: numbers as tensors, categories as lists.

    A category counts when it has more than one value. The kind of harm (``category``, ``modality``) must besides
    be known for examples of both classes: where only toxic rows have one, it is the label under another name.
    """
    columns: dict[str, Column] = dict(lengths)
    columns["response_characters"] = torch.tensor([len(example.response or "") for example in examples])
    categories: dict[str, list[str | None]] = {
        "language": [example.language for example in examples],
        "source": [example.source for example in examples],
        "category": [example.category for example in examples],
        "condition": [example.condition for example in examples],
        "modality": [example.modality for example in examples],
        "n_images": [str(example.n_images) for example in examples],
        "n_frames": [str(example.n_frames) for example in examples],
    }
    for name in ("category", "modality"):
        known = {e.is_toxic for e, value in zip(examples, categories[name], strict=True) if value is not None}
        if len(known) < 2:
            del categories[name]
    return columns | {name: values for name, values in categories.items() if len(set(values)) > 1}


def confound_table(examples: Sequence[Example], lengths: Mapping[str, Int[Tensor, " sample"]]) -> tuple[Confound, ...]:
    """Rate every property of `columns_of` as a neuron would be rated.

    A category is rated by the share of toxic examples that have it in the other folds, and only examples of one
    fold are compared with each other. Over all folds together chance would lie below 0.5: a fold rich in toxic
    examples leaves few to the others.

    Raises:
        SafeglassesError: a class is missing.
    """
    labels = torch.tensor([example.is_toxic for example in examples])
    folds = torch.tensor([_fold(example.pair_id or example.prompt_key) for example in examples])
    table = []
    for name, column in columns_of(examples, lengths).items():
        if isinstance(column, Tensor):
            table.append(_confound(name, "numeric", float(auroc_rows(column.double()[None], labels)), labels))
        else:
            shares = _cross_fitted(strata_of(column), labels, folds)
            told = bool(comparable(labels, folds))  # a handful of examples may have no fold with both classes
            auroc = float(adjusted(shares[None], labels, folds).auroc) if told else 0.5
            table.append(_confound(name, "category", auroc, labels))
    return tuple(table)


def _fold(key: str) -> int:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[1] % FOLDS


def _cross_fitted(
    codes: Int[Tensor, " sample"], labels: Bool[Tensor, " sample"], folds: Int[Tensor, " sample"]
) -> Float[Tensor, " sample"]:
    """Return for each sample the smoothed share of toxic ones among those of its category in the other folds."""
    shares = torch.empty(len(labels), dtype=torch.float64)
    n = int(codes.max()) + 1
    for fold in torch.unique(folds).tolist():
        here = folds == fold
        prior = (labels[~here].sum() + 1) / ((~here).sum() + 2)
        of, toxic = (torch.bincount(codes[rows], minlength=n).double() for rows in (~here, ~here & labels))
        shares[here] = ((toxic + _PRIOR * prior) / (of + _PRIOR))[codes[here]]
    return shares


def _confound(name: str, kind: Kind, auroc: float, labels: Bool[Tensor, " sample"]) -> Confound:
    n_pos, n_neg = int(labels.sum()), int((~labels).sum())
    a = torch.tensor(auroc, dtype=torch.float64)
    half = 1.959964 * float(standard_error(a, n_pos, n_neg))
    p = 2 * float(p_values((a - 0.5).abs() + 0.5, n_pos, n_neg))
    return Confound(name, kind, auroc, max(0.0, auroc - half), min(1.0, auroc + half), p)


@dataclass(frozen=True, eq=False)
class Explained:
    """Which neurons tell no more than a property does."""

    name: str
    """The property."""
    flagged: Bool[Tensor, " neuron"]
    """Whether little, or nothing that is significant, is left among examples alike in it."""
    auroc: Float[Tensor, " neuron"]
    """What is left: the AUROC within strata; 0.5 where nothing could be compared."""
    comparable: float
    """Share of toxic–non-toxic pairs that are alike. At 0 the property is the label, and every neuron is flagged."""

    def to_json(self) -> dict[str, Any]:
        """Return the counts, JSON-ready."""
        return {
            "confound": self.name,
            "neurons": len(self.flagged),
            "flagged": int(self.flagged.sum()),
            "comparable": self.comparable,
        }


def explained(
    values: Float[Tensor, "neuron sample"],
    labels: Bool[Tensor, " sample"],
    columns: Mapping[str, Column],
    *,
    strata: int = 10,
) -> tuple[Explained, ...]:
    """Tell for each property which neurons lose what they knew once only examples alike in it are compared.

    Neurons below 0.5 are judged from below. Give the columns of flagged confounds: a property that does not
    differ between the classes can explain nothing, and each one tested may flag a weak expert by chance.

    Args:
        values: of the selected neurons.
        labels: whether a sample is toxic.
        columns: the properties, a value per sample.
        strata: into how many parts numbers are cut.

    Raises:
        SafeglassesError: as in `auroc`.
    """
    gini = 2 * auroc_rows(values, labels) - 1
    side = torch.where(gini < 0, -1.0, 1.0).double()
    results = []
    for name, column in columns.items():
        codes = strata_of(column, strata)
        if not comparable(labels, codes):
            half, every = torch.full_like(gini, 0.5), torch.ones_like(gini, dtype=torch.bool)
            results.append(Explained(name, every, half, 0.0))
            continue
        left = adjusted(values, labels, codes)
        p = torch.where(side > 0, left.p, 1 - left.p)
        little = side * (2 * left.auroc - 1) < KEPT * gini.abs()
        results.append(Explained(name, little | (p >= ADJUSTED_LEVEL), left.auroc, left.comparable))
    return tuple(results)


def explaining(results: Sequence[Explained]) -> tuple[str | None, ...]:
    """Name for each neuron the property that leaves least of it, of those that explain it; None if none does."""
    if not results:
        return ()
    off = torch.stack([torch.where(r.flagged, (r.auroc - 0.5).abs(), torch.inf) for r in results])
    least = off.min(dim=0)
    return tuple(
        None if value == torch.inf else results[i].name
        for value, i in zip(least.values.tolist(), least.indices.tolist(), strict=True)
    )
