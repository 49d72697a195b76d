"""The folder that glasses are shipped as: what PEFT loads, what people read, and what proves that both agree.

| file | what it is |
|---|---|
| ``adapter_config.json``, ``adapter_model.safetensors`` | an IA3 adapter: PEFT, transformers |
| ``neurons.parquet`` | every changed neuron with its factor and evidence: the source of truth |
| ``glasses.json`` | recipe, strength, base model and its fingerprint, counts, notes, hashes of the others |
| ``README.md`` | model card |
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safeglasses.defend.adapters import (
    CONFIG,
    TENSORS,
    check_names,
    move,
    one_side,
    verify_adapter,
    write_adapter,
)
from safeglasses.defend.card import glasses_card
from safeglasses.defend.factors import Factors, count, effective, in_order
from safeglasses.defend.home import Home
from safeglasses.defend.table import NEURONS, read_table, write_table
from safeglasses.errors import PartialMatch, SafeglassesError
from safeglasses.files import atomic_folder, atomic_write_text, read_json, sha256_file, write_json
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM

RECORD = "glasses.json"
SCHEMA = 1


@dataclass(frozen=True)
class Contents:
    """What a glasses folder holds."""

    factors: Factors
    """Factors at strength 1; every site has a changed neuron."""
    strength: float
    """Strength that the adapter's tensors have taken up."""
    columns: Mapping[str, Factors]
    """Evidence per neuron."""
    base_fingerprint: str
    """Fingerprint of the base model."""
    recipe: str
    """Name of the recipe."""
    notes: Mapping[str, Any]
    """JSON-ready."""
    home: Home
    """The base model as files name it."""


def write_folder(folder: Path, contents: Contents, vlm: VLM | None, *, overwrite: bool = False) -> Path:
    """Write all files, or none.

    Raises:
        SafeglassesError: the folder exists, a module has both sides, or PEFT would match other modules too.
    """
    home = contents.home
    adapter, moves = one_side(effective(contents.factors, contents.strength), vlm)
    if vlm is not None:
        check_names(vlm.model, adapter, home)
    sites = in_order(contents.factors)
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        write_adapter(temporary, adapter, home)
        n_neurons = write_table(temporary / NEURONS, contents.factors, contents.columns)
        record = {
            "schema": SCHEMA,
            "recipe": contents.recipe,
            "strength": contents.strength,
            "base": {"fingerprint": contents.base_fingerprint, **asdict(home)},
            "n_neurons": n_neurons,
            "widths": {str(site): len(contents.factors[site]) for site in sites},
            "moved": {str(old): str(new) for old, new in moves.items()},
            "notes": dict(contents.notes),
            "files": {name: sha256_file(temporary / name) for name in (CONFIG, TENSORS, NEURONS)},
        }
        write_json(temporary / RECORD, record)
        atomic_write_text(temporary / "README.md", glasses_card(record))
    return folder


def read_folder(folder: Path) -> Contents:
    """Read a folder and check that its files agree.

    Raises:
        SafeglassesError: no such folder, no glasses in it, written by a newer version, or a file is damaged.
        PartialMatch: the adapter is not what the table of neurons says.
    """
    record = _read_record(folder)
    try:
        widths = {Site.parse(text): int(width) for text, width in record["widths"].items()}
        moves = {Site.parse(old): Site.parse(new) for old, new in record["moved"].items()}
        home = Home.read(record["base"])
        fingerprint, recipe, strength = (
            record["base"]["fingerprint"],
            record["recipe"],
            float(record["strength"]),
        )
        notes, hashes, n_neurons = record["notes"], record["files"], record["n_neurons"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SafeglassesError(
            f"{RECORD} is damaged",
            given=f"{folder / RECORD}: {type(error).__name__} {error}",
            do="restore the folder, or make the glasses again",
        ) from error
    if sha256_file(folder / NEURONS) != hashes[NEURONS]:
        raise PartialMatch(
            "the table of neurons was changed after saving",
            given=str(folder / NEURONS),
            expected=f"a file with the SHA-256 in {RECORD}",
            do="restore the folder; for other factors make new glasses: Glasses(factors, ...)",
        )
    factors, columns = read_table(folder / NEURONS, widths)
    verify_adapter(folder, move(effective(factors, strength), moves), home)
    if count(factors) != n_neurons:
        raise PartialMatch(
            "the table of neurons has another length",
            given=f"{count(factors)} neurons",
            expected=f"{n_neurons} neurons",
        )
    return Contents(factors, strength, columns, fingerprint, recipe, notes, home)


def _read_record(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise SafeglassesError(
            "no such glasses folder",
            given=str(folder),
            expected="a folder that glasses.save or `safeglasses fit` wrote",
            do="check the path; to use one from the hub: hf download REPO --local-dir FOLDER",
        )
    if not (folder / RECORD).exists():
        adapter = (folder / CONFIG).exists()
        raise SafeglassesError(
            "this PEFT adapter holds no glasses" if adapter else "this folder holds no glasses",
            given=f"{folder} without {RECORD}",
            expected="a folder that glasses.save or `safeglasses fit` wrote",
            do="load it with peft" if adapter else "look for glasses/ inside a run folder",
        )
    record = read_json(folder / RECORD)
    schema = record.get("schema") if isinstance(record, dict) else None
    if not isinstance(schema, int) or schema < 1:
        raise SafeglassesError(
            f"{RECORD} has no schema number", given=f"{folder / RECORD}: {schema!r}", expected=f"{SCHEMA}"
        )
    if schema > SCHEMA:
        raise SafeglassesError(
            "these glasses were written by a newer version of safeglasses",
            given=f"schema {schema} in {folder / RECORD}",
            expected=f"schema {SCHEMA} or older",
            do="pip install --upgrade safeglasses",
        )
    missing = [name for name in (CONFIG, TENSORS, NEURONS) if not (folder / name).exists()]
    if missing:
        raise SafeglassesError(
            "a file of these glasses is missing",
            given=f"{folder} without {', '.join(missing)}",
            do="restore the folder, or make the glasses again",
        )
    return record
