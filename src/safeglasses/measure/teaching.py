"""Teach strengths a round at a time: sample the model as it stands, add its toxic answers, take gradient steps.

A round is a file, and depends on its inputs alone: a killed calibration goes on where it was.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from jaxtyping import Float
from safetensors.torch import load_file, save
from torch import Tensor

from safeglasses.data.examples import Example
from safeglasses.defend.recipes import CalibratedRule, Recipe
from safeglasses.errors import SafeglassesError
from safeglasses.files import atomic_write_bytes, read_json, write_json
from safeglasses.find.evidence import Evidence
from safeglasses.find.pools import Pool
from safeglasses.measure.calibrate import Effort, Keep, Objective, own_toxic, run_round
from safeglasses.measure.choosing import Choice
from safeglasses.measure.contrasts import Contrast, Lessons
from safeglasses.measure.judges import Judge
from safeglasses.model.hooks import scaled
from safeglasses.model.vlm import VLM

T = TypeVar("T")


@dataclass(frozen=True)
class Taught:
    """What a round leaves to the next."""

    strengths: Float[Tensor, "*group"]
    """The learned scalars."""
    own_toxic: tuple[Contrast, ...]
    """The model's own toxic answers, as it stood at the start of the round."""
    loss: float
    """Mean loss at the end."""
    kl: float
    """Mean KL at the end, nats per token."""


@dataclass(frozen=True)
class Teacher:
    """Everything that rounds have in common."""

    vlm: VLM
    """The untouched model."""
    evidence: Evidence
    """AUROC per neuron."""
    judge: Judge
    """Who says which of the model's own answers are toxic."""
    recipe: Recipe
    """How evidence becomes a rule."""
    effort: Effort
    """Work per round."""
    seed: int
    """Of sampling and of the order of batches."""
    max_new_tokens: int
    """Longest answer of the model's own."""
    objective: Objective = field(default_factory=Objective)
    """The loss; its β is the choice's."""
    on_step: Callable[[], None] = lambda: None
    """Called after every gradient step."""
    asked: Callable[[Example], Example] = lambda example: example
    """What the model reads in place of each prompt, e.g. with words around it."""
    categories: Mapping[str, Evidence] | None = None
    """Evidence per category of harm, where strengths are learned by category."""

    def rule(self, choice: Choice) -> CalibratedRule:
        """Make the rule of a choice.

        Raises:
            SafeglassesError: the evidence leaves nothing to turn down.
            PartialMatch: it lacks a site of the recipe.
        """
        rule = CalibratedRule.from_evidence(
            self.evidence,
            pools=tuple(Pool.parse(p) for p in choice.pools),
            threshold=choice.threshold,
            clamp=self.recipe.clamp,
            sites=self.vlm.anatomy.sites(self.recipe.sites),  # the evidence may cover more
            two_sided=self.recipe.two_sided,
            granularity=self.recipe.granularity,
            confirmed=self.recipe.confirmed,
            categories=self.categories,
            heads=self.recipe.heads(self.vlm.anatomy),
        )
        if rule.n_experts == 0:
            raise SafeglassesError(
                "no expert neurons: calibration has nothing to turn down",
                given=f"evidence {' + '.join(choice.pools)}, AUROC > {choice.threshold}",
                do="check that the classes differ (see confounds in the report), or give more pairs",
            )
        return rule

    def keep(self, lessons: Lessons) -> Keep:
        """Encode the benign prompts on which the model must stay what it is."""
        rows = drawn(lessons.benign, 4 * self.effort.prompts, self.seed, 1, key=lambda e: e.id)
        return Keep(self.vlm, [self.asked(row) for row in rows], self.effort.batch)

    def teach(
        self,
        folder: Path,
        index: int,
        choice: Choice,
        before: Sequence[Taught],
        lessons: Lessons,
        keep: Keep,
        *,
        seed: int,
    ) -> Taught:
        """Run round `index`, or read it when an earlier run has finished it.

        Args:
            folder: where its files lie.
            index: of the round; draws the prompts that are sampled.
            choice: evidence, threshold and β.
            before: the rounds that led here; none: a cold start.
            lessons: what it learns from.
            keep: the lessons' benign prompts, encoded.
            seed: of this round.

        Raises:
            SafeglassesError: the folder holds a round of another choice.
        """
        tensors, record = folder / f"round-{index}.safetensors", folder / f"round-{index}.json"
        if record.exists():  # written last
            kept, by_id = read_json(record), {p.id: p for p in lessons.eliciting}
            _check_same(record, kept["choice"], choice)
            own = tuple(Contrast(by_id[i], toxic, benign) for i, toxic, benign in kept["own_toxic"])
            for _ in range(self.effort.steps):
                self.on_step()
            return Taught(load_file(tensors)["strengths"], own, kept["loss"], kept["kl"])
        rule, amount = self.rule(choice), self.effort.prompts
        strengths = before[-1].strengths if before else rule.start(self.objective.start)
        # The first round listens to the untouched model, later ones to the model as it stands.
        with scaled(self.vlm.model, self.vlm.anatomy, rule.factors(strengths) if before else {}):
            prompts: list[Example] = drawn(lessons.eliciting, amount, self.seed, 10 + index, key=lambda e: e.id)
            new = own_toxic(
                self.vlm, prompts, self.judge, seed=seed, max_new_tokens=self.max_new_tokens, asked=self.asked
            )
        mined: list[Contrast] = []
        for earlier in before:
            mined = [*earlier.own_toxic, *mined[:amount]]
        given = drawn(lessons.contrasts, max(amount, len(new)), self.seed, index, key=lambda c: c.prompt.id)
        strengths, loss, kl = run_round(
            self.vlm,
            rule,
            strengths,
            [replace(c, prompt=self.asked(c.prompt)) for c in (*new, *mined, *given)],
            keep,
            objective=replace(self.objective, beta=choice.beta),
            effort=self.effort,
            seed=seed,
            on_step=self.on_step,
        )
        atomic_write_bytes(tensors, save({"strengths": strengths}))
        told = [[c.prompt.id, c.toxic, c.benign] for c in new]
        write_json(record, {"choice": asdict(choice), "loss": loss, "kl": kl, "own_toxic": told})
        return Taught(strengths, tuple(new), loss, kl)


def _check_same(record: Path, kept: Mapping[str, Any], choice: Choice) -> None:
    if Choice(tuple(kept["pools"]), kept["threshold"], kept["beta"]) != choice:
        raise SafeglassesError(
            "the folder holds a round of another calibration",
            given=f"{record}: {kept}",
            expected=str(asdict(choice)),
            do="calibrate in another folder",
        )


def drawn(items: Sequence[T], k: int, seed: int, salt: int, *, key: Callable[[T], str]) -> list[T]:
    """At most `k` items, the same at every call; `key` names an item."""
    return sorted(items, key=lambda i: hashlib.sha256(f"{seed}:{salt}:{key(i)}".encode()).digest())[:k]
