"""``docs/architectures.md``: the anatomy of every registered type, as Markdown that a test compares line by line."""

from collections.abc import Iterable
from posixpath import commonpath
from typing import Any

from transformers import PreTrainedModel

from safeglasses.model.architectures import Entry, picture_tokens
from safeglasses.model.decoders import by_table
from safeglasses.model.outside import REGIONS
from safeglasses.model.overview import overview
from safeglasses.ship.support import ACTIONS, support

_INTRO = """# Architectures

Every type that transformers {version} registers as image-text-to-text, from its default config: the model is built
without weights and its parts are found as they are in a checkpoint. `safeglasses inspect TYPE` shows all of one type,
`safeglasses inspect MODEL --no-weights` of a checkpoint whose config differs from the default.

This page is made by `python scripts/make_architectures.py`; a test compares it with the installed transformers.

**{located} of {types} types located, {structural} of them by structure alone**, {experts} with fused experts,
{modular} from a config of our own (the default builds no model, or hides a projector).

What may be done is what the code's own rules allow for this anatomy. That a type is allowed does not mean that it was
ever run: [families.md](families.md) has what was, with tiny models.

## Anatomy

The decoder's path, layers and width; what its feed-forward blocks are made of, ending in the map that reads the neurons
(in brackets the neurons of a layer's block; several widths where layers differ); fused experts (experts × neurons of
each); query heads × width of what each writes, and heads of keys and values where those are fewer; linear maps in all.
`N` in a path stands for a number.
"""
_BEYOND = """
## Beyond the decoder

What `--sites vision`, `projector`, `encoder` and `crossing` look at, off by default: linear maps, by their paths in the
whole model (addresses begin with a slash; without layer numbers here). A projector that is a bare parameter, and towers
without linear maps, have no sites. Keys and values of cross-attention in the decoder's own layers count as `crossing`.
"""
_ALLOWED = """
## What may be done

`yes`: with all neurons of the decoder; `maps`: with its linear maps, but not with all feed-forward neurons; `experts`:
with the neurons of fused experts alone; `no`.
Numbers name the sentences below.
"""


def page(entries: Iterable[Entry], version: str) -> str:
    """Return the page.

    Args:
        entries: in the order to show them; each is asked for once and may be forgotten then.
        version: of transformers.
    """
    rows: list[str] = []
    allowed: list[str] = []
    beyond: list[str] = []
    notes: list[str] = []
    sentences: dict[str, int] = {}
    counts = {"types": 0, "located": 0, "structural": 0, "experts": 0, "modular": 0}
    for entry in entries:
        counts["types"] += 1
        counts["modular"] += bool(entry.note)
        if entry.note:
            notes.append(f"- `{entry.model_type}`: {entry.note}.")
        if entry.anatomy is None or entry.model is None:
            rows.append(f"| `{entry.model_type}` | not located: {entry.reason} ||||||||")
            continue
        counts["located"] += 1
        counts["structural"] += not by_table(entry.model_type)
        counts["experts"] += bool(entry.anatomy.experts)
        found = overview(entry.anatomy)
        rows.append(_row(entry, entry.model, found))
        beyond.append(f"| `{entry.model_type}` | {' | '.join(_region(found, region) for region in REGIONS)} |")
        cells = []
        for action in support(entry.model, entry.anatomy):
            number = f" {sentences.setdefault(action.why, len(sentences) + 1)}" if action.why else ""
            cells.append({"linear maps": "maps"}.get(action.level, action.level) + number)
        allowed.append(f"| `{entry.model_type}` | {' | '.join(cells)} |")
    lines = [
        _INTRO.format(version=version, **counts),
        "| type | decoder | layers × width | feed-forward | fused experts | attention heads | linear maps | "
        "cross-attention | picture tokens | parameters |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *rows,
        _BEYOND,
        f"| type | {' | '.join(REGIONS)} |",
        "|---" * (len(REGIONS) + 1) + "|",
        *beyond,
        _ALLOWED,
        f"| type | {' | '.join(ACTIONS)} |",
        "|---" * (len(ACTIONS) + 1) + "|",
        *allowed,
        "",
        *(f"{number}. {why[:1].upper()}{why[1:]}." for why, number in sentences.items()),
        "",
        "## Configs of our own",
        "",
        *notes,
    ]
    return "\n".join(lines) + "\n"


