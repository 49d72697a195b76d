"""The main job: examples → evidence → glasses → proof, each stage with a file behind it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safeglasses.data.categories import by_category
from safeglasses.data.open import PAIRS, PROMPTS
from safeglasses.defend.folder import add_results
from safeglasses.defend.glasses import Glasses
from safeglasses.defend.recipes import RECIPES, Recipe
from safeglasses.errors import SafeglassesError
from safeglasses.files import atomic_write_text, write_json
from safeglasses.find.pools import Pool
from safeglasses.find.streams import reaches, streams_of
from safeglasses.measure.contrasts import calibration_data
from safeglasses.measure.judges import judge_from, refusal_judge
from safeglasses.measure.panel import panel_from
from safeglasses.model.anatomy import What
from safeglasses.model.routing import check_reachable
from safeglasses.model.vlm import load
from safeglasses.progress import Progress, Quiet
from safeglasses.report.html import write_report
from safeglasses.report.stored import store
from safeglasses.run.budget import parse_budget
from safeglasses.run.calibrating import Wanted
from safeglasses.run.folder import RunFolder
from safeglasses.run.inputs import content_of, judge_of, judges_of, read_inputs
from safeglasses.run.job import Job
from safeglasses.run.proof import report_data
from safeglasses.run.written import OPEN, write_measurements

_PATCHES: set[What] = {"vision", "projector"}
"""Sites whose tokens are patches of pictures."""


@dataclass(frozen=True)
class FitResult:
    """What `fit` gives back."""

    glasses: Glasses
    """The glasses that were fitted, as saved in ``folder/glasses``."""
    summary: dict[str, Any]
    """The content of ``folder/summary.json``."""
    folder: Path
    """The run folder."""


def fit(
    model: str | Path,
    pairs: str | Path | None = None,
    prompts: str | Path | None = None,
    judge: str | Sequence[str] | None = None,
    recipe: str | Path | Recipe = "sgm-calibrated",
    out: str | Path | None = None,
    budget: str | None = None,
    *,
    sites: What | Sequence[What] | None = None,
    by_head: bool = False,
    harm: str | float | None = None,
    front: bool | Sequence[float] = False,
    category: str | Sequence[str] | None = None,
    under: str | None = None,
    refusals: str | None = None,
    seed: int = 0,
    limit: int | None = None,
    batch_size: int | str = "auto",
    dtype: str = "auto",
    device_map: str | None = None,
    revision: str | None = None,
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> FitResult:
    """Fit safety glasses to a model and prove what they do.

    Args:
        model: checkpoint folder or hub id.
        pairs: toxic and non-toxic image-text pairs (JSONL, Parquet or a folder; ``docs/data.md``); without, those of
            MM-TOXIC-QA (open), which ships.
        prompts: prompts to measure and calibrate on; without, those of MM-TOXIC-QA (open), or the distinct prompts of
            the pairs where these were given.
        judge: one or several, as `safeglasses.judge_from` reads them; the first decides, the others are recorded.
            Without, those that ship.
        recipe: a name (`safeglasses.Recipe` lists them), a TOML file, or a recipe.
        sites: where to look and act, instead of where the recipe says; see `Recipe.sites`.
        by_head: turn the neurons of an attention head down together, as `Recipe.by_head`.
        out: run folder; a folder with the same inputs is resumed.
        budget: time for calibration, e.g. ``90s``; turned into counts once and kept with the run.
        harm: accept glasses with at most this share of harmful answers on the calibrate split (``2%``, 0.02), and of
            these take the least damage; without, the lowest score.
        front: calibrate a sweep of β and keep the glasses of all points, in ``out/front``; numbers replace the β.
        category: make glasses against these kinds of harm only, by the ``category`` of toxic rows; the proof then
            shows harm of every category.
        under: words around the request that the model reads in every step of calibration and in the proof, as in a
            stack: ``self-reminder``, ``adashield-s``, ``xsafety`` or ``system:FILE``, joined by ``+``.
        refusals: ``lexicon:FILE`` of refusal phrases; without, the shipped multilingual list.
        seed: of sampling, search and calibration.
        limit: at most so many examples per split, for a quick look.
        batch_size: rows per forward pass, or ``auto``.
        dtype: ``auto`` or a torch dtype's name.
        device_map: as in transformers.
        revision: of a hub model.
        skip_bad: skip unreadable rows and count them, instead of failing.
        overwrite: delete another run in `out`.
        progress: where progress is shown.

    Raises:
        SafeglassesError: bad input; always before long work.
    """
    show = progress or Quiet()
    chosen = _elsewhere(_recipe(recipe), sites, by_head=by_head)
    wanted = Wanted.read(chosen, harm=harm, front=front, category=category, under=under)
    size = _batch_size(batch_size)
    if budget is not None:
        parse_budget(budget)
    path = Path(out) if out is not None else Path(f"safeglasses-{Path(str(model)).name}")
    asked = PROMPTS if pairs is None and prompts is None else prompts
    inputs = {
        "model": str(model),
        "revision": revision,
        "pairs": content_of(PAIRS if pairs is None else pairs),
        "prompts": content_of(asked) if asked is not None else None,
        "judge": judges_of(judge),
        "refusals": None if refusals is None else judge_of(refusals),
        "recipe": chosen.to_toml(),
        "budget": budget,
        "seed": seed,
        "limit": limit,
        "dtype": dtype,
        "skip_bad": skip_bad,
        **wanted.inputs(),
    }
    RunFolder.examine(path, inputs, overwrite=overwrite)  # before anything takes time
    judges = panel_from(judge), refusal_judge() if refusals is None else judge_from(refusals)
    with show.stage("load"):
        vlm = load(model, dtype=dtype, device_map=device_map, revision=revision)
    where = vlm.anatomy.sites(chosen.sites)
    check_reachable(vlm.anatomy, where)
    streams_of(vlm.anatomy, where, chosen.pools)  # says now which sites no way of pooling reaches
    with show.stage("read and check the data"):
        data = read_inputs(vlm, pairs, prompts, *judges, limit=limit, skip_bad=skip_bad, categories=wanted.categories)
        if chosen.rule == "calibrated":
            calibration_data(data.lessons, data.prompts)  # says now what would be missing later
        for error in wanted.under.refused(vlm, [*data.prompts, *data.pairs]) if wanted.under else ():
            if error is not None:  # a template that refuses, or drops, what is put before the model
                raise error
        if chosen.by_category:
            by_category(data.pairs)
    folder = RunFolder.open(path, inputs, overwrite=overwrite)
    atomic_write_text(folder.path / "recipe.toml", chosen.to_toml())
    fingerprint = folder.once("fingerprint.json", vlm.fingerprint)
    if fingerprint != vlm.fingerprint():
        raise SafeglassesError(
            "the model changed since this run began",
            given=vlm.fingerprint(),
            expected=fingerprint,
            do="start a new run with another --out, or use --overwrite",
        )
    job = Job(vlm, data, chosen, folder, seed, size, show, wanted)
    evidence = job.evidence()
    glasses, search = job.glasses(evidence, budget)
    measurements, missing = job.measure(evidence, glasses)
    write_measurements(
        tuple(measurements.values()),
        folder.path / "results",
        task="safeglasses" if asked != PROMPTS else "mm_toxic_qa",
        dataset=OPEN if asked == PROMPTS and limit is None else None,
        seconds=folder.seconds().get("measure"),
        again=False,
    )
    with show.stage("report"):
        summary = job.summary(evidence, glasses, search, measurements)
        page = report_data(
            vlm,
            data.pairs.split("find"),
            evidence,
            glasses,
            search,
            measurements,
            summary,
            missing=missing,
            under=wanted.under.name if wanted.under else "",
        )
        store(page, folder.path / "report.json")
        write_report(page, folder.path / "report.html")
        add_results(folder.path / "glasses", summary, judge=data.judge.name)
        write_json(folder.path / "summary.json", summary)  # last: a folder that has it is finished
    return FitResult(glasses, summary, folder.path)


def _recipe(recipe: str | Path | Recipe) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if str(recipe) in RECIPES:
        return RECIPES[str(recipe)]
    if Path(recipe).suffix == ".toml":
        return Recipe.from_toml(Path(recipe))
    raise SafeglassesError(
        "no such recipe", given=repr(str(recipe)), expected=", ".join(RECIPES) + ", or a file ending in .toml"
    )


def _elsewhere(recipe: Recipe, sites: What | Sequence[What] | None, *, by_head: bool) -> Recipe:
    """Return the recipe on other sites, under a name that says so.

    Patches of pictures are no last token and no response: for the vision side ``prompt:max`` joins the recipe's ways of
    pooling, and takes the place of those that find nothing at any of its sites.
    """
    if sites is None and not by_head:
        return recipe
    where = recipe.sites if sites is None else sites
    named: tuple[What, ...] = (where,) if isinstance(where, str) else tuple(where)
    changed = replace(recipe, sites=named[0] if len(named) == 1 else named, by_head=by_head or recipe.by_head)
    if set(named) & _PATCHES and not any(reaches(pool, "picture", False) for pool in recipe.pools):
        kept = recipe.pools if set(named) - _PATCHES else ()
        changed = replace(changed, pools=(*kept, Pool("prompt", "max")))
    parts = [recipe.name, *(["+".join(named)] if sites is not None else []), *(["by-head"] if by_head else [])]
    return replace(changed, name="-".join(parts))


def _batch_size(value: int | str) -> int | str:
    if value == "auto":
        return value
    try:
        size = int(value)
    except ValueError:
        size = 0
    if size < 1:
        raise SafeglassesError("not a batch size", given=repr(value), expected="a positive number or auto")
    return size


__all__ = ["FitResult", "fit"]
