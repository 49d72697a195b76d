"""Precise Shield, start to end: probe → safety neurons → a shield and its controls → proof, resumable."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safeglasses.data.open import open_benchmark
from safeglasses.defend.glasses import Glasses
from safeglasses.files import write_json
from safeglasses.find.rules import Rule
from safeglasses.model.vlm import load
from safeglasses.progress import Progress, Quiet
from safeglasses.report.shield_page import write_shield_page
from safeglasses.run.folder import RunFolder
from safeglasses.run.inputs import content_of, judge_of
from safeglasses.run.shield_data import read_shield_data, shipped_languages
from safeglasses.run.shield_job import Job
from safeglasses.run.shield_plan import ShieldPlan, sites_for
from safeglasses.tune.shield import Shield


@dataclass(frozen=True)
class ShieldResult:
    """What `shield` gives back."""

    shield: Shield | Glasses
    """What was tuned, as saved in ``folder/shield``; glasses where the mode is ``amplify``."""
    summary: dict[str, Any]
    """The content of ``folder/summary.json``."""
    folder: Path
    """The run folder."""


def shield(
    model: str | Path,
    probe: str | Path | None = None,
    prompts: str | Path | None = None,
    judge: str = "complied",
    out: str | Path | None = None,
    *,
    plan: ShieldPlan | None = None,
    languages: Sequence[str] | None = None,
    refusals: str | None = None,
    seed: int = 0,
    limit: int | None = None,
    test_limit: int | None = None,
    batch_size: int | str = "auto",
    dtype: str = "auto",
    device_map: str | None = None,
    revision: str | None = None,
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ShieldResult:
    """Find a model's safety neurons, tune only those, and prove what that did, beside controls.

    Source: Precise Shield (arXiv 2604.08881). Controls, gates, robustness and transfer are ours.

    Args:
        model: checkpoint folder or hub id.
        probe: harmful requests and harmless counterparts by language and risk type, with answers to train on, in
            splits ``find`` and ``test``; without, the one that ships.
        prompts: benign prompts with answers (find: trained on beside the probe; test: utility); without a probe,
            those that ship.
        judge: decides on answers to harmful requests; ``complied`` counts what is not refused.
        out: run folder; one with the same inputs is resumed.
        plan: what is done.
        languages: which of the probe's; None for all.
        refusals: judge of refusals on benign prompts; None for the shipped phrases.
        seed: of sets of random neurons, training and bootstrap.
        limit: rows per label and cell to find and tune with.
        test_limit: rows per label and cell, and ordinary rows per language, to measure with.
        batch_size: prompts at once when answering, or ``auto``.
        dtype: ``auto`` or a torch dtype's name.
        device_map: as in transformers.
        revision: of a hub model.
        skip_bad: skip unreadable rows.
        overwrite: delete another run in `out`.
        progress: where progress is shown.

    Raises:
        SafeglassesError: bad input, before long work.
    """
    show, plan = progress or Quiet(), plan or ShieldPlan()
    rule = Rule.named(plan.rule, plan.share)
    shipped = open_benchmark()
    if probe is None:
        probe, prompts = shipped.probes, prompts or shipped.prompts
        if languages is None:
            languages = shipped_languages(probe)
            show.say(f"languages with enough rows in the shipped probe: {', '.join(languages)}")
    path = Path(out) if out is not None else Path(f"safeglasses-shield-{Path(str(model)).name}")
    inputs = {
        "model": str(model),
        "revision": revision,
        "probe": content_of(probe),
        "prompts": content_of(prompts) if prompts is not None else None,
        "judge": judge_of(judge),
        "refusals": None if refusals is None else judge_of(refusals),
        "plan": {**vars(plan), "tune": plan.tune.record()},
        "languages": list(languages) if languages is not None else None,
        "seed": seed,
        "limit": limit,
        "test_limit": test_limit,
        "dtype": dtype,
        "skip_bad": skip_bad,
    }
    RunFolder.examine(path, inputs, overwrite=overwrite)
    with show.stage("load"):
        vlm = load(model, dtype=dtype, device_map=device_map, revision=revision)
    sites = sites_for(plan, vlm, show)
    with show.stage("read and check the data"):
        data = read_shield_data(
            vlm,
            probe,
            prompts,
            judge,
            refusals,
            languages=languages,
            limit=limit,
            test_limit=test_limit,
            skip_bad=skip_bad,
        )
        data.training()
    folder = RunFolder.open(path, inputs, overwrite=overwrite)
    job = Job(vlm, data, plan, rule, sites, folder, seed, batch_size, show)
    job.check_base()
    contrast = job.contrast()
    job = job.completed()
    neurons = contrast.union()
    made, measured, seeds = job.arms(neurons)
    summary = job.summary(contrast, neurons, made, measured, seeds)
    with show.stage("report"):
        write_shield_page(summary, folder.path / "report.html")
        write_json(folder.path / "summary.json", summary)  # last: a folder that has it is finished
    return ShieldResult(made["shield"], summary, folder.path)
