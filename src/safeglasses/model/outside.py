"""Linear maps beyond the decoder's layers: vision tower, projector, encoder, gated cross-attention; by structure.

Their addresses are paths inside the whole model behind a slash, ``/model.multi_modal_projector.linear_1:out``: no
decoder-relative address begins so, and both kinds may stand in one selection.
"""

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, get_args

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from safeglasses.errors import SafeglassesError
from safeglasses.model.blocks import ATTENTION
from safeglasses.model.crossing import CROSS, is_key
from safeglasses.model.sites import Site

Region = Literal["vision", "projector", "encoder", "crossing"]
REGIONS: tuple[Region, ...] = get_args(Region)
Stream = Literal["decoder", "encoder", "picture"]
"""Whose tokens a map reads: those that the decoder reads, those of an encoder, or what a picture was cut into."""
_TOLD: dict[Region, str] = {
    "vision": "no layers of linear maps that read pictures were found",
    "projector": "no linear map between a vision tower and the decoder was found",
    "encoder": "the model has no encoder that reads text",
    "crossing": "no cross-attention layers beside the decoder's, and no keys and values that read pictures alone",
}
_UNUSED = re.compile(r"audio|speech|pooler|generat", re.IGNORECASE)
"""Other senses than sight, summaries of whole pictures that no language model reads, what makes pictures (Janus)."""


@dataclass(frozen=True)
class Outside:
    """Linear maps outside the decoder's layers, by region; paths begin with a slash."""

    widths: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """(inputs, outputs) of every map, in the model's order."""
    regions: Mapping[str, Region] = field(default_factory=dict)
    """Where each lies."""
    towers: tuple[str, ...] = ()
    """Vision towers: paths inside the model, without slash."""

    def paths(self, region: Region) -> tuple[str, ...]:
        """Return a region's maps."""
        return tuple(path for path, own in self.regions.items() if own == region)

    def sites(self, region: Region) -> tuple[Site, ...]:
        """Return the outputs of a region's maps.

        Raises:
            SafeglassesError: there are none.
        """
        found = tuple(Site(path, "out") for path in self.paths(region))
        if not found:
            raise SafeglassesError(
                f"there are no sites = {region!r} in this model",
                given=_TOLD[region],
                expected="one of " + (", ".join(r for r in REGIONS if self.paths(r)) or "the decoder's own sites"),
                do="list the model's sites with `safeglasses inspect MODEL`",
            )
        return found

    def stream(self, path: str) -> Stream:
        """Return whose tokens a map reads; gated cross-attention reads the decoder's, its keys and values pictures'."""
        region = self.regions[path]
        if region == "crossing":
            return "picture" if is_key(path) and CROSS.search(path) else "decoder"
        return "encoder" if region == "encoder" else "picture"


def find_outside(
    model: nn.Module, decoder_path: str, layers_path: str, hidden_size: int, encoder_path: str | None
) -> Outside:
    """Find the maps beyond the decoder's layers.

    *Vision*: linear maps in the lists of layers with attention (in all of it, where there is no such list) of every
    vision tower: what the model calls its image encoder, or takes ``pixel_values``. *Encoder*: the same in an
    encoder–decoder's encoder. *Crossing*: lists of cross-attention layers in the decoder's module that are not its own.
    *Projector*: what else a tower holds behind its layers, and parts that read as many numbers as a tower or another
    such part writes, several side by side included.

    Args:
        model: the whole model; the meta device will do.
        decoder_path: absolute.
        layers_path: of the decoder's layers, relative to it.
        hidden_size: of the decoder.
        encoder_path: absolute, of an encoder–decoder.
    """
    layers = f"{decoder_path}.{layers_path}".lstrip(".")
    modules = dict(model.named_modules())
    maps = {name: _widths(part) for name, part in modules.items() if isinstance(part, nn.Linear | Conv1D)}
    maps = {
        name: widths
        for name, widths in maps.items()
        if not _below(name, (layers,)) and not isinstance(modules[name], NonDynamicallyQuantizableLinear)
    }
    found: dict[str, Region] = {}
    towers: list[str] = []
    for tower in _towers(model, modules, layers, encoder_path):
        inside = _inside_tower(modules, {n: w for n, w in maps.items() if _below(n, (tower,))}, tower, hidden_size)
        found |= inside
        towers += [tower] * bool(inside)
    reading: list[str] = []
    if encoder_path is not None and encoder_path not in towers:
        reading = [at for at in _layer_lists(modules[encoder_path], encoder_path) if not _below(at, towers)]
        found |= {name: "encoder" for name in maps if _below(name, reading)}
    beside = [at for at in _layer_lists(modules[decoder_path], decoder_path) if at != layers and at not in reading]
    crossing = [at for at in beside if not _below(at, towers) and all(map(_crosses, modules[at].children()))]
    found |= {name: "crossing" for name in maps if _below(name, crossing)}
    if towers:
        parts = _parts(model, modules, [n for n in maps if n not in found], (*towers, *reading, *crossing), layers)
        found |= dict.fromkeys(_between(modules, parts, towers, hidden_size), "projector")
    order = [name for name in maps if name in found]
    return Outside({f"/{n}": maps[n] for n in order}, {f"/{n}": found[n] for n in order}, tuple(towers))


def _towers(
    model: nn.Module, modules: Mapping[str, nn.Module], layers: str, encoder_path: str | None
) -> tuple[str, ...]:
    """Return the outermost modules that read pictures and do not hold the decoder, or an encoder of text."""
    holds = [name for name in modules if name == "" or _below(layers, (name,))]
    get_encoder: Any = getattr(model, "get_encoder", None)
    named = get_encoder("image") if callable(get_encoder) else None
    told = [
        name
        for name, part in modules.items()
        if name not in holds and (part is named or _reads_pixels(type(part))) and not _embeds_words(part, model)
    ]
    if encoder_path is not None:  # what holds an encoder of text is no tower
        told = [name for name in told if not _below(encoder_path, (name,)) or name == encoder_path]
    return tuple(name for name in told if not any(_below(name, (other,)) for other in told if other != name))


