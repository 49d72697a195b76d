"""Fold glasses into quantised checkpoints: where each row has scales of its own, the scales take the factors.

| stored as | scales | what a row's factor multiplies |
|---|---|---|
| GPTQ, AWQ (``qweight``) | ``scales`` (group, out) | a column |
| compressed-tensors, FBGEMM: int8, fp8, packed int4 | ``weight_scale`` (out, 1) or (out, group) | a row |
| bitsandbytes 8 bits | ``SCB`` (out) | an entry |
| bitsandbytes 4 bits, not nested | ``weight.absmax`` (out · group) | a run of entries |
| left unquantised | ``weight`` itself | a row |

w = (q − z)·s in all of them, so the integers q and z stay, and each scale is rounded once to its own type. Factors on
inputs fit where they are equal within each group, or where the row of another map can take them; else they are
refused, as is every format with scales that are coarser than a row or have too few bits.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from safeglasses.defend.factors import Factors, changed, in_order, refuse_fused, refuse_outside
from safeglasses.defend.glasses import Glasses
from safeglasses.defend.home import check_fit, check_norms, check_unfolded, quantisation
from safeglasses.errors import SafeglassesError
from safeglasses.model.sites import Site
from safeglasses.model.weights import norms_digest
from safeglasses.ship.checkpoint import Change, Checkpoint, Stored

_NUMBERS = (torch.float32, torch.float16, torch.bfloat16)
_ROTATIONS = ("transform_config", "rotation")  # of a quantisation config: neurons are mixed with one another
_AGAIN: Mapping[str, str] = {
    "bitsandbytes": 'AutoModelForImageTextToText.from_pretrained("FOLDED", quantization_config='
    'BitsAndBytesConfig(load_in_4bit=True)).save_pretrained("OUT"); or wear the adapter folder, unmerged: '
    'PeftModel.from_pretrained(model, "GLASSES")',
    "fp8": 'AutoModelForImageTextToText.from_pretrained("FOLDED", quantization_config=FineGrainedFP8Config())'
    '.save_pretrained("OUT")',
    "compressed-tensors": 'llmcompressor.oneshot(model="FOLDED", recipe=RECIPE, output_dir="OUT")',
}


@dataclass(frozen=True)
class _Scales:
    """What factors of one linear map multiply."""

    stored: Stored
    """The tensor on disk."""
    rows: int
    """Number of outputs."""
    rows_first: bool
    """Whether it is laid out as (out, group) or as (group, out)."""
    group: Int[Tensor, " in"]
    """The group of each input."""

    def by_group(self, into: Float[Tensor, " in"]) -> Float[Tensor, " group"] | None:
        """Return one factor per group, if the inputs of each group share theirs."""
        found = torch.ones(self.stored.numel // self.rows).scatter(0, self.group, into)
        return found if torch.equal(found[self.group], into) else None

    def change(self, out: Tensor | None, into: Tensor | None) -> Change:
        """Make the change on disk: a product in float32, rounded once."""
        groups = None if into is None else self.by_group(into)

        def scale(tensor: Tensor) -> Tensor:
            grid = tensor.float().reshape((self.rows, -1) if self.rows_first else (-1, self.rows))
            for factors, axis in ((out, 1), (groups, 0)):
                if factors is not None:
                    grid = grid * factors.unsqueeze(axis if self.rows_first else 1 - axis)
            return _rounded(grid.reshape(tensor.shape), tensor.dtype, self.stored.key)

        return Change(self.stored, scale)


def check_quantised_base(checkpoint: Checkpoint, glasses: Glasses) -> None:
    """Refuse a quantised checkpoint that is no copy of the glasses' base, as far as norms can tell (`check_norms`).

    Raises:
        WrongBase: its norms are others, or it has these glasses' like folded in already.
    """
    config, parts = checkpoint.config, checkpoint.anatomy
    check_unfolded(config, checkpoint.source, glasses.base_fingerprint, glasses.home)
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name, parameter in checkpoint.model.named_parameters():
        prefix = parts.absolute_path("")
        place = checkpoint.places.get(name)
        if place is None or parameter.ndim != 1 or not name.startswith(prefix) or not name.endswith("weight"):
            continue
        inside = name.removeprefix(prefix).startswith(f"{parts.layers_path}.")
        found[inside].append(checkpoint.read(place.stored[0]))
    digest = norms_digest(outside=found[0], inside=found[1])
    method = quantisation(config) or "not quantised"
    check_norms(f"{checkpoint.source} ({method})", method, digest, glasses.base_fingerprint, glasses.home)


def quantised_changes(checkpoint: Checkpoint, factors: Factors) -> list[Change]:
    """Find what to multiply on disk so that a quantised checkpoint wears the factors, biases included.

    Raises:
        PartialMatch: some site is missing or of another width.
        SafeglassesError: a factor that no scale can take exactly, with what to do instead.
    """
    refuse_fused(
        changed(factors),
        "a quantised checkpoint's scales",
        "fold into the unquantised checkpoint, then quantise the result",
    )
    refuse_outside(
        changed(factors), "a patched quantised checkpoint", "fold into the unquantised checkpoint, then quantise"
    )
    check_fit(checkpoint.anatomy, factors)
    acting, changes, stuck = changed(factors), [], []
    _refuse_rotated(checkpoint)
    scales = {path: _scales(checkpoint, path) for path in dict.fromkeys(site.path for site in in_order(acting))}
    result = dict(acting)
    for site in in_order(acting):
        found = scales[site.path]
        if found is not None and (site.side == "out" or found.by_group(acting[site]) is not None):
            continue
        up = _up_of(checkpoint, site) if found is not None else None
        if up is None or scales.setdefault(up.path, _scales(checkpoint, up.path)) is None:
            stuck.append(f"{site} ({', '.join(sorted(_leaves(checkpoint, site.path))) or 'not stored'})")
            continue
        row = result.pop(site)
        result[up] = result[up] * row if up in result else row
    if stuck:
        raise _not_exact(checkpoint, stuck)
    for path in dict.fromkeys(site.path for site in in_order(result)):
        out, into, found = result.get(Site(path, "out")), result.get(Site(path, "in")), scales[path]
        if found is not None:
            changes.append(found.change(out, into))
        bias = _leaves(checkpoint, path).get("bias")
        if bias is not None and out is not None:
            changes.append(_Scales(bias, len(out), True, torch.zeros(1, dtype=torch.int64)).change(out, None))
    return changes


def _leaves(checkpoint: Checkpoint, path: str) -> dict[str, Stored]:
    """Return what is stored of one linear map, by the last part of its name; nothing that a conversion makes."""
    prefix = checkpoint.anatomy.absolute_path(path) + "."
    return {
        name.removeprefix(prefix): place.stored[0]
        for name, place in checkpoint.places.items()
        if name.startswith(prefix) and place.conversion is None
    }


def _scales(checkpoint: Checkpoint, path: str) -> _Scales | None:
    """Find the scales of one linear map; None if it has none that a factor per row can go into."""
    leaves = _leaves(checkpoint, path)
    rows, inputs = checkpoint.anatomy.linears[path], checkpoint.anatomy.in_features[path]
    method, first = quantisation(checkpoint.config), True
    order: Stored | None = None
    if "qweight" in leaves and "scales" in leaves:
        found, first = leaves["scales"], False
        order = leaves.get("g_idx")
        shape = leaves["qweight"].shape
        if len(shape) != 2 or shape[0 if method == "awq" else 1] != (inputs if method == "awq" else rows):
            return None  # repacked for one kernel (Marlin, GEMV): scales are permuted
    elif "weight_scale" in leaves:
        found, order = leaves["weight_scale"], leaves.get("weight_g_idx")
    elif "SCB" in leaves:
        found = leaves["SCB"]
    elif "weight.absmax" in leaves:
        found = leaves["weight.absmax"]
    else:
        found, first = leaves.get("weight"), not _transposed(checkpoint, path)
        if found is None or found.shape != ((rows, inputs) if first else (inputs, rows)):
            return None
    groups = found.numel // rows
    sized = found.numel == groups * rows and groups > 0 and (order is not None or inputs % groups == 0)
    if not sized or found.dtype not in _NUMBERS or (len(found.shape) > 1 and found.shape[0 if first else -1] != rows):
        return None
    group = torch.arange(inputs) // (inputs // groups) if order is None else checkpoint.read(order).long().flatten()
    return _Scales(found, rows, first, group) if len(group) == inputs and int(group.max()) < groups else None


def _transposed(checkpoint: Checkpoint, path: str) -> bool:
    return not isinstance(checkpoint.model.get_submodule(checkpoint.anatomy.absolute_path(path)), nn.Linear)


def _up_of(checkpoint: Checkpoint, site: Site) -> Site | None:
    """Find the map whose output scales as the input of `site` does; None unless random weights prove it.

    As in `defend.adapters.one_side`, but on a copy of the block: what it computes does not depend on its weights.
    """
    parts, (block_path, _, last) = checkpoint.anatomy, site.path.rpartition(".")
    up, gate = Site(f"{block_path}.up_proj", "out"), f"{block_path}.gate_proj"
    if not {up.path, gate} <= parts.linears.keys() or parts.linears[up.path] != parts.in_features[site.path]:
        return None
    generator = torch.Generator().manual_seed(0)
    block = deepcopy(checkpoint.model.get_submodule(parts.absolute_path(block_path))).to_empty(device="cpu").float()
    factor, seen = torch.linspace(-1.5, 1.5, parts.linears[up.path]), []

    def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])

    def multiply(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output * factor

    noise = torch.randn(65_537, generator=generator)  # repeated: drawing a large block's weights takes a second
    with torch.no_grad():
        for parameter in block.parameters():
            tiled = noise.repeat(parameter.numel() // len(noise) + 1)[: parameter.numel()]
            parameter.copy_(tiled.reshape(parameter.shape) * parameter.shape[-1] ** -0.5)
        x = torch.randn(1, 4, parts.in_features[up.path], generator=generator)
        block.get_submodule(last).register_forward_pre_hook(keep)
        block(x)
        block.get_submodule("up_proj").register_forward_hook(multiply)
        block(x)
    return up if torch.allclose(seen[1], seen[0] * factor, rtol=1e-3, atol=1e-5) else None


def _rounded(product: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    rounded = product.to(dtype)
    if not bool(rounded.isfinite().all()):
        raise SafeglassesError(
            "a scaled weight does not fit into its type",
            given=f"{key}: {int((~rounded.isfinite()).sum())} values outside {dtype}, or not finite before",
            expected="factors that keep every weight in range",
            do="lower the strength, or fold before quantising",
        )
    return rounded


def _refuse_rotated(checkpoint: Checkpoint) -> None:
    config: Any = getattr(checkpoint.config, "quantization_config", None)
    found = config if isinstance(config, Mapping) else vars(config) if config is not None else {}
    rotations = [name for name in _ROTATIONS if found.get(name)]
    if rotations:
        raise _not_exact(checkpoint, [f"{name} mixes neurons with one another" for name in rotations])


def _not_exact(checkpoint: Checkpoint, what: list[str]) -> SafeglassesError:
    method = quantisation(checkpoint.config) or "none"
    again = _AGAIN.get(method, "quantise FOLDED as the base was quantised")
    return SafeglassesError(
        "these factors cannot be folded exactly into a quantised checkpoint",
        given=f"{checkpoint.source} ({method}), {len(what)} places: {', '.join(what[:3])}",
        expected="factors on outputs of maps with a scale per row in 16 or 32 bits, or on inputs that share a scale",
        do=f"fold first, then quantise: safeglasses fold BASE --glasses GLASSES --out FOLDED; then {again}",
    )
