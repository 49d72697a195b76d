"""Fold glasses into a GGUF file as it is, quantised or not: the scales of changed rows are multiplied in place.

The header gains one entry, ``safeglasses.folded``; everything else of the file is carried over byte for byte.
Needs the ``gguf`` package, an extra: ``pip install 'safeglasses[gguf]'``.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from safeglasses.defend.factors import Factors, changed, in_order, refuse_fused
from safeglasses.defend.glasses import Glasses, refuse_empty
from safeglasses.defend.home import check_norms
from safeglasses.errors import PartialMatch, SafeglassesError
from safeglasses.model.sites import Site
from safeglasses.model.weights import agreement, norms_digest
from safeglasses.ship.gguf_blocks import FLOATS, SCALES, Rounding, scale_blocks, scale_numbers
from safeglasses.ship.gguf_file import check_output, check_unfolded, copy_marked, library, new_file, open_file
from safeglasses.ship.gguf_names import FOLD_FIRST, Names, names_of, norms_in

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Change:
    """Factors for one tensor of the file."""

    tensor: Any
    """gguf's ``ReaderTensor``."""
    out: Float[Tensor, " _out"] | None
    """Factors of its rows, in the file's order."""
    into: Float[Tensor, " _in"] | None
    """Factors of its columns."""


