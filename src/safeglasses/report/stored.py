"""Keep a page's record beside it, so that the page can be drawn again without the model."""

from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from safeglasses.errors import SafeglassesError
from safeglasses.files import atomic_write_bytes
from safeglasses.report.record import ReportData

_RECORD = TypeAdapter(ReportData)


def store(data: ReportData, path: Path) -> None:
    """Write the record as JSON, atomically."""
    atomic_write_bytes(path, _RECORD.dump_json(data))


def stored(path: Path) -> ReportData:
    """Read what `store` wrote.

    Raises:
        SafeglassesError: no such file, or not a record of this version.
    """
    if not path.is_file():
        raise SafeglassesError("no record of a report", given=str(path), do="finish the run: repeat its command")
    try:
        return _RECORD.validate_json(path.read_bytes())
    except ValidationError as error:
        raise SafeglassesError(
            "not a record of a report that this version reads",
            given=f"{path}: {error.error_count()} problems, the first: {error.errors()[0]['msg']}",
            do="draw it with the version of safeglasses that wrote it, or repeat the run",
        ) from error
