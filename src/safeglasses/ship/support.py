"""What can be done with a model of some anatomy, and where not, the sentence why; from shapes alone."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn

from safeglasses.errors import SafeglassesError
from safeglasses.model import loading
from safeglasses.model.anatomy import Anatomy
from safeglasses.tune.layers import carried_by_peft
from safeglasses.tune.targets import check_tunable, makers_of

Level = Literal["yes", "linear maps", "experts", "no"]
ACTIONS = ("capture", "wear", "fold", "IA3", "LoRA", "shield")


@dataclass(frozen=True)
class Support:
    """Whether one thing can be done."""

    action: str
    """One of `ACTIONS`."""
    level: Level
    """``linear maps``: with the linear maps of the decoder, but not with all feed-forward neurons; ``experts``: with
    the neurons of fused experts alone."""
    why: str = ""
    """Why not everywhere."""

    def to_json(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return asdict(self)


def support(model: nn.Module, anatomy: Anatomy) -> tuple[Support, ...]:
    """Say what the code's own rules allow; that a type is allowed does not mean that it was ever run.

    Args:
        model: on any device, the meta device included.
        anatomy: of the model.
    """
    config: Any = model.config
    try:
        loading.auto_class(config.model_type, config)
    except SafeglassesError as error:
        why = error.what if config.is_encoder_decoder else "no Auto class that writes text loads it"
        return tuple(Support(action, "no", why) for action in ACTIONS)
    experts = next((site for site in anatomy.neurons if site.expert is not None), None)
    tied = _tied(model, anatomy)
    if anatomy.experts:
        routed = "fused experts are slices of 3-D parameters, which no module computes alone"
        own = "experts with biases that do not compute through transformers' experts interface cannot be entered"
        entered = all(experts.dispatched or not experts.biased for experts in anatomy.experts.values())
        limits = {} if entered else {"capture": own, "wear": own, "fold": own}
        limits |= {
            "IA3": routed,
            "LoRA": routed,
        }
    else:
        limits = {"capture": "experts see only the tokens a router sends there"} if experts is not None else {}
    if tied:
        limits["fold"] = tied
    if anatomy.merged_keys and "capture" not in limits:
        limits["capture"] = "keys and values of the decoder and of the encoder go through one map"
    found = [
        Support(action, "linear maps" if action in limits else "yes", limits.get(action, "")) for action in ACTIONS[:5]
    ]
    return (*found, _shield(model, anatomy))


def _shield(model: Any, anatomy: Anatomy) -> Support:
    if any(site.expert is not None and not site.fused for site in anatomy.neurons):
        return Support(
            "shield", "no", "experts that are modules of their own have no gradient in a step without a token for them"
        )
    try:
        for block in anatomy.blocks:
            makers_of(anatomy, block.down)
        check_tunable(anatomy, anatomy.neurons)
    except SafeglassesError as error:
        return Support("shield", "no", error.what)
    if not anatomy.neurons:
        return Support("shield", "no", anatomy.ffn_reason)
    if len(carried_by_peft(model, anatomy, anatomy.neurons)) < len(anatomy.neurons):
        return Support("shield", "experts", "PEFT takes the linear maps that make the other neurons for experts")
    return Support("shield", "yes")


def _tied(model: nn.Module, anatomy: Anatomy) -> str:
    """Say which linear map of the decoder shares its weight with another module; empty if none does."""
    homes: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        homes.setdefault(id(parameter), []).append(name)
    wanted = {f"{anatomy.absolute_path(path)}.weight" for path in anatomy.linears}
    shared = next((names for names in homes.values() if len(names) > 1 and wanted & set(names)), None)
    return "" if shared is None else f"{shared[0]} is also {shared[1]}"
