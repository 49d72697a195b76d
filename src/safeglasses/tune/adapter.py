"""A shield's changes as the LoRA adapter that PEFT loads: written padded, and read back only if nothing else is in it.

Linear maps are ``target_modules``, each with an A and a B of its own; fused experts are ``target_parameters``, with one
pair of tensors for all experts of a 3-D parameter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from safeglasses.defend.adapters import CONFIG, TENSORS, check_names, lora_config
from safeglasses.defend.home import Home
from safeglasses.defend.strict import read_object
from safeglasses.errors import PartialMatch, SafeglassesError
from safeglasses.files import atomic_write_bytes, write_json
from safeglasses.model.sites import Site
from safeglasses.tune.change import Change
from safeglasses.tune.record import RECORD, Record, damaged
from safeglasses.tune.slices import Pair, Slice, keys_of, packed, unpacked
from safeglasses.tune.targets import rows_of

_PREFIX = "base_model.model."
_MAY_MOVE = ("base_model_name_or_path", "revision")


def check_unambiguous(model: nn.Module | None, changes: Mapping[str, Change], home: Home) -> None:
    """Refuse names that PEFT would match on other modules or parameters as well: it compares the ends of paths.

    Raises:
        SafeglassesError: naming one.
    """
    check_names(model, {Site(path, "out"): torch.ones(1) for path, c in changes.items() if c.part is None}, home)
    names = [home.absolute(path) for path in fused_in(changes)]
    for name, _ in model.named_parameters() if model is not None else ():
        wrong = next((target for target in names if name.endswith("." + target)), None)
        if wrong is not None:
            raise SafeglassesError(
                "PEFT would apply this shield to another parameter as well",
                given=f"{name} ends with {wrong}",
                expected="paths of parameters that are unambiguous in this model",
                do="fold the shield instead: safeglasses fold",
            )


def write_adapter(folder: Path, changes: Mapping[str, Change], rank: int, scale: float, home: Home) -> None:
    """Write config and tensors.

    Args:
        folder: where.
        changes: what changed, by path relative to the decoder.
        rank: that all of them are padded to.
        scale: what BA is multiplied by, the same for all.
        home: the base model as files name it.
    """
    linear = [path for path, change in changes.items() if change.part is None]
    write_json(folder / CONFIG, _config(linear, list(fused_in(changes)), rank, scale, home))
    atomic_write_bytes(folder / TENSORS, save(_tensors(changes, rank, home), metadata={"format": "pt"}))


def fused_in(changes: Mapping[str, Change]) -> dict[str, dict[int, Change]]:
    """Return the changes of fused experts by parameter and number."""
    found: dict[str, dict[int, Change]] = {}
    for change in changes.values():
        if change.part is not None:
            found.setdefault(change.part.parameter, {})[change.part.number] = change
    return found


def read_changes(folder: Path, record: Record, masks: Mapping[Site, Tensor]) -> dict[str, Change]:
    """Read the changes of an adapter that does what the record and the table of neurons say, and nothing else.

    Args:
        folder: of the shield.
        record: what ``shield.json`` says.
        masks: the neurons.

    Raises:
        PartialMatch: config or tensors are others, or something outside the selection changes.
        SafeglassesError: record and neurons cannot both be.
    """
    _check_config(folder, record)
    stored, found = record.stored, {}
    parts = [part for part in map(record.part, stored.modules) if part is not None]
    for path, (out, into) in stored.modules.items():
        if record.part(path) is None:
            found[path] = _read_linear(folder, record, masks, path, out, into)
    for parameter in stored.experts:
        found |= _read_experts(folder, record, masks, [part for part in parts if part.parameter == parameter])
    _check_keys(folder, record)
    return {path: found[path] for path in stored.modules}


def _config(paths: Sequence[str], fused: Sequence[str], rank: int, scale: float, home: Home) -> dict[str, Any]:
    parameters = {"target_parameters": [home.absolute(path) for path in fused]} if fused else {}
    return {**parameters, **lora_config(home, paths, rank=rank, alpha=scale * rank)}


def _tensors(changes: Mapping[str, Change], rank: int, home: Home) -> dict[str, Tensor]:
    found, fused = {}, fused_in(changes)
    for path, some in fused.items():
        first, second = keys_of(path, list(fused), _prefix(home))
        part = next(change.part for change in some.values() if change.part is not None)
        pairs = packed({number: change.full() for number, change in some.items()}, part, rank)
        found[first], found[second] = (value.contiguous() for value in pairs)
    for path, change in changes.items():
        if change.part is not None:
            continue
        a, b = change.full()
        more = rank - len(a)
        key = f"{_PREFIX}{home.absolute(path)}"
        found[f"{key}.lora_A.weight"] = nn.functional.pad(a, (0, 0, 0, more)).contiguous()
        found[f"{key}.lora_B.weight"] = nn.functional.pad(b, (0, more)).contiguous()
    return dict(sorted(found.items()))


def _check_config(folder: Path, record: Record) -> None:
    stored = record.stored
    given = read_object(folder / CONFIG)
    linear = [path for path in stored.modules if record.part(path) is None]
    wanted = _config(linear, list(stored.experts), stored.rank, stored.scale, record.home)
    for name in sorted(given.keys() | wanted.keys()):
        if name in _MAY_MOVE and isinstance(given.get(name), str | None):
            continue
        if name not in given or name not in wanted or given[name] != wanted[name]:
            raise tampered("the adapter is not what the record says", folder / CONFIG, f"{name[:80]} as it was written")


def _check_keys(folder: Path, record: Record) -> None:
    with safe_open(folder / TENSORS, framework="pt") as tensors:
        found = set(tensors.keys())
    linear = [path for path in record.stored.modules if record.part(path) is None]
    names = [f"{_PREFIX}{record.home.absolute(path)}" for path in linear]
    fused = list(record.stored.experts)
    wanted = {f"{name}.{part}.weight" for name in names for part in ("lora_A", "lora_B")}
    wanted |= {key for path in fused for key in keys_of(path, fused, _prefix(record.home))}
    if found != wanted:
        raise tampered("the adapter has other tensors", folder / TENSORS, f"{len(wanted)} tensors, not {len(found)}")


def _read_linear(folder: Path, record: Record, masks: Mapping[Site, Tensor], path: str, out: int, into: int) -> Change:
    stored, linear = record.stored, [site for site in masks if not site.fused]
    site = next((s for s in linear if path == s.path or path.startswith(s.path.rpartition(".")[0] + ".")), None)
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
    shapes = ((stored.rank, into), (out, stored.rank))
    a, b = _pair(folder, (f"{key}.lora_A.weight", f"{key}.lora_B.weight"), shapes)
    return _confined(folder, record, key, Change(out, into, a, b, None, None, stored.scale), rows, columns)


def _read_experts(
    folder: Path, record: Record, masks: Mapping[Site, Tensor], parts: Sequence[Slice]
) -> dict[str, Change]:
    """Read what changes in the experts of one parameter; those of which nothing is recorded must have zeros."""
    stored = record.stored
    if not parts:
        raise damaged(folder / RECORD, "a parameter of experts without an expert that changed")
    part, sizes = parts[0], {stored.modules[part.path] for part in parts}
    if len(sizes) > 1:
        raise damaged(folder / RECORD, f"{part.parameter} with experts of several sizes")
    ((out, into),) = sizes
    keys, many = keys_of(part.parameter, list(stored.experts), _prefix(record.home)), stored.rank * part.n_experts
    reads, writes = (out, into) if part.turned else (into, out)
    both = _pair(folder, keys, ((many, reads), (writes, many)))
    found = {}
    for part in parts:
        chosen = masks.get(Site(part.expert, "in"))
        if chosen is None or not bool(chosen.any()):
            raise damaged(folder / RECORD, f"{part.path} is of an expert without a selected neuron")
        if out != len(chosen) * len(part.sides):
            raise damaged(folder / RECORD, f"{part.path} of {out} rows for {len(chosen)} neurons")
        rows = None if stored.mode == "plain" else part.rows(chosen.nonzero().flatten(), len(chosen))
        a, b = unpacked(*both, part)
        whole = Change(out, into, a, b, None, None, stored.scale, part)
        found[part.path] = _confined(folder, record, keys[0], whole, rows, None)
    for number in set(range(part.n_experts)) - {part.number for part in parts}:
        if any(bool(value.any()) for value in unpacked(*both, replace(part, number=number))):
            raise _more(folder, f"{keys[0]}, expert {number}")
    return found


def _pair(folder: Path, keys: tuple[str, str], shapes: tuple[tuple[int, int], tuple[int, int]]) -> Pair:
    try:
        with safe_open(folder / TENSORS, framework="pt") as tensors:
            a, b = (tensors.get_tensor(key) for key in keys)
    except (SafetensorError, ValueError) as error:
        raise tampered("the adapter lacks a tensor", folder / TENSORS, str(error)[:200]) from error
    given = (tuple(a.shape), tuple(b.shape))
    if given != shapes or a.dtype != b.dtype:
        raise tampered("a tensor of the adapter has another shape", folder / TENSORS, f"{keys[0]}: {given}")
    return a, b


def _confined(
    folder: Path, record: Record, key: str, full: Change, rows: Tensor | None, columns: Tensor | None
) -> Change:
    """Return a change as small as it should be, if nothing else is in it."""
    a, b = full.full()
    found = _cut(full, rows, columns, one_hot=record.stored.mode == "rows")
    again = found.full()
    if any(bool(x[len(y) :].any()) for x, y in ((a, again[0]), (b.T, again[1].T))) or not (
        torch.equal(a[: len(again[0])], again[0]) and torch.equal(b[:, : again[1].shape[1]], again[1])
    ):
        raise _more(folder, key)
    return found


def _cut(full: Change, rows: Tensor | None, columns: Tensor | None, *, one_hot: bool) -> Change:
    a = full.a if columns is None else full.a[:, columns]
    if one_hot and rows is not None:
        return Change(full.out, full.into, a[: len(rows)].clone(), None, rows, columns, full.scale, full.part)
    if full.b is None:
        raise TypeError("B is there")
    b = full.b if rows is None else full.b[rows]
    used = (a.any(dim=1) | b.any(dim=0)).nonzero()  # ranks behind these are padding: maps of `plain` differ in rank
    rank = int(used[-1]) + 1 if len(used) else 1
    a, b = a[:rank], b[:, :rank]
    return Change(full.out, full.into, a.clone(), b.clone(), rows, columns, full.scale, full.part)


def _prefix(home: Home) -> str:
    return _PREFIX + (f"{home.decoder_path}." if home.decoder_path else "")


def _more(folder: Path, key: str) -> PartialMatch:
    return tampered("the adapter changes what is not selected", folder / TENSORS, f"zeros outside, in {key}")


def tampered(what: str, path: Path, expected: str) -> PartialMatch:
    """Return the refusal of a file that is not what was written."""
    return PartialMatch(what, given=str(path), expected=expected, do="restore the folder, or tune again")