def _row(entry: Entry, model: PreTrainedModel, found: dict[str, Any]) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    cells = [
        f"`{entry.model_type}`",
        f"`{found['decoder'] or '.'}` → `{found['layers_path']}`"
        + (" (by table)" if by_table(entry.model_type) else ""),
        f"{found['layers']} × {found['hidden_size']:,}",
        _blocks(found),
        "; ".join(
            f"`{row['kind']}` {_numbers(row['experts'])} × {_numbers(row['width'])} in {row['layers']} layers"
            for row in found["experts"]
        ),
        _heads(found),
        f"{len(found['linears'])} kinds, {sum(row['maps'] for row in found['linears']):,} maps, "
        f"{found['neurons']['linears']:,} outputs",
        _crossing(found),
        picture_tokens(model.config),
        f"{parameters:,}",
    ]
    return f"| {' | '.join(cells)} |"


def _blocks(found: dict[str, Any]) -> str:
    said = []
    for row in found["blocks"]:
        place = row["maps"][-1].rpartition(".")[0]
        names = ", ".join(f"`{kind.removeprefix(place + '.')}`" for kind in row["maps"])
        said.append((f"`{place}`: " if place else "") + f"{names} [{_numbers(row['width'])}]")
    missing = found["layers_without_neurons"]
    return "; ".join(said) + (f"; none in {len(missing)} layers" if missing else "")


def _heads(found: dict[str, Any]) -> str:
    """Say the heads of every kind of attention: those that write, and fewer ones of keys and values."""
    said: dict[str, None] = {}
    kept: dict[str, set[int]] = {}
    for row in found["heads"]:
        path, _, side = row["kind"].partition(":")
        place = path.partition(".")[0]
        if side == "out":
            kept.setdefault(place, set()).add(row["heads"])
    for row in (row for row in found["heads"] if row["kind"].endswith(":in")):
        place = row["kind"].partition(".")[0]
        fewer = sorted(n for n in kept.get(place, ()) if n < row["heads"])
        said[f"`{place}` {row['heads']} × {row['width']}" + (f" ({_numbers(fewer)})" if fewer else "")] = None
    return "; ".join(said)


def _region(found: dict[str, Any], region: str) -> str:
    """Say where a region's maps are: by name where they are few, else by what their paths share."""
    rows = [row for row in found["outside"] if row["region"] == region]
    kinds, maps = [row["kind"].removeprefix("/").split(".") for row in rows], sum(row["maps"] for row in rows)
    keys = found["cross_attention_maps"] - found["merged_maps"] if region == "crossing" else 0
    said = [f"{keys} keys and values"] if keys else []
    for first in dict.fromkeys(kind[0] for kind in kinds):
        some = [kind for kind in kinds if kind[0] == first]
        shared = commonpath(["/".join(kind) for kind in some]).split("/")
        leaves = [".".join(kind[len(shared) :]) for kind in some]
        named = f": {', '.join(f'`{leaf}`' for leaf in leaves)}" if 1 < len(leaves) <= 4 else ""
        said.append(f"`/{'.'.join(shared)}`{named}")
    return "; ".join(said) + (f" ({maps:,} maps)" if maps > 1 else "")


def _crossing(found: dict[str, Any]) -> str:
    alone, keys = len(found["cross_attention_layers"]), found["cross_attention_maps"]
    said = [f"{alone} layers of its own"] if alone else [f"{keys} key and value maps"] if keys else []
    beside = ", ".join(f"`{path}` × {n}" for path, n in found["beside"].items())
    said += [f"beside the layers, without addresses: {beside}"] if beside else []
    return "; ".join(said)


def _numbers(value: int | list[int]) -> str:
    return f"{value:,}" if isinstance(value, int) else ", ".join(f"{one:,}" for one in value)
