"""Attention heads: the maps of attention, and which neurons of them belong to which head."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from safeglasses.errors import SafeglassesError
from safeglasses.model.blocks import ATTENTION
from safeglasses.model.sites import Site

_ROLES = {
    "query": re.compile(r"(q|query)(_b)?(_proj)?"),
    "key": re.compile(r"(k|key)(_proj)?"),
    "value": re.compile(r"(v|value|kv_b)(_proj)?"),
    "output": re.compile(r"(o|out|output|dense|c)(_proj)?"),
}
_AT_ONCE = re.compile(r"(in_proj_)?w?qkv(_proj)?|query_key_value|c_attn", re.IGNORECASE)
_WRITTEN = ("v_head_dim", "head_v_dim", "head_dim", "head_size", "attention_head_size", "key_value_proj_dim")


@dataclass(frozen=True)
class Attention:
    """The maps of a decoder's attention."""

    maps: tuple[str, ...] = ()
    """Linear maps inside attention, linear attention included, in the model's order."""
    heads: Mapping[Site, int] = field(default_factory=dict)
    """How many heads lie one behind the other, in blocks of equal width, on each side that has heads: what queries,
    keys and values write, and what the output map reads. Queries and output have the query heads, keys and values
    their own fewer ones: of n query heads and m others, query heads j·n/m … (j+1)·n/m − 1 look at head j.
    A map that writes all three at once has n + 2·m: each block is a head's queries, keys or values. In which order they
    come (GPT-2: all queries first; Persimmon: head by head) is no matter of shapes, and not needed to take a head's
    neurons together."""

    def sites(self, *, without: Iterable[str] = ()) -> tuple[Site, ...]:
        """Return the outputs of all maps but some.

        Raises:
            SafeglassesError: there is none.
        """
        left_out = set(without)
        return self._some(Site(path, "out") for path in self.maps if path not in left_out)

    def sites_by_head(self) -> tuple[Site, ...]:
        """Return the inputs of the output maps: what the heads write, one behind the other.

        Raises:
            SafeglassesError: there is none.
        """
        return self._some(site for site in self.heads if site.side == "in")

    def _some(self, sites: Iterable[Site]) -> tuple[Site, ...]:
        found = tuple(sites)
        if not found:
            raise SafeglassesError(
                "the decoder has no attention whose maps and heads are known",
                given=f"{len(self.maps)} linear maps in attention",
                expected="modules called attention that hold linear maps, and say how wide a head is",
                do='use sites="linears" or sites="mlp"',
            )
        return found


def find_attention(decoder: nn.Module, layers_path: str, widths: Mapping[str, tuple[int, int]]) -> Attention:
    """Find the maps of attention in every layer, and their heads.

    Attention is what is called so, by the name of a module or of its class. The width of a head is what the module
    itself says; maps are told by their last names (``q_proj``, ``query`` …).

    Args:
        decoder: the decoder.
        layers_path: of its list of layers.
        widths: (inputs, outputs) of all linear maps in the layers, by path, in the model's order.
    """
    maps: list[str] = []
    heads: dict[Site, int] = {}
    for path, unit in _units(decoder.get_submodule(layers_path), layers_path):
        inside = [name for name in widths if name.startswith(path + ".")]
        maps += inside
        heads |= _heads(path, unit, {name: widths[name] for name in inside})
    return Attention(tuple(name for name in widths if name in set(maps)), heads)


def _units(layers: nn.Module, layers_path: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost modules of attention in every layer."""
    for number, layer in layers.named_children():
        last = "\n"
        for name, child in layer.named_modules():
            named = ATTENTION.search(name) or ATTENTION.search(type(child).__name__)
            if name and named and not name.startswith(last) and any(True for _ in child.children()):
                last = name + "."
                yield f"{layers_path}.{number}.{name}", child


def _heads(path: str, unit: nn.Module, widths: Mapping[str, tuple[int, int]]) -> dict[Site, int]:
    roles = {role: found[0] for role in _ROLES if len(found := [name for name in widths if _is(role, name)]) == 1}
    said = [vars(child) for child in unit.modules()]  # BERT's heads are known to a module inside
    written = _said(said, _WRITTEN)
    if "output" not in roles or written < 1 or widths[roles["output"]][0] % written:
        return {}
    n = widths[roles["output"]][0] // written
    linear = _said(said, ("head_k_dim",))  # linear attention may have fewer queries, and keys of another width
    keyed = linear or _said(said, ("head_dim",)) or written
    found = {Site(roles["output"], "in"): n}
    for role, path in roles.items():
        outputs, name = widths[path][1], path.rpartition(".")[2]
        if (role == "query" and not linear) or name.startswith("kv_b"):  # with its gate, or keys with values
            count = n if outputs % n == 0 else 0
        else:
            count = _blocks(outputs, written if role == "value" else keyed)
        if role != "output" and count and n % count == 0:
            found[Site(path, "out")] = count
    for path, (_, outputs) in widths.items():
        count = _blocks(outputs, written) if keyed == written else 0
        others, odd = divmod(count - n, 2)
        if _AT_ONCE.fullmatch(path.rpartition(".")[2]) and others > 0 and not odd and n % others == 0:
            found[Site(path, "out")] = count
    return found


def _said(attributes: Iterable[Mapping[str, Any]], names: Iterable[str]) -> int:
    """Return the first number that modules hold under one of these names; 0: none."""
    known = list(attributes)
    return next((own[name] for name in names for own in known if isinstance(own.get(name), int)), 0)


def _blocks(outputs: int, width: int) -> int:
    return outputs // width if outputs % width == 0 else 0


def _is(role: str, path: str) -> bool:
    return bool(_ROLES[role].fullmatch(path.rpartition(".")[2]))
