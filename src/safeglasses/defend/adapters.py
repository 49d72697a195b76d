"""The PEFT side of glasses: an IA3 adapter whose learned vectors are the factors.

IA3 multiplies the output of a target module (bias included) by a vector of shape (out, 1), or, for modules
among ``feedforward_modules``, the input by one of shape (1, in). That is what a factor does, bit for bit: in
float32 whichever way the adapter is loaded; in 16 bits through transformers, or through PEFT with
``autocast_adapter_dtype=False`` (PEFT's default multiplies in float32 there and rounds once more).

Source: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning", section 3.3;
``peft/tuners/ia3/layer.py``. Here the vectors are not trained but computed.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor, nn

from safeglasses.defend.factors import Factors, in_order
from safeglasses.defend.home import Home
from safeglasses.defend.strict import read_object
from safeglasses.defend.tensors import check_shapes, check_tensors, some, tampered
from safeglasses.errors import PartialMatch, SafeglassesError
from safeglasses.files import atomic_write_bytes, write_json
from safeglasses.model.hooks import scaled, tap
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_MAY_MOVE = ("base_model_name_or_path", "revision")


def write_adapter(folder: Path, effective: Factors, home: Home) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``; same factors, same bytes.

    Raises:
        SafeglassesError: two sides of one module, which IA3 cannot hold.
    """
    _refuse_both_sides(effective)
    sites = in_order(effective)
    write_json(folder / CONFIG, _config(sites, home))
    tensors = {_key(site, home): _shaped(site, effective[site]) for site in sites}
    atomic_write_bytes(folder / TENSORS, save(dict(sorted(tensors.items())), metadata={"format": "pt"}))


def lora_config(home: Home, paths: Iterable[str], *, rank: int, alpha: float) -> dict[str, Any]:
    """Return ``adapter_config.json`` of a LoRA of linear maps, as exported glasses and shields write it.

    Args:
        home: the base model.
        paths: of the maps, relative to the decoder.
        rank: of all of them.
        alpha: the scale times the rank.
    """
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": home.source,
        "revision": home.revision,
        "target_modules": [home.absolute(path) for path in paths],
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": home.conv1d,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "exclude_modules": None,
        "auto_mapping": None,
    }


def _config(sites: Iterable[Site], home: Home) -> dict[str, Any]:
    ordered = in_order(sites)
    return {
        "peft_type": "IA3",
        "task_type": None,
        "base_model_name_or_path": home.source,
        "revision": home.revision,
        "target_modules": [home.absolute(site.path) for site in ordered],
        "feedforward_modules": [home.absolute(site.path) for site in ordered if site.side == "in"],
        "fan_in_fan_out": home.conv1d,
        "init_ia3_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "exclude_modules": None,
        "auto_mapping": None,
    }


def check_layout(folder: Path, widths: Mapping[Site, int], home: Home) -> None:
    """Check that PEFT will scale exactly these sites, from the config and the header of the tensors alone.

    Every entry of the config is compared: `exclude_modules` would take modules out again, `auto_mapping` makes
    PEFT import a library of the file's choice. Where the base model lies may differ, for it may move.

    Raises:
        SafeglassesError: the files cannot be read.
        PartialMatch: the config, or a tensor's name, shape or type says something else.
    """
    given, wanted = read_object(folder / CONFIG), _config(widths, home)
    for name in sorted(given.keys() | wanted.keys()):
        if name not in given:
            raise tampered(folder / CONFIG, f"{name} is missing")
        if name not in wanted:
            raise tampered(folder / CONFIG, f"{name[:80]!r} is unknown")
        if name in _MAY_MOVE and isinstance(given[name], str | None):
            continue
        if not _same(given[name], wanted[name]):
            raise tampered(folder / CONFIG, f"{name} is {_differing(given[name], wanted[name])}")
    shapes = {_key(site, home): [width, 1] if site.side == "out" else [1, width] for site, width in widths.items()}
    check_shapes(folder / TENSORS, shapes)


def check_values(folder: Path, effective: Factors, home: Home) -> None:
    """Check that the adapter's vectors are these factors, bit for bit.

    Raises:
        SafeglassesError: the file cannot be read.
        PartialMatch: naming the vectors that differ.
    """
    check_tensors(folder / TENSORS, {_key(site, home): _shaped(site, row) for site, row in effective.items()})


def check_names(model: nn.Module | None, effective: Factors, home: Home) -> None:
    """Refuse names that PEFT would match on other modules as well: it compares the ends of paths.

    Args:
        model: the base model; without it only the targets are compared with each other.
        effective: what the adapter will hold.
        home: the base model as files name it.

    Raises:
        SafeglassesError: naming both modules.
    """
    targets = {home.absolute(site.path) for site in effective}
    inputs = {home.absolute(site.path) for site in effective if site.side == "in"}
    for name in (name for name, _ in model.named_modules()) if model is not None else sorted(targets):
        ends = {name[i + 1 :] for i, letter in enumerate(name) if letter == "."}
        wrong = ends & targets if name not in targets else {t for t in inputs - {name} if name.endswith(t)}
        if wrong:
            raise SafeglassesError(
                "PEFT would apply these glasses to another module as well",
                given=f"{name} ends with {min(wrong)}",
                expected="module paths that are unambiguous in this model",
                do="fold the glasses instead: safeglasses fold",
            )


