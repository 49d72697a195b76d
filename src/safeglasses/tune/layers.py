"""PEFT's LoRA with only the rows and columns that may change: the others have no memory, gradient or optimiser state.

PEFT makes its layers as always; then A and B are replaced by smaller ones. Its forward calls them as modules, so
dropout, scaling, casting and everything that is built on PEFT stay as they are.
"""

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float, Int
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from safeglasses.errors import SafeglassesError
from safeglasses.model.anatomy import Anatomy
from safeglasses.model.sites import Site
from safeglasses.model.weights import whole
from safeglasses.tune.change import Change
from safeglasses.tune.config import TuneConfig
from safeglasses.tune.targets import Target, makers_of

ADAPTER = "default"
_CHECKPOINTING = "gradient_checkpointing"  # where transformers keeps it, whatever its method is called


class Rows(nn.Module):
    """LoRA's B of some rows alone: writes zeros into all others."""

    def __init__(self, weight: Float[Tensor, "row rank"] | None, rows: Int[Tensor, " row"], out: int) -> None:
        super().__init__()
        self.weight = None if weight is None else nn.Parameter(weight)
        self.register_buffer("rows", rows, persistent=False)
        self.out_features = out

    def forward(self, inner: Float[Tensor, "*_ rank"]) -> Float[Tensor, "*_ out"]:
        """Spread over the rows; without a weight, as it is."""
        values = inner if self.weight is None else functional.linear(inner, self.weight)
        zeros = values.new_zeros(*values.shape[:-1], self.out_features)
        return zeros.index_copy_(-1, self.get_buffer("rows"), values)


class Columns(nn.Module):
    """LoRA's A of some columns alone: reads no others."""

    def __init__(self, weight: Float[Tensor, "rank column"], columns: Int[Tensor, " column"]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_buffer("columns", columns, persistent=False)

    def forward(self, x: Float[Tensor, "*_ in"]) -> Float[Tensor, "*_ rank"]:
        """Gather the columns and multiply."""
        return functional.linear(x.index_select(-1, self.get_buffer("columns")), self.weight)


def peft_config(anatomy: Anatomy, targets: Sequence[Target], config: TuneConfig, *, transposed: bool) -> LoraConfig:
    """Return PEFT's config for these targets: explicit names, one scaling, nothing but LoRA."""
    names = {target.path: anatomy.absolute_path(target.path) for target in targets}
    one_hot = any(target.one_hot for target in targets)
    scale = 1 if one_hot else config.scale
    rank = max(target.rank for target in targets)
    return LoraConfig(
        r=rank,
        lora_alpha=scale * rank,  # type: ignore[arg-type]  # a float is as good
        rank_pattern={rf"^{names[t.path]}": t.rank for t in targets if t.rank != rank},
        alpha_pattern={rf"^{names[t.path]}": scale * t.rank for t in targets if t.rank != rank},
        lora_dropout=0.0 if one_hot else config.dropout,
        target_modules=list(names.values()),
        bias="none",
        fan_in_fan_out=transposed,
        init_lora_weights=True,
    )


def check_names_kept(model: PreTrainedModel, config: LoraConfig) -> None:
    """Refuse a model of whose linear maps PEFT takes some for experts as transformers 4 had them.

    PEFT then trains, and loads, a LoRA of all fused experts instead (GLM-4.5V's shared experts).

    Raises:
        SafeglassesError: naming a map.
    """
    lost = _taken_for_experts(model, config)
    if lost:
        raise SafeglassesError(
            "PEFT takes linear maps of this model for experts, by their names",
            given=f"{lost[0]} of {model.config.model_type}" + (f" and {len(lost) - 1} more" if len(lost) > 1 else ""),
            expected="neurons of fused experts alone: PEFT would apply the change of these maps to all experts",
            do="tune Selection({site: mask for site, mask in neurons.masks.items() if site.fused}); neurons of linear "
            "maps can be scaled by glasses",
        )


def carried_by_peft(model: PreTrainedModel, anatomy: Anatomy, sites: Iterable[Site]) -> tuple[Site, ...]:
    """Return those feed-forward sites whose neurons' changes an adapter can hold: not those `check_names_kept` refuses.

    Args:
        model: on any device, the meta device included.
        anatomy: of the model.
        sites: inputs of feed-forward output maps, or of fused experts.
    """
    sites = tuple(sites)
    makers = {s: [anatomy.absolute_path(p) for p in makers_of(anatomy, s.path)] for s in sites if not s.fused}
    names = [name for some in makers.values() for name in some]
    lost = set(_taken_for_experts(model, LoraConfig(target_modules=names))) if names else set()
    return tuple(site for site in sites if lost.isdisjoint(makers.get(site, ())))


def _taken_for_experts(model: PreTrainedModel, config: LoraConfig) -> list[str]:
    """Return the linear maps that PEFT reads as experts.

    Source: PEFT 0.21, ``_convert_peft_config_moe`` in ``utils/transformers_weight_conversion.py``.
    """
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # a version before it converted anything
        return []
    other = copy.deepcopy(config)
    convert_peft_config_for_transformers(other, model=model, conversions=None)
    return sorted(set(config.target_modules or ()) - set(other.target_modules or ()))


@contextmanager
def restored(model: PreTrainedModel) -> Iterator[None]:
    """Take PEFT's layers off again when the block ends: every module, flag and mode is as before.

    What Trainer and TRL write into a model is put back as well: special tokens in its configs, tags, a forward.
    """
    configs = [vars(config) for config in (model.config, model.config.get_text_config(), model.generation_config)]
    said = [dict(config) for config in configs]
    tags, forward = model.model_tags, vars(model).get("forward")
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {name: (part.training, vars(part).get(_CHECKPOINTING)) for name, part in model.named_modules()}
    try:
        yield
    finally:
        for name, part in list(model.named_modules()):
            if isinstance(part, LoraLayer):
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, part.get_base_layer())
        model.disable_input_require_grads()  # PEFT turns it on where activations are computed again
        vars(model).pop("peft_config", None)  # else the next adapter is taken for a second one
        model.model_tags = tags
        if forward is None:
            vars(model).pop("forward", None)
        for config, before in zip(configs, said, strict=True):
            config.clear()
            config.update(before)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
            parameter.grad = None
        for name, part in model.named_modules():
            part.training, checkpointing = modes[name]
            vars(part).pop(_CHECKPOINTING, None)
            if checkpointing is not None:
                vars(part)[_CHECKPOINTING] = checkpointing


