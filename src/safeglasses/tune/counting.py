"""How much a training moves, in three counts that are easily confused; from shapes alone, without weights.

| count | what it is |
|---|---|
| optimiser parameters | numbers that AdamW moves; what papers give as a share of the model |
| touched weights | weights that may be others after merging: rows × columns, biases never |
| neurons | the selection |
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from safeglasses.errors import SafeglassesError
from safeglasses.find.selection import Selection
from safeglasses.model.anatomy import Anatomy, anatomy
from safeglasses.model.architectures import on_meta
from safeglasses.tune.config import Mode, TuneConfig
from safeglasses.tune.targets import Target, targets_of


@dataclass(frozen=True)
class Counts:
    """What a training moves."""

    optimiser_parameters: int
    """Numbers that the optimiser moves."""
    model_parameters: int
    """Numbers of the whole model, pictures' tower included, tied ones once."""
    touched_weights: int
    """Weights that may be others after merging."""
    neurons: int
    """Selected neurons."""

    @property
    def trainable_share(self) -> float:
        """Optimiser parameters over the model's."""
        return self.optimiser_parameters / self.model_parameters

    @property
    def touched_share(self) -> float:
        """Touched weights over the model's parameters."""
        return self.touched_weights / self.model_parameters

    def record(self) -> dict[str, Any]:
        """Return counts and shares JSON-ready."""
        return {**asdict(self), "trainable_share": self.trainable_share, "touched_share": self.touched_share}

    def text(self) -> str:
        """Say it in a line."""
        return (
            f"{self.optimiser_parameters:,} optimiser parameters ({self.trainable_share:.3%} of the model), "
            f"{self.touched_weights:,} weights touched ({self.touched_share:.2%}), {self.neurons:,} neurons"
        )


def count(
    model: PreTrainedConfig | nn.Module,
    neurons: Selection | float | int,
    *,
    mode: Mode = "lora",
    config: TuneConfig | None = None,
    cross_attention: bool = False,
) -> Counts:
    """Count for a model, or for a config alone: its model is built on the meta device.

    Args:
        model: one of them.
        neurons: a selection; or how many neurons of every layer: a share (float) or a number (int).
        mode: how they would be tuned.
        config: for rank.
        cross_attention: count such layers as well, as papers seem to; they are never tuned here.

    Raises:
        SafeglassesError: as in `targets_of`.
    """
    found: Any = on_meta(model) if isinstance(model, PreTrainedConfig) else model
    parts = anatomy(found)
    text = None if cross_attention else found.config.get_text_config(decoder=True)
    chosen = neurons if isinstance(neurons, Selection) else evenly(parts, text, neurons)
    targets = targets_of(parts, text, chosen, mode, config or TuneConfig())
    return counts_of(targets, chosen, found)


def counts_of(targets: Sequence[Target], neurons: Selection, model: nn.Module) -> Counts:
    """Count for targets that are known."""
    return Counts(
        optimiser_parameters=sum(target.parameters for target in targets),
        model_parameters=sum(parameter.numel() for parameter in model.parameters()),
        touched_weights=sum(target.n_rows * target.n_columns for target in targets),
        neurons=len(neurons),
    )


def evenly(parts: Anatomy, text_config: Any, share: float | int) -> Selection:
    """Select the first neurons of every layer but those of cross-attention: for counting, not for tuning.

    Args:
        parts: of the model.
        text_config: the config of its decoder, which says which layers these are.
        share: of every layer's neurons, rounded down (float), or their number (int).
    """
    crossing = set(getattr(text_config, "cross_attention_layers", None) or ())
    masks = {}
    for site in (site for site in parts.sites("neurons") if site.layer not in crossing):
        width = parts.width(site)
        k = share if isinstance(share, int) else int(share * width)
        if not 0 < k <= width:
            raise SafeglassesError(
                "no such number of neurons", given=f"{share} of {width:,} at {site}", expected="at least one neuron"
            )
        masks[site] = torch.arange(width) < k
    return Selection(masks)
