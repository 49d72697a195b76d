"""``glasses.json``: written with a hash of itself, read so that nothing in it is believed before it is checked.

A file that came over a network may be damaged or made up. So every entry has one type and a plausible size, no
entry is unknown or there twice, and the last one is the SHA-256 of all others: an edit by hand is noticed even
where no other file would contradict it.
"""

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from safeglasses.defend.adapters import CONFIG, TENSORS
from safeglasses.defend.home import Home
from safeglasses.defend.strict import read_object
from safeglasses.defend.table import NEURONS
from safeglasses.defend.vectors import VECTORS
from safeglasses.errors import PartialMatch, SafeglassesError
from safeglasses.files import write_json
from safeglasses.model.sites import Site

RECORD = "glasses.json"
_SHIELD = "shield.json"  # what `tune.record` writes
SCHEMA = 3  # 1 had no hash of itself; 3 says its form, and is written for `factors` alone: older versions read the rest
Form = Literal["ia3", "factors"]
"""``ia3``: an adapter of PEFT; ``factors``: a file of our own, where IA3 has no place for what the glasses scale."""
HASHED: Mapping[Form, tuple[str, ...]] = {"ia3": (CONFIG, TENSORS, NEURONS), "factors": (VECTORS, NEURONS)}
"""The files beside the record, by form."""
LOADS_IN: Mapping[Form, tuple[str, ...]] = {"ia3": ("safeglasses", "peft", "transformers"), "factors": ("safeglasses",)}
"""What loads a folder as it is; everything else takes folded checkpoints."""
SEAL = "sha256"
_WIDEST = 2**24  # a hundred times the widest map of any model so far; wider is a typo or a trap
_MODULE = re.compile(r"([A-Za-z_]\w*(\.\w+)*)?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RESTORE = "restore the folder, or make the glasses again"


@dataclass(frozen=True)
class Stored:
    """``glasses.json`` as it lies on disk."""

    __pydantic_config__: ClassVar = ConfigDict(strict=True, extra="forbid")
    schema: int
    """Version of this format."""
    recipe: str
    """Name of the recipe."""
    strength: float
    """Strength that the adapter's tensors have taken up."""
    base: dict[str, Any]
    """Fingerprint and `Home` of the base model."""
    n_neurons: int
    """Rows of the table of neurons."""
    widths: dict[str, int]
    """Neurons of every site."""
    moved: dict[str, str]
    """Input sites whose factors the adapter has on an output."""
    notes: dict[str, Any]
    """Anything else."""
    files: dict[str, str]
    """SHA-256 of the other files."""
    sha256: str | None = None
    """SHA-256 of the other entries; missing in schema 1."""
    form: str | None = None
    """`Form`; from schema 3 on, before it was always ``ia3``."""
    loads_in: list[str] | None = None
    """What loads the folder; from schema 3 on."""


_STORED, _HOME = TypeAdapter(Stored), TypeAdapter(Home)


@dataclass(frozen=True)
class Record:
    """What ``glasses.json`` says, checked."""

    form: Form
    """What lies beside it."""
    recipe: str
    """Name of the recipe."""
    strength: float
    """Strength that the adapter's tensors have taken up."""
    fingerprint: str
    """Fingerprint of the base model."""
    home: Home
    """The base model as files name it."""
    n_neurons: int
    """Rows of the table of neurons."""
    widths: Mapping[Site, int]
    """Neurons of every site."""
    moves: Mapping[Site, Site]
    """Input sites whose factors the adapter has on an output."""
    notes: Mapping[str, Any]
    """Anything else."""
    files: Mapping[str, str]
    """SHA-256 of the other files."""
    raw: Mapping[str, Any]
    """The file's entries as they are, for cards."""


def write_record(folder: Path, entries: Mapping[str, Any], form: Form) -> dict[str, Any]:
    """Write ``glasses.json`` with its schema number and seal; return what was written."""
    said = {} if form == "ia3" else {"form": form, "loads_in": list(LOADS_IN[form])}
    record = {"schema": SCHEMA if said else 2, **said, **entries}
    record[SEAL] = seal_of(record)
    write_json(folder / RECORD, record)
    return record


def seal_of(record: Mapping[str, Any]) -> str:
    """Hash all entries but the seal: SHA-256 of JSON with sorted keys and no spaces."""
    body = {name: value for name, value in record.items() if name != SEAL}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def check_seal(folder: Path, record: Record) -> None:
    """Refuse a record that was edited; checked last, so that a contradiction gets a text of its own.

    Raises:
        PartialMatch: the hash inside is not that of the other entries.
    """
    if record.raw.get(SEAL) is not None and record.raw[SEAL] != seal_of(record.raw):
        raise PartialMatch(
            f"{RECORD} was changed after saving",
            given=str(folder / RECORD),
            expected=f"entries with the SHA-256 that {RECORD} has of itself",
            do=f"{_RESTORE}; in Python, dataclasses.replace(glasses, notes=...).save(NEW) writes other notes",
        )


def read_record(folder: Path) -> Record:
    """Read ``glasses.json`` and see that the files it speaks of are there.

    Raises:
        SafeglassesError: no such folder, no glasses in it, written by a newer version, or an entry cannot be.
    """
    _refuse_other_folders(folder)
    path = folder / RECORD
    raw = read_object(path)
    _check_schema(path, raw.get("schema"))
    form = _form(path, raw)
    absent = [name for name in HASHED[form] if not (folder / name).is_file()]
    if absent:
        raise SafeglassesError(
            "a file of these glasses is missing", given=f"{folder} without {', '.join(absent)}", do=_RESTORE
        )
    try:
        stored = _STORED.validate_json(json.dumps(raw))  # from Python it would want instances
        home = _home(stored.base)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise _damaged(path, f"{place[:80]}: {first['msg']}") from error
    _check_numbers(path, stored)
    _check_texts(path, stored, home, form)
    try:
        widths = {Site.parse(text): width for text, width in stored.widths.items()}
        moves = {Site.parse(old): Site.parse(new) for old, new in stored.moved.items()}
    except SafeglassesError as error:
        raise _damaged(path, f"{error.given[:200]} is {error.what}") from error
    _check_moves(path, widths, moves)
    return Record(
        form=form,
        recipe=stored.recipe,
        strength=stored.strength,
        fingerprint=stored.base["fingerprint"],
        home=home,
        n_neurons=stored.n_neurons,
        widths=widths,
        moves=moves,
        notes=stored.notes,
        files=stored.files,
        raw=raw,
    )


def _refuse_other_folders(folder: Path) -> None:
    wrote = "a folder that glasses.save or `safeglasses fit` wrote"
    if not folder.is_dir():
        raise SafeglassesError(
            "no such glasses folder",
            given=str(folder),
            expected=wrote,
            do="check the path; to use one from the hub: hf download REPO --local-dir FOLDER",
        )
    if (folder / _SHIELD).exists() and not (folder / RECORD).exists():
        raise SafeglassesError(
            "this folder holds a shield, not glasses",
            given=str(folder),
            expected=wrote,
            do="load it with peft as it is; `safeglasses fold MODEL --shield DIR` puts it into the weights, for every "
            "other runtime",
        )
    if not (folder / RECORD).exists():
        adapter = (folder / CONFIG).exists()
        raise SafeglassesError(
            "this PEFT adapter holds no glasses" if adapter else "this folder holds no glasses",
            given=f"{folder} without {RECORD}",
            expected=wrote,
            do="load it with peft" if adapter else "look for glasses/ inside a run folder",
        )


def _check_schema(path: Path, schema: object) -> None:
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise SafeglassesError(
            f"{RECORD} has no schema number", given=f"{path}: {str(schema)[:80]!r}", expected=f"1 to {SCHEMA}"
        )
    if schema > SCHEMA:
        raise SafeglassesError(
            "these glasses were written by a newer version of safeglasses",
            given=f"schema {schema} in {path}",
            expected=f"schema {SCHEMA} or older",
            do="pip install --upgrade safeglasses",
        )


def _form(path: Path, raw: Mapping[str, Any]) -> Form:
    """Read what lies beside the record; refuse a second kind, which PEFT would load instead of all."""
    known: dict[str, Form] = {"ia3": "ia3", "factors": "factors"}
    form = known.get(str(raw.get("form", "ia3")))
    said = None if form is None or form == "ia3" else list(LOADS_IN[form])
    if form is None or (raw["schema"] < 3) != (form == "ia3") or raw.get("loads_in") != said:
        raise _damaged(path, f"form {str(raw.get('form'))[:80]!r} in schema {raw['schema']}")
    if form == "factors" and (path.parent / CONFIG).exists():
        raise PartialMatch(
            "an adapter lies beside glasses that IA3 cannot carry: PEFT would wear a part of them",
            given=str(path.parent / CONFIG),
            expected=f"{', '.join(HASHED[form])}",
            do=f"remove {CONFIG}, or make the glasses again",
        )
    return form


def _home(base: Mapping[str, Any]) -> Home:
    entries = {name: value for name, value in base.items() if name != "fingerprint"}
    return _HOME.validate_json(json.dumps(entries), strict=True)


def _check_numbers(path: Path, stored: Stored) -> None:
    if not (0 <= stored.strength <= sys.float_info.max):
        raise _damaged(path, f"strength {stored.strength!s:.40}")
    for site, width in stored.widths.items():
        if not 1 <= width <= _WIDEST:
            raise _damaged(path, f"a width of {width} at {site[:80]}")
    if not 1 <= stored.n_neurons <= sum(stored.widths.values()):
        raise _damaged(path, f"{stored.n_neurons} of {sum(stored.widths.values())} neurons")


def _check_texts(path: Path, stored: Stored, home: Home, form: Form) -> None:
    unknown = stored.base.keys() - {"fingerprint", *(entry.name for entry in fields(Home))}
    if unknown:
        raise _damaged(path, f"base has an unknown entry {min(unknown)[:80]!r}")
    fingerprint = stored.base.get("fingerprint")
    if not isinstance(fingerprint, str) or not re.fullmatch(r"[\w.:+-]{1,200}", fingerprint):
        raise _damaged(path, f"base.fingerprint {str(fingerprint)[:80]!r}")
    if not _MODULE.fullmatch(home.decoder_path):
        raise _damaged(path, f"base.decoder_path {home.decoder_path[:80]!r}")
    names = HASHED[form]
    if stored.files.keys() != set(names) or not all(_SHA256.fullmatch(text) for text in stored.files.values()):
        raise _damaged(path, f"files must have the SHA-256 of {', '.join(names)}")
    if (stored.sha256 is None) != (stored.schema == 1):
        raise _damaged(path, f"schema {stored.schema} {'without' if stored.sha256 is None else 'with'} {SEAL}")


def _check_moves(path: Path, widths: Mapping[Site, int], moves: Mapping[Site, Site]) -> None:
    for old, new in moves.items():
        good = old.side == "in" and new.side == "out" and old in widths and widths[old] == widths.get(new, widths[old])
        if not good:
            raise _damaged(path, f"moved {old} to {new}")


def _damaged(path: Path, what: str) -> SafeglassesError:
    return SafeglassesError(f"{RECORD} is damaged", given=f"{path}: {what}", do=_RESTORE)
