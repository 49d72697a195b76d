"""``shield.json``: written with a hash of itself, read so that nothing in it is believed before it is checked."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from safeglasses.defend.adapters import CONFIG, TENSORS
from safeglasses.defend.home import Home
from safeglasses.defend.record import SEAL, seal_of
from safeglasses.defend.strict import read_object
from safeglasses.defend.table import NEURONS
from safeglasses.errors import PartialMatch, SafeglassesError
from safeglasses.files import write_json
from safeglasses.model.sites import Site
from safeglasses.tune.config import MODES, Mode
from safeglasses.tune.counting import Counts
from safeglasses.tune.slices import Slice

RECORD = "shield.json"
SCHEMA = 1
HASHED = (CONFIG, TENSORS, NEURONS)
_WIDEST = 2**24
_PATH = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
_RESTORE = "restore the folder, or tune again"


@dataclass(frozen=True)
class Layout:
    """How one 3-D parameter of fused experts lies."""

    __pydantic_config__: ClassVar = ConfigDict(strict=True, extra="forbid")
    n_experts: int
    """How many experts it holds."""
    transposed: bool
    """Whether it is kept ``[expert, in, out]``."""
    said: bool
    """Whether the module tells PEFT the order of its axes."""
    interleaved: bool
    """Whether rows of gate and up alternate."""


@dataclass(frozen=True)
class Stored:
    """``shield.json`` as it lies on disk."""

    __pydantic_config__: ClassVar = ConfigDict(strict=True, extra="forbid")
    schema: int
    """Version of this format."""
    mode: Mode
    """How it was tuned."""
    base: dict[str, Any]
    """Fingerprint and `Home` of the base model."""
    widths: dict[str, int]
    """Neurons of every site of the selection."""
    n_neurons: int
    """Rows of the table of neurons."""
    modules: dict[str, tuple[int, int]]
    """Rows and columns of every changed map, by path relative to the decoder."""
    rank: int
    """Rank that the adapter's tensors are padded to."""
    scale: float
    """What BA is multiplied by."""
    counts: dict[str, int | float]
    """How much it moves."""
    config: dict[str, Any]
    """Numbers of the training."""
    notes: dict[str, Any]
    """Anything else."""
    files: dict[str, str]
    """SHA-256 of the other files."""
    sha256: str
    """SHA-256 of the other entries."""
    experts: dict[str, Layout] = field(default_factory=dict)
    """How the changed 3-D parameters of fused experts lie, by path relative to the decoder; their modules are
    ``EXPERT.PARAMETER``."""


@dataclass(frozen=True)
class Record:
    """What ``shield.json`` says, checked."""

    stored: Stored
    """Its entries."""
    fingerprint: str
    """Fingerprint of the base model."""
    home: Home
    """The base model as files name it."""
    counts: Counts
    """How much it moves."""
    widths: Mapping[Site, int]
    """Neurons of every site of the selection."""

    def part(self, path: str) -> Slice | None:
        """Return which slice of a 3-D parameter a changed map is; None for linear maps."""
        expert, _, leaf = path.rpartition(".")
        home, _, number = expert.rpartition(".")
        layout = self.stored.experts.get(f"{home}.{leaf}")
        if layout is None or not number.isdecimal() or int(number) >= layout.n_experts:
            return None
        return Slice(f"{home}.{leaf}", int(number), **asdict(layout))


_STORED, _HOME = TypeAdapter(Stored), TypeAdapter(Home)


def write_record(folder: Path, entries: Mapping[str, Any]) -> None:
    """Write ``shield.json`` with its schema number and seal."""
    record = {"schema": SCHEMA, **entries}
    record[SEAL] = seal_of(record)
    write_json(folder / RECORD, record)


def is_shield(folder: str | Path) -> bool:
    """Whether a folder says that it holds a shield."""
    return (Path(folder) / RECORD).exists()


def read_record(folder: Path) -> Record:
    """Read ``shield.json`` and see that the files it speaks of are there.

    Raises:
        SafeglassesError: no such folder, no shield in it, written by a newer version, or an entry cannot be.
        PartialMatch: it was changed after saving.
    """
    wrote = "a folder that shield.save or tune(out=...) wrote"
    if not folder.is_dir():
        raise SafeglassesError("no such shield folder", given=str(folder), expected=wrote, do="check the path")
    path = folder / RECORD
    if not path.exists():
        adapter = (folder / CONFIG).exists()
        raise SafeglassesError(
            "this PEFT adapter is no shield" if adapter else "this folder holds no shield",
            given=f"{folder} without {RECORD}",
            expected=wrote,
            do="load it with peft" if adapter else "check the path",
        )
    raw = read_object(path)
    schema = raw.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise SafeglassesError(
            "this shield was written by a newer version of safeglasses",
            given=f"schema {schema} in {path}",
            expected=f"schema {SCHEMA}",
            do="pip install --upgrade safeglasses",
        )
    absent = [name for name in HASHED if not (folder / name).is_file()]
    if absent:
        raise SafeglassesError(
            "a file of this shield is missing", given=f"{folder} without {', '.join(absent)}", do=_RESTORE
        )
    try:
        stored = _STORED.validate_json(json.dumps(raw))
        entries = {name: value for name, value in stored.base.items() if name != "fingerprint"}
        home = _HOME.validate_json(json.dumps(entries), strict=True)
        counted = {f.name: stored.counts[f.name] for f in fields(Counts)}
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise damaged(path, f"{place[:80]}: {first['msg']}") from error
    except KeyError as error:
        raise damaged(path, f"counts without {error.args[0]}") from error
    if raw[SEAL] != seal_of(raw):
        raise PartialMatch(
            f"{RECORD} was changed after saving",
            given=str(path),
            expected=f"entries with the SHA-256 that {RECORD} has of itself",
            do=_RESTORE,
        )
    widths = _check(path, stored, home)
    counts = Counts(**{name: int(value) for name, value in counted.items()})
    return Record(stored, str(stored.base["fingerprint"]), home, counts, widths)


def _check(path: Path, stored: Stored, home: Home) -> dict[Site, int]:
    sizes = [*stored.widths.values(), *(size for shape in stored.modules.values() for size in shape)]
    good = {
        "schema": stored.schema == SCHEMA,
        "mode": stored.mode in MODES,
        "widths": bool(stored.widths),
        "modules": bool(stored.modules) and all(_PATH.fullmatch(name) for name in stored.modules),
        "experts": all(_PATH.fullmatch(name) and 2 <= one.n_experts <= _WIDEST for name, one in stored.experts.items()),
        "a size": all(1 <= size <= _WIDEST for size in sizes),
        "rank": 1 <= stored.rank <= max(sizes, default=0),
        "scale": stored.scale > 0,
        "n_neurons": 1 <= stored.n_neurons <= sum(stored.widths.values()),
        "base.fingerprint": bool(re.fullmatch(r"[\w.:+-]{1,200}", str(stored.base.get("fingerprint")))),
        "base.decoder_path": home.decoder_path == "" or bool(_PATH.fullmatch(home.decoder_path)),
        "files": stored.files.keys() == set(HASHED),
    }
    wrong = [name for name, fine in good.items() if not fine]
    if wrong:
        raise damaged(path, f"{wrong[0]} cannot be")
    try:
        return {Site.parse(text): width for text, width in stored.widths.items()}
    except SafeglassesError as error:
        raise damaged(path, f"{error.given[:200]} is {error.what}") from error


def damaged(path: Path, what: str) -> SafeglassesError:
    """Return the refusal of a file that cannot be."""
    return SafeglassesError(f"{path.name} is damaged", given=f"{path}: {what}", do=_RESTORE)