@contextmanager
def aliases_quiet() -> Iterator[None]:
    """Let PEFT and TRL use a name that transformers has given up."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        yield


def confine(peft: nn.Module, anatomy: Anatomy, targets: Sequence[Target]) -> None:
    """Replace PEFT's A and B by those of the rows and columns that may change; ``rows`` starts with A zero."""
    for target in targets:
        layer = layer_of(peft, anatomy, target)
        a: Tensor = layer.lora_A[ADAPTER].weight.detach()
        b: Tensor = layer.lora_B[ADAPTER].weight.detach()
        if target.columns is not None:
            columns = target.columns.to(a.device)
            layer.lora_A[ADAPTER] = Columns(a[:, columns].clone(), columns)
        if target.one_hot:
            nn.init.zeros_(layer.lora_A[ADAPTER].weight)
        if target.rows is not None:
            rows = target.rows.to(b.device)
            layer.lora_B[ADAPTER] = Rows(None if target.one_hot else b[rows].clone(), rows, target.out)


def changes_of(peft: nn.Module, anatomy: Anatomy, targets: Sequence[Target]) -> dict[str, Change]:
    """Read what was trained, on the CPU, in the type that it was trained in, by the modules' paths."""
    found = {}
    for target in targets:
        layer = layer_of(peft, anatomy, target)
        a = whole(layer.lora_A[ADAPTER].weight).cpu().clone()
        b = None if target.one_hot else whole(layer.lora_B[ADAPTER].weight).cpu().clone()
        scale = float(layer.scaling[ADAPTER])
        found[target.path] = Change(target.out, target.into, a, b, target.rows, target.columns, scale)
    return found


def layer_of(peft: nn.Module, anatomy: Anatomy, target: Target) -> Any:
    """Return PEFT's layer around the module of a target."""
    inner: Any = peft.get_submodule("base_model.model")
    layer = inner.get_submodule(anatomy.absolute_path(target.path))
    if not isinstance(layer, LoraLayer):
        raise TypeError(f"{target.path} is a {type(layer).__name__}, not one of PEFT's layers")
    return layer


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that the optimiser moves, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