def _inside_tower(
    modules: Mapping[str, nn.Module], maps: Mapping[str, tuple[int, int]], tower: str, hidden_size: int
) -> dict[str, Region]:
    """Tell a tower's layers from what makes their outputs ready for the decoder; not from embeddings and summaries."""
    names = [name for name in maps if not _UNUSED.search(name)]
    lists = _layer_lists(modules[tower], tower) or _lists(modules[tower], tower)
    layers = [name for name in names if _below(name, lists)] if lists else names
    found: dict[str, Region] = dict.fromkeys(layers, "vision")
    for place, inner in modules[tower].named_children():
        part = [name for name in names if _below(name, (f"{tower}.{place}",)) and name not in found]
        pools = any(isinstance(child, nn.MultiheadAttention) for child in inner.modules())
        behind = bool(part and layers) and names.index(part[0]) > names.index(layers[0])
        reads = any(maps[name][0] % maps[layer][1] == 0 for name in part for layer in layers)
        if not pools and (behind or (reads and any(maps[name][1] == hidden_size for name in part))):
            found |= dict.fromkeys(part, "projector")
    return found


def _parts(
    model: nn.Module, modules: Mapping[str, nn.Module], rest: Iterable[str], others: Iterable[str], layers: str
) -> dict[str, list[str]]:
    """Return the outermost parts that hold neither the decoder nor others, with their maps.

    Left out are the decoder (but for what holds a tower as well), the map to the vocabulary, stacks of text layers, and
    the half of an autoencoder that makes pictures.
    """
    get_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head, apart = get_head(), tuple(others)
    around = [name for name in modules if name and _below(layers, (name,))]
    holds = [name for name in around if any(_below(other, (name,)) for other in apart)]
    halves = [f"{place.removesuffix('.encoder')}.decoder" for place in apart if place.endswith(".encoder")]
    own = (*apart, *(name for name in around if name not in holds), *halves)
    parts: dict[str, list[str]] = {}
    for name in rest:
        if modules[name] is not head and not _below(name, own) and not _UNUSED.search(name):
            parts.setdefault(_part(name, (*apart, layers)), []).append(name)
    return {place: names for place, names in parts.items() if not _embeds_words(modules[place], model)}


def _between(
    modules: Mapping[str, nn.Module], parts: Mapping[str, list[str]], towers: Iterable[str], hidden_size: int
) -> list[str]:
    """Follow widths from the towers on: a part that reads what is known writes what others may read."""
    known = {out for tower in towers for _, out in _all_widths(modules[tower])}
    chosen: list[str] = []
    waiting = dict(parts)
    while True:
        fits = [p for p in waiting if any(into % out == 0 for into, _ in _all_widths(modules[p]) for out in known)]
        if not fits:
            return chosen
        for place in fits:
            chosen += waiting.pop(place)
            known |= {out for _, out in _all_widths(modules[place]) if out != hidden_size}


def _all_widths(part: nn.Module) -> list[tuple[int, int]]:
    """Return inputs and outputs of all maps, convolutions included."""
    linear = [_widths(child) for child in part.modules() if isinstance(child, nn.Linear | Conv1D)]
    convolved = [
        (c.in_channels, c.out_channels) for c in part.modules() if isinstance(c, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    ]
    return linear + convolved


def _part(name: str, around: tuple[str, ...]) -> str:
    """Return the outermost module around a map that holds none of the others."""
    pieces = name.split(".")
    for stop in range(1, len(pieces) + 1):
        place = ".".join(pieces[:stop])
        if not any(_below(other, (place,)) for other in around):
            return place
    return name


def _layer_lists(root: nn.Module, path: str) -> tuple[str, ...]:
    """Return the absolute paths of the outermost lists of modules with attention."""
    lists = [(name, part) for name, part in root.named_modules() if isinstance(part, nn.ModuleList) and len(part)]
    attending = [name for name, part in lists if all(_attends(layer) for layer in part)]
    outer = [name for name in attending if not any(name.startswith(f"{other}.") for other in attending)]
    return tuple(f"{path}.{name}".lstrip(".") for name in outer)


def _lists(root: nn.Module, path: str) -> tuple[str, ...]:
    """Return the absolute paths of the outermost lists of modules."""
    lists = [name for name, part in root.named_modules() if isinstance(part, nn.ModuleList) and len(part)]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return tuple(f"{path}.{name}".lstrip(".") for name in outer)


def _attends(layer: nn.Module) -> bool:
    return any(ATTENTION.search(n) or ATTENTION.search(type(part).__name__) for n, part in layer.named_modules())


def _crosses(layer: nn.Module) -> bool:
    return any(CROSS.search(name) for name, _ in layer.named_modules())


@cache
def _reads_pixels(kind: type[nn.Module]) -> bool:
    names = inspect.signature(kind.forward).parameters
    return any(name.startswith(("pixel_values", "flattened_patches")) for name in names)


def _embeds_words(part: nn.Module, model: nn.Module) -> bool:
    """Tell a stack of text layers: it holds as many word vectors as the model's vocabulary."""
    config: Any = model.config
    size = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    return any(isinstance(child, nn.Embedding) and child.num_embeddings == size for child in part.modules())


def _below(name: str, places: Iterable[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def _widths(part: nn.Linear | Conv1D) -> tuple[int, int]:
    if isinstance(part, nn.Linear):
        return int(part.in_features), int(part.out_features)  # some configs make tensors of them
    return part.nx, part.nf
