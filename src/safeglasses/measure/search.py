"""Choose among calibrations: a small search over discrete choices, judged by sampling on the calibrate split.

Each trial calibrates with one choice of evidence, threshold and β; each round of each trial is a candidate. The best
candidate has the lowest *score*: its sampled harmful rate on the calibrate split plus what it exceeds the guards by.
Its choices made, its strengths are learned once more from the find and the calibrate split together: more pictures and
wordings, and nothing is left to choose.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from jaxtyping import Float
from safetensors.torch import load_file, save
from torch import Tensor

from safeglasses.defend.glasses import Glasses
from safeglasses.defend.recipes import CalibratedRule, Recipe
from safeglasses.errors import SafeglassesError
from safeglasses.files import atomic_write_bytes, read_json, write_json
from safeglasses.find.evidence import Evidence
from safeglasses.find.pools import Pool
from safeglasses.measure.calibrate import Effort, Keep, Objective, frozen, own_toxic, run_round
from safeglasses.measure.choosing import SELECTION_RULE, SHARES, Choice, excess, figures_of, suggest
from safeglasses.measure.contrasts import CalibrationData, Contrast, Lessons
from safeglasses.measure.judges import Judge
from safeglasses.measure.measurement import Measurement, measure
from safeglasses.measure.respond import Decoding
from safeglasses.model.hooks import scaled
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
    """Held-out figures: ``harmful``, ``utility:<slot>``, ``perplexity``, ``refusals``, ``empty``, ``training_kl``,
    ``loss``, ``excess``, ``score``."""

    @property
    def score(self) -> float:
        """Harmful rate plus excess; lower is better."""
        return self.figures["score"]


@dataclass(frozen=True)
class Search:
    """Everything that calibration found."""

    best: Candidate
    """The candidate picked by `SELECTION_RULE`."""
    candidates: tuple[Candidate, ...]
    """All candidates, in order; the report's Pareto front."""
    base: dict[str, float]
    """The untouched model's figures on the same slice."""
    rule: CalibratedRule
    """The best candidate's rule."""

    @property
    def learned_scalars(self) -> int:
        """How many strengths the best candidate learned."""
        return self.rule.n_strengths


