"""Glasses: factors that turn neurons down; worn through hooks, folded into weights, saved as an adapter."""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from safeglasses.defend.factors import Factors, changed, check_factors, count, effective, in_order
from safeglasses.defend.folder import Contents, form_of, read_folder, write_folder
from safeglasses.defend.home import FOLDED, Home, check_base, check_fit, quantisation
from safeglasses.defend.weights import scale_weights
from safeglasses.errors import SafeglassesError, WrongBase
from safeglasses.model.anatomy import anatomy
from safeglasses.model.hooks import scaled
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM


@dataclass(frozen=True, eq=False)
class Glasses:
    """Factors per neuron, the strength they are worn at, and what they were made from and for.

    >>> with glasses.at(0.5).worn(vlm):
    ...     vlm.generate(chats, max_new_tokens=64, temperature=0, seed=0)
    """

    factors: Factors
    """Factor per neuron and site, float32 on the CPU; 1 changes nothing, unchanged sites may be missing."""
    base_fingerprint: str
    """Fingerprint of the model they were made for."""
    recipe: str
    """Name of the recipe that made them."""
    strength: float | int = 1.0
    """λ of α_eff = 1 − λ(1 − α): 0 takes them off, 1 is as made; above 1 factors can turn negative."""
    columns: Mapping[str, Factors] = field(default_factory=dict)
    """Evidence for the table of neurons, e.g. ``auroc prompt:last``; saved for changed neurons only."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Anything else worth keeping (learned strengths, thresholds), JSON-ready."""
    home: Home | None = None
    """The base model as files name it; known after `load` and `fitted`. No part of equality."""
    moves: Mapping[Site, Site] = field(default_factory=dict)
    """Input sites that do what an output site does, proved on the base when saved. No part of equality."""

    def __post_init__(self) -> None:
        check_factors(self.factors)
        if not (0 <= self.strength <= sys.float_info.max):  # an integer may be larger than any float
            given = f"{self.strength!s:.40}"
            raise SafeglassesError("not a strength", given=given, expected="a finite number of at least 0")
        object.__setattr__(self, "strength", float(self.strength))
        try:
            text = json.dumps(dict(self.notes), allow_nan=False, ensure_ascii=False)
            text.encode("utf-8")  # a lone surrogate could not be written
        except (TypeError, ValueError, RecursionError) as error:
            raise SafeglassesError("notes must be JSON-ready", given=str(error)) from error
        object.__setattr__(self, "notes", json.loads(text))
        factors = {site: row.detach().to("cpu", torch.float32) for site, row in self.factors.items()}
        object.__setattr__(self, "factors", factors)
        if self.strength > 1:
            check_factors(effective(factors, self.strength))  # they may overflow

    def __eq__(self, other: object) -> bool:
        """Same base, recipe, strength, notes, changed neurons, factors and evidence of those; bit for bit."""
        if not isinstance(other, Glasses):
            return NotImplemented
        names = ("base_fingerprint", "recipe", "strength", "notes")
        mine, theirs = changed(self.factors), changed(other.factors)
        return (
            all(getattr(self, n) == getattr(other, n) for n in names)
            and mine.keys() == theirs.keys()
            and all(torch.equal(mine[site], theirs[site]) for site in mine)
            and self.columns.keys() == other.columns.keys()
            and all(_same_evidence(self.columns[n], other.columns[n], mine) for n in self.columns)
        )

    __hash__ = None  # type: ignore[assignment]

    def __mul__(self, other: "Glasses") -> "Glasses":
        """Both at once: the product of what each does at its strength.

        Raises:
            WrongBase: they were made for different models.
        """
        if self.base_fingerprint != other.base_fingerprint:
            raise WrongBase(
                "glasses for different models cannot be worn at once",
                given=other.base_fingerprint,
                expected=self.base_fingerprint,
            )
        product = dict(self.effective())
        for site, row in other.effective().items():
            if site in product and product[site].shape != row.shape:
                raise SafeglassesError(
                    "glasses of different width cannot be worn at once",
                    given=f"{site}: {len(row)} neurons",
                    expected=f"{len(product[site])} neurons",
                )
            product[site] = product[site] * row if site in product else row
        parts = [{"recipe": g.recipe, "strength": g.strength, "notes": g.notes} for g in (self, other)]
        return Glasses(
            factors=product,
            base_fingerprint=self.base_fingerprint,
            recipe=f"{self.recipe} × {other.recipe}",
            columns={
                name: _merge(self.columns.get(name, {}), other.columns.get(name, {}))
                for name in (*self.columns, *(n for n in other.columns if n not in self.columns))
            },
            notes={"product_of": parts},
            home=self.home or other.home,
            moves={**other.moves, **self.moves},
        )

    @property
    def n_neurons(self) -> int:
        """How many neurons these glasses change at this strength; tiny ones round to no change."""
        return count(self.effective())

    @property
    def loads_in_peft(self) -> bool:
        """Whether `save` writes an adapter of PEFT; factors of fused experts need a file of our own."""
        return form_of(changed(self.factors)) == "ia3"

    @property
    def identity(self) -> str:
        """SHA-256 over site, width and factors as they act (float32) of every site that is changed."""
        digest = hashlib.sha256()
        acting = changed(self.effective())
        for site in in_order(acting):
            digest.update(f"{site} {len(acting[site])} ".encode())
            digest.update(acting[site].numpy().astype("<f4").tobytes())
        return digest.hexdigest()

    def effective(self) -> dict[Site, Float[Tensor, " _neuron"]]:
        """Factors as they act at this strength: 1 − strength · (1 − factor), float32."""
        return effective(self.factors, self.strength)

    def at(self, strength: float | int) -> "Glasses":
        """Return the same glasses at another strength."""
        return replace(self, strength=strength)

    def fitted(self, vlm: VLM) -> "Glasses":
        """Check that these glasses belong to a model, and remember how files name it.

        Raises:
            WrongBase: they were made for another model.
            PartialMatch: some site is missing or of another width.
        """
        check_base(vlm, self.base_fingerprint, self.home)
        check_fit(vlm.anatomy, self.factors)
        if self.home is not None and quantisation(vlm.model.config) is not None:
            return self  # a quantised copy must not take the place of the base that they were made on
        return replace(self, home=Home.of(vlm))

    @contextmanager
    def worn(self, target: VLM | nn.Module) -> Iterator[None]:
        """Wear the glasses inside the block; after it the model is what it was, bit for bit.

        Args:
            target: a `VLM`, whose fingerprint is checked; or a bare model, whose names and widths are.

        Raises:
            WrongBase: the model is not the one they were made for.
            PartialMatch: some site is missing or of another width; nothing is worn then.
        """
        if isinstance(target, VLM):
            model, parts = target.model, target.anatomy
            check_base(target, self.base_fingerprint, self.home)
        else:
            model, parts = target, anatomy(target)
        check_fit(parts, self.factors)
        with scaled(model, parts, changed(self.effective())):
            yield

    def fold(self, vlm: VLM) -> None:
        """Multiply the glasses into the weights, in place and for good.

        Output factors scale a map's rows and bias, input factors its columns: products in float32, rounded
        once. The model's config remembers it (``safeglasses_folded``): more glasses of its base are refused.

        Raises:
            WrongBase: another model, or one that has glasses of this base folded in.
            PartialMatch: some site is missing or of another width.
            SafeglassesError: a weight is quantised, shared with another module, or not loaded; or no neuron
                is changed. The model is as it was in each of these cases.
        """
        fitted = self.fitted(vlm)
        refuse_empty(self, "folding")
        scale_weights(vlm.model, vlm.anatomy, self.effective())
        record = {
            "base_fingerprint": self.base_fingerprint,
            "base_source": fitted.home.source if fitted.home is not None else None,
            "recipe": self.recipe,
            "strength": self.strength,
            "n_neurons": self.n_neurons,
        }
        setattr(vlm.model.config, FOLDED, [*(getattr(vlm.model.config, FOLDED, None) or ()), record])

    def save(self, folder: str | Path, vlm: VLM | None = None, *, overwrite: bool = False) -> Path:
        """Write the folder that PEFT, transformers and `load` read; where fused experts are scaled, `load` alone.

        Args:
            folder: where; see `safeglasses.defend.folder` for what is in it.
            vlm: the base model; not needed for glasses that were loaded or `fitted`.
            overwrite: replace a folder that is there.

        Raises:
            SafeglassesError: no neuron is changed, the base model is not known, or the folder exists.
            WrongBase: as in `fitted`.
            PartialMatch: as in `fitted`.
        """
        refuse_empty(self, "saving")
        glasses = self if vlm is None else self.fitted(vlm)
        if glasses.home is None:
            raise SafeglassesError(
                "the adapter must name the modules of its base model, which these glasses do not know",
                do="give the model: glasses.save(folder, vlm)",
            )
        contents = Contents(
            factors=changed(glasses.factors),
            columns=glasses.columns,
            base_fingerprint=glasses.base_fingerprint,
            recipe=glasses.recipe,
            strength=glasses.strength,
            notes=glasses.notes,
            home=glasses.home,
            moves=glasses.moves,
        )
        return write_folder(Path(folder), contents, vlm, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | Path) -> "Glasses":
        """Read a folder that `save` wrote.

        Raises:
            SafeglassesError: no such folder, no glasses in it, or written by a newer version.
            PartialMatch: the adapter's tensors are not what the table of neurons says.
        """
        found = read_folder(Path(folder))
        return cls(
            factors=found.factors,
            base_fingerprint=found.base_fingerprint,
            recipe=found.recipe,
            strength=found.strength,
            columns=found.columns,
            notes=found.notes,
            home=found.home,
            moves=found.moves,
        )


