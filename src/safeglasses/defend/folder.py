"""The folder that glasses are shipped as: what PEFT loads, what people read, and what proves that both agree.

| file | what it is |
|---|---|
| ``adapter_config.json``, ``adapter_model.safetensors`` | an IA3 adapter: PEFT, transformers |
| or ``glasses.safetensors`` | our own file, where fused experts are scaled, which IA3 has no place for (`vectors`) |
| ``neurons.parquet`` | every changed neuron with its factor and evidence: the source of truth |
| ``glasses.json`` | recipe, strength, base model and its fingerprint, counts, notes, hashes of the others |
| ``results.json`` | what a run measured, once it has (`add_results`) |
| ``README.md`` | model card |
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safeglasses.defend.adapters import (
    CONFIG,
    check_layout,
    check_names,
    check_values,
    move,
    one_side,
    write_adapter,
)
from safeglasses.defend.card import glasses_card
from safeglasses.defend.factors import Factors, count, effective, in_order
from safeglasses.defend.home import Home
from safeglasses.defend.record import HASHED, RECORD, Form, Record, check_seal, read_record, write_record
from safeglasses.defend.results import RESULTS, Results, read_results, results_of, write_results
from safeglasses.defend.table import NEURONS, read_table, write_table
from safeglasses.defend.vectors import check_factors_of, check_vectors, write_vectors
from safeglasses.errors import PartialMatch, SafeglassesError
from safeglasses.files import atomic_folder, atomic_write_text, sha256_file
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM


@dataclass(frozen=True)
class Contents:
    """What a glasses folder holds."""

    factors: Factors
    """Factors at strength 1; every site has a changed neuron."""
    strength: float | int
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
    moves: Mapping[Site, Site]
    """Input sites that may stand on an output, as proved on the base model."""


def form_of(factors: Factors) -> Form:
    """Say what a folder with these factors holds: IA3 has no place for fused experts."""
    return "factors" if any(site.fused for site in factors) else "ia3"


def write_folder(folder: Path, contents: Contents, vlm: VLM | None, *, overwrite: bool = False) -> Path:
    """Write all files, or none: an adapter of PEFT, or, where fused experts are scaled, our own file.

    Raises:
        SafeglassesError: the folder exists, a module has both sides, or PEFT would match other modules too.
    """
    home, acting = contents.home, effective(contents.factors, contents.strength)
    form = form_of(contents.factors)
    moves: Mapping[Site, Site] = {}
    if form == "ia3":
        acting, moves = one_side(acting, vlm, contents.moves)
        check_names(vlm.model if vlm is not None else None, acting, home)
    sites = in_order(contents.factors)
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        if form == "ia3":
            write_adapter(temporary, acting, home)
        else:
            write_vectors(temporary, acting, home, contents.base_fingerprint)
        n_neurons = write_table(temporary / NEURONS, contents.factors, contents.columns)
        entries = {
            "recipe": contents.recipe,
            "strength": contents.strength,
            "base": {"fingerprint": contents.base_fingerprint, **asdict(home)},
            "n_neurons": n_neurons,
            "widths": {str(site): len(contents.factors[site]) for site in sites},
            "moved": {str(old): str(new) for old, new in moves.items()},
            "notes": dict(contents.notes),
            "files": {name: sha256_file(temporary / name) for name in HASHED[form]},
        }
        record = write_record(temporary, entries, form)
        atomic_write_text(temporary / "README.md", glasses_card(record))
    return folder


def read_folder(folder: Path) -> Contents:
    """Read a folder and check that its files agree.

    Widths are compared with the sizes that the adapter has on disk before memory is taken for them.

    Raises:
        SafeglassesError: no such folder, no glasses in it, written by a newer version, or a file is damaged.
        PartialMatch: the adapter is not what the table of neurons says.
    """
    record = read_record(folder)
    try:
        if record.form == "ia3":
            check_layout(folder, _moved_widths(record), record.home)
        else:
            check_vectors(folder, record.widths, record.home, record.fingerprint)
        _check_hash(folder, record, NEURONS, "the table of neurons")
        factors, columns = read_table(folder / NEURONS, record.widths, n_rows=record.n_neurons)
        acting = effective(factors, record.strength)
        if record.form == "ia3":
            check_values(folder, move(acting, record.moves), record.home)
        else:
            check_factors_of(folder, acting)
        if count(factors) != record.n_neurons:
            raise PartialMatch(
                "the table of neurons has another length",
                given=f"{count(factors)} neurons",
                expected=f"{record.n_neurons} neurons",
            )
        for name in HASHED[record.form]:
            if name not in (CONFIG, NEURONS):  # what PEFT may have edited in the config is compared entry by entry
                _check_hash(folder, record, name, "the adapter")
        check_seal(folder, record)
    except OSError as error:
        raise SafeglassesError("could not read glasses", given=f"{folder} ({error.strerror or error})") from error
    return Contents(
        factors=factors,
        strength=record.strength,
        columns=columns,
        base_fingerprint=record.fingerprint,
        recipe=record.recipe,
        notes=record.notes,
        home=record.home,
        moves=record.moves,
    )


def add_results(folder: str | Path, summary: Mapping[str, Any], *, judge: str | None = None) -> Results:
    """Put what a run measured beside the glasses, and into their card.

    Args:
        folder: of the glasses that were measured, as they are on disk.
        summary: what the run's ``summary.json`` holds.
        judge: name of the judge.

    Raises:
        PartialMatch: the summary is of other glasses.
        SafeglassesError: no glasses, or no summary.
    """
    folder = Path(folder)
    record = read_record(folder)
    results = results_of(summary, glasses=sha256_file(folder / RECORD), strength=record.strength, judge=judge)
    said = {name: summary.get(name) for name in ("base_fingerprint", "recipe")}
    known = {"base_fingerprint": record.fingerprint, "recipe": record.recipe}
    hashes = {f"glasses/{name}": text for name, text in record.files.items()}
    said |= {name: text for name, text in summary["hashes"].items() if name in hashes}
    known |= {name: text for name, text in hashes.items() if name in said}
    if said != known:
        name = next(name for name in known if said[name] != known[name])
        raise PartialMatch(
            "these results are of other glasses", given=f"{name} {said[name]}", expected=f"{known[name]}"
        )
    write_results(folder, results)
    atomic_write_text(folder / "README.md", glasses_card(record.raw, results))
    return results


def results_in(folder: str | Path, strength: float | int | None = None) -> Results | None:
    """Return the results beside glasses; None if there are none, or if they are of another strength.

    Args:
        folder: of the glasses.
        strength: what the glasses are worn at; None: as they were saved.

    Raises:
        PartialMatch: the results are of other glasses.
        SafeglassesError: they cannot be read.
    """
    path = Path(folder) / RESULTS
    if not path.exists():
        return None
    results = read_results(path)
    if results.glasses != sha256_file(Path(folder) / RECORD):
        raise PartialMatch(
            "these results are of other glasses",
            given=f"{path} for a {RECORD} with SHA-256 {results.glasses}",
            expected=f"the {RECORD} beside it",
            do=f"remove {RESULTS}, or measure the glasses again",
        )
    return results if strength is None or results.strength == strength else None


def _moved_widths(record: Record) -> dict[Site, int]:
    moved = {site: width for site, width in record.widths.items() if site not in record.moves}
    return moved | {new: record.widths[old] for old, new in record.moves.items()}


def _check_hash(folder: Path, record: Record, name: str, what: str) -> None:
    if sha256_file(folder / name) != record.files[name]:
        raise PartialMatch(
            f"{what} was changed after saving",
            given=str(folder / name),
            expected=f"a file with the SHA-256 in {RECORD}",
            do="restore the folder; for other factors make new glasses: Glasses(factors, ...)",
        )
