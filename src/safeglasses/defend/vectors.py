"""Glasses' own file of factors, for what IA3 cannot carry: factors of fused experts.

``glasses.safetensors`` holds one float32 vector per changed site, named by the site's address
(``layers.3.mlp.experts.17:in``), as it acts at the strength in ``glasses.json``. Its one entry of metadata,
``safeglasses``, is JSON: ``schema``, ``base_fingerprint`` and ``decoder_path``, below which the addresses lie (one, as
safetensors writes several in any order, and the same glasses shall be the same bytes).
A folder with it has no ``adapter_config.json``: PEFT must fail, and not wear a part of the glasses.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save

from safeglasses.defend.factors import Factors, in_order
from safeglasses.defend.home import Home
from safeglasses.defend.tensors import check_shapes, check_tensors, opened, tampered
from safeglasses.files import atomic_write_bytes
from safeglasses.model.sites import Site

VECTORS = "glasses.safetensors"
SCHEMA = 1
_ENTRY = "safeglasses"


def write_vectors(folder: Path, effective: Factors, home: Home, base_fingerprint: str) -> None:
    """Write the file; same factors, same bytes."""
    rows = {str(site): effective[site].contiguous() for site in in_order(effective)}
    atomic_write_bytes(folder / VECTORS, save(rows, metadata=_metadata(home, base_fingerprint)))


def check_vectors(folder: Path, widths: Mapping[Site, int], home: Home, base_fingerprint: str) -> None:
    """Check that the file is of this base and has a vector of each of these sites and no other, by its header alone.

    Raises:
        SafeglassesError: the file cannot be read.
        PartialMatch: it says something else.
    """
    with opened(folder / VECTORS) as tensors:
        given = tensors.metadata() or {}
    wanted = _metadata(home, base_fingerprint)
    if given != wanted:
        raise tampered(folder / VECTORS, f"metadata {given.get(_ENTRY)!r:.200}, not {wanted[_ENTRY]!r:.200}")
    check_shapes(folder / VECTORS, {str(site): [width] for site, width in widths.items()})


def check_factors_of(folder: Path, effective: Factors) -> None:
    """Check that the file's vectors are these factors, bit for bit.

    Raises:
        SafeglassesError: the file cannot be read.
        PartialMatch: naming the vectors that differ.
    """
    check_tensors(folder / VECTORS, {str(site): row for site, row in effective.items()})


def _metadata(home: Home, base_fingerprint: str) -> dict[str, str]:
    said = {"schema": SCHEMA, "base_fingerprint": base_fingerprint, "decoder_path": home.decoder_path}
    return {_ENTRY: json.dumps(said)}
