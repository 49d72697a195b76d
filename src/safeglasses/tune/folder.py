"""The folder that shields are shipped as: what PEFT loads, what people read, and what proves that both agree.

| file | what it is |
|---|---|
| ``adapter_config.json``, ``adapter_model.safetensors`` | a LoRA of one rank for all maps: PEFT, vLLM |
| ``neurons.parquet`` | the neurons, and by how much their rows changed |
| ``shield.json`` | mode, base model and its fingerprint, counts, numbers of the training, hashes of the others |

Rows (and columns) that may not change are zeros in the adapter. They are looked at when it is read: a LoRA of other
rows is no shield.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from safeglasses.defend.adapters import TENSORS
from safeglasses.defend.factors import in_order
from safeglasses.defend.home import Home
from safeglasses.defend.table import NEURONS, read_neurons, write_neurons
from safeglasses.errors import SafeglassesError
from safeglasses.files import atomic_folder, sha256_file
from safeglasses.find.selection import Selection
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM
from safeglasses.tune.adapter import check_unambiguous, fused_in, read_changes, tampered, write_adapter
from safeglasses.tune.change import Change, makers
from safeglasses.tune.config import Mode
from safeglasses.tune.counting import Counts
from safeglasses.tune.record import HASHED, RECORD, Layout, read_record, write_record

_CHANGE = "change"


@dataclass(frozen=True)
class Contents:
    """What a shield folder holds."""

    mode: Mode
    """How it was tuned."""
    changes: Mapping[str, Change]
    """What changed, by module relative to the decoder."""
    neurons: Selection
    """The selection."""
    base_fingerprint: str
    """Fingerprint of the base model."""
    counts: Counts
    """How much it moves."""
    config: Mapping[str, Any]
    """Numbers of the training."""
    notes: Mapping[str, Any]
    """JSON-ready."""
    home: Home
    """The base model as files name it."""


def write_folder(folder: Path, contents: Contents, vlm: VLM | None, *, overwrite: bool = False) -> Path:
    """Write all files, or none; same contents, same bytes.

    Raises:
        SafeglassesError: the folder exists, or PEFT would match other modules too.
    """
    home, changes = contents.home, contents.changes
    check_unambiguous(None if vlm is None else vlm.model, changes, home)
    rank = max(len(change.a) for change in changes.values())
    scale = next(iter(changes.values())).scale
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        write_adapter(temporary, changes, rank, scale, home)
        masks = contents.neurons.masks
        n_neurons = write_neurons(temporary / NEURONS, masks, {_CHANGE: moved(contents.neurons, changes)})
        write_record(
            temporary,
            {
                "mode": contents.mode,
                "base": {"fingerprint": contents.base_fingerprint, **asdict(home)},
                "widths": {str(site): len(masks[site]) for site in in_order(masks)},
                "n_neurons": n_neurons,
                "modules": {path: [change.out, change.into] for path, change in changes.items()},
                **_layouts(changes),
                "rank": rank,
                "scale": scale,
                "counts": contents.counts.record(),
                "config": dict(contents.config),
                "notes": dict(contents.notes),
                "files": {name: sha256_file(temporary / name) for name in HASHED},
            },
        )
    return folder


def moved(neurons: Selection, changes: Mapping[str, Change]) -> dict[Site, Float[Tensor, " _neuron"]]:
    """Return by how much the rows that make each neuron changed: the norm over all maps that make it."""
    found, made_by = {}, makers(changes, neurons.masks)
    for site, mask in neurons.masks.items():
        squares = torch.zeros(len(mask), dtype=torch.float64)
        for change in (change for change in made_by[site].values() if change.out in (len(mask), 2 * len(mask))):
            a = change.a.double() * change.scale
            rows = a if change.b is None else change.b.double()
            norms = (rows * rows if change.b is None else rows @ (a @ a.T) * rows).sum(dim=1)
            index = torch.arange(change.out) if change.rows is None else change.rows
            neuron = index % len(mask) if change.part is None else change.part.neuron(index, len(mask))[1]
            squares.index_add_(0, neuron, norms)  # gate and up may be one map
        found[site] = squares.clamp(min=0).sqrt().float()
    return found


def read_folder(folder: Path) -> Contents:
    """Read a folder and check that its files agree.

    Raises:
        SafeglassesError: no such folder, no shield in it, written by a newer version, or a file is damaged.
        PartialMatch: the adapter is not what the record and the table of neurons say.
    """
    record = read_record(folder)
    stored = record.stored
    try:
        for name, what in ((NEURONS, "the table of neurons"), (TENSORS, "the adapter")):
            if sha256_file(folder / name) != stored.files[name]:
                raise tampered(f"{what} was changed after saving", folder / name, f"the SHA-256 in {RECORD}")
        masks, _ = read_neurons(folder / NEURONS, record.widths, n_rows=stored.n_neurons, first=_CHANGE)
        changes = read_changes(folder, record, masks)
    except OSError as error:
        raise SafeglassesError("could not read a shield", given=f"{folder} ({error.strerror or error})") from error
    return Contents(
        mode=stored.mode,
        changes=changes,
        neurons=Selection({site: masks[site] for site in in_order(masks)}),
        base_fingerprint=record.fingerprint,
        counts=record.counts,
        config=stored.config,
        notes=stored.notes,
        home=record.home,
    )


def _layouts(changes: Mapping[str, Change]) -> dict[str, dict[str, Any]]:
    """Return how the parameters of fused experts lie, as the record has it; no entry where there are none."""
    names = [entry.name for entry in fields(Layout)]
    parts = {path: next(iter(some.values())).part for path, some in fused_in(changes).items()}
    return {"experts": {p: {name: getattr(part, name) for name in names} for p, part in parts.items()}} if parts else {}
