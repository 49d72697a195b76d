"""Which candidate is taken, and by what rule; figures are held-out, and their standard errors are taken seriously.

The best of many noisy figures looks better than it is. So a limit must hold with one standard error to spare, and
candidates that lie within one standard error of the best count as equally good: of these the one is taken that changes
the model least, by its KL on benign answers, which has far less noise than a count of wrong words.

Source of the rule: Breiman, Friedman, Olshen & Stone 1984, "Classification and regression trees", section 3.4.3 (the
1 SE rule); Hastie, Tibshirani & Friedman 2009, "The elements of statistical learning", section 7.10.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from safeglasses.measure.choosing import SELECTION_RULE

FRONT_RULE = (
    "lowest score on the calibrate split, with one standard error: of all points of the front whose score (harmful "
    "rate + excess over the guards) is at most the lowest one + the standard error of its harmful rate, the one that "
    "changes the model least (KL from the untouched model on benign answers); its strengths are then learned once more "
    "from both splits"
)
Figures = Mapping[str, float]


@dataclass(frozen=True)
class Taken:
    """Which candidate, and why."""

    index: int
    """Its place among the candidates."""
    rule: str
    """The rule in words."""
    limit: float | None = None
    """The highest harmful rate that was asked for."""
    missed: str = ""
    """One sentence where no candidate keeps the limit; empty where it is kept, or none was asked for."""


def lowest(figures: Sequence[Figures]) -> Taken:
    """Take the lowest score; ties go to the earlier candidate."""
    return Taken(min(range(len(figures)), key=lambda i: figures[i]["score"]), SELECTION_RULE)


def gentlest(figures: Sequence[Figures]) -> Taken:
    """Take, among those within one standard error of the lowest score, the one nearest to the untouched model."""
    best = figures[lowest(figures).index]
    close = [i for i, f in enumerate(figures) if f["score"] <= best["score"] + best["harmful_error"]]
    return Taken(min(close, key=lambda i: distance(figures[i])), FRONT_RULE)


def at_most(figures: Sequence[Figures], harm: float) -> Taken:
    """Take the least damage among those whose harm is at most a limit, both with one standard error.

    Where no candidate keeps the limit, the one is taken that comes closest to it, and `Taken.missed` says so.

    Args:
        figures: of the candidates, each with ``harmful``, ``damage`` and their errors.
        harm: the limit of the harmful rate, 0 to 1.
    """
    rule = harm_rule(harm)
    bound = [f["harmful"] + f["harmful_error"] for f in figures]
    kept = [i for i, high in enumerate(bound) if high <= harm]
    if not kept:
        nearest = min(range(len(figures)), key=lambda i: (bound[i], figures[i]["damage"]))
        found = figures[nearest]
        missed = (
            f"No candidate keeps harm at most {100 * harm:.3g} % with one standard error to spare; the closest has "
            f"{100 * found['harmful']:.2f} ± {100 * found['harmful_error']:.2f} % on the calibrate split and is taken"
        )
        return Taken(nearest, rule, harm, missed)
    best = min((figures[i] for i in kept), key=lambda f: f["damage"])
    close = [i for i in kept if figures[i]["damage"] <= best["damage"] + best["damage_error"]]
    return Taken(min(close, key=lambda i: distance(figures[i])), rule, harm)


def harm_rule(harm: float) -> str:
    """Put the constraint form into words."""
    return (
        f"harm at most {100 * harm:.3g} % on the calibrate split, before any gradient has seen it, with one "
        "standard error to spare; of these the least damage (the worst loss in units of its guard); within one "
        "standard error of the least, the candidate that changes the model least (KL from the untouched model on "
        "benign answers); its strengths are then learned once more from both splits"
    )


def distance(figures: Figures) -> float:
    """How far a candidate is from the untouched model: held-out KL, else that of the last training steps."""
    return figures["kl"] if "kl" in figures else figures["training_kl"]
