"""Cause, not correlation: what a model does without some of its neurons, beside others of the same number."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safeglasses.data.examples import Example
from safeglasses.defend.ablation import Ablation, StandIns
from safeglasses.defend.defence import Defence
from safeglasses.defend.patching import Patch
from safeglasses.errors import SafeglassesError
from safeglasses.find.selection import Selection
from safeglasses.measure.items import is_benign
from safeglasses.measure.judges import Judge
from safeglasses.measure.measurement import Measurement, measure
from safeglasses.measure.paired import difference
from safeglasses.measure.respond import Decoding
from safeglasses.model.vlm import VLM
from safeglasses.progress import Progress, Quiet

Kind = Literal["zero", "mean", "resample"]
KINDS: tuple[Kind, ...] = ("zero", "mean", "resample")
DOSES = (0.25, 0.5, 0.75, 1.5, 2.0)
SCHEMA = 1


@dataclass(frozen=True)
class _Arm:
    """One thing that is measured."""

    neurons: str
    """``none``, ``selected``, ``random``; ``tuned``, ``patched selected``, ``patched random`` with a tuned model."""
    how: str
    """``zero``, ``mean``, ``resample``, ``scale`` or ``patch``; empty where nothing is done to neurons."""
    factor: float | None
    """For ``scale``."""
    seed: int | None
    """Of a random control."""
    defence: Defence | None
    """What is worn."""

    @property
    def name(self) -> str:
        """Name of its journal."""
        parts = (self.neurons.replace(" ", "-"), self.how, self.factor, self.seed)
        return "-".join(str(part) for part in parts if part not in (None, ""))


def ablate(
    vlm: VLM,
    neurons: Selection,
    prompts: Sequence[Example],
    judge: Judge,
    *,
    ordinary: Sequence[Example],
    kinds: Sequence[Kind] = KINDS,
    controls: int = 5,
    doses: Sequence[float] = DOSES,
    tuned: Defence | None = None,
    refusals: Judge | None = None,
    temperature: float = 0.0,
    max_new_tokens: int = 64,
    seed: int = 0,
    journals: Path | None = None,
    batch_size: int | str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a model without the neurons, and without as many others of the same layers.

    Args:
        vlm: the untouched model.
        neurons: what is ablated.
        prompts: requests that should be refused or elicit harm, and benign ones (``non-toxic``).
        judge: of harm; ``complied`` for requests that should be refused.
        ordinary: benign examples whose activations stand in for ablated ones; none of `prompts`.
        kinds: which ablations.
        controls: random sets per kind, each of another seed.
        doses: factors of the dose–response curve, beside 0 (``zero``) and 1 (nothing done).
        tuned: what a defended model wears; its activations are then patched into the untouched one.
        refusals: judge of refusals on benign prompts.
        temperature: 0 is greedy.
        max_new_tokens: longest answer.
        seed: of sampling, of the stand-ins, and of the first control.
        journals: folder where finished answers are kept, for resuming.
        batch_size: prompts at once, or ``auto``.
        progress: where progress is shown.

    Returns:
        JSON-ready: ``rows`` with a row per arm, and ``effects`` with paired differences and their intervals.

    Raises:
        SafeglassesError: no harmful prompts, fewer than one control, an example in both sets, or neurons that do not
            fit; always before the first answer.
    """
    show = progress or Quiet()
    _check(prompts, ordinary, kinds, controls)
    random = [neurons.matched(seed + i) for i in range(controls)]
    if tuned is not None:
        with Patch(tuned, neurons).worn(vlm):
            pass  # refuses now what it would refuse after all other arms
    stand_ins = None
    if {"mean", "resample"} & set(kinds):
        with show.stage("ordinary activations"):
            sites = [site for site, mask in neurons.masks.items() if mask.any()]
            stand_ins = StandIns.of(vlm, ordinary, sites, seed=seed)
    arms = list(_arms(neurons, random, kinds, doses, stand_ins, tuned, seed))
    decoding = Decoding("greedy" if temperature == 0 else "sampled", temperature, max_new_tokens, seed)
    found: dict[str, Measurement] = {}
    total = len(arms) * len(prompts)
    with show.stage("answer with neurons taken out", total) as advance:
        for i, arm in enumerate(arms):
            found[arm.name] = measure(
                vlm,
                prompts,
                judge,
                glasses=arm.defence,
                name=arm.name,
                decodings=(decoding,),
                refusals=refusals,
                journal_dir=journals,
                batch_size=batch_size,
                progress=lambda done, _, i=i: advance(i * len(prompts) + done, total),
            )
    return {
        "schema": SCHEMA,
        "kind": "ablation",
        "model": vlm.source,
        "base_fingerprint": vlm.fingerprint(),
        "judge": judge.name,
        "neurons": len(neurons),
        "neurons_of": sum(len(mask) for mask in neurons.masks.values()),
        "layers": len({site.layer for site, mask in neurons.masks.items() if mask.any()}),
        "controls": controls,
        "seed": seed,
        "decoding": {"temperature": temperature, "max_new_tokens": max_new_tokens},
        "prompts": {"harmful": sum(not is_benign(e) for e in prompts), "benign": sum(map(is_benign, prompts))},
        "rows": [_row(arm, found[arm.name]) for arm in arms],
        "effects": _effects(arms, found, decoding.name),
    }


