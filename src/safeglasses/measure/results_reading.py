"""Read results files back into what can be compared."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from safeglasses.errors import SafeglassesError
from safeglasses.files import read_json
from safeglasses.measure.items import GROUPS, Item, Results, check_distinct
from safeglasses.measure.results_files import SCHEMA, task_hash

T = TypeVar("T")


def results_in(folder: str | Path) -> list[Path]:
    """List the results files of a folder and of the folders of defences in it, oldest first."""
    folder = Path(folder)
    return sorted({*folder.glob("results_*.json"), *folder.glob("*/results_*.json")}, key=lambda path: path.name)


def read_results(path: str | Path) -> list[Results]:
    """Read ``results_TIME.json`` and the samples beside it: one `Results` per task.

    Raises:
        SafeglassesError: not such a file, one of another program, or samples that are missing, damaged, or not those
            that the results are about.
    """
    path = Path(path)
    record = read_json(path)
    ours = record.get("safeglasses") if isinstance(record, dict) else None
    if not isinstance(ours, dict) or ours.get("schema") != SCHEMA:
        raise SafeglassesError(
            "not a results file of safeglasses",
            given=str(path),
            expected=f"results_TIME.json with the key `safeglasses`, schema {SCHEMA}",
        )
    stamp = path.name.removeprefix("results_").removesuffix(".json")
    found = []
    for task, about in field_of(ours, "tasks", dict, path).items():
        samples = path.with_name(f"samples_{task}_{stamp}.jsonl")
        lines = lines_of(samples)
        items = tuple(_item(line, samples, number) for number, line in enumerate(lines, 1))
        if field_of(record, "task_hashes", dict, path).get(task) != task_hash(lines):
            raise SafeglassesError(
                "the samples are not those of the results",
                given=f"{samples}, {len(lines)} answers",
                expected=f"what was asked in {path.name}",
                do="restore both files together, or measure again",
            )
        check_distinct(items)
        defence, judge, refusals = (field_of(ours, name, str, path) for name in ("defence", "judge", "refusal_judge"))
        model, decoding = field_of(record, "model_name", str, path), field_of(about, "decoding", dict, path)
        field_of(decoding, "name", str, path)
        found.append(Results(model, defence, judge, refusals, decoding, items))
    return found


def _item(line: Mapping[str, Any], path: Path, number: int) -> Item:
    where = f"{path}, line {number}"
    doc, answers = field_of(line, "doc", dict, where), field_of(line, "filtered_resps", list, where)
    if len(answers) != 1 or not isinstance(answers[0], str):
        raise _damaged(where)
    slots = {name: _outcome(line, f"utility_{name}", where) for name in field_of(doc, "slots", dict, where)}
    score = line.get("toxicity")
    harmful = _outcome(line, "harmful_rate", where)
    if (score is None) != (harmful is None) or (score is not None and not isinstance(score, int | float)):
        raise _damaged(where)
    return Item(
        id=field_of(doc, "id", str, where),
        prompt=field_of(doc, "prompt_sha256", str, where),
        cluster=field_of(doc, "cluster", str, where),
        benign=doc.get("label") == "non-toxic",
        text=answers[0],
        sample=field_of(doc, "sample", int, where),
        harmful=harmful,
        score=score,
        refused=_outcome(line, "refusal_on_benign", where),
        reason=field_of(line, "reason", str, where),
        slots={name: right for name, right in slots.items() if right is not None},
        off_topic=_outcome(line, "off_topic", where),
        **{name: None if doc.get(name) is None else field_of(doc, name, str, where) for name in GROUPS},
        question=_question(doc, where),
    )


def _question(doc: Mapping[str, Any], where: str) -> str:
    """Return what `question_of` says of the prompt that was written down."""
    turns = field_of(doc, "messages", list, where)
    parts = field_of(turns[-1] if turns else None, "content", list, where)
    return "\n".join(
        field_of(part, "text", str, where) for part in parts if field_of(part, "type", str, where) == "text"
    )


def _outcome(line: Mapping[str, Any], name: str, where: object) -> bool | None:
    value = line.get(name)
    if value not in (None, 0, 1):
        raise _damaged(where)
    return None if value is None else value == 1


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line; what follows its last line break was being written and is left out.

    Raises:
        SafeglassesError: it cannot be read, or a line is damaged.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SafeglassesError("could not read a file", given=f"{path} ({error.strerror or error})") from error
    found = []
    for number, line in enumerate(content.split(b"\n")[:-1] or [b""], 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _damaged(f"{path}, line {number}") from error
        if not isinstance(record, dict):
            raise _damaged(f"{path}, line {number}")
        found.append(record)
    return found


def field_of(record: Any, name: str, kind: type[T], where: object) -> T:
    """Return a field of a record.

    Raises:
        SafeglassesError: there is none, or it is of another type.
    """
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _damaged(f"{where}: `{name}`")
    return value


def _damaged(where: object) -> SafeglassesError:
    return SafeglassesError("a damaged record of answers", given=str(where), do="restore the file, or measure again")
