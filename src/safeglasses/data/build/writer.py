"""Parquet in the layout of the Hub: a folder per configuration, shards per split, pictures inside the rows."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeglasses.data.build.composing import Made, by_split
from safeglasses.data.build.recipe import Config
from safeglasses.data.records import Text, Turn
from safeglasses.files import atomic_write_bytes, sha256_file

if TYPE_CHECKING:
    import pyarrow

TEXTS = (
    *("id", "response", "label", "pair_id", "category", "language", "modality", "condition", "source", "licence"),
    "split",
)
"""Columns of text; ``messages``, ``image`` and, where there are any, ``slots`` come on top."""
_ROW_GROUP = 2000
_DICTIONARY = 32 * 2**20
"""Bytes of different pictures per row group that are stored once each, however many rows show them."""


def write_config(folder: Path, config: Config, rows: Sequence[Made], rows_per_file: int) -> dict[str, str]:
    """Write one configuration and return the SHA-256 of its files by their name below ``folder``.

    Rows are sorted by id; compression, encodings and versions are pinned, so that equal rows give equal bytes
    with one version of Arrow.
    """
    slots = sorted({name for row in rows for name in row.example.slots})
    written: dict[str, str] = {}
    for split, here in by_split(rows).items():
        shards = -(-len(here) // rows_per_file)
        size = -(-len(here) // shards)
        for number in range(shards):
            name = f"{config}/{split}-{number:05}-of-{shards:05}.parquet"
            part = here[number * size : (number + 1) * size]
            atomic_write_bytes(folder / name, _parquet([_columns(row, slots) for row in part], slots))
            written[name] = sha256_file(folder / name)
    return written


def _parquet(rows: Sequence[Mapping[str, Any]], slots: Sequence[str]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(list(rows), schema=schema_of(slots)),
        sink,
        row_group_size=_ROW_GROUP,
        version="2.6",
        data_page_version="1.0",
        compression="zstd",
        compression_level=9,
        use_dictionary=True,
        dictionary_pagesize_limit=_DICTIONARY,
        write_statistics=False,
    )
    return sink.getvalue().to_pybytes()


def schema_of(slots: Sequence[str]) -> "pyarrow.Schema":
    """Return the columns, with the features that ``datasets`` reads from the file's metadata."""
    import pyarrow

    text = pyarrow.string()
    part = pyarrow.struct([("type", text), ("text", text)])
    fields = [
        ("messages", pyarrow.list_(pyarrow.struct([("role", text), ("content", pyarrow.list_(part))]))),
        ("image", pyarrow.struct([("bytes", pyarrow.binary()), ("path", text)])),
        *((name, text) for name in TEXTS),
    ]
    value = {"dtype": "string", "_type": "Value"}
    content = {"feature": {"type": value, "text": value}, "_type": "List"}
    features: dict[str, Any] = {
        "messages": {"feature": {"role": value, "content": content}, "_type": "List"},
        "image": {"_type": "Image"},
        **dict.fromkeys(TEXTS, value),
    }
    if slots:
        fields.append(("slots", pyarrow.struct([(name, text) for name in slots])))
        features["slots"] = dict.fromkeys(slots, value)
    schema = pyarrow.schema(fields)
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _columns(row: Made, slots: Sequence[str]) -> dict[str, Any]:
    example = row.example
    picture = example.pictures[0] if example.pictures else None
    return {
        "messages": [_message(turn) for turn in example.messages],
        "image": None if picture is None else {"bytes": picture.read(), "path": None},
        "slots": {name: example.slots.get(name) for name in slots},
        "licence": row.licence,
        **{name: getattr(example, name) for name in TEXTS if name != "licence"},
    }


def _message(turn: Turn) -> dict[str, Any]:
    return {
        "role": turn.role,
        "content": [
            {"type": "text", "text": part.text} if isinstance(part, Text) else {"type": "image", "text": None}
            for part in turn.content
        ],
    }
