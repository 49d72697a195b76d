"""How a model answers, with and without a defence: read, answer, judge, and write down what was asked for."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safeglasses.defend.defence import Defence
from safeglasses.defend.glasses import Glasses
from safeglasses.errors import SafeglassesError
from safeglasses.measure.disputes import agreement_records
from safeglasses.measure.judges import judge_from, refusal_judge
from safeglasses.measure.measurement import GREEDY, SAMPLED, Measurement, measure
from safeglasses.measure.panel import DEFAULT_JUDGES, panel_from
from safeglasses.model.vlm import load
from safeglasses.progress import Progress, Quiet
from safeglasses.run.inputs import rows_of
from safeglasses.run.worn import worn_in
from safeglasses.run.written import OPEN, write_measurements


@dataclass(frozen=True)
class Asked:
    """What is measured, as a command or a caller says it."""

    prompts: str | Path | None = None
    """Prompts; None: those of MM-TOXIC-QA (open)."""
    judges: Sequence[str] | None = None
    """As `judge_from` reads them, the first decides; None: those that ship."""
    refusals: str | None = None
    """Who tells refusals; None: the shipped phrases."""
    glasses: str | Path | None = None
    """A folder of glasses: the model is measured without and with them."""
    strength: float | None = None
    """Of the glasses; None: as saved."""
    split: str = "test"
    """``find``, ``calibrate``, ``test`` or ``all``."""
    max_new_tokens: int = 64
    """Longest answer."""
    seed: int = 0
    """Of sampling."""
    limit: int | None = None
    """Only the first so many prompts."""
    skip_bad: bool = False
    """Skip rows that cannot be used, and count them."""
    out: Path | None = None
    """Where results files and answers go; what is there is gone on with."""
    log_dir: Path | None = None
    """Where Inspect logs go."""
    dataset: str | None = None
    """Id of the prompts' benchmark on the Hub, for ``.eval_results``."""


def measure_model(
    model: str | Path,
    asked: Asked,
    *,
    batch_size: int | str = "auto",
    dtype: str = "auto",
    device_map: str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Answer prompts, sampled and greedy, and count.

    Args:
        model: checkpoint folder or hub id.
        asked: what to measure, and what to write.
        batch_size: prompts at once, or ``auto``.
        dtype: ``auto`` or a torch dtype's name.
        device_map: as in transformers.
        revision: of a hub model.
        progress: where progress is shown.

    Returns:
        JSON-ready: ``rows``, ``paired``, ``judges``, ``agreement`` as in ``summary.json``, and the ``files`` written.

    Raises:
        SafeglassesError: bad input, as far as possible before the model is loaded.
    """
    show, started, clock = progress or Quiet(), datetime.now(UTC), time.perf_counter()
    judges = panel_from(asked.judges)
    refusals = refusal_judge() if asked.refusals is None else judge_from(asked.refusals)
    specs = tuple(DEFAULT_JUDGES if asked.judges is None else asked.judges)
    if asked.log_dir is not None:
        from safeglasses.evals.logs import check_judges  # an optional dependency: says so if it is missing

        check_judges(specs)
    examples, found = rows_of(asked.prompts, asked.split, skip_bad=asked.skip_bad)
    rows = found[: asked.limit]
    show.say(f"{len(rows):,} of {len(examples):,} prompts ({asked.split})")
    worn = {"none": None} if asked.glasses is None else {"none": None, "glasses": _glasses(asked)}
    with show.stage("load the model"):
        vlm = load(model, dtype=dtype, device_map=device_map, revision=revision)
    measured: dict[str, Measurement] = {}
    for name, pair in worn.items():
        with show.stage("answer without glasses" if pair is None else "answer with glasses") as advance:
            measured[name] = measure(
                vlm,
                rows,
                judges,
                glasses=pair,
                name=name,
                decodings=[replace(d, max_new_tokens=asked.max_new_tokens) for d in (SAMPLED, GREEDY)],
                refusals=refusals,
                seed=asked.seed,
                journal_dir=None if asked.out is None else asked.out / "responses",
                batch_size=batch_size,
                progress=advance,
            )
    harm = measured["none"].row("sampled").harmful_rate
    paired = measured["none"].paired(measured["glasses"], "sampled") if len(measured) == 2 and harm else None
    files = _write(asked, specs, measured, started, time.perf_counter() - clock, show)
    return {
        "schema": 1,
        "model": vlm.source,
        "base_fingerprint": vlm.fingerprint(),
        "glasses": None if asked.glasses is None else str(asked.glasses),
        "judge": judges[0].name,
        "judges": [one.name for one in judges],
        "agreement": agreement_records(tuple(measured.values())),
        "split": asked.split,
        "rows": [row for result in measured.values() for row in result.to_rows()],
        "paired": None if paired is None else paired.to_json(),
        "skipped_rows": len(examples.skipped),
        "seed": asked.seed,
        "files": files,
    }


def _glasses(asked: Asked) -> Defence:
    worn = worn_in(asked.glasses or "")
    if asked.strength is None:
        return worn
    if not isinstance(worn, Glasses):
        raise SafeglassesError(
            "a shield has no strength",
            given=f"{asked.glasses}, --strength {asked.strength:g}",
            do="leave --strength out",
        )
    return worn.at(asked.strength)


def _write(
    asked: Asked,
    specs: tuple[str, ...],
    measured: dict[str, Measurement],
    started: datetime,
    seconds: float,
    show: Progress,
) -> dict[str, list[str]]:
    """Write what was asked for; ``.eval_results`` only of the whole test split of a benchmark that has an id."""
    files: dict[str, list[str]] = {}
    if asked.out is not None:
        shipped = asked.prompts is None
        whole = asked.limit is None and asked.split == "test"
        dataset = asked.dataset or (OPEN if shipped else None)
        if not whole or dataset is None:
            why = "prompts without --dataset" if whole else "a part of the benchmark"
            show.say(f"no .eval_results: {why} is nothing that others could compare with")
        files = write_measurements(
            tuple(measured.values()),
            asked.out,
            task="mm_toxic_qa" if shipped else "safeglasses",
            dataset=dataset if whole else None,
            seconds=round(seconds, 2),
        )
    if asked.log_dir is not None:
        from safeglasses.evals.logs import Origin, write_logs

        data = None if asked.prompts is None else Path(asked.prompts)
        refusals = "refusals" if asked.refusals is None else asked.refusals
        with show.stage("write logs"):
            files["logs"] = [
                str(path)
                for name, measurement in measured.items()
                for path in write_logs(
                    measurement,
                    asked.log_dir,
                    Origin(specs, refusals, data, asked.split, _model_args(asked, name), started),
                )
            ]
    return files


def _model_args(asked: Asked, name: str) -> dict[str, Any]:
    if name == "none":
        return {}
    return {"glasses": str(asked.glasses)} | ({} if asked.strength is None else {"strength": asked.strength})
