"""What pairs must be before any long work starts, and the prompts that lie in them."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from PIL import Image

from safeglasses.data.pictures import Picture
from safeglasses.data.records import SPLITS, Example, Examples
from safeglasses.errors import SafeglassesError

if TYPE_CHECKING:
    import safeglasses.model.chat

logger = logging.getLogger(__name__)


@runtime_checkable
class Reader(Protocol):
    """The part of a `VLM` that says how long a chat is."""

    @property
    def context_length(self) -> int | None:
        """Most tokens that the model takes; ``None`` when it does not say."""
        ...

    def lengths(self, chats: "Sequence[safeglasses.model.chat.Chat]") -> list[int]:
        """Return the number of tokens of each chat, pictures and response included."""
        ...


def check_pairs(examples: Examples, vlm: Reader, *, minimum: int = 20) -> None:
    """Refuse pairs from which nothing can be learned, before any model runs.

    Logs a warning when every prompt has toxic and non-toxic responses in the same proportion.

    Args:
        examples: all splits of the pairs.
        vlm: whose context the rows must fit into.
        minimum: fewest rows of each class in the ``find`` split.

    Raises:
        SafeglassesError: rows without label or response, a class missing or too small, rows too long.
    """
    _refuse(examples, lambda row: row.label is None, "rows without a label", '"label": "toxic" or "non-toxic"')
    _refuse(
        examples,
        lambda row: not (row.response or "").strip(),
        "rows without a response",
        'some text in "response"',
    )
    _check_classes(examples, minimum)
    _check_lengths(examples, vlm)
    find = examples.split("find")
    if _prompt_shares(find.toxic) == _prompt_shares(find.non_toxic):
        logger.warning(
            "toxic and non-toxic rows share their prompts: nothing measured on the prompt can differ, and "
            "prompt:* evidence will be empty"
        )


def check_media(examples: Iterable[Example], vlm: Reader) -> None:
    """Check that a model takes what rows show: a row of each number of pictures and of frames is tried.

    Raises:
        SafeglassesError: pictures or videos that the model does not take, or none where it needs one.
    """
    kinds = {row.layout: row for row in examples}
    _measured(list(kinds.values()), vlm)


def prompts_of(pairs: Iterable[Example]) -> Examples:
    """Return the distinct prompts of pairs, for measuring when the user gives no prompts.

    A prompt with a toxic response is ``toxic`` (eliciting), any other ``non-toxic`` (a benign control). Its
    response is the first non-toxic one, for reference, if there is one. A prompt of several splits keeps the
    earliest of find, calibrate, test, so that ``test`` holds only what nothing has seen.
    """
    groups: dict[str, list[Example]] = {}
    for row in pairs:
        groups.setdefault(row.prompt_key, []).append(row)
    prompts = []
    for rows in groups.values():
        reference = next((row for row in rows if row.label == "non-toxic"), None)
        prompts.append(
            replace(
                reference or rows[0],
                response=reference.response if reference else None,
                label="toxic" if any(row.is_toxic for row in rows) else "non-toxic",
                split=min((row.split for row in rows), key=SPLITS.index),
            )
        )
    return Examples(tuple(prompts))


def _check_classes(examples: Examples, minimum: int) -> None:
    counts = {name: (len(part.toxic), len(part.non_toxic)) for name in SPLITS if (part := examples.split(name))}
    toxic, non_toxic = counts.get("find", (0, 0))
    if min(toxic, non_toxic) >= minimum:
        return
    missing = None if toxic and non_toxic else "non-toxic" if toxic else "toxic"
    raise SafeglassesError(
        f"no {missing} rows in the find split" if missing else "too few rows in the find split",
        given="; ".join(f"{name}: {a} toxic, {b} non-toxic" for name, (a, b) in counts.items()) or "no rows",
        expected=f"at least {minimum} toxic and {minimum} non-toxic rows in find",
        do='add rows, or put more of them into find with "split": "find"',
    )


def _check_lengths(examples: Examples, vlm: Reader) -> None:
    lengths, limit = _measured(examples, vlm), vlm.context_length
    if limit is None:
        return
    long = {row.id: length for row, length in zip(examples, lengths, strict=True) if length > limit}
    if long:
        raise SafeglassesError(
            "rows longer than the model's context",
            given=_named([f"{name} ({length:,} tokens)" for name, length in long.items()]),
            expected=f"at most {limit:,} tokens, prompt, pictures and response together",
            do="shorten or remove these rows",
        )


def _measured(examples: Sequence[Example], vlm: Reader) -> list[int]:
    @cache
    def blank(size: tuple[int, int]) -> Image.Image:
        return Image.new("RGB", size)

    def stand_in(picture: Picture) -> Image.Image:  # only the size counts, so the pixels can stay on disk
        return blank(picture.size)

    return vlm.lengths([row.chat_with(stand_in) for row in examples])


def _refuse(examples: Examples, wrong: Callable[[Example], bool], what: str, expected: str) -> None:
    ids = [row.id for row in examples if wrong(row)]
    if ids:
        raise SafeglassesError(what, given=_named(ids), expected=expected, do="complete or remove these rows")


def _prompt_shares(rows: Examples) -> dict[str, Fraction]:
    return {key: Fraction(count, len(rows)) for key, count in Counter(row.prompt_key for row in rows).items()}


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
