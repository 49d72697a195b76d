"""Rows of data as samples: the chat with its pictures inside, everything else as metadata."""

from collections.abc import Callable
from typing import Any

from inspect_ai.dataset import Sample
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    Content,
    ContentImage,
    ContentText,
)

from safeglasses.data.examples import SPLITS, Example, Text, Turn, Video, read_examples
from safeglasses.data.open import open_prompts
from safeglasses.errors import SafeglassesError
from safeglasses.evals.solvers import wrapper_of
from safeglasses.evals.uris import data_uri

_ROLES = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}


def samples(
    data: str | None,
    *,
    split: str,
    keep: Callable[[Example], bool],
    what: str,
    language: str | None = None,
    condition: str | None = None,
    category: str | None = None,
    wrapper: str | None = None,
) -> list[Sample]:
    """Read the rows of one task.

    Args:
        data: .jsonl, .parquet or a folder; None: the open benchmark.
        split: find, calibrate, test or all.
        keep: which rows the task is about.
        what: names those rows in errors.
        language: only rows of this language; several separated by commas.
        condition: only standard or only adversarial rows.
        category: only rows of this category; several separated by commas.
        wrapper: a wrapper's id: only standard rows in its languages, which it makes adversarial.

    Raises:
        SafeglassesError: no such data or split, or no row is left.
        BadRow: a row that cannot be used.
    """
    if split not in (*SPLITS, "all"):
        raise SafeglassesError("no such split", given=repr(split), expected=", ".join((*SPLITS, "all")))
    examples = open_prompts() if data is None else read_examples(data)
    wanted = {"language": language, "condition": condition, "category": category}
    rows = examples if split == "all" else examples.split(split)
    rows = rows.filter(keep)
    for name, value in wanted.items():
        if value is not None:
            allowed = {part.strip() for part in str(value).split(",")}
            rows = rows.filter(lambda row, name=name, allowed=allowed: getattr(row, name) in allowed)
    if wrapper is not None:
        languages = wrapper_of(wrapper).languages
        rows = rows.filter(lambda row: row.condition == "standard" and (not languages or row.language in languages))
        wanted["wrapper"] = wrapper
    if not len(rows):
        told = ", ".join([f"split={split}", *(f"{n}={v}" for n, v in wanted.items() if v is not None)])
        raise SafeglassesError(
            f"no {what}",
            given=f"{data or 'the open benchmark'} ({told})",
            expected="at least one row; there is no rate of an empty set",
            do="name another split with -T split=…, or give rows that it holds",
        )
    films = [row.id for row in rows if row.n_frames]
    if films:
        raise SafeglassesError(
            "videos do not go through Inspect here",
            given=f"{len(films)} row(s) with videos, the first {films[0]!r}",
            expected="rows of text and pictures: its messages hold whole files of videos, and ours hold frames",
            do="measure them with safeglasses measure --log-dir, or give the frames as pictures",
        )
    found = [sample_of(row) for row in rows]
    for sample in found if wrapper is not None else ():
        sample.metadata = {**(sample.metadata or {}), "condition": "adversarial", "wrapper": wrapper}
    return found


def sample_of(example: Example) -> Sample:
    """Return a row as Inspect takes it; the reference response is the target."""
    metadata: dict[str, Any] = {
        "label": example.label,
        "category": example.category,
        "language": example.language,
        "modality": example.modality,
        "condition": example.condition,
        "source": example.source,
        "split": example.split,
        "pair_id": example.pair_id,
        "slots": dict(example.slots),
        "prompt_key": example.prompt_key,
    }
    return Sample(
        id=example.id,
        input=[message_of(turn) for turn in example.messages],
        target=example.response or "",
        metadata=metadata,
    )


def message_of(turn: Turn) -> ChatMessage:
    """Return a turn as a message, pictures as data URIs: a log then needs no other file.

    A video becomes its frames: enough for a log to show, and no task that asks a model gets here with one.
    """
    parts: list[Content] = [
        content
        for part in turn.content
        for content in (
            [ContentText(text=part.text)]
            if isinstance(part, Text)
            else [ContentImage(image=data_uri(still)) for still in (part.frames if isinstance(part, Video) else [part])]
        )
    ]
    return _ROLES[turn.role](content=parts)
