"""Answer the same prompts by many stacks of defences, judge all answers, and write down what each buys and costs."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safeglasses.files import write_json
from safeglasses.measure.judges import judge_from, refusal_judge
from safeglasses.measure.judging import judge_answers
from safeglasses.measure.panel import panel_from
from safeglasses.measure.respond import Response, resolve_batch_size
from safeglasses.model.vlm import load
from safeglasses.progress import Progress, Quiet
from safeglasses.protect.grid import Measured, grid_rows, held_bytes
from safeglasses.protect.local import LocalAnswerer, memory_per_token
from safeglasses.protect.running import protect
from safeglasses.report.grid_page import write_grid_page
from safeglasses.run.inputs import drawn_from, rows_of
from safeglasses.run.stacks import StacksAsked, circular, decoding_of, refuse_misfits, slug, stacks_of

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class GridAsked(StacksAsked):
    """What is compared, as a command or a caller says it."""

    refusals: str | None = None
    """Who tells refusals; None: the shipped phrases."""


def grid_model(
    model: str | Path,
    asked: GridAsked,
    *,
    batch_size: int | str = "auto",
    dtype: str = "auto",
    device_map: str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure stacks of defences side by side.

    Args:
        model: checkpoint folder or hub id.
        asked: what to compare.
        batch_size: prompts at once, or ``auto``.
        dtype: ``auto`` or a torch dtype's name.
        device_map: as in transformers.
        revision: of a hub model.
        progress: where progress is shown.

    Returns:
        What ``grid.json`` holds, and the ``files`` written.

    Raises:
        SafeglassesError: bad input, as far as possible before the model is loaded; answers of another grid in the
            folder; a model that cannot answer where stacks fail open.
    """
    show = progress or Quiet()
    judges = panel_from(asked.judges)
    refusals = refusal_judge() if asked.refusals is None else judge_from(asked.refusals)
    rows = drawn_from(rows_of(asked.prompts, asked.split)[1], asked.limit)
    stacks = stacks_of(asked)
    deciding = circular(stacks, judges[0], show)
    with show.stage("load the model"):
        vlm = load(model, dtype=dtype, device_map=device_map, revision=revision)
    refuse_misfits(stacks, vlm, rows)
    decoding = decoding_of(asked)
    size = resolve_batch_size(vlm, batch_size)
    measured = []
    for stack in stacks:
        with show.stage(f"answer: {stack.name}") as advance:
            outcomes = protect(
                stack,
                rows,
                LocalAnswerer(vlm, stack.worn),
                decoding=decoding,
                journal=asked.out / "answers" / f"{slug(stack.name)}.jsonl",
                batch_size=size,
                progress=advance,
            )
        responses = [Response(o.id, o.text, len(vlm.tokenizer(o.text)["input_ids"]), 0) for o in outcomes]
        answers = judge_answers(rows, responses, judges, refusals)
        held = held_bytes(stack.worn)
        measured.append(Measured(stack.name, answers, tuple(outcomes), held, memory_per_token(vlm)))
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "model": vlm.source,
        "base_fingerprint": vlm.fingerprint(),
        "judge": judges[0].name,
        "refusal_judge": refusals.name,
        "judges_inside": sorted({judge.name for stack in stacks for judge in stack.judges}),
        "circular": deciding,
        "decoding": asdict(decoding),
        "split": asked.split,
        "prompts": len(rows),
        "parts": {stack.name: [part.name for part in stack.parts] for stack in stacks},
        "rows": [row.to_json() for row in grid_rows(measured)],
    }
    write_json(asked.out / "grid.json", record)
    page = write_grid_page(record, asked.out / "grid.html")
    return {**record, "files": {"grid": str(asked.out / "grid.json"), "page": str(page)}}
