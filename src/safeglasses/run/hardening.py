"""Does a defence last? The same model after pruning, after benign fine-tuning, and in eight bits."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from safeglasses.data.examples import Example
from safeglasses.defend.home import FOLDED
from safeglasses.defend.weights import scale_weights
from safeglasses.find.contrasting import feed_forward_sites
from safeglasses.find.selection import Selection
from safeglasses.model.anatomy import module
from safeglasses.model.vlm import VLM
from safeglasses.tune.config import TuneConfig
from safeglasses.tune.layers import carried_by_peft
from safeglasses.tune.shield import Shield
from safeglasses.tune.training import tune

TREATMENTS = ("pruned", "benign fine-tuning", "int8")
STEPS = 50


def defended(vlm: VLM, shield: Shield | None) -> VLM:
    """Return a copy of the model in memory, with the shield folded in, that counts as a model of its own."""
    twin = replace(vlm, model=copy.deepcopy(vlm.model))
    if shield is not None:
        shield.fold(twin)
        delattr(twin.model.config, FOLDED)  # what follows is done to it as to any model
    return twin


def pruned(vlm: VLM, neurons: Selection) -> None:
    """Set what reads the neurons to zero in the output maps, in place: what they are no longer matters."""
    scale_weights(vlm.model, vlm.anatomy, {site: (~mask).float().cpu() for site, mask in neurons.masks.items()})


def fine_tuned(vlm: VLM, examples: Sequence[Example], *, steps: int = STEPS, config: TuneConfig) -> None:
    """Train gate and up of every layer on benign examples for some steps, in place: LoRA without a mask."""
    sites = carried_by_peft(vlm.model, vlm.anatomy, feed_forward_sites(vlm))
    every = Selection({site: torch.ones(vlm.anatomy.width(site), dtype=torch.bool) for site in sites})
    trained = tune(vlm, every, examples, mode="plain", config=replace(config, max_steps=steps))
    trained.fold(vlm)
    delattr(vlm.model.config, FOLDED)


def rounded_to_int8(vlm: VLM) -> None:
    """Round the weights of the decoder's linear maps and fused experts to 8 bits a row, in place (largest = 127).

    What weight-only int8 serving computes with, up to its own arithmetic.
    """
    anatomy = vlm.anatomy
    linear = dict.fromkeys(site.path for site in anatomy.sites("linears"))
    weights = [(module(vlm.model, anatomy, path).get_parameter("weight"), -1) for path in linear]
    for path, experts in anatomy.experts.items():
        names = (f"{anatomy.absolute_path(path)}.{name}" for name in (*experts.makers, experts.down))
        weights += [(vlm.model.get_parameter(name), -2 if experts.transposed else -1) for name in names]
    with torch.no_grad():
        for weight, axis in weights:
            weight.copy_(rounded(weight, axis))


def rounded(weight: Tensor, axis: int = -1) -> Tensor:
    """Return a weight as it is after symmetric rounding of each row to 255 levels.

    Args:
        weight: a matrix, or several.
        axis: along which a row lies: that of the inputs.
    """
    scale = weight.float().abs().amax(dim=axis, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (weight.float() / scale).round().mul(scale).to(weight.dtype)


def treatments(neurons: Selection, ordinary: Sequence[Example], config: TuneConfig) -> dict[str, Callable[[VLM], None]]:
    """Return what is done to a copy, by name; benign fine-tuning only where there are examples for it."""
    found: dict[str, Callable[[VLM], None]] = {"pruned": lambda vlm: pruned(vlm, neurons)}
    if ordinary:
        found["benign fine-tuning"] = lambda vlm: fine_tuned(vlm, ordinary, config=config)
    found["int8"] = rounded_to_int8
    return found