def fold_gguf(path: str | Path, glasses: Glasses, out: str | Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Copy a GGUF file with the glasses folded in; its quantised numbers stay, only scales change.

    Factors on inputs of quantised maps cannot be held by scales; those of a gated block's down map go to the up
    map's rows, which does the same, others are refused.

    Returns:
        A JSON-ready record: what was changed, how the base was recognised, what rounding did.

    Raises:
        SafeglassesError: not a GGUF file, types or sides that cannot be patched exactly, or `out` exists.
        WrongBase: glasses for another model, or glasses are folded in already.
        PartialMatch: some site is missing or of another width.
    """
    path, out = Path(path), Path(out)
    gguf = library()
    check_output(path, out, overwrite=overwrite)
    refuse_empty(glasses, "folding")
    refuse_fused(changed(glasses.factors), "a patched GGUF file", FOLD_FIRST)
    reader = open_file(gguf, path)
    check_unfolded(reader, path)
    names = names_of(reader, gguf)
    _check_identity(reader, path, glasses)
    factors, moved = _on_outputs(reader, names, changed(glasses.effective()))
    changes = _plan(reader, names, factors)
    mark = {
        "base_fingerprint": glasses.base_fingerprint,
        "base_source": glasses.home.source if glasses.home is not None else None,
        "recipe": glasses.recipe,
        "strength": glasses.strength,
        "n_neurons": glasses.n_neurons,
    }
    with new_file(out) as temporary:
        data_start = copy_marked(path, reader, json.dumps(mark), temporary)
        rounding = _patch(temporary, changes, data_start - int(reader.data_offset), gguf)
    if rounding.vanished:
        _log.warning(
            "%d of %d scales are too small for fp16 and became zero: factors near 0 act as 0 there",
            rounding.vanished,
            rounding.scales,
        )
    kinds = [change.tensor.tensor_type.name for change in changes]
    return {
        "checkpoint": str(out),
        "neurons": glasses.n_neurons,
        "strength": glasses.strength,
        "base": mark["base_source"],
        "architecture": names.architecture,
        "tensors": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        "moved": {str(old): str(new) for old, new in moved.items()},
        "scales": {
            "changed": rounding.scales,
            "largest_error": rounding.largest,
            "below_normal": rounding.coarse,
            "below_normal_error": rounding.coarsest,
            "vanished": rounding.vanished,
        },
    }


def _check_identity(reader: Any, path: Path, glasses: Glasses) -> None:
    mine = glasses.home.norms if glasses.home is not None else None
    digests = [norms_digest(outside=parts[0], inside=parts[1]) for parts in (norms_in(reader, s) for s in (0.0, 1.0))]
    theirs = next((digest for digest in digests if agreement(mine, digest) == "all"), digests[0])
    check_norms(f"{path} (GGUF)", "gguf", theirs, glasses.base_fingerprint, glasses.home)


def _on_outputs(
    reader: Any, names: Names, factors: Factors
) -> tuple[dict[Site, Float[Tensor, " _n"]], dict[Site, Site]]:
    """Move factors from the inputs of quantised down maps to the rows of the up maps."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    result, moves, stuck = dict(factors), {}, []
    for site in in_order(factors):
        name = names.tensor(site)
        tensor = tensors.get(f"{name}.weight")
        if site.side == "out" or tensor is None or tensor.tensor_type.name in FLOATS:
            continue
        parent, _, last = name.rpartition(".")
        gated = last == "ffn_down" and {f"{parent}.ffn_gate.weight", f"{parent}.ffn_up.weight"} <= tensors.keys()
        up = Site(f"{site.path.rpartition('.')[0]}.up_proj", "out")
        if not gated or len(factors[site]) != tensors[f"{parent}.ffn_up.weight"].shape[-1]:
            stuck.append(f"{site} ({tensor.tensor_type.name})")
            continue
        row = result.pop(site)
        result[up] = result[up] * row if up in result else row
        moves[site] = up
    if stuck:
        raise SafeglassesError(
            "factors on the inputs of a quantised map cannot be folded into a GGUF file: blocks run along the inputs",
            given=f"{len(stuck)} sites: {', '.join(stuck[:3])}",
            expected="factors on outputs, or on inputs of maps stored as F32, F16 or BF16",
            do=FOLD_FIRST,
        )
    return result, moves


def _plan(reader: Any, names: Names, factors: Factors) -> list[_Change]:
    """Find the tensor of every factor, its bias included; refuse before anything is written."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    changes, problems, frozen = [], [], []
    for path in dict.fromkeys(site.path for site in in_order(factors)):
        out, into = factors.get(Site(path, "out")), factors.get(Site(path, "in"))
        name = names.tensor(Site(path, "out"))
        tensor, bias = tensors.get(f"{name}.weight"), tensors.get(f"{name}.bias")
        shape = [] if tensor is None else [int(n) for n in tensor.shape]  # [in, out]
        wanted = [None if into is None else len(into), None if out is None else len(out)]
        if len(shape) != 2 or any(w not in (None, n) for w, n in zip(wanted, shape, strict=True)):
            problems.append(f"{path} ({name}.weight is {'missing' if tensor is None else shape[::-1]})")
            continue
        kinds = {t.name: t.tensor_type.name for t in (tensor, bias) if t is not None}
        frozen += [f"{n}: {kind}" for n, kind in kinds.items() if kind not in FLOATS and kind not in SCALES]
        ordered = None if out is None else names.ordered(Site(path, "out"), out)
        changes.append(_Change(tensor, ordered, into))
        if bias is not None and ordered is not None:
            changes.append(_Change(bias, None, ordered))  # a matrix of one row
    if problems:
        raise PartialMatch(
            "the glasses fit only a part of this file",
            given=f"{len(problems)} linear maps do not match: {', '.join(problems[:4])}",
            expected="every site to name a matrix of the file with as many neurons",
            do="give the file of the model that they were made for, or " + FOLD_FIRST,
        )
    if frozen:
        raise SafeglassesError(
            "these GGUF types have no scale that could take a factor exactly",
            given=f"{len(frozen)} tensors: {', '.join(frozen[:3])}",
            expected="one of " + ", ".join([*FLOATS, *SCALES]),
            do=FOLD_FIRST,
        )
    return changes


def _patch(path: Path, changes: list[_Change], shift: int, gguf: Any) -> Rounding:
    total = Rounding()
    data = np.memmap(path, dtype=np.uint8, mode="r+")
    for change in changes:
        tensor = change.tensor
        start, kind = int(tensor.data_offset) + shift, tensor.tensor_type.name
        rows = int(tensor.shape[-1]) if len(tensor.shape) == 2 else 1
        matrix = torch.from_numpy(data[start : start + int(tensor.n_bytes)]).reshape(rows, -1)
        if kind in FLOATS:
            scale_numbers(matrix, kind, change.out, change.into, tensor.name)
        elif change.out is not None:
            block = gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]
            total += scale_blocks(matrix, kind, block, change.out, tensor.name)
    data.flush()
    return total