@dataclass(frozen=True)
class _Taught:
    """What a round leaves to the next."""

    strengths: Float[Tensor, "*group"]
    """The learned scalars."""
    own_toxic: tuple[Contrast, ...]
    """The model's own toxic answers, as it stood at the start of the round."""
    loss: float
    """Mean loss at the end."""
    kl: float
    """Mean KL at the end, nats per token."""


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
    ) -> None:
        self.vlm, self.evidence, self.data, self.judge, self.recipe = vlm, evidence, data, judge, recipe
        self.effort, self.folder, self.refusals, self.seed = effort, folder, refusals, seed
        self.max_new_tokens, self.on_step = max_new_tokens, on_step

    def search(self, trials: int) -> Search:
        """Run the trials and pick the best candidate.

        Raises:
            SafeglassesError: the evidence leaves nothing to turn down.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.base = self._base_figures()
        keep = self._keep(self.data.find)
        done: list[tuple[Choice, float]] = []
        candidates: list[Candidate] = []
        with frozen(self.vlm):
            for trial in range(trials):
                found = self._trial(trial, suggest(done, self.recipe.pools, self.seed), keep)
                candidates += found
                done.append((found[0].choice, min(c.score for c in found)))
        best = min(candidates, key=lambda c: c.score)
        return Search(best, tuple(candidates), self.base, self.rule(best.choice))

    def refit(self, search: Search) -> Float[Tensor, "*group"]:
        """Learn the strengths of the best candidate once more, from both splits, as many rounds as it had."""
        folder = self.folder / "refit"
        folder.mkdir(exist_ok=True)
        best, keep = search.best, self._keep(self.data.both)
        taught: list[_Taught] = []
        with frozen(self.vlm):
            for index in range(best.round + 1):
                taught.append(self._teach(folder, best.trial, index, best.choice, taught, self.data.both, keep))
        return taught[-1].strengths

    def glasses(self, search: Search) -> Glasses:
        """Make the glasses of the best candidate, its strengths learned from both splits."""
        best, rule, strengths = search.best, search.rule, self.refit(search)
        notes = {
            "learned_scalars": search.learned_scalars,
            "strengths": rule.table(strengths),
            "choice": asdict(best.choice),
            "selection_rule": SELECTION_RULE,
            "trial": best.trial,
            "round": best.round,
            "share": best.share,
        }
        glasses = rule.glasses(strengths, recipe=self.recipe.name, notes=notes)
        return replace(glasses, factors=glasses.at(best.share).effective())

    def rule(self, choice: Choice) -> CalibratedRule:
        """Make the rule of a choice."""
        pools = tuple(Pool.parse(p) for p in choice.pools)
        return CalibratedRule.from_evidence(
            self.evidence,
            pools=pools,
            threshold=choice.threshold,
            clamp=self.recipe.clamp,
            two_sided=self.recipe.two_sided,
            granularity=self.recipe.granularity,
            confirmed=self.recipe.confirmed,
        )

    def _sample(self, examples: Sequence, k: int, salt: int) -> list:
        """At most `k` examples, the same at every call."""
        keyed = sorted(examples, key=lambda e: hashlib.sha256(f"{self.seed}:{salt}:{e.id}".encode()).digest())
        return keyed[:k]

    def _measure(self) -> Measurement:
        decoding = Decoding("sampled", temperature=1.0, max_new_tokens=self.max_new_tokens, seed=self.seed + 1)
        held_out = self._sample(self.data.held_out, 2 * self.effort.prompts, 2)
        return measure(self.vlm, held_out, self.judge, decodings=(decoding,), refusals=self.refusals)

    def _base_figures(self) -> dict[str, float]:
        path = self.folder / "base.json"
        if not path.exists():
            write_json(path, figures_of(self._measure()))
        return read_json(path)

    def _keep(self, lessons: Lessons) -> Keep:
        return Keep(self.vlm, self._sample(lessons.benign, 4 * self.effort.prompts, 1), self.effort.batch)

    def _trial(self, number: int, choice: Choice, keep: Keep) -> list[Candidate]:
        folder = self.folder / f"trial-{number:02d}"
        folder.mkdir(exist_ok=True)
        rule = self.rule(choice)
        if rule.n_experts == 0:
            raise SafeglassesError(
                "no expert neurons: calibration has nothing to turn down",
                given=f"evidence {' + '.join(choice.pools)}, AUROC > {choice.threshold}",
                do="check that the classes differ (see confounds in the report), or give more pairs",
            )
        candidates: list[Candidate] = []
        taught: list[_Taught] = []
        for index in range(self.effort.rounds):
            taught.append(self._teach(folder, number, index, choice, taught, self.data.find, keep))
            strengths = taught[-1].strengths
            for share, figures in zip(SHARES, self._compared(folder, index, rule, taught[-1]), strict=True):
                candidates.append(Candidate(number, index, choice, share, strengths, figures))
        return candidates

    def _teach(
        self,
        folder: Path,
        trial: int,
        index: int,
        choice: Choice,
        before: Sequence["_Taught"],
        lessons: Lessons,
        keep: Keep,
    ) -> "_Taught":
        """Run round `index`, or read it when an earlier run has finished it."""
        tensors, record = folder / f"round-{index}.safetensors", folder / f"round-{index}.json"
        if record.exists():  # written last
            kept, by_id = read_json(record), {p.id: p for p in lessons.eliciting}
            own = tuple(Contrast(by_id[i], toxic, benign) for i, toxic, benign in kept["own_toxic"])
            for _ in range(self.effort.steps):
                self.on_step()
            return _Taught(load_file(tensors)["strengths"], own, kept["loss"], kept["kl"])
        rule, seed = self.rule(choice), self.seed + 1000 * trial + index
        strengths = before[-1].strengths if before else rule.start(Objective.start)
        # The first round listens to the untouched model, later ones to the model as it stands.
        with scaled(self.vlm.model, self.vlm.anatomy, rule.factors(strengths) if before else {}):
            prompts = self._sample(lessons.eliciting, self.effort.prompts, 10 + index)
            new = own_toxic(self.vlm, prompts, self.judge, seed=seed, max_new_tokens=self.max_new_tokens)
        mined: list[Contrast] = []
        for earlier in before:
            mined = [*earlier.own_toxic, *mined[: self.effort.prompts]]
        given = self._sample_contrasts(lessons, max(self.effort.prompts, len(new)), index)
        strengths, loss, kl = run_round(
            self.vlm,
            rule,
            strengths,
            [*new, *mined, *given],
            keep,
            objective=Objective(beta=choice.beta),
            effort=self.effort,
            seed=seed,
            on_step=self.on_step,
        )
        atomic_write_bytes(tensors, save({"strengths": strengths}))
        told = [[c.prompt.id, c.toxic, c.benign] for c in new]
        write_json(record, {"choice": asdict(choice), "loss": loss, "kl": kl, "own_toxic": told})
        return _Taught(strengths, tuple(new), loss, kl)

    def _compared(self, folder: Path, index: int, rule: CalibratedRule, taught: "_Taught") -> list[dict[str, float]]:
        """Measure a round's strengths on the calibrate split, for every share of them that may be worn."""
        path = folder / f"figures-{index}.json"
        if path.exists():
            return read_json(path)
        figures = []
        for share in SHARES:
            worn = {site: 1 - share * (1 - row) for site, row in rule.factors(taught.strengths).items()}
            with scaled(self.vlm.model, self.vlm.anatomy, worn):
                seen = figures_of(self._measure())
            seen |= {"loss": taught.loss, "training_kl": taught.kl, "excess": excess(seen, self.base)}
            figures.append({**seen, "score": seen["harmful"] + seen["excess"]})
        write_json(path, figures)
        return figures

    def _sample_contrasts(self, lessons: Lessons, k: int, salt: int) -> list[Contrast]:
        keyed = sorted(
            lessons.contrasts,
            key=lambda c: hashlib.sha256(f"{self.seed}:{salt}:{c.prompt.id}".encode()).digest(),
        )
        return keyed[:k]
