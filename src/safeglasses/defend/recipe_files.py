"""Recipes as TOML files: reading with every mistake named, writing with every entry explained."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from safeglasses.errors import SafeglassesError
from safeglasses.model.anatomy import What

_TEXT, _NUMBER = (str,), (float, int)
_ENTRIES: dict[str, tuple[tuple[type, ...], str]] = {
    "name": (_TEXT, "what glasses made by this recipe are called"),
    "doc": (_TEXT, "one line for people"),
    "sites": (
        (str, list),
        "outputs of linear maps: mlp, attention, linears (all); inputs: neurons (of the MLPs), heads (of attention); "
        "beyond the decoder: vision, projector, encoder, crossing; several as a list",
    ),
    "pools": ((list,), "evidence as span:how; spans image, prompt, response, all; how max, mean, last"),
    "rule": (_TEXT, "gini: 1 - the largest Gini; constant; calibrated: 1 - sum of strength * Gini"),
    "threshold": (_NUMBER, "select neurons with AUROC above it"),
    "fdr": (_NUMBER, "select neurons significant at this false discovery rate, held-out data confirming"),
    "top_k": ((int,), "select so many neurons of the whole model, by AUROC"),
    "constant": (_NUMBER, "factor of the constant rule"),
    "clamp": ((bool,), "hold factors in [0, 1]"),
    "two_sided": ((bool,), "calibrated: neurons that are low on toxic examples count too"),
    "granularity": (_TEXT, "calibrated: group (a strength per kind, layer and evidence) or neuron"),
    "confirmed": ((bool,), "calibrated: only the expertise that held-out examples confirm counts"),
    "by_category": ((bool,), "calibrated by group: a strength per category of harm too, each by its own evidence"),
    "by_head": ((bool,), "attention, heads: the neurons of a head are turned down together"),
}
_WORDS = {
    "sites": get_args(What),
    "rule": ("gini", "constant", "calibrated"),
    "granularity": ("group", "neuron"),
}


def read_recipe(path: Path) -> dict[str, Any]:
    """Read the entries of a recipe file, types checked; ``pools`` are still texts.

    Raises:
        SafeglassesError: no such file, no TOML, an unknown or missing entry, or a value of the wrong type.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SafeglassesError("could not read the recipe", given=f"{path}: {error}") from error
    unknown = [name for name in table if name not in _ENTRIES]
    lacking = [name for name in ("sites", "pools", "rule") if name not in table]
    wrong = [name for name, value in table.items() if name in _ENTRIES and not _fits(name, value)]
    for what, names in (("unknown entry", unknown), ("no entry", lacking), ("wrong type of", wrong)):
        if names:
            raise SafeglassesError(
                "the recipe file has a mistake",
                given=f"{path}: {what} {', '.join(names)}",
                expected=", ".join(_ENTRIES),
                do="start from the file of a named recipe: RECIPES['sgm'].to_toml()",
            )
    for name, words in _WORDS.items():
        given = table.get(name, [])
        if not set(given if isinstance(given, list) else [given]) <= set(words):
            raise SafeglassesError(
                "the recipe file has a mistake",
                given=f"{path}: {name} = {given!r}",
                expected=" or ".join(words),
            )
    return {n: float(v) if _ENTRIES[n][0] == _NUMBER else v for n, v in table.items()}


def write_recipe(values: Mapping[str, object]) -> str:
    """Write entries as TOML, each under its meaning; entries that are None are left as comments."""
    lines = []
    for name, (_, meaning) in _ENTRIES.items():
        value = values[name]
        text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML wants DEL escaped, JSON not
        lines += [f"# {meaning}", f"# {name} =" if value is None else f"{name} = {text}"]
    return "\n".join(lines) + "\n"


def _fits(name: str, value: object) -> bool:
    kinds = _ENTRIES[name][0]
    if isinstance(value, bool) or not isinstance(value, kinds):
        return kinds == (bool,) and isinstance(value, bool)
    return not isinstance(value, list) or all(isinstance(item, str) for item in value)
