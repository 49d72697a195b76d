"""Reading the user's data whole or not at all: every row checked, every picture decoded once."""

import difflib
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from safeglasses.data.pictures import Picture, Video
from safeglasses.data.records import Example, Examples
from safeglasses.data.rows import FIELDS, ROW_PICTURES, ROW_VIDEOS, SKIP, SKIP_BAD, Pool, example_from
from safeglasses.data.splits import assign_splits
from safeglasses.data.tables import rows_of
from safeglasses.errors import BadRow, SafeglassesError

logger = logging.getLogger(__name__)


def read_examples(path: str | Path, *, skip_bad: bool = False) -> Examples:
    """Read examples from JSONL, Parquet, or a folder (of these, or saved by ``datasets``).

    A row needs ``messages`` alone. Without ``split`` rows are split by the hash of what they share
    (`assign_splits`): the same rows in any order give the same splits.

    Args:
        path: the file or folder; picture paths are relative to where the rows are.
        skip_bad: leave bad rows out and note each in ``skipped`` instead of stopping at the first.

    Raises:
        BadRow: a row cannot be used: not JSON, a picture missing or damaged, an unknown label, a second id, …
        SafeglassesError: there is no such data, or no usable row in it.
    """
    path = Path(path)
    skipped: list[str] = []

    def drop(error: BadRow) -> None:
        if not skip_bad:
            raise error
        skipped.append(str(error))

    drafts: list[_Draft] = []
    pool, fields = Pool(), set[str]()
    for row in rows_of(path):
        try:
            if isinstance(row, BadRow):
                raise row
            fields |= row.fields.keys()
            drafts.append(_Draft(row.where, example_from(row, pool), row.fields.get("split") is not None))
        except BadRow as error:
            drop(error)
    damages = _damages([*pool.paths.values(), *pool.contents.values()])
    usable: dict[str, _Draft] = {}
    for draft in drafts:
        error = draft.fault(damages, usable)
        if error is None:
            usable[draft.example.id] = draft
        else:
            drop(error)
    if not usable:
        raise SafeglassesError(
            "no usable row", given=f"{path} ({len(skipped)} bad rows skipped)", expected="at least one row"
        )
    _report(fields, skipped)
    examples = [draft.example for draft in usable.values()]
    return Examples(tuple(assign_splits(examples, [draft.in_split for draft in usable.values()])), tuple(skipped))


@dataclass(frozen=True)
class _Draft:
    """A row that parsed, before its pictures and its id are compared with the others."""

    where: str
    """``FILE:ROW``."""
    example: Example
    """The row, in ``find`` when it names no split."""
    in_split: bool
    """Whether it names one."""

    def fault(self, damages: Mapping[int, BadRow], earlier: Mapping[str, "_Draft"]) -> BadRow | None:
        """Return what is wrong with the row's pictures or its id."""
        for picture in self.example.pictures:
            damage = damages.get(id(picture))
            if damage is not None:
                return BadRow(
                    f"{self.where}: {damage.what}", given=damage.given, expected=damage.expected, do=damage.do
                )
        for video in (part for part in self.example.media if isinstance(part, Video)):
            sizes = list(dict.fromkeys(frame.size for frame in video.frames))
            if len(sizes) > 1:
                return BadRow(
                    f"{self.where}: the frames of a video differ in size",
                    given=" and ".join(f"{width} × {height}" for width, height in sizes[:2]),
                    expected="one size for all frames of a video",
                    do=f"resize them to one size, give them as pictures, or {SKIP_BAD}",
                )
        first = earlier.get(self.example.id)
        if first is None:
            return None
        return BadRow(
            f"{self.where}: an id for the second time",
            given=f"{self.example.id!r}, first in {first.where}",
            expected="one id for each row, or none at all",
            do=SKIP,
        )


def _damages(pictures: list[Picture]) -> dict[int, BadRow]:
    """Decode every picture once and return what is wrong, by ``id(picture)``."""
    Image.init()  # registers the formats, which is not for several threads at a time
    with ThreadPoolExecutor() as workers:
        found = workers.map(_damage, pictures)
    return {id(picture): damage for picture, damage in zip(pictures, found, strict=True) if damage is not None}


def _damage(picture: Picture) -> BadRow | None:
    try:
        picture.open()
        _ = picture.key  # hashed here too: Pillow and hashlib both leave the interpreter to the other threads
    except BadRow as error:
        return error
    return None


def _report(fields: set[str], skipped: list[str]) -> None:
    for name in sorted(fields - {*FIELDS, *ROW_PICTURES, *ROW_VIDEOS}):
        near = difflib.get_close_matches(name, FIELDS, n=1)
        logger.warning("the field %r of the data is not used%s", name, f"; is {near[0]!r} meant?" if near else "")
    if skipped:
        logger.warning("%d bad row(s) skipped, the first: %s", len(skipped), skipped[0])
