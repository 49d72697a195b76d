"""Find the language decoder, its linear maps and feed-forward neurons by structure, never by family name."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from safeglasses.errors import SafeglassesError
from safeglasses.model import trouble
from safeglasses.model.blocks import ATTENTION, Block, find_blocks
from safeglasses.model.crossing import CROSS, is_key, merges
from safeglasses.model.decoders import find_decoder, find_encoder, find_layers, other_layers
from safeglasses.model.experts import Experts, find_experts
from safeglasses.model.heads import Attention, find_attention
from safeglasses.model.outside import Outside, Stream, find_outside
from safeglasses.model.sites import Site

What = Literal["mlp", "linears", "neurons", "attention", "heads", "vision", "projector", "encoder", "crossing"]


@dataclass(frozen=True)
class Anatomy:
    """Where a model keeps the parts that glasses act on; paths are relative to the decoder unless said."""

    decoder_path: str
    """Path of the decoder inside the model: ``model.language_model``; empty if the model is the decoder."""
    layers_path: str
    """Path of the decoder's list of layers, e.g. ``layers``."""
    n_layers: int
    """Number of decoder layers."""
    hidden_size: int
    """Width of the residual stream."""
    linears: Mapping[str, int]
    """``out_features`` of every linear map inside the layers, by path, in the model's own order."""
    in_features: Mapping[str, int]
    """``in_features`` of the same maps."""
    blocks: tuple[Block, ...]
    """Feed-forward blocks of linear maps, in the model's order. A layer may have several (experts that are modules, a
    dense block beside experts) or none; empty if not found."""
    ffn_reason: str = ""
    """Why there is no such block."""
    experts: Mapping[str, Experts] = field(default_factory=dict)
    """Modules of fused experts, by path; no linear maps, so in none of the fields above."""
    attention: Attention = field(default_factory=Attention)
    """The maps of attention, and which of their neurons belong to which head."""
    beside: Mapping[str, int] = field(default_factory=dict)
    """Further lists of layers with attention in the decoder's module, with their lengths (Idefics's gated
    cross-attention, an encoder): what is in them has an address in `outside`, if any."""
    encoder_path: str | None = None
    """Path of the encoder inside the model, of an encoder–decoder; None: there is none."""
    merged_keys: tuple[str, ...] = ()
    """Key and value maps of attention that reads the decoder's and the encoder's tokens at once (T5Gemma 2)."""

    outside: Outside = field(default_factory=Outside)
    """Linear maps beyond the decoder's layers; their paths begin with a slash and are the model's."""

    @cached_property
    def ffn(self) -> tuple[str, ...]:
        """Output maps of the feed-forward blocks: their inputs are the neurons."""
        return tuple(block.down for block in self.blocks)

    @cached_property
    def mlp(self) -> tuple[str, ...]:
        """All linear maps of the feed-forward blocks, in the model's order."""
        return tuple(path for path in self.linears if path in self._members)

    @cached_property
    def neurons(self) -> tuple[Site, ...]:
        """Inputs of the feed-forward output maps, then those of fused experts; empty if there are none."""
        fused = (site for experts in self.experts.values() for site in experts.sites("in"))
        return (*(Site(path, "in") for path in self.ffn), *fused)

    @property
    def cross_attention_layers(self) -> tuple[int, ...]:
        """Layers that look at pictures alone, with a feed-forward block of their own; text-only inputs skip them."""
        kinds: dict[int, set[bool]] = {}
        for path in self.linears:
            inner = path.removeprefix(self.layers_path + ".")
            if ATTENTION.search(inner):
                kinds.setdefault(int(inner.partition(".")[0]), set()).add(bool(CROSS.search(inner)))
        return tuple(sorted(layer for layer, found in kinds.items() if found == {True}))

    @cached_property
    def cross_attention_keys(self) -> tuple[str, ...]:
        """Key and value maps of cross-attention: they read pictures or an encoder, not the decoder's tokens alone."""
        merged = set(self.merged_keys)
        return tuple(path for path in self.linears if path in merged or (is_key(path) and CROSS.search(path)))

    @property
    def layers_without_neurons(self) -> tuple[int, ...]:
        """Layers without a feed-forward block, as hybrids have that do one thing per layer."""
        filled = {Site(path, "in").layer for path in self.ffn} | {fused.layer for fused in self.experts.values()}
        return tuple(layer for layer in range(self.n_layers) if layer not in filled)

    def block_of(self, path: str) -> Block | None:
        """Return the feed-forward block that a linear map belongs to."""
        return self._members.get(path)

    def expert(self, site: Site) -> tuple[Experts, int] | None:
        """Return the fused experts that a site is one of, and its number there; None for linear maps."""
        path, _, number = site.path.rpartition(".")
        found = self.experts.get(path)
        if found is None or not number.isdecimal() or int(number) >= found.n_experts:
            return None
        return found, int(number)

    def stream(self, site: Site) -> Stream:
        """Return whose tokens a site's values belong to.

        Raises:
            PartialMatch: the model has no such linear map or expert.
            SafeglassesError: it reads several kinds of tokens at once.
        """
        self.width(site)
        if site.path in self.merged_keys:
            raise trouble.merged(site)
        if site.outside:
            return self.outside.stream(site.path)
        if site.path not in self.cross_attention_keys:
            return "decoder"
        return "picture" if self.encoder_path is None else "encoder"

    def sites(self, what: What | Sequence[What]) -> tuple[Site, ...]:
        """Return a family of sites, or several one after the other.

        ``mlp``: outputs of all maps of the feed-forward blocks; ``linears``: outputs of all linear maps of the
        decoder but `cross_attention_keys`, without fused experts; ``neurons``: inputs of the feed-forward output
        maps; ``attention``: outputs of attention's maps (queries, keys, values, output; of cross-attention without
        keys and values); ``heads``: inputs of attention's output maps, head by head. Fused experts follow the linear
        maps. Beyond the decoder, outputs of all linear maps: ``vision``: of the tower's layers; ``projector``: between
        tower and decoder; ``encoder``: of an encoder–decoder's encoder; ``crossing``: of cross-attention layers beside
        the decoder's, and keys and values of the decoder's own that read pictures or the encoder. See `find_outside`.

        Raises:
            SafeglassesError: the model has no such sites.
        """
        if not isinstance(what, str):
            return tuple(dict.fromkeys(site for one in what for site in self.sites(one)))
        if what == "crossing":
            keys = tuple(Site(path, "out") for path in self.cross_attention_keys if path not in self.merged_keys)
            return (*keys, *self.outside.sites(what)) if self.outside.paths(what) or not keys else keys
        if what == "vision" or what == "projector" or what == "encoder":
            return self.outside.sites(what)
        if what == "attention":
            return self.attention.sites(without=self.cross_attention_keys)
        if what == "heads":
            return self.attention.sites_by_head()
        if what == "linears":
            if not self.linears:
                raise trouble.no_linears(self.n_layers, self.absolute_path(self.layers_path))
            elsewhere = set(self.cross_attention_keys)
            return tuple(Site(path, "out") for path in self.linears if path not in elsewhere)
        if not self.neurons:
            raise trouble.no_blocks(self.ffn_reason, self.linears)
        if what == "neurons":
            return self.neurons
        fused = (site for experts in self.experts.values() for site in experts.sites("gate", "up", "out"))
        return (*(Site(path, "out") for path in self.mlp), *fused)

    def width(self, site: Site) -> int:
        """Return the number of neurons of a site.

        Raises:
            PartialMatch: the decoder has no such linear map or expert.
        """
        found = self.expert(site)
        if found is not None and (site.side != "gate" or found[0].gated):
            return found[0].size(site.side)
        self.require(site.path)
        if site.side not in ("in", "out"):
            raise trouble.no_side(site)
        if site.outside:
            return self.outside.widths[site.path][site.side == "out"]
        return self.linears[site.path] if site.side == "out" else self.in_features[site.path]

    def halves(self, path: str) -> tuple[str, str] | None:
        """Return what the two halves of a gate-and-up map are called, in their order; None for other maps.

        The site is the map's whole ``:out``, as adapters want it; single neurons are addressed by half.
        """
        block = self.block_of(path)
        if block is None or path == block.down or self.linears[path] != 2 * self.in_features[block.down]:
            return None
        return Site(path, "out").halves

    def address(self, site: Site, index: int) -> str:
        """Return the text form of one neuron; in a fused map by half: ``layers.0.mlp.gate_up_proj:up#3``."""
        return site.address(index, self.width(site))

    def neuron(self, text: str) -> tuple[Site, int]:
        """Read the text form of one neuron, `address`'s or the plain ``SITE#INDEX``.

        Raises:
            SafeglassesError: no neuron's address, or an index that the site does not have.
            PartialMatch: the model has no such site.
        """
        place, _, number = text.partition("#")
        site = Site.parse(place)
        halves = self.halves(site.path) if site.side not in ("in", "out") else None
        whole = Site(site.path, "out") if halves is not None else site
        width = self.width(whole) // (1 if halves is None else 2)
        if not (number.isdecimal() and int(number) < width):
            raise SafeglassesError("no such neuron", given=repr(text), expected=f"{place}#0 … {place}#{width - 1}")
        return whole, int(number) + (width * halves.index(site.side) if halves is not None else 0)

    def absolute(self, site: Site) -> str:
        """Return the path of the site's module inside the whole model, as adapter files want it."""
        return self.absolute_path(site.path)

    def absolute_path(self, path: str) -> str:
        """Return a site's path as a path inside the whole model."""
        if path.startswith("/"):
            return path[1:]
        return f"{self.decoder_path}.{path}" if self.decoder_path else path

    def require(self, *paths: str) -> None:
        """Check that the model has these linear maps, in the decoder's layers or beyond.

        Raises:
            PartialMatch: at least one is missing, or one of fused experts.
        """
        missing = [path for path in paths if path not in self.linears and path not in self.outside.widths]
        fused = [path for path in missing if self.expert(Site(path, "in")) is not None]
        if fused:
            raise trouble.no_modules(fused)
        if missing:
            raise trouble.missing(missing, len(paths), list(self.linears))

    def require_linear(self, sites: Iterable[Site]) -> None:
        """Check that these are the two sides of linear maps, before hooks are put on them.

        Raises:
            PartialMatch: a module is missing, or a site is one of fused experts, or a side that no map has.
        """
        wanted = tuple(sites)
        self.require(*(site.path for site in wanted))
        for site in wanted:
            self.width(site)
            if self.stream(site) != "decoder":
                raise trouble.other_tokens(site)

    @cached_property
    def _members(self) -> Mapping[str, Block]:
        return {path: block for block in self.blocks for path in (*block.makers, block.down)}


