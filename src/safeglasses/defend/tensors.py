"""Files of vectors that must be what the table of neurons says: names, shapes and types first, then every number."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from safeglasses.errors import PartialMatch, SafeglassesError


def check_shapes(path: Path, expected: Mapping[str, Sequence[int]]) -> None:
    """Check that a file holds just these tensors, in float32, by its header alone.

    Raises:
        SafeglassesError: the file cannot be read.
        PartialMatch: naming tensors that are missing, unknown or of another shape or type.
    """
    with opened(path) as tensors:
        found = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118 (no mapping)
        layout = {key: (part.get_dtype(), part.get_shape()) for key, part in found.items()}
    missing, unknown = expected.keys() - layout.keys(), layout.keys() - expected.keys()
    other = [key for key in expected.keys() & layout.keys() if layout[key] != ("F32", list(expected[key]))]
    for what, keys in (("missing", missing), ("unknown", unknown), ("of another shape or type", other)):
        if keys:
            raise tampered(path, f"{len(keys)} of {len(expected)} tensors {what}: {some(sorted(keys))}")


def check_tensors(path: Path, expected: Mapping[str, Tensor]) -> None:
    """Check that a file's tensors are these, bit for bit.

    Raises:
        SafeglassesError: the file cannot be read.
        PartialMatch: naming the tensors that differ.
    """
    with opened(path) as tensors:
        other = [key for key in sorted(expected) if not torch.equal(tensors.get_tensor(key), expected[key])]
    if other:
        raise PartialMatch(
            "the adapter is not what the table of neurons says: one of the files was changed after saving",
            given=f"{path}: {len(other)} of {len(expected)} tensors with other values: {some(other)}",
            expected="the factors of the table at the strength in glasses.json",
            do="restore the folder; to change the strength: safeglasses stack FOLDER --strength 0.5 --out NEW, "
            'or in Python Glasses.load(FOLDER).at(0.5).save("NEW")',
        )


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a file of tensors.

    Raises:
        SafeglassesError: it cannot be read, now or inside the block.
    """
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError, ValueError) as error:
        raise SafeglassesError("could not read the adapter", given=f"{path}: {error}") from error


def tampered(path: Path, what: str) -> PartialMatch:
    """Return the refusal of a file that does not fit the others of its folder."""
    return PartialMatch(
        "the adapter is not what the table of neurons says: one of the files was changed after saving",
        given=f"{path}: {what}",
        expected="the files as they were written together",
        do="restore the folder, or make the glasses again",
    )


def some(names: Sequence[str]) -> str:
    """Name the first three of many."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
