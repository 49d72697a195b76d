"""From one parsed row to an `Example`: every field checked, every complaint with file and row."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from safeglasses.data.pictures import Picture, Video
from safeglasses.data.records import CONDITIONS, LABELS, SPLITS, Condition, Example, Split, Text, Turn
from safeglasses.errors import BadRow

FIELDS = (
    *(
        "id",
        "messages",
        "response",
        "label",
        "pair_id",
        "category",
        "language",
        "modality",
        "condition",
        "source",
    ),
    *("split", "slots"),
    "licence",  # for people; nothing here depends on it
)
ROW_PICTURES = ("images", "image", "file_name")
"""Columns with a row's pictures, for ``{"type": "image"}`` parts without one (TRL, datasets, ImageFolder)."""
ROW_VIDEOS = ("videos", "video")
"""Columns with a row's videos, for ``{"type": "video"}`` parts without one: lists of frames, and one such list."""
ROLES = ("system", "user", "assistant")
SKIP_BAD = "leave bad rows out with --skip-bad (in Python: skip_bad=True)"
SKIP = f"mend the row, or {SKIP_BAD}"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:")
_MESSAGES = '"messages": [{"role": "user", "content": "…"}]'
_TEXT = '{"type": "text", "text": "…"}'
_IMAGE = '{"type": "image", "path": "…"}'
_VIDEO = '{"type": "video", "video": ["frames/1.png", "frames/2.png", …], "fps": 2}'
_Word = TypeVar("_Word")


@dataclass(frozen=True)
class Row:
    """One parsed row and where it came from."""

    where: str
    """``FILE:ROW``, counted from 1."""
    folder: Path
    """What its picture paths are relative to."""
    fields: Mapping[str, Any]
    """The row's own fields."""

    @property
    def name(self) -> str:
        """The id of a row that gives none: the same wherever the data lie."""
        return Path(self.where).name

    def bad(self, what: str, *, given: str, expected: str, do: str = SKIP) -> BadRow:
        """Return the error for this row."""
        return BadRow(f"{self.where}: {what}", given=given, expected=expected, do=do)


@dataclass(frozen=True)
class Pool:
    """Pictures by path and by content, so that one that many rows share is kept and decoded once."""

    paths: dict[Path, Picture] = field(default_factory=dict)
    """Pictures in files."""
    contents: dict[str, Picture] = field(default_factory=dict)
    """Embedded pictures by the SHA-256 of their bytes."""

    def at(self, path: Path) -> Picture:
        """Return the one picture of that path."""
        return self.paths.setdefault(path, Picture(path=path))

    def of(self, data: bytes) -> Picture:
        """Return the one picture of those bytes."""
        return self.contents.setdefault(hashlib.sha256(data).hexdigest(), Picture(data=data))


def example_from(row: Row, pool: Pool) -> Example:
    """Check one row and return its example (``split`` is ``find`` when the row names none).

    Raises:
        BadRow: the row cannot be used; the message says where, why and what to do.
    """
    identity = _text(row, "id", number=True)
    condition: Condition | None = _choice(row, "condition", CONDITIONS)
    split: Split | None = _choice(row, "split", SPLITS)
    return Example(
        id=row.name if identity is None else identity,
        messages=_messages(row, pool),
        response=_text(row, "response"),
        label=_choice(row, "label", LABELS),
        pair_id=_text(row, "pair_id", number=True),
        category=_text(row, "category"),
        language=_text(row, "language"),
        modality=_text(row, "modality"),
        condition=condition or "standard",
        source=_text(row, "source"),
        split=split or "find",
        slots=_slots(row),
    )


def short(value: object) -> str:
    """Return a value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


def _text(row: Row, name: str, *, number: bool = False) -> str | None:
    value = row.fields.get(name)
    if number and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is not None and not isinstance(value, str):
        raise row.bad(f'"{name}" is not text', given=short(value), expected="a string, or no such field")
    return value


def _choice(row: Row, name: str, words: tuple[_Word, ...]) -> _Word | None:
    value = row.fields.get(name)
    if value is None:
        return None
    for word in words:
        if value == word:
            return word
    expected = ", ".join(f'"{word}"' for word in words)
    raise row.bad(f'unknown "{name}"', given=short(value), expected=f"{expected}, or no such field")


def _slots(row: Row) -> dict[str, str]:
    value = row.fields.get("slots")
    slots: dict[str, str] = {}
    # Parquet's maps arrive as lists of pairs, its tables with null for what a row lacks
    pairs = value.items() if isinstance(value, Mapping) else value if isinstance(value, list) else [value]
    for pair in [] if value is None else pairs:
        match pair:
            case (str(), None):
                continue
            case (str(name), str(word)):
                slots[name] = word
            case _:
                expected = 'a table of words, like {"name": "cat", "colour": "red"}'
                raise row.bad('"slots" is not a table of words', given=short(value), expected=expected)
    return slots


def _messages(row: Row, pool: Pool) -> tuple[Turn, ...]:
    value = row.fields.get("messages")
    if value is None:
        fields = ", ".join(str(name) for name in row.fields) or "none"
        raise row.bad('no "messages"', given=f"the fields {fields}", expected=_MESSAGES)
    if not isinstance(value, list):
        raise row.bad('"messages" is not a list', given=short(value), expected=_MESSAGES)
    spare = _Spare(iter(_row_pictures(row, pool)), iter(_row_videos(row, pool)))
    turns = tuple(_turn(row, pool, message, spare) for message in value)
    if not any(not isinstance(part, Text) or part.text.strip() for turn in turns for part in turn.content):
        raise row.bad('empty "messages"', given=short(value), expected="some text or a picture")
    for kind, left, names in (("image", spare.pictures, ROW_PICTURES), ("video", spare.videos, ROW_VIDEOS)):
        count = sum(1 for _ in left)
        if count:
            raise row.bad(
                f"{'pictures' if kind == 'image' else 'videos'} of the row that no message shows",
                given=f"{count} in {next(name for name in names if row.fields.get(name) is not None)!r}",
                expected=f'a part {{"type": "{kind}"}} in the "content" where each belongs',
            )
    if turns[-1].role != "user":
        raise row.bad(
            "the last message is not the user's",
            given=f"role {turns[-1].role!r}",
            expected='the prompt in "messages", the answer to it in "response"',
        )
    return turns


@dataclass(frozen=True)
class _Spare:
    """What a row's columns hold for the parts that name nothing themselves."""

    pictures: Iterator[Picture]
    """In order."""
    videos: Iterator[Video]
    """In order."""