def anatomy(model: nn.Module) -> Anatomy:
    """Find the parts of a model.

    The decoder is ``model.get_decoder()``; its layers are its list of modules as long as the text config's
    ``num_hidden_layers`` (see `decoders`). What a feed-forward block is says `blocks`, what fused experts are
    `experts`, what attention and its heads are `heads`.

    Raises:
        SafeglassesError: no decoder, or no list of layers in it.
    """
    decoder, decoder_path = find_decoder(model)
    layers_path, n_layers, hidden_size = find_layers(model, decoder)
    widths: dict[str, tuple[int, int]] = {}
    for path, child in decoder.named_modules():
        if path.startswith(layers_path + "."):
            if isinstance(child, nn.Linear) and "router" not in type(child).__name__.lower():
                # a router that is one (Llama 4, PhiMoE) gives its choices beside its scores, and no tensor
                widths[path] = (child.in_features, child.out_features)
            elif isinstance(child, Conv1D):
                widths[path] = (child.nx, child.nf)
    experts, encoder_path = find_experts(decoder, layers_path), find_encoder(model)
    found = find_blocks(decoder, layers_path, widths, hidden_size, experts)
    return Anatomy(
        decoder_path=decoder_path,
        layers_path=layers_path,
        n_layers=n_layers,
        hidden_size=hidden_size,
        linears={path: out for path, (_, out) in widths.items()},
        in_features={path: into for path, (into, _) in widths.items()},
        blocks=found.blocks,
        ffn_reason=found.reason,
        experts=experts,
        attention=find_attention(decoder, layers_path, widths),
        beside=other_layers(decoder, layers_path),
        encoder_path=encoder_path,
        merged_keys=tuple(path for path in widths if is_key(path) and merges(decoder, path)),
        outside=find_outside(model, decoder_path, layers_path, hidden_size, encoder_path),
    )


def module(model: nn.Module, anatomy: Anatomy, site: Site | str) -> nn.Module:
    """Return the linear map of a site (or of a decoder-relative path).

    Raises:
        PartialMatch: the decoder has no such linear map.
    """
    path = site.path if isinstance(site, Site) else site
    anatomy.require(path)
    return model.get_submodule(anatomy.absolute_path(path))
