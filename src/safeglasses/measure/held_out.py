"""The held-out slice: what strengths do to prompts that no gradient has seen, beside the untouched model."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from safeglasses.data.examples import Example
from safeglasses.files import read_json, write_json
from safeglasses.measure.choosing import excess, figures_of
from safeglasses.measure.damage import Seen, damage, harm_error, seen
from safeglasses.measure.judges import Judge
from safeglasses.measure.measurement import Measurement, measure
from safeglasses.measure.respond import Decoding
from safeglasses.model.hooks import scaled
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM

Factors = Mapping[Site, Float[Tensor, " _neuron"]]


@dataclass(frozen=True)
class _Trying:
    """Factors on trial, as what is worn."""

    factors: Factors
    identity: str = "calibration"

    def worn(self, target: VLM) -> AbstractContextManager[object]:
        return scaled(target.model, target.anatomy, self.factors)


@dataclass(frozen=True)
class HeldOut:
    """Prompts of the calibrate split, who judges answers to them, and what the untouched model does."""

    vlm: VLM
    """The untouched model."""
    prompts: tuple[Example, ...]
    """Eliciting and benign prompts."""
    judge: Judge
    """Decides which answers are harmful."""
    refusals: Judge
    """Decides which answers refuse."""
    decoding: Decoding
    """How answers are drawn."""
    folder: Path
    """Where the untouched model's figures are kept."""
    asked: Callable[[Example], Example] | None = None
    """What the model reads in place of each prompt."""

    @cached_property
    def base(self) -> dict[str, float]:
        """The untouched model's figures."""
        _ = self._untouched
        return read_json(self.folder / "base.json")

    def figures(self, factors: Factors) -> dict[str, float]:
        """Measure factors: figures, ``harmful_error``, ``damage``, ``damage_error``, ``excess``, ``score``."""
        measured = self._measure(_Trying(factors))
        found, rows = figures_of(measured), seen(measured)
        found |= {
            "harmful_error": harm_error(rows),
            **damage(self._untouched, rows),
            "excess": excess(found, self.base),
        }
        return {**found, "score": found["harmful"] + found["excess"]}

    @cached_property
    def _untouched(self) -> tuple[Seen, ...]:
        path, record = self.folder / "base-answers.json", self.folder / "base.json"
        if not (path.exists() and record.exists()):
            measured = self._measure(None)
            write_json(path, [row.to_json() for row in seen(measured)])
            write_json(record, figures_of(measured) | {"harmful_error": harm_error(seen(measured))})
        return tuple(Seen(**row) for row in read_json(path))

    def _measure(self, trying: _Trying | None) -> Measurement:
        return measure(
            self.vlm,
            self.prompts,
            self.judge,
            glasses=trying,
            name=None if trying is None else "candidate",
            decodings=(self.decoding,),
            refusals=self.refusals,
            asked=self.asked,
        )
