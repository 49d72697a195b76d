"""Black-box searches over strengths, for `calibration.py`: the search proposes, sampled answers judge."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import optuna
import torch
from calibrators import Budget, Found, Ground, Meter, Offer, kept, prompts_of

from safeglasses.defend.calibrated import CalibratedRule
from safeglasses.defend.recipes import RECIPES
from safeglasses.find.evidence import Evidence

Space = Literal["kinds", "kinds and layers", "kinds and terms", "groups"]


@dataclass(frozen=True)
class Plan:
    """What a search may choose, and how it spends its budget."""

    space: Space = "kinds"
    """Which strengths are free."""
    rules: tuple[str, ...] = ("two-sided", "AurA")
    """Keys of `RULES`, one of which a trial takes."""
    prompts: int = 100
    """Prompts of the calibrate split per trial."""
    high: float = 2.0
    """Largest strength."""
    told: bool = True
    """Whether it begins with the uniform strength 1 and 1.5 of every rule."""
    finals: int = 0
    """Prompts on which the best are measured once more; 0: they are not."""
    share: float = 1.0
    """Of the budget, for the search; the rest is for the finals."""


def searching(
    ground: Ground, seconds: float, plan: Plan, sampler: Callable[[int], optuna.samplers.BaseSampler]
) -> Found:
    """Let a sampler propose strengths, harm and damage both to be small; hand over the best of what it tried."""
    budget = Budget(seconds)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler(ground.seed))
    meter = Meter(ground, prompts_of(ground, "calibrate", plan.prompts, 2), 2)
    rules = {name: RULES[name](ground.evidence) for name in plan.rules}
    for params in starts(plan, rules) if plan.told else ():
        study.enqueue_trial(params)
    offers: list[Offer] = []
    longest, before = 0.0, budget.spent
    while not offers or budget.fits(longest, plan.share):
        trial = study.ask()
        rule = rules[trial.suggest_categorical("rule", list(rules))]
        factors = rule.factors(strengths_of(partial(_suggested, trial), plan, rule))
        offers.append(Offer(f"trial {trial.number}", meter.figures(factors), factors))
        study.tell(trial, offers[-1].place)
        longest, before = max(longest, budget.spent - before), budget.spent
    best = kept(offers, meter.harmful)
    if plan.finals:
        best = kept(tuple(_again(ground, budget, best, plan.finals)), meter.harmful)
    return Found(best, len(offers), budget.spent)


def _suggested(trial: optuna.Trial, name: str, high: float) -> float:
    return trial.suggest_float(name, 0, high)


def _again(ground: Ground, budget: Budget, offers: Sequence[Offer], count: int) -> Iterator[Offer]:
    meter = Meter(ground, prompts_of(ground, "calibrate", count, 3), 3)
    longest, before = 0.0, budget.spent
    _ = meter.base
    for offer in offers:
        if budget.fits(longest):
            yield replace(offer, figures=meter.figures(offer.factors))
            longest, before = max(longest, budget.spent - before), budget.spent


def _two_sided(evidence: Evidence, threshold: float) -> CalibratedRule:
    recipe = RECIPES["sgm-calibrated"]
    return CalibratedRule.from_evidence(
        evidence,
        pools=recipe.pools,
        threshold=threshold,
        clamp=recipe.clamp,
        two_sided=recipe.two_sided,
        confirmed=recipe.confirmed,
    )


def _aura(evidence: Evidence) -> CalibratedRule:
    return CalibratedRule.from_evidence(evidence, pools=RECIPES["aura"].pools)


RULES: dict[str, Callable[[Evidence], CalibratedRule]] = {
    "two-sided": partial(_two_sided, threshold=0.52),
    "two-sided, stronger": partial(_two_sided, threshold=0.55),
    "AurA": _aura,
}
"""Neurons and evidence, with a strength per group: those of `sgm-calibrated`, and AurA's on all linear maps."""


def starts(plan: Plan, rules: Mapping[str, CalibratedRule]) -> Iterator[dict[str, float | str]]:
    """The uniform rules, as trials to begin with."""
    for name, rule in rules.items():
        for strength in (1.0, 1.5):
            params: dict[str, float | str] = {"rule": name}

            def ask(number: str, high: float, params: dict[str, float | str] = params, all_: float = strength) -> float:
                params[number] = value = min(all_, high)
                return value

            strengths_of(ask, plan, rule)
            yield params


def strengths_of(ask: Callable[[str, float], float], plan: Plan, rule: CalibratedRule) -> torch.Tensor:
    """Ask for numbers, by name and upper end, and make strengths of them."""
    kinds, layers, terms = rule.shape

    def numbers(name: str, *shape: int, high: float = plan.high) -> torch.Tensor:
        return torch.tensor([ask(f"{name} {i}", high) for i in range(torch.Size(shape).numel())]).reshape(shape)

    match plan.space:
        case "kinds":
            strengths = numbers("kind", kinds, 1, 1)
        case "kinds and layers":
            strengths = numbers("kind", kinds, 1, 1) * numbers("layer", 1, layers, 1, high=1.0)
        case "kinds and terms":
            strengths = numbers("kind and term", kinds, 1, terms)
        case "groups":
            strengths = numbers("group", kinds, layers, terms)
    return strengths.expand(kinds, layers, terms).contiguous()