def _check(prompts: Sequence[Example], ordinary: Sequence[Example], kinds: Sequence[str], controls: int) -> None:
    if all(is_benign(e) for e in prompts):
        raise SafeglassesError(
            "no prompt that could elicit harm",
            given=f"{len(prompts)} prompts, all labelled non-toxic",
            expected="rows labelled toxic: requests that should be refused, or that elicit harm",
        )
    if controls < 1 or not kinds or set(kinds) - set(KINDS):
        raise SafeglassesError(
            "not an ablation",
            given=f"kinds {', '.join(kinds) or 'none'}, {controls} controls",
            expected=f"kinds out of {', '.join(KINDS)}, and at least one random control",
        )
    both = {e.id for e in prompts} & {e.id for e in ordinary}
    if both:
        raise SafeglassesError(
            "examples are measured whose activations stand in for ablated ones",
            given=", ".join(sorted(both)[:3]),
            expected="ordinary examples of another split",
        )


def _arms(
    neurons: Selection,
    random: Sequence[Selection],
    kinds: Sequence[Kind],
    doses: Sequence[float],
    stand_ins: StandIns | None,
    tuned: Defence | None,
    seed: int,
) -> Iterator[_Arm]:
    yield _Arm("none", "", None, None, None)
    sets = [("selected", None, neurons), *(("random", seed + i, control) for i, control in enumerate(random))]
    for kind in kinds:
        for name, which, chosen in sets:
            how = "scale" if kind == "zero" else kind
            worn = Ablation(chosen, how, stand_ins=None if kind == "zero" else stand_ins, seed=seed)
            yield _Arm(name, kind, None, which, worn)
    for dose in doses:
        for name, which, chosen in sets[:2]:
            yield _Arm(name, "scale", dose, which, Ablation(chosen, factor=dose))
    if tuned is not None:
        yield _Arm("tuned", "", None, None, tuned)
        for name, which, chosen in sets:
            yield _Arm(f"patched {name}", "patch", None, which, Patch(tuned, chosen))


def _row(arm: _Arm, found: Measurement) -> dict[str, Any]:
    row = found.to_rows()[0]
    kept = ("harmful_rate", "refusal_on_benign", "utility", "perplexity", "kl", "empty", "very_short")
    named = {"neurons": arm.neurons, "how": arm.how or None, "factor": arm.factor, "seed": arm.seed}
    return {**named, **{name: row[name] for name in kept}}


def _effects(arms: Sequence[_Arm], found: Mapping[str, Measurement], decoding: str) -> list[dict[str, Any]]:
    """Compare, prompt by prompt, selected neurons with nothing and with the mean over random ones."""
    harm = {arm.name: _harm(found[arm.name], decoding) for arm in arms}
    untouched = harm["none"]
    effects = []
    for how in dict.fromkeys(arm.how for arm in arms if arm.how and arm.factor is None):
        selected = next(harm[a.name] for a in arms if a.how == how and a.neurons.endswith("selected"))
        controls = [harm[a.name] for a in arms if a.how == how and a.neurons.endswith("random")]
        random = [_mean(values) for values in zip(*controls, strict=True)]
        effects.append(
            {
                "how": how,
                "selected_minus_none": difference(untouched, selected).to_json(),
                "random_minus_none": difference(untouched, random).to_json(),
                "selected_minus_random": difference(random, selected).to_json(),
                "controls": [difference(untouched, control).value for control in controls],
            }
        )
    return effects


def _harm(found: Measurement, decoding: str) -> list[float | None]:
    verdicts = [answer.verdict for answer in found.eliciting(decoding)]
    return [None if v is None or v.harmful is None else float(v.harmful) for v in verdicts]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
