"""Judge answers that were written down before: a run's journals, or the verdicts of other judges in results files."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from safeglasses.data.examples import Example
from safeglasses.errors import SafeglassesError
from safeglasses.measure.items import Item, Results, items_of
from safeglasses.measure.judges import Judge
from safeglasses.measure.judging import judge_answers
from safeglasses.measure.respond import Response
from safeglasses.measure.results_reading import field_of, lines_of
from safeglasses.measure.verdicts import Verdict, verdicts_of


def read_journal(
    path: str | Path, prompts: Sequence[Example], judge: Judge, refusals: Judge, *, defence: str
) -> Results:
    """Judge the answers that a run wrote down.

    Args:
        path: the journal.
        prompts: examples among which the answered prompts are.
        judge: decides what is harmful.
        refusals: decides what is a refusal.
        defence: what was worn.

    Raises:
        SafeglassesError: the journal is damaged or unfinished, or the prompts are not those that were answered.
    """
    path = Path(path)
    header, *lines = lines_of(path)
    rows = {field_of(line, "item", int, path): line for line in lines}
    known = {example.id: example for example in prompts}
    asked, counts = [], dict[str, int]()
    for number in range(len(rows)):
        row = rows.get(number)
        example = known.get(field_of(row, "example_id", str, path)) if row else None
        if row is None or example is None:
            raise SafeglassesError(
                "the journal is unfinished" if row is None else "a prompt that was answered is missing",
                given=f"{path}, {f'answer {number}' if row is None else row['example_id']}",
                expected="all answers of a finished run" if row is None else "the prompts of that run",
                do="run the same again: it goes on" if row is None else "give its file with --prompts",
            )
        counts[example.id] = sample = counts.get(example.id, -1) + 1
        asked.append((example, sample, field_of(row, "text", str, path), field_of(row, "n_tokens", int, path)))
    digest = "\n".join(f"{example.id}\t{example.prompt_key}\t{sample}" for example, sample, _, _ in asked)
    if hashlib.sha256(digest.encode("utf-8", "surrogatepass")).hexdigest() != header.get("prompts"):
        raise SafeglassesError(
            "these are not the prompts that were answered",
            given=f"{path}, {len(asked)} answers",
            expected="the same prompts, with the same words and pictures, all of them answered",
            do="give the run's own prompts with --prompts, or finish the run",
        )
    responses = [Response(example.id, text, n_tokens, sample) for example, sample, text, n_tokens in asked]
    answers = judge_answers([example for example, *_ in asked], responses, judge, refusals)
    items = items_of(answers, [sample for _, sample, _, _ in asked])
    model, decoding = field_of(header, "model", str, path), field_of(header, "decoding", dict, path)
    return Results(model, defence, judge.name, refusals.name, decoding, items)


def judged_again(results: Results, judge: Judge | None, refusals: Judge | None) -> Results:
    """Return the same answers with the verdicts of other judges; None keeps those that there are.

    Raises:
        SafeglassesError: a judge answers out of step.
    """
    items = list(results.items)
    for index, verdict in _again(judge, items, benign=False) if judge else ():
        said = {"harmful": verdict.harmful, "score": verdict.score, "reason": verdict.reason}
        items[index] = replace(items[index], **said)
    for index, verdict in _again(refusals, items, benign=True) if refusals else ():
        items[index] = replace(items[index], refused=verdict.harmful, reason=verdict.reason)
    return replace(
        results,
        items=tuple(items),
        judge=judge.name if judge else results.judge,
        refusal_judge=refusals.name if refusals else results.refusal_judge,
    )


def _again(judge: Judge, items: Sequence[Item], *, benign: bool) -> list[tuple[int, Verdict]]:
    rows = [index for index, item in enumerate(items) if item.benign is benign]
    asked = [items[i] for i in rows]
    found = verdicts_of(judge, [item.text for item in asked], [item.question for item in asked]) if asked else []
    return list(zip(rows, found, strict=True))