def _turn(row: Row, pool: Pool, message: object, spare: _Spare) -> Turn:
    if not isinstance(message, Mapping):
        raise row.bad("a message is not a table", given=short(message), expected=_MESSAGES)
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        expected = ", ".join(f'"{role}"' for role in ROLES)
        raise row.bad('unknown "role" of a message', given=short(role), expected=expected)
    if isinstance(content, str):
        return Turn(role, (Text(content),))
    if not isinstance(content, list) or not content:
        expected = "a string, or a list of texts, pictures and videos"
        raise row.bad('a message without "content"', given=short(message), expected=expected)
    return Turn(role, tuple(_part(row, pool, part, spare) for part in content))


def _part(row: Row, pool: Pool, part: object, spare: _Spare) -> Text | Picture | Video:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or kind not in {"text", "image", "video"}:
        raise row.bad("unknown part of a message", given=short(part), expected=f"{_TEXT}, {_IMAGE} or {_VIDEO}")
    if kind == "video":
        return _video_part(row, pool, part, spare)
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise row.bad('a text part without "text"', given=short(part), expected=_TEXT)
        return Text(part["text"])
    for name in ("image", "url"):
        if part.get(name) is not None:
            return _picture(row, pool, part[name])
    if part.get("path") is not None or part.get("bytes") is not None:
        return _picture(row, pool, part)
    picture = next(spare.pictures, None)
    if picture is None:
        raise row.bad("an image part without a picture", given=short(part), expected=_IMAGE)
    return picture


def _video_part(row: Row, pool: Pool, part: Mapping[str, Any], spare: _Spare) -> Video:
    fps = part.get("fps")
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < float("inf")):
        raise row.bad(
            'the "fps" of a video is no rate', given=short(fps), expected="a number above 0, or no such field"
        )
    value = next((part[name] for name in ("video", "path", "url", "bytes") if part.get(name) is not None), None)
    video = next(spare.videos, None) if value is None else _video(row, pool, value)
    if video is None:
        raise row.bad("a video part without a video", given=short(part), expected=_VIDEO)
    return Video(video.frames, None if fps is None else float(fps))


def _video(row: Row, pool: Pool, value: object) -> Video:
    if not isinstance(value, list) or not value:
        raise row.bad(
            "a video that is no list of frames",
            given="bytes" if isinstance(value, bytes) else short(value),
            expected=_VIDEO,
            do=f"write its frames as pictures first, e.g. ffmpeg -i clip.mp4 -vf fps=2 frames/%04d.png, or {SKIP_BAD}",
        )
    return Video(tuple(_picture(row, pool, frame) for frame in value))


def _row_videos(row: Row, pool: Pool) -> list[Video]:
    for name in ROW_VIDEOS:
        value = row.fields.get(name)
        if value is not None:
            many = isinstance(value, list) and bool(value) and all(isinstance(video, list) for video in value)
            return [_video(row, pool, video) for video in (value if many else [value])]
    return []


def _row_pictures(row: Row, pool: Pool) -> list[Picture]:
    for name in ROW_PICTURES:
        value = row.fields.get(name)
        if value is not None:
            return [_picture(row, pool, item) for item in (value if isinstance(value, list) else [value])]
    return []


def _picture(row: Row, pool: Pool, value: object) -> Picture:
    """Return the picture of a path, of bytes, or of the ``{bytes, path}`` in which datasets stores images."""
    if isinstance(value, Mapping):
        data = value.get("bytes")
        if isinstance(data, str):
            given = f"{len(data):,} characters"
            raise row.bad("a picture's bytes as text", given=given, expected="a path, or Parquet, which holds bytes")
        value = value.get("path") if data is None else data
    if isinstance(value, bytes):
        return pool.of(value)
    if not isinstance(value, str) or not value:
        raise row.bad("a picture that is no path", given=short(value), expected="a local path, like images/1.png")
    if _URL.match(value):
        raise row.bad(
            "a picture on the network",
            given=short(value),
            expected="a local file, which stays what it was",
            do=f"download it and give its path, or {SKIP_BAD}",
        )
    return pool.at(row.folder / value)
