"""The Pareto front of harm and damage: one calibration whose β falls from point to point, each warm-started.

The sweep begins with the gentlest glasses (the largest β) and goes on from their strengths to harsher ones, since a
factor that has been pressed to 0 has no gradient to come back by. Before every point the model, as it stands, answers
eliciting prompts itself: hard negatives of milder glasses are no hard negatives of harsher ones.

Source of the order: Friedman, Hastie & Tibshirani 2010, "Regularization paths for generalized linear models via
coordinate descent", section 2.5 (warm starts from the most regularised solution).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from safeglasses.defend.glasses import Glasses
from safeglasses.defend.recipes import CalibratedRule
from safeglasses.errors import SafeglassesError
from safeglasses.files import read_json, write_json
from safeglasses.measure.calibrate import Keep, frozen
from safeglasses.measure.choosing import Choice
from safeglasses.measure.contrasts import Lessons
from safeglasses.measure.held_out import HeldOut
from safeglasses.measure.teaching import Taught, Teacher

FRONT_BETAS = (1200.0, 600.0, 300.0, 150.0, 75.0, 37.5)
"""What is swept by default: each half of the one before, both sides of the single calibration's 150."""


@dataclass(frozen=True)
class Point:
    """One pair of glasses on the front, with what the held-out slice says of it."""

    index: int
    """Place in the sweep, 0 for the gentlest."""
    beta: float
    """Weight of staying the base model on benign prompts."""
    strengths: Float[Tensor, "*group"]
    """The learned scalars, from the find split alone: what was measured."""
    figures: dict[str, float]
    """Held-out figures, as `HeldOut.figures` gives them, with ``training_kl`` and ``loss``."""
    dominated: bool
    """Another point has neither more harm nor more damage, and less of one of them."""

    @property
    def harmful(self) -> float:
        """Harmful rate, 0 to 1."""
        return self.figures["harmful"]

    @property
    def damage(self) -> float:
        """The worst loss in units of its guard, 0.01 a point; see `safeglasses.measure.damage`."""
        return self.figures["damage"]

    def to_json(self) -> dict[str, Any]:
        """Return everything but the strengths."""
        return {name: value for name, value in vars(self).items() if name != "strengths"}


@dataclass(frozen=True)
class Front:
    """All points of one sweep."""

    points: tuple[Point, ...]
    """In the order of the sweep, β falling."""
    base: dict[str, float]
    """The untouched model's figures on the same slice."""
    rule: CalibratedRule
    """What the strengths of all points are strengths of."""
    choice: Choice
    """Evidence and threshold; its β means nothing here."""
    recipe: str
    """Name of the recipe."""

    def glasses(self, point: Point) -> Glasses:
        """Make the glasses of a point, as they were measured.

        Raises:
            SafeglassesError: they change no neuron.
        """
        notes = {
            "learned_scalars": self.rule.n_strengths,
            "strengths": self.rule.table(point.strengths),
            "choice": asdict(replace(self.choice, beta=point.beta)),
            "front": point.to_json(),
        }
        return self.rule.glasses(point.strengths, recipe=self.recipe, notes=notes)

    def to_json(self) -> dict[str, Any]:
        """Return what ``front.json`` holds."""
        return {"base": self.base, "points": [point.to_json() for point in self.points]}


def dominated(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Say of each point, both of whose coordinates should be small, whether another is better in one and no worse."""
    return [any(x <= a and y <= b and (x, y) != (a, b) for x, y in points) for a, b in points]


def sweep(
    teacher: Teacher,
    held_out: HeldOut,
    lessons: Lessons,
    choice: Choice,
    betas: Sequence[float],
    folder: Path,
    *,
    enough: Callable[[], bool] = lambda: False,
) -> Front:
    """Calibrate along the front; the first point takes all rounds of the effort, every further one a single round.

    Args:
        teacher: what the rounds have in common.
        held_out: where points are measured.
        lessons: what strengths are learned from.
        choice: evidence and threshold of all points.
        betas: in any order.
        folder: a file per round and per point lies here, and beside it ``front.json``, which grows with every point.
        enough: asked between points; true stops the sweep.

    Raises:
        SafeglassesError: no β, one twice, or one that is not positive.
    """
    path = _path(betas)
    folder.mkdir(parents=True, exist_ok=True)
    keep, rule = teacher.keep(lessons), teacher.rule(choice)
    taught: list[Taught] = []
    found: list[Point] = []

    def front() -> Front:
        return Front(tuple(found), held_out.base, rule, choice, teacher.recipe.name)

    for number, beta in enumerate(path):
        if found and enough():
            break
        at = replace(choice, beta=beta)
        walk(teacher, folder, lessons, keep, at, taught, first=number == 0)
        figures = _figures(folder / f"point-{number:02d}.json", held_out, rule, taught[-1])
        found.append(Point(number, beta, taught[-1].strengths, figures, dominated=False))
        worse = dominated([(p.harmful, p.damage) for p in found])
        found = [replace(p, dominated=lost) for p, lost in zip(found, worse, strict=True)]
        write_json(folder.parent / "front.json", front().to_json())
    return front()


def walk(
    teacher: Teacher, folder: Path, lessons: Lessons, keep: Keep, choice: Choice, taught: list[Taught], *, first: bool
) -> None:
    """Teach the rounds of one point and append them to those before."""
    with frozen(teacher.vlm):
        for _ in range(teacher.effort.rounds if first else 1):
            index = len(taught)
            seed = teacher.seed + index
            taught.append(teacher.teach(folder, index, choice, taught, lessons, keep, seed=seed))


def retrace(teacher: Teacher, front: Front, point: Point, lessons: Lessons, folder: Path) -> Float[Tensor, "*group"]:
    """Walk the same way again with other lessons, as far as a point; return its strengths."""
    folder.mkdir(parents=True, exist_ok=True)
    keep = teacher.keep(lessons)
    taught: list[Taught] = []
    for other in front.points[: point.index + 1]:
        at = replace(front.choice, beta=other.beta)
        walk(teacher, folder, lessons, keep, at, taught, first=other.index == 0)
    return taught[-1].strengths


def _path(betas: Sequence[float]) -> list[float]:
    if not betas or len(set(betas)) < len(betas) or not all(0 < beta < float("inf") for beta in betas):
        raise SafeglassesError(
            "not a sweep of β",
            given=", ".join(f"{beta:g}" for beta in betas) or "nothing",
            expected="positive numbers, each once",
        )
    return sorted((float(beta) for beta in betas), reverse=True)


def _figures(path: Path, held_out: HeldOut, rule: CalibratedRule, taught: Taught) -> dict[str, float]:
    if not path.exists():
        told = {"loss": taught.loss, "training_kl": taught.kl}
        write_json(path, held_out.figures(rule.factors(taught.strengths)) | told)
    return read_json(path)
