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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from safeglasses.defend.adapters import CONFIG, TENSORS, check_names
from safeglasses.defend.factors import in_order
from safeglasses.defend.home import Home
from safeglasses.defend.strict import read_object
from safeglasses.defend.table import NEURONS, read_neurons, write_neurons
from safeglasses.errors import PartialMatch, SafeglassesError
from safeglasses.files import atomic_folder, atomic_write_bytes, sha256_file, write_json
from safeglasses.find.selection import Selection
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM
from safeglasses.tune.change import Change
from safeglasses.tune.config import Mode
from safeglasses.tune.counting import Counts
from safeglasses.tune.record import HASHED, RECORD, Record, damaged, read_record, write_record
from safeglasses.tune.targets import rows_of

_PREFIX = "base_model.model."
_MAY_MOVE = ("base_model_name_or_path", "revision")
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
    places = {Site(path, "out"): torch.ones(1) for path in changes}
    check_names(vlm.model if vlm is not None else None, places, home)
    rank = max(len(change.a) for change in changes.values())
    scale = next(iter(changes.values())).scale
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        write_json(temporary / CONFIG, _config(list(changes), rank, scale, home))
        atomic_write_bytes(temporary / TENSORS, save(_tensors(changes, rank, home), metadata={"format": "pt"}))
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
    found = {}
    for site, mask in neurons.masks.items():
        block = site.path.rpartition(".")[0] + "."
        squares = torch.zeros(len(mask), dtype=torch.float64)
        for path, change in changes.items():
            if path.startswith(block) and path != site.path and change.out in (len(mask), 2 * len(mask)):
                a = change.a.double() * change.scale
                rows = a if change.b is None else change.b.double()
                norms = (rows * rows if change.b is None else rows @ (a @ a.T) * rows).sum(dim=1)
                index = torch.arange(change.out) if change.rows is None else change.rows
                squares.index_add_(0, index % len(mask), norms)  # gate and up may be one map
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
                raise _tampered(f"{what} was changed after saving", folder / name, f"the SHA-256 in {RECORD}")
        _check_config(folder, record)
        masks, _ = read_neurons(folder / NEURONS, record.widths, n_rows=stored.n_neurons, first=_CHANGE)
        changes = {
            path: _read_change(folder, record, masks, path, shape[0], shape[1])
            for path, shape in stored.modules.items()
        }
        _check_keys(folder, record)
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


def _tensors(changes: Mapping[str, Change], rank: int, home: Home) -> dict[str, Tensor]:
    found = {}
    for path, change in changes.items():
        a, b = change.full()
        more = rank - len(a)
        key = f"{_PREFIX}{home.absolute(path)}"
        found[f"{key}.lora_A.weight"] = nn.functional.pad(a, (0, 0, 0, more)).contiguous()
        found[f"{key}.lora_B.weight"] = nn.functional.pad(b, (0, more)).contiguous()
    return dict(sorted(found.items()))


def _config(paths: list[str], rank: int, scale: float, home: Home) -> dict[str, Any]:
    alpha = scale * rank
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": home.source,
        "revision": home.revision,
        "target_modules": [home.absolute(path) for path in paths],
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": home.conv1d,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "exclude_modules": None,
        "auto_mapping": None,
    }


def _check_config(folder: Path, record: Record) -> None:
    stored = record.stored
    given = read_object(folder / CONFIG)
    wanted = _config(list(stored.modules), stored.rank, stored.scale, record.home)
    for name in sorted(given.keys() | wanted.keys()):
        if name in _MAY_MOVE and isinstance(given.get(name), str | None):
            continue
        if name not in given or name not in wanted or given[name] != wanted[name]:
            raise _tampered(
                "the adapter is not what the record says", folder / CONFIG, f"{name[:80]} as it was written"
            )


def _read_change(folder: Path, record: Record, masks: Mapping[Site, Tensor], path: str, out: int, into: int) -> Change:
    stored = record.stored
    site = next((s for s in masks if path == s.path or path.startswith(s.path.rpartition(".")[0] + ".")), None)
    if site is None:
        raise damaged(folder / RECORD, f"{path} is in no layer with a selected neuron")
    chosen = masks[site]
    reads = path == site.path
    if (into if reads else out) not in ((len(chosen),) if reads else (len(chosen), 2 * len(chosen))):
        raise damaged(folder / RECORD, f"{path} of {out} × {into} for {len(chosen)} neurons")
    inside = {"plain": None, "freeze": (~chosen).nonzero().flatten()}.get(stored.mode, chosen.nonzero().flatten())
    rows = None if inside is None or reads else rows_of(inside, len(chosen), out)
    columns = inside if reads else None
    key = f"{_PREFIX}{record.home.absolute(path)}"
    try:
        with safe_open(folder / TENSORS, framework="pt") as tensors:
            a, b = tensors.get_tensor(f"{key}.lora_A.weight"), tensors.get_tensor(f"{key}.lora_B.weight")
    except (SafetensorError, ValueError) as error:
        raise _tampered("the adapter lacks a tensor", folder / TENSORS, str(error)[:200]) from error
    shapes = (tuple(a.shape), tuple(b.shape))
    if shapes != ((stored.rank, into), (out, stored.rank)) or a.dtype != b.dtype:
        raise _tampered("a tensor of the adapter has another shape", folder / TENSORS, f"{key}: {shapes}")
    full = Change(out, into, a, b, None, None, stored.scale)
    found = _confined(full, rows, columns, one_hot=stored.mode == "rows")
    again = found.full()
    if any(bool(x[len(y) :].any()) for x, y in ((a, again[0]), (b.T, again[1].T))) or not (
        torch.equal(a[: len(again[0])], again[0]) and torch.equal(b[:, : again[1].shape[1]], again[1])
    ):
        raise _tampered("the adapter changes what is not selected", folder / TENSORS, f"zeros outside, in {key}")
    return found


def _confined(full: Change, rows: Tensor | None, columns: Tensor | None, *, one_hot: bool) -> Change:
    a = full.a if columns is None else full.a[:, columns]
    if one_hot and rows is not None:
        return Change(full.out, full.into, a[: len(rows)].clone(), None, rows, columns, full.scale)
    if full.b is None:
        raise TypeError("B is there")
    b = full.b if rows is None else full.b[rows]
    return Change(full.out, full.into, a.clone(), b.clone(), rows, columns, full.scale)


def _check_keys(folder: Path, record: Record) -> None:
    with safe_open(folder / TENSORS, framework="pt") as tensors:
        found = set(tensors.keys())
    names = [f"{_PREFIX}{record.home.absolute(path)}" for path in record.stored.modules]
    wanted = {f"{name}.{part}.weight" for name in names for part in ("lora_A", "lora_B")}
    if found != wanted:
        raise _tampered("the adapter has other tensors", folder / TENSORS, f"{len(wanted)} tensors, not {len(found)}")


def _tampered(what: str, path: Path, expected: str) -> PartialMatch:
    return PartialMatch(what, given=str(path), expected=expected, do="restore the folder, or tune again")
