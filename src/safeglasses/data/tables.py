"""The files that rows come in: JSONL, Parquet, and folders that hold them or were saved by ``datasets``."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safeglasses.data.rows import SKIP, Row, short
from safeglasses.errors import BadRow, SafeglassesError

if TYPE_CHECKING:
    import pyarrow

_BOM = b"\xef\xbb\xbf"
EXPECTED = "a .jsonl or .parquet file, a folder with data.jsonl, metadata.jsonl or *.parquet, or a saved dataset"


def rows_of(path: Path) -> Iterator[Row | BadRow]:
    """Yield the rows of a file or folder in order, an error in the place of each that does not parse.

    Raises:
        SafeglassesError: there is nothing at ``path`` that can be read.
    """
    if not path.exists():
        raise SafeglassesError("no such data", given=str(path), expected=EXPECTED)
    if path.is_dir():
        yield from _folder(path)
    elif path.suffix == ".jsonl":
        yield from _jsonl(path)
    elif path.suffix == ".parquet":
        yield from _parquet(path)
    else:
        raise SafeglassesError("data of an unknown kind", given=str(path), expected=EXPECTED)


def _jsonl(path: Path) -> Iterator[Row | BadRow]:
    r"""Split on ``\n`` alone: texts may hold U+2028 and its like, where ``splitlines`` would cut them."""
    try:
        content = path.read_bytes().removeprefix(_BOM)
    except OSError as error:
        raise SafeglassesError("the data cannot be read", given=f"{path} ({error.strerror})") from error
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            yield _line(f"{path}:{number}", path.parent, line)


def _line(where: str, folder: Path, line: bytes) -> Row | BadRow:
    try:
        text = line.decode("utf-8")
        fields = json.loads(text)
        if "\\ud" in text or "\\uD" in text:  # half a surrogate pair is JSON but no text
            json.dumps(fields, ensure_ascii=False).encode("utf-8")
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        return BadRow(f"{where}: the row is not UTF-8 text", given=error.reason, expected="UTF-8", do=SKIP)
    except (ValueError, RecursionError) as error:
        return BadRow(
            f"{where}: the row is not JSON",
            given=f"{len(line):,} bytes ({error})",
            expected="one whole JSON object on one line; was the file cut off?",
            do=SKIP,
        )
    if isinstance(fields, dict):
        return Row(where, folder, fields)
    return Row(where, folder, {}).bad("the row is not an object", given=short(fields), expected="{…}")


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise SafeglassesError(
            "the Parquet file cannot be read",
            given=f"{path} ({error})",
            do="was it cut off? write or fetch it again",
        ) from error
    yield from _table(table, str(path), path.parent)


def _folder(path: Path) -> Iterator[Row | BadRow]:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        yield from _saved(path)
        return
    parquet = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
    named = [file for file in (path / "data.jsonl", path / "metadata.jsonl") if file.exists()]
    found = [*named, *parquet]
    if len(named) > 1 or (named and parquet):
        raise SafeglassesError(
            "the folder holds several sets of rows",
            given=", ".join(str(file) for file in found),
            expected="one of them",
            do="give the file itself",
        )
    if not found:
        raise SafeglassesError("no rows in the folder", given=str(path), expected=EXPECTED)
    for file in found:
        yield from rows_of(file)


def _saved(path: Path) -> Iterator[Row]:
    """Read what ``save_to_disk`` wrote, pictures left encoded."""
    import datasets

    try:
        saved = datasets.load_from_disk(path)
    except (OSError, ValueError, KeyError) as error:
        raise SafeglassesError(
            "the datasets folder cannot be read",
            given=f"{path} ({error})",
            do="save it again with save_to_disk",
        ) from error
    parts = saved if isinstance(saved, datasets.DatasetDict) else {"": saved}
    for name, part in parts.items():
        where = f"{path}/{name}" if name else str(path)
        yield from _table(part.with_format("arrow")[:], where, path)


def _table(table: "pyarrow.Table", where: str, folder: Path) -> Iterator[Row]:
    number = 0
    for batch in table.to_batches(max_chunksize=1024):
        for fields in batch.to_pylist():
            number += 1
            yield Row(f"{where}:{number}", folder, fields)