def one_side(
    effective: Factors, vlm: VLM | None, proved: Mapping[Site, Site] = MappingProxyType({})
) -> tuple[dict[Site, Float[Tensor, " _neuron"]], dict[Site, Site]]:
    """Move factors so that every module has them on one side only, where that can be done.

    In a gated feed-forward block, down(act(gate(x)) ∘ up(x)), factors on the input of *down* and on the
    output of *up* do the same. The move is proved on the block itself before it is made.

    Args:
        effective: factors as they act.
        vlm: the model to prove moves on.
        proved: moves that were proved on the same base model earlier; used where `vlm` is None.

    Returns:
        The factors of the adapter, and which site moved where.

    Raises:
        SafeglassesError: some module keeps both sides.
    """
    moves: dict[Site, Site] = {}
    for site in in_order(effective):
        if site.side == "in" and Site(site.path, "out") in effective:
            up = _up_of(vlm, site) if vlm is not None else proved.get(site)
            moves |= {site: up} if up is not None else {}
    moved = move(effective, moves)
    _refuse_both_sides(moved)
    return moved, moves


def move(effective: Factors, moves: Mapping[Site, Site]) -> dict[Site, Float[Tensor, " _neuron"]]:
    """Multiply each moved site's factors into those of the site it moves to."""
    moved = dict(effective)
    for old, new in moves.items():
        row = moved.pop(old)
        if new in moved and len(moved[new]) != len(row):
            raise PartialMatch("factors cannot move to a site of another width", given=f"{old} to {new}")
        moved[new] = moved[new] * row if new in moved else row
    return moved


def _up_of(vlm: VLM, site: Site) -> Site | None:
    """Find the map whose output scales as the input of `site` does; None unless the block proves it."""
    block_path = site.path.rpartition(".")[0]
    up = Site(f"{block_path}.up_proj", "out")
    names = {up.path, f"{block_path}.gate_proj"}
    widths = vlm.anatomy.linears
    if not names <= widths.keys() or widths[up.path] != vlm.anatomy.in_features[site.path]:
        return None
    block = vlm.model.get_submodule(vlm.anatomy.absolute_path(block_path))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, vlm.anatomy.in_features[up.path], generator=generator).to(vlm.device, vlm.dtype)
    factor = torch.linspace(-1.5, 1.5, widths[up.path])
    seen: list[Tensor] = []
    with (
        torch.no_grad(),
        tap(vlm.model, vlm.anatomy, [site], lambda _, value: seen.append(value.float().cpu())),
    ):
        block(x)
        with scaled(vlm.model, vlm.anatomy, {up: factor}):
            block(x)
    plain, after = seen
    return up if torch.allclose(after, plain * factor, rtol=0.02, atol=1e-3 * float(plain.abs().max())) else None


def _refuse_both_sides(effective: Factors) -> None:
    both = [s.path for s in in_order(effective) if s.side == "in" and Site(s.path, "out") in effective]
    if both:
        raise SafeglassesError(
            "an IA3 adapter scales a module's input or its output, not both",
            given=f"both sides of {len(both)} modules: {some(both)}",
            expected="one side per module; in gated blocks the inputs of down_proj can move to up_proj",
            do="save(folder, vlm) with the model, or fold the glasses: safeglasses fold takes both sides",
        )


def _key(site: Site, home: Home) -> str:
    return f"{_PREFIX}{home.absolute(site.path)}.ia3_l"


def _shaped(site: Site, row: Float[Tensor, " _neuron"]) -> Tensor:
    return row.reshape((-1, 1) if site.side == "out" else (1, -1)).contiguous()


def _same(given: Any, wanted: Any) -> bool:
    if isinstance(wanted, list):
        good = isinstance(given, list) and all(isinstance(name, str) for name in given)
        return good and sorted(given) == sorted(wanted)
    return type(given) is type(wanted) and given == wanted


def _differing(given: Any, wanted: Any) -> str:
    if not isinstance(wanted, list) or not isinstance(given, list):
        return f"{given!r:.80}, not {wanted!r:.80}"
    strings = {name for name in given if isinstance(name, str)}
    extra, missing = sorted(strings - set(wanted)), sorted(set(wanted) - strings)
    parts = [f"{word} {some(names)}" for word, names in (("with", extra), ("without", missing)) if names]
    return " and ".join(parts) or "a list with repeats, or with something that is no text"