def refuse_empty(glasses: Glasses, what: str) -> None:
    """Refuse glasses that change nothing.

    Raises:
        SafeglassesError: saying what was to be done with them, e.g. ``saving``.
    """
    if glasses.n_neurons == 0:
        raise SafeglassesError(
            f"these glasses change no neuron: {what} them would silently do nothing",
            given=f"recipe {glasses.recipe}, strength {glasses.strength:g}, {len(glasses.factors)} sites",
            expected="at least one neuron with a factor other than 1, and a strength above 0",
            do="lower the recipe's threshold, or raise the strength",
        )


def _same_evidence(
    a: Factors,
    b: Factors,
    acting: Factors,
) -> bool:
    """Compare two columns at the changed neurons, NaN equal to NaN."""

    def at(column: Mapping[Site, Tensor], site: Site, where: Tensor) -> Tensor:
        return column[site][where].float() if site in column else torch.full((int(where.sum()),), float("nan"))

    masks = {site: row != 1 for site, row in acting.items()}
    return all(torch.equal(at(a, s, m).nan_to_num(-1), at(b, s, m).nan_to_num(-1)) for s, m in masks.items())


def _merge(a: Factors, b: Factors) -> dict[Site, Float[Tensor, " _neuron"]]:
    """Join two columns of the same name; the first wins where both know a neuron."""
    joined = dict(a)
    for site, row in b.items():
        joined[site] = torch.where(joined[site].isnan(), row, joined[site]) if site in joined else row
    return joined
