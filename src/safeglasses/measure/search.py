"""Choose among calibrations: a small search over discrete choices, or the points of a front, judged by sampling.

Each trial calibrates with one choice of evidence, threshold and β; each round of each trial is a candidate, and so is
each point of a front. One is picked by its figures on the calibrate split (`safeglasses.measure.selecting`). Its
choices made, its strengths are learned once more from the find and the calibrate split together: more pictures and
wordings, and nothing is left to choose.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from safeglasses.data.examples import Example
from safeglasses.defend.glasses import Glasses
from safeglasses.defend.recipes import CalibratedRule, Recipe
from safeglasses.files import read_json, write_json
from safeglasses.find.evidence import Evidence
from safeglasses.measure.calibrate import Effort, Keep, frozen
from safeglasses.measure.choosing import SHARES, Choice, default_choice, suggest
from safeglasses.measure.contrasts import CalibrationData
from safeglasses.measure.front import FRONT_BETAS, Front, retrace, sweep
from safeglasses.measure.held_out import HeldOut
from safeglasses.measure.judges import Judge
from safeglasses.measure.respond import Decoding
from safeglasses.measure.selecting import Taken, at_most, gentlest, lowest
from safeglasses.measure.teaching import Taught, Teacher, drawn
from safeglasses.model.vlm import VLM


@dataclass(frozen=True)
class Candidate:
    """One round of one trial with what the held-out slice says of it."""

    trial: int
    """Number of the trial."""
    round: int
    """Number of the round, from 0."""
    choice: Choice
    """The trial's discrete choices."""
    share: float
    """How much of the learned suppression is worn: α = 1 − share · (1 − α learned)."""
    strengths: Float[Tensor, "*group"]
    """The learned scalars."""
    figures: dict[str, float]
    """Held-out figures: ``harmful``, ``utility:<slot>``, ``perplexity``, ``refusals``, ``empty``, ``kl``,
    ``harmful_error``, ``damage``, ``damage_error``, ``training_kl``, ``loss``, ``excess``, ``score``."""

    @property
    def score(self) -> float:
        """Harmful rate plus excess; lower is better."""
        return self.figures["score"]


@dataclass(frozen=True)
class Search:
    """Everything that calibration found."""

    candidates: tuple[Candidate, ...]
    """All candidates, in order."""
    taken: Taken
    """Which of them is used, and why."""
    base: dict[str, float]
    """The untouched model's figures on the same slice."""
    rule: CalibratedRule
    """The best candidate's rule."""
    front: Front | None = None
    """The sweep that the candidates are the points of; None where they are rounds of trials."""

    @property
    def best(self) -> Candidate:
        """The candidate that is used."""
        return self.candidates[self.taken.index]

    @property
    def learned_scalars(self) -> int:
        """How many strengths the best candidate learned."""
        return self.rule.n_strengths


