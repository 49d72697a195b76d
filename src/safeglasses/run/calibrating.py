"""What a user may ask of calibration beyond its default, and the glasses of every point of a front."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safeglasses.defend.factors import count
from safeglasses.defend.recipes import Recipe
from safeglasses.errors import SafeglassesError
from safeglasses.measure.front import FRONT_BETAS, Front
from safeglasses.model.vlm import VLM
from safeglasses.progress import Progress
from safeglasses.run.budget import Plan
from safeglasses.run.under import Under


@dataclass(frozen=True)
class Wanted:
    """What is asked of calibration."""

    harm: float | None = None
    """Constraint form: harm at most this, 0 to 1, then the least damage."""
    front: tuple[float, ...] | None = None
    """Pareto form: the β of the sweep."""
    categories: tuple[str, ...] = ()
    """The only kinds of harm that glasses are made for; none: all."""
    under: Under | None = None
    """Defences at the input that stand before the model in every step of calibration and in the proof."""

    @classmethod
    def read(
        cls,
        recipe: Recipe,
        *,
        harm: str | float | None = None,
        front: bool | Sequence[float] = False,
        category: str | Sequence[str] | None = None,
        under: str | None = None,
    ) -> "Wanted":
        """Read what the user wrote.

        Args:
            recipe: which must be one that is calibrated, if anything but categories is asked.
            harm: ``2%`` or 0.02.
            front: the β of the sweep; true for `FRONT_BETAS`.
            category: names, as a sequence or separated by commas.
            under: parts of a stack, joined by ``+``.

        Raises:
            SafeglassesError: no share, nothing to calibrate, or parts that are more than words around a request.
        """
        given = {"--harm": harm is not None, "--front": bool(front), "--under": under is not None}
        asked = [name for name, there in given.items() if there]
        if asked and recipe.rule != "calibrated":
            raise SafeglassesError(
                "this recipe has no calibration",
                given=f"{' and '.join(asked)} with recipe {recipe.name}",
                expected='a recipe with rule = "calibrated"',
                do="use --recipe sgm-calibrated",
            )
        names = category.split(",") if isinstance(category, str) else category or ()
        return cls(
            harm=None if harm is None else parse_share(harm),
            front=FRONT_BETAS if front is True else tuple(front) if front else None,
            categories=tuple(dict.fromkeys(name.strip() for name in names)),
            under=None if under is None else Under.read(under),
        )

    def inputs(self) -> dict[str, Any]:
        """Return what decides the result, as inputs of the run; what is not asked is not there."""
        found = {
            "harm": self.harm,
            "front": list(self.front or ()) or None,
            "categories": list(self.categories) or None,
            "under": None if self.under is None else f"{self.under.name} {self.under.identity}",
        }
        return {name: value for name, value in found.items() if value is not None}

    def notes(self) -> dict[str, Any]:
        """Return what glasses must say of themselves: what they are for, and under what."""
        found = {"categories": list(self.categories), "under": self.under.name if self.under else ""}
        return {name: value for name, value in found.items() if value}

    def steps(self, plan: Plan) -> int:
        """Gradient steps in all, the second teaching from both splits included."""
        effort = plan.effort
        if self.front is None:
            return (plan.trials + 1) * effort.rounds * effort.steps
        return 2 * (effort.rounds + len(self.front) - 1) * effort.steps


def parse_share(text: str | float) -> float:
    """Read ``2%``, ``2.5 %`` or ``0.02``.

    Raises:
        SafeglassesError: no share from 0 to 1.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*(%?)", str(text).strip())
    share = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= share <= 1:
        raise SafeglassesError("not a share", given=repr(text), expected="a share such as 2% or 0.02")
    return share


def save_points(front: Front, folder: Path, vlm: VLM, show: Progress, wanted: Wanted) -> None:
    """Write the glasses of every point into ``folder/NN``, as they were measured; those that are there are left."""
    for point in front.points:
        path = folder / f"{point.index:02d}"
        if path.exists():
            continue
        if count(front.rule.factors(point.strengths)) == 0:
            show.say(f"the front's point {point.index:02d} (β {point.beta:g}) changes no neuron and has no glasses")
            continue
        glasses = front.glasses(point)
        replace(glasses, notes={**glasses.notes, **wanted.notes()}).save(path, vlm)
