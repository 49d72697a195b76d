"""``neurons.parquet``: one row per neuron of glasses or of a shield, for people, pandas and SQL; what `load` believes.

| column | type | meaning |
|---|---|---|
| `site` | string | address relative to the decoder, e.g. ``layers.12.mlp.down_proj:in`` |
| `layer` | int32 | decoder layer, -1 outside any |
| `kind` | string | the site without its layer, e.g. ``mlp.down_proj:in`` |
| `index` | int32 | neuron within the site |
| `neuron` | string | its address; in a gate-and-up map by half: ``layers.0.mlp.gate_up_proj:up#3`` |
| `factor` | float32 | what the neuron's value is multiplied by at strength 1 (glasses) |
| others | float32 | evidence: ``auroc <pool>``, ``held-out <pool>``, ``q <pool>`` …; see `COLUMNS` |

Rows are in order of layer, site and index. The schema says what each column means, in the column's metadata.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from safeglasses.defend.factors import Factors, in_order
from safeglasses.errors import PartialMatch, SafeglassesError
from safeglasses.files import atomic_write_bytes
from safeglasses.model.sites import Site

NEURONS = "neurons.parquet"
COLUMNS = {
    "site": "address relative to the decoder",
    "layer": "decoder layer, -1 outside any",
    "kind": "the site without its layer",
    "index": "neuron within the site",
    "neuron": "address; in a gate-and-up map by half",
    "factor": "what the neuron's value is multiplied by at strength 1",
    "auroc": "area under the ROC curve of the pooled value against the label (toxic = 1)",
    "held-out": "the same on held-out data",
    "met-toxic": "toxic samples of which a token in the span was sent to the neuron's expert",
    "met-non-toxic": "non-toxic samples, likewise",
    "change": "norm of the change of the neuron's rows",
    "q": "smallest false discovery rate at which the neuron is selected (Benjamini-Hochberg)",
}
_TYPES = {
    "site": pa.string(),
    "layer": pa.int32(),
    "kind": pa.string(),
    "index": pa.int32(),
}
_ADDRESS = "neuron"  # for people: what is loaded is `site` and `index`
_MOST_COLUMNS = 1024
_TEXT, _ROOM = 1024, 2**20  # bytes: of the two texts in a row, and of what a small table has besides rows


def write_table(path: Path, factors: Factors, columns: Mapping[str, Factors]) -> int:
    """Write the neurons whose factor is not 1 and return their number; same content, same bytes."""
    masks = {site: row != 1 for site, row in factors.items()}
    return write_neurons(path, masks, {"factor": factors, **columns})


def write_neurons(path: Path, masks: Mapping[Site, Bool[Tensor, " _neuron"]], columns: Mapping[str, Factors]) -> int:
    """Write the neurons of a set with what is known of them, and return their number; same content, same bytes."""
    sites = in_order(masks)
    kept = {site: masks[site].nonzero().flatten() for site in sites}
    counts = [len(kept[site]) for site in sites]

    def spread(values: list[Any], kind: pa.DataType) -> pa.Array:
        encoded = pa.DictionaryArray.from_arrays(
            pa.array(np.repeat(np.arange(len(sites), dtype=np.int32), counts)), pa.array(values, type=kind)
        )
        return encoded.cast(kind)

    def joined(column: Factors) -> pa.Array:
        rows = [column[s][kept[s]].float() if s in column else torch.full((len(kept[s]),), float("nan")) for s in sites]
        return pa.array(torch.cat(rows).numpy() if rows else np.empty(0, np.float32), type=pa.float32())

    index = torch.cat([kept[s] for s in sites]).to(torch.int32).numpy() if sites else np.empty(0, np.int32)
    named = [_addresses(site, kept[site].numpy(), len(masks[site])) for site in sites]
    arrays = {
        "site": spread([str(s) for s in sites], pa.string()),
        "layer": spread([s.layer for s in sites], pa.int32()),
        "kind": spread([s.kind for s in sites], pa.string()),
        "index": pa.array(index, type=pa.int32()),
        _ADDRESS: pa.concat_arrays(named) if named else pa.array([], type=pa.string()),
    }
    arrays |= {name: joined(column) for name, column in columns.items()}
    fields = [
        pa.field(name, array.type, metadata={"doc": COLUMNS.get(name.partition(" ")[0], "evidence")})
        for name, array in arrays.items()
    ]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(list(arrays.values()), schema=pa.schema(fields)), sink, compression="zstd")
    atomic_write_bytes(path, sink.getvalue().to_pybytes())
    return int(sum(counts))


def _addresses(site: Site, index: np.ndarray, width: int) -> pa.Array:
    """Write `Site.address` of many neurons at once."""
    halves = (0, width // 2) if site.address(0, width) != site.neuron(0) else (0,)
    places = [site.address(first, width).partition("#")[0] for first in halves]
    size = width // len(halves)
    where = pa.DictionaryArray.from_arrays(pa.array((index // size).astype(np.int32)), pa.array(places))
    joined: Any = [where.cast(pa.string()), pa.array(index % size).cast(pa.string()), "#"]
    return pc.call_function("binary_join_element_wise", joined)  # by name: pyarrow makes the others at import


def read_table(
    path: Path, widths: Mapping[Site, int], *, n_rows: int
) -> tuple[dict[Site, Float[Tensor, " _neuron"]], dict[str, dict[Site, Float[Tensor, " _neuron"]]]]:
    """Read the factors (1 for neurons without a row) and the evidence columns (NaN for them).

    Args:
        path: the file.
        widths: sites and how many neurons they have.
        n_rows: how many rows there must be; checked before they are read.

    Raises:
        SafeglassesError: the file is no table of so many neurons.
        PartialMatch: a site or an index that `widths` does not know, or a neuron with two rows.
    """
    masks, columns = read_neurons(path, widths, n_rows=n_rows, first="factor")
    factors = columns.pop("factor")
    return {site: torch.where(masks[site], row, 1.0) for site, row in factors.items()}, columns


def read_neurons(
    path: Path, widths: Mapping[Site, int], *, n_rows: int, first: str
) -> tuple[dict[Site, Bool[Tensor, " _neuron"]], dict[str, dict[Site, Float[Tensor, " _neuron"]]]]:
    """Read which neurons have a row, and the columns with numbers (NaN for neurons without one).

    Args:
        path: the file.
        widths: sites and how many neurons they have.
        n_rows: how many rows there must be; checked before they are read.
        first: a column of numbers that must be there.

    Raises:
        SafeglassesError: the file is no table of so many neurons.
        PartialMatch: a site or an index that `widths` does not know, or a neuron with two rows.
    """
    try:
        table = _read(path, n_rows, first)
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: names that are no UTF-8
        raise SafeglassesError("could not read the table of neurons", given=f"{path}: {error}") from error
    encoded = table.column("site").combine_chunks().dictionary_encode()
    try:
        names, codes = encoded.dictionary.to_pylist(), _numbers(encoded.indices)
    except UnicodeDecodeError as error:
        raise SafeglassesError("not a table of neurons", given=f"{path}: column site: {error}") from error
    index = torch.from_numpy(_numbers(table.column("index").combine_chunks()).astype(np.int64))
    values = {
        name: torch.from_numpy(_numbers(table.column(name).combine_chunks()).astype(np.float32))
        for name in table.column_names
        if name not in _TYPES
    }
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(len(names) + 1))
    out: dict[str, dict[Site, Tensor]] = {name: {} for name in values}
    masks: dict[Site, Tensor] = {}
    for i, text in enumerate(names):
        site, rows = Site.parse(text), torch.from_numpy(order[starts[i] : starts[i + 1]])
        _check_rows(path, site, index[rows], widths)
        masks[site] = torch.zeros(widths[site], dtype=torch.bool).index_fill_(0, index[rows], True)
        for name, column in values.items():
            row = torch.full((widths[site],), float("nan"))
            row.index_copy_(0, index[rows], column[rows])
            out[name][site] = row
    absent = [str(site) for site in widths if str(site) not in set(names)]
    if absent:
        raise PartialMatch("the table of neurons lacks sites", given=f"{path} without {', '.join(absent[:3])}")
    return masks, out


def _numbers(array: pa.Array) -> np.ndarray:
    """Return numbers without gaps; `to_numpy` would import pandas, which takes longer than all the rest."""
    return np.from_dlpack(array)


def _read(path: Path, n_rows: int, first: str) -> pa.Table:
    """Read the file once its footer says what was expected: nothing is decompressed before."""
    with pq.ParquetFile(path) as file:
        wrong = _wrong_in_footer(file.schema_arrow, file.metadata, n_rows, first)
        table = pa.table({}) if wrong else file.read([n for n in file.schema_arrow.names if n != _ADDRESS])
    empty = [name for name in table.column_names if table.column(name).null_count]
    if wrong or empty:
        what = wrong or f"nothing in a row of column {empty[0][:80]!r}"
        raise SafeglassesError(
            "not a table of neurons", given=f"{path} has {what}", expected=", ".join([*_TYPES, first])
        )
    return table


def _wrong_in_footer(schema: pa.Schema, said: pq.FileMetaData, n_rows: int, first: str) -> str:
    names = schema.names
    if len(set(names)) < len(names) or len(names) > _MOST_COLUMNS:
        return f"{len(names)} columns, {len(set(names))} of them with names of their own"
    known = _TYPES | ({_ADDRESS: pa.string()} if _ADDRESS in names else {})
    for name, kind in {**dict.fromkeys([*names, first], pa.float32()), **known}.items():
        if name not in names:
            return f"no column {name}"
        if schema.field(name).type != kind:
            return f"column {name[:80]!r} of type {schema.field(name).type}"
    size = sum(said.row_group(i).total_byte_size for i in range(said.num_row_groups))
    if said.num_rows != n_rows or size > _ROOM + n_rows * (_TEXT + 8 * len(names)):
        return f"{said.num_rows:,} rows of {size:,} bytes in all, not {n_rows:,} rows"
    return ""


def _check_rows(path: Path, site: Site, index: Tensor, widths: Mapping[Site, int]) -> None:
    if site not in widths:
        raise PartialMatch("the table of neurons names a site that glasses.json does not", given=f"{site} in {path}")
    if int(index.min()) < 0 or int(index.max()) >= widths[site] or len(index.unique()) != len(index):
        raise PartialMatch(
            "the table of neurons has an index twice or out of range",
            given=f"{site} in {path}",
            expected=f"indices from 0 to {widths[site] - 1}, each at most once",
        )