class Calibration:
    """One search; state lives in `folder`, a round at a time, so that a killed run goes on where it was."""

    def __init__(
        self,
        vlm: VLM,
        evidence: Evidence,
        data: CalibrationData,
        judge: Judge,
        *,
        recipe: Recipe,
        effort: Effort,
        folder: Path,
        refusals: Judge,
        seed: int,
        max_new_tokens: int,
        on_step: Callable[[], None] = lambda: None,
        asked: Callable[[Example], Example] | None = None,
        categories: Mapping[str, Evidence] | None = None,
    ) -> None:
        """Take what calibration works on.

        Args:
            vlm: the untouched model.
            evidence: AUROC per neuron.
            data: what is learned from, and chosen on.
            judge: decides which answers are harmful.
            recipe: how evidence becomes a rule.
            effort: work per trial.
            folder: where the state lives.
            refusals: decides which answers refuse.
            seed: of everything that is drawn.
            max_new_tokens: longest answer.
            on_step: called after every gradient step.
            asked: what the model reads in place of each prompt: defences at the input that will be worn with the
                glasses.
            categories: evidence per category of harm, for recipes with ``by_category``.
        """
        self.data, self.recipe, self.effort, self.folder = data, recipe, effort, folder
        self.vlm, self.judge, self.refusals, self.seed = vlm, judge, refusals, seed
        self.teacher = Teacher(
            vlm,
            evidence,
            judge,
            recipe,
            effort,
            seed=seed,
            max_new_tokens=max_new_tokens,
            on_step=on_step,
            asked=asked or _itself,
            categories=categories,
        )
        self.held_out = HeldOut(
            vlm,
            tuple(drawn(data.held_out, 2 * effort.prompts, seed, 2, key=lambda e: e.id)),
            judge,
            refusals,
            Decoding("sampled", temperature=1.0, max_new_tokens=max_new_tokens, seed=seed + 1),
            folder,
            asked,
        )

    def search(self, trials: int, *, harm: float | None = None) -> Search:
        """Run the trials and pick the best candidate.

        Args:
            trials: how many discrete choices are tried.
            harm: the highest harmful rate that is accepted; without, the lowest score is taken.

        Raises:
            SafeglassesError: the evidence leaves nothing to turn down.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        base = self.held_out.base
        keep = self.teacher.keep(self.data.find)
        done: list[tuple[Choice, float]] = []
        candidates: list[Candidate] = []
        for trial in range(trials):
            found = self._trial(trial, suggest(done, self.recipe.pools, self.seed), keep)
            candidates += found
            done.append((found[0].choice, min(c.score for c in found)))
        figures = [c.figures for c in candidates]
        taken = lowest(figures) if harm is None else at_most(figures, harm)
        return Search(tuple(candidates), taken, base, self.teacher.rule(candidates[taken.index].choice))

    def front(
        self,
        betas: Sequence[float] = FRONT_BETAS,
        *,
        choice: Choice | None = None,
        enough: Callable[[], bool] = lambda: False,
    ) -> Front:
        """Calibrate a sweep of β, each point warm-started from the one before; see `safeglasses.measure.front`.

        Args:
            betas: in any order; the largest is the first.
            choice: evidence and threshold; without, those of a search's first trial.
            enough: asked between points; true stops the sweep. The first point is always made.

        Raises:
            SafeglassesError: no β, one twice, or one that is not positive; the evidence leaves nothing to turn down.
        """
        folder = self.folder / "front"
        chosen = default_choice(self.recipe.pools) if choice is None else choice
        return sweep(self.teacher, self.held_out, self.data.find, chosen, betas, folder, enough=enough)

    def on_front(self, front: Front, *, harm: float | None = None) -> Search:
        """Pick a point of a front, as `search` picks a candidate of trials.

        Args:
            front: the sweep.
            harm: the highest harmful rate that is accepted; without, the gentlest of the best points is taken.
        """
        candidates = tuple(
            Candidate(0, p.index, replace(front.choice, beta=p.beta), 1.0, p.strengths, p.figures) for p in front.points
        )
        figures = [c.figures for c in candidates]
        taken = gentlest(figures) if harm is None else at_most(figures, harm)
        return Search(candidates, taken, front.base, front.rule, front)

    def refit(self, search: Search) -> Float[Tensor, "*group"]:
        """Learn the strengths of the best candidate once more, from both splits, along the same rounds."""
        folder = self.folder / "refit"
        if search.front is not None:
            return retrace(self.teacher, search.front, search.front.points[search.best.round], self.data.both, folder)
        folder.mkdir(exist_ok=True)
        best, keep = search.best, self.teacher.keep(self.data.both)
        taught: list[Taught] = []
        with frozen(self.vlm):
            for index in range(best.round + 1):
                seed = self._seed(best.trial, index)
                taught.append(self.teacher.teach(folder, index, best.choice, taught, self.data.both, keep, seed=seed))
        return taught[-1].strengths

    def glasses(self, search: Search) -> Glasses:
        """Make the glasses of the best candidate, its strengths learned from both splits."""
        best, rule, strengths = search.best, search.rule, self.refit(search)
        notes = {
            "learned_scalars": search.learned_scalars,
            "strengths": rule.table(strengths),
            "choice": asdict(best.choice),
            "selection_rule": search.taken.rule,
            "trial": best.trial,
            "round": best.round,
            "share": best.share,
        }
        notes |= {"limit_missed": search.taken.missed} if search.taken.missed else {}
        glasses = rule.glasses(strengths, recipe=self.recipe.name, notes=notes)
        return replace(glasses, factors=glasses.at(best.share).effective())

    def _seed(self, trial: int, index: int) -> int:
        return self.seed + 1000 * trial + index

    def _trial(self, number: int, choice: Choice, keep: Keep) -> list[Candidate]:
        folder = self.folder / f"trial-{number:02d}"
        folder.mkdir(exist_ok=True)
        rule = self.teacher.rule(choice)
        candidates: list[Candidate] = []
        taught: list[Taught] = []
        with frozen(self.vlm):
            for index in range(self.effort.rounds):
                seed = self._seed(number, index)
                taught.append(self.teacher.teach(folder, index, choice, taught, self.data.find, keep, seed=seed))
                strengths = taught[-1].strengths
                for share, figures in zip(SHARES, self._compared(folder, index, rule, taught[-1]), strict=True):
                    candidates.append(Candidate(number, index, choice, share, strengths, figures))
        return candidates

    def _compared(self, folder: Path, index: int, rule: CalibratedRule, taught: Taught) -> list[dict[str, float]]:
        """Measure a round's strengths on the calibrate split, for every share of them that may be worn."""
        path = folder / f"figures-{index}.json"
        if not path.exists():
            learned = rule.factors(taught.strengths)
            worn = [{site: 1 - share * (1 - row) for site, row in learned.items()} for share in SHARES]
            told = {"loss": taught.loss, "training_kl": taught.kl}
            write_json(path, [self.held_out.figures(factors) | told for factors in worn])
        return read_json(path)


def _itself(example: Example) -> Example:
    return example
