"""A model's anatomy as a table: what ``safeglasses inspect`` shows and ``docs/architectures.md`` is made of."""

from collections.abc import Iterable
from typing import Any

from safeglasses.model.anatomy import Anatomy
from safeglasses.model.experts import Experts
from safeglasses.model.sites import Site


def overview(anatomy: Anatomy) -> dict[str, Any]:
    """Return an anatomy JSON-ready: one row per kind of linear map, and per kind of fused experts.

    Widths that differ between layers are lists of all that occur.
    """
    fused = list(anatomy.experts.values())
    return {
        "decoder": anatomy.decoder_path,
        "layers": anatomy.n_layers,
        "layers_path": anatomy.layers_path,
        "hidden_size": anatomy.hidden_size,
        "linears": _linears(anatomy),
        "blocks": _blocks(anatomy),
        "experts": _fused(fused),
        "heads": _heads(anatomy),
        "cross_attention_layers": list(anatomy.cross_attention_layers),
        "cross_attention_maps": len(anatomy.cross_attention_keys),
        "merged_maps": len(anatomy.merged_keys),
        "outside": _outside(anatomy),
        "beside": {path: n for path, n in anatomy.beside.items() if not _addressed(anatomy, path)},
        "layers_without_neurons": list(anatomy.layers_without_neurons),
        "neurons": {
            "linears": sum(anatomy.linears.values()),
            "mlp": sum(anatomy.linears[path] for path in anatomy.mlp),
            "ffn": sum(anatomy.in_features[path] for path in anatomy.ffn),
            "experts": sum(experts.n_experts * experts.width for experts in fused),
        },
        "ffn_reason": anatomy.ffn_reason,
    }


def _linears(anatomy: Anatomy) -> list[dict[str, Any]]:
    feed_forward = set(anatomy.mlp)
    kinds: dict[str, list[str]] = {}
    for path in anatomy.linears:
        kinds.setdefault(_kind(path), []).append(path)
    return [
        {
            "kind": kind,
            "layers": len({Site(path, "out").layer for path in paths}),
            "maps": len(paths),
            "in": _widths(anatomy.in_features[path] for path in paths),
            "out": _widths(anatomy.linears[path] for path in paths),
            "mlp": any(path in feed_forward for path in paths),
            "halves": list(anatomy.halves(paths[0]) or ()),
        }
        for kind, paths in kinds.items()
    ]


def _outside(anatomy: Anatomy) -> list[dict[str, Any]]:
    """Return a row per region and kind of map beyond the decoder's layers, with the addresses of its outputs."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for path, region in anatomy.outside.regions.items():
        kinds.setdefault((region, _kind(path)), []).append(path)
    return [
        {
            "region": region,
            "kind": kind,
            "maps": len(paths),
            "in": _widths(anatomy.outside.widths[path][0] for path in paths),
            "out": _widths(anatomy.outside.widths[path][1] for path in paths),
            "first": f"{paths[0]}:out",
        }
        for (region, kind), paths in kinds.items()
    ]


def _addressed(anatomy: Anatomy, path: str) -> bool:
    inside = f"/{anatomy.absolute_path(path)}."
    return any(own.startswith(inside) for own in anatomy.outside.regions)


def _blocks(anatomy: Anatomy) -> list[dict[str, Any]]:
    kinds: dict[tuple[str, ...], list[str]] = {}
    for block in anatomy.blocks:
        kinds.setdefault(tuple(_kind(path) for path in (*block.makers, block.down)), []).append(block.down)
    return [
        {
            "maps": list(kind),
            "layers": len({Site(path, "in").layer for path in downs}),
            "blocks": len(downs),
            "width": _widths(anatomy.in_features[path] for path in downs),
        }
        for kind, downs in kinds.items()
    ]


def _fused(modules: Iterable[Experts]) -> list[dict[str, Any]]:
    kinds: dict[str, list[Experts]] = {}
    for experts in modules:
        kinds.setdefault(_kind(experts.path), []).append(experts)
    return [
        {
            "kind": kind,
            "layers": len({one.layer for one in found}),
            "experts": _widths(one.n_experts for one in found),
            "width": _widths(one.width for one in found),
            "hidden": _widths(one.hidden for one in found),
            "parameters": [*found[0].makers, found[0].down],
            "layout": _layout(found[0]),
            "routed": found[0].routed,
            "dispatched": found[0].dispatched,
        }
        for kind, found in kinds.items()
    ]


def _heads(anatomy: Anatomy) -> list[dict[str, Any]]:
    """One row per kind of side that has heads, and number of heads."""
    kinds: dict[tuple[str, int, int], list[Site]] = {}
    for site, number in anatomy.attention.heads.items():
        kinds.setdefault((site.kind, number, anatomy.width(site) // number), []).append(site)
    return [
        {"kind": kind, "heads": number, "width": width, "layers": len({site.layer for site in sites})}
        for (kind, number, width), sites in kinds.items()
    ]


def _layout(experts: Experts) -> str:
    halves = "gate and up alternating" if experts.interleaved else "gate, then up"
    shape = "[expert, in, out]" if experts.transposed else "[expert, out, in]"
    return ", ".join(
        [
            shape,
            *([halves] if experts.gated and len(experts.makers) == 1 else []),
            *([] if experts.gated else ["no gate"]),
            *(["biases"] if experts.biased else []),
        ]
    )


def _kind(path: str) -> str:
    return Site(path, "out").kind.removesuffix(":out")


def _widths(values: Iterable[int]) -> int | list[int]:
    found = sorted(set(values))
    return found[0] if len(found) == 1 else found
