"""Calibration by gradient and the uniform rule, as `calibration.py` compares them; `searchers.py` has the others.

Every method turns a budget of processor time into a few glasses. All start from the same evidence, and all see the
find and the calibrate split only.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Literal

from hypervolume import Place, most

from safeglasses.data.examples import Example, Examples
from safeglasses.defend.factors import Factors, effective
from safeglasses.defend.recipes import RECIPES, Recipe, apply
from safeglasses.find.evidence import Evidence
from safeglasses.measure.calibrate import Effort
from safeglasses.measure.contrasts import calibration_data
from safeglasses.measure.damage import Seen, damage, harm_error, seen
from safeglasses.measure.judges import Judge
from safeglasses.measure.measurement import measure
from safeglasses.measure.respond import Decoding
from safeglasses.measure.search import Calibration
from safeglasses.measure.teaching import drawn
from safeglasses.model.hooks import scaled
from safeglasses.model.vlm import VLM

DAMAGE = 0.10
"""Reference point of damage: 10 points. That of harm is the untouched model's own rate."""
KEPT = 6
"""So many glasses a method hands over at most."""
EFFORT = Effort(rounds=1, steps=12, prompts=128, batch=16)
BETAS = (300.0, 75.0, 18.75, 4.6875)
STRENGTHS = (0.5, 1.0, 1.25, 1.5, 2.0, 3.0)
"""The one strength of the uniform rule."""
SWEPT = 200
"""Prompts of the calibrate split on which every strength of the uniform rule is measured."""


@dataclass(frozen=True)
class Ground:
    """What all methods share on one draw of the benchmark."""

    vlm: VLM
    """The untouched model."""
    evidence: Evidence
    """AUROC of every linear map's outputs, for all recipes' pools."""
    pairs: Examples
    """Toxic and harmless responses."""
    prompts: Examples
    """Eliciting and benign prompts of all splits."""
    judge: Judge
    """Decides which answers are harmful."""
    refusals: Judge
    """Decides which answers refuse."""
    max_new_tokens: int
    """Longest answer."""
    seed: int
    """Of the draw, of sampling and of searching."""
    folder: Path
    """Where a method may write."""


@dataclass(frozen=True)
class Offer:
    """Glasses that a method found, with what it knows of them."""

    label: str
    """What sets them apart from the method's others."""
    figures: Mapping[str, float]
    """``harmful``, ``damage`` and their errors, as the method saw them."""
    factors: Factors = field(repr=False)
    """What is worn."""

    @property
    def place(self) -> Place:
        """Harm and damage."""
        return self.figures["harmful"], self.figures["damage"]


@dataclass(frozen=True)
class Found:
    """What a method hands over."""

    offers: tuple[Offer, ...]
    """At most `KEPT`, undominated by the method's own figures."""
    tried: int
    """Glasses measured."""
    seconds: float
    """Processor time used."""
    pick: Offer | None = None
    """The one to wear, where the method has a rule for that."""


class Budget:
    """Processor time of this process, from now on."""

    def __init__(self, seconds: float) -> None:
        self._start, self._seconds = time.process_time(), seconds

    @property
    def spent(self) -> float:
        """Seconds used so far."""
        return time.process_time() - self._start

    def fits(self, seconds: float, share: float = 1.0) -> bool:
        """Whether so many more seconds stay within a share of the budget."""
        return self.spent + seconds <= share * self._seconds


class Meter:
    """Measures factors on a fixed set of prompts, answers sampled at temperature 1 from a fixed seed."""

    def __init__(self, ground: Ground, prompts: Sequence[Example], salt: int) -> None:
        self.ground, self.prompts = ground, prompts
        self.decoding = Decoding("sampled", 1.0, ground.max_new_tokens, ground.seed + salt)

    @cached_property
    def base(self) -> tuple[Seen, ...]:
        """The untouched model's answers."""
        return self._seen({})

    @property
    def harmful(self) -> float:
        """The untouched model's harmful rate."""
        return rate(self.base)

    def figures(self, factors: Factors) -> dict[str, float]:
        """Return ``harmful``, ``damage`` and their standard errors."""
        base, rows = self.base, self._seen(factors)
        return {"harmful": rate(rows), "harmful_error": harm_error(rows), **damage(base, rows)}

    def _seen(self, factors: Factors) -> tuple[Seen, ...]:
        ground = self.ground
        with scaled(ground.vlm.model, ground.vlm.anatomy, factors):
            return seen(
                measure(ground.vlm, self.prompts, ground.judge, decodings=(self.decoding,), refusals=ground.refusals)
            )


def rate(rows: Sequence[Seen]) -> float:
    """Share of harmful answers among the judged ones."""
    judged = [row.harmful for row in rows if row.harmful is not None]
    return sum(judged) / len(judged)


def prompts_of(ground: Ground, split: Literal["calibrate", "test"], count: int, salt: int) -> list[Example]:
    """Draw as many eliciting as benign prompts."""
    rows = ground.prompts.split(split).rows
    kinds = ([e for e in rows if e.label != "non-toxic"], [e for e in rows if e.label == "non-toxic"])
    return [e for kind in kinds for e in drawn(kind, count // 2, ground.seed, salt, key=lambda e: e.id)]


def kept(offers: Sequence[Offer], harmful: float) -> tuple[Offer, ...]:
    """Return the few offers to hand over."""
    return tuple(offers[i] for i in most([offer.place for offer in offers], (harmful, DAMAGE), KEPT))


def calibration(ground: Ground, seconds: float) -> Found:
    """Sweep β by gradient; a point is begun only where as long a one as the longest so far still fits."""
    folder = ground.folder / "calibration"
    shutil.rmtree(folder, ignore_errors=True)  # what a killed run left would be taken for nothing
    budget, laps = Budget(seconds), [0.0]

    def enough() -> bool:
        laps.append(budget.spent)
        return not budget.fits(max(b - a for a, b in pairwise(laps)))

    calibrator = Calibration(
        ground.vlm,
        ground.evidence,
        calibration_data(ground.pairs, ground.prompts),
        ground.judge,
        recipe=RECIPES["sgm-calibrated"],
        effort=EFFORT,
        folder=folder,
        refusals=ground.refusals,
        seed=ground.seed,
        max_new_tokens=ground.max_new_tokens,
    )
    front = calibrator.front(BETAS, enough=enough)
    offers = [Offer(f"β = {p.beta:g}", p.figures, front.rule.factors(p.strengths)) for p in front.points]
    spent, taken = budget.spent, calibrator.on_front(front).taken
    return Found(kept(offers, front.base["harmful"]), len(offers), spent, offers[taken.index])


def uniform(ground: Ground, seconds: float, recipe: Recipe) -> Found:
    """Sweep the one strength of a parameter-free rule."""
    budget = Budget(seconds)
    meter = Meter(ground, prompts_of(ground, "calibrate", SWEPT, 1), 1)
    glasses = apply(recipe, ground.evidence, anatomy=ground.vlm.anatomy)
    offers = []
    for share in STRENGTHS:
        factors = {site: row.clamp(0, 1) for site, row in effective(glasses.factors, share).items()}
        offers.append(Offer(f"strength {share:g}", meter.figures(factors), factors))
    return Found(kept(offers, meter.harmful), len(offers), budget.spent)
