"""Which rows and columns of which linear maps a training may change, given the neurons.

A neuron is a coordinate of h in y = W_down h, h = act(W_gate x) ∘ W_up x: its rows of *gate* and *up* make it, its
column of *down* says what it writes. Without a gate, one map makes it (fc1); where gate and up are one map, it
has a row in either half. The same holds in every one of fused experts, whose maps are slices of 3-D parameters.

| mode | rows of gate and up | columns of down |
|---|---|---|
| ``lora``, ``rows`` | the neurons' | none: the map is left alone |
| ``plain`` | all | none |
| ``freeze`` | all but the neurons' | all but the neurons' |

Source: Precise Shield (arXiv 2604.08881), section on tuning; SafeNeuron (arXiv 2602.12158) for ``freeze``.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from safeglasses.defend.factors import in_order
from safeglasses.defend.home import check_widths, quantisation
from safeglasses.errors import SafeglassesError
from safeglasses.find.selection import Selection
from safeglasses.model.anatomy import Anatomy
from safeglasses.model.routing import check_reachable
from safeglasses.model.sites import Site
from safeglasses.tune.config import Mode, TuneConfig
from safeglasses.tune.slices import Slice, slices_of


@dataclass(frozen=True, eq=False)
class Target:
    """The part of one linear map y = W x that may change."""

    path: str
    """Module, relative to the decoder."""
    out: int
    """Rows of W."""
    into: int
    """Columns of W."""
    rows: Int[Tensor, " _row"] | None
    """Rows that may change; None: all."""
    columns: Int[Tensor, " _column"] | None
    """Columns that may change; None: all."""
    rank: int
    """Rank of the change."""
    one_hot: bool
    """Whether B is the one-hot of `rows` and is not trained (``rows``)."""
    part: Slice | None = None
    """Which slice of a 3-D parameter W is, in one of fused experts; None: the weight of a module."""

    @property
    def n_rows(self) -> int:
        """How many rows may change."""
        return self.out if self.rows is None else len(self.rows)

    @property
    def n_columns(self) -> int:
        """How many columns may change."""
        return self.into if self.columns is None else len(self.columns)

    @property
    def parameters(self) -> int:
        """Numbers that the optimiser moves."""
        return self.rank * (self.n_columns + (0 if self.one_hot else self.n_rows))


def targets_of(anatomy: Anatomy, text_config: Any, neurons: Selection, mode: Mode, config: TuneConfig) -> list[Target]:
    """Find what may change, in the order of the model's modules.

    Args:
        anatomy: of the model.
        text_config: the config of its decoder.
        neurons: over inputs of feed-forward output maps.
        mode: see the table above.
        config: for rank and empty layers.

    Raises:
        PartialMatch: a site is missing or of another width.
        SafeglassesError: the model or the selection does not allow it.
    """
    sites = _checked_sites(anatomy, text_config, neurons, config)
    if mode == "freeze":
        _refuse_freezing_experts(sites)
    found: list[Target] = []
    for site in sites:
        chosen = neurons.masks[site].cpu()
        picked, others = chosen.nonzero().flatten(), (~chosen).nonzero().flatten()
        if mode == "freeze" and not len(others):
            raise SafeglassesError(
                "freezing every neuron of a layer leaves nothing to train", given=f"all {len(picked)} of {site}"
            )
        index = {"plain": None, "freeze": others}.get(mode, picked)
        if site.fused:
            for part, out, into in slices_of(anatomy, site):
                rows = None if index is None else part.rows(index, len(chosen))
                rank = config.rank if mode != "rows" or rows is None else len(rows)
                found.append(Target(part.path, out, into, rows, None, rank, mode == "rows", part))
            continue
        for path in makers_of(anatomy, site.path):
            out, into = anatomy.linears[path], anatomy.in_features[path]
            rows = None if index is None else rows_of(index, len(chosen), out)
            rank = config.rank if mode != "rows" or rows is None else len(rows)
            found.append(Target(path, out, into, rows, None, rank, mode == "rows"))
        if mode == "freeze":
            out, into = anatomy.linears[site.path], anatomy.in_features[site.path]
            found.append(Target(site.path, out, into, None, others, config.rank, False))
    if mode == "plain" and config.plain_rank is not None:
        return [replace(target, rank=config.plain_rank) for target in found]
    if mode == "plain":
        budget = sum(t.parameters for t in targets_of(anatomy, text_config, neurons, "lora", config))
        return _spread(found, budget)
    return found


def makers_of(anatomy: Anatomy, down: str) -> list[str]:
    """Return the maps whose outputs make the neurons that `down` reads: gate and up, both in one, or fc1.

    Raises:
        SafeglassesError: there are none.
    """
    block, width = anatomy.block_of(down), anatomy.in_features[down]
    inside = list(block.makers) if block is not None else []
    found = [path for path in inside if anatomy.linears[path] == width or anatomy.halves(path) is not None]
    if not found:
        held = ", ".join(f"{path} with {anatomy.linears[path]:,} outputs" for path in inside) or "nothing else"
        raise SafeglassesError(
            "no linear map makes these neurons one by one",
            given=f"{down} reads {width:,} neurons; beside it: {held}",
            expected="gate_proj and up_proj, fc1, or gate_up_proj: an output per neuron, or per half of one",
            do="use amplify, or glasses",
        )
    return found


def rows_of(neurons: Int[Tensor, " neuron"], width: int, out: int) -> Int[Tensor, " row"]:
    """Return the rows of a map that make some neurons; where gate and up are one map, those of both halves.

    Args:
        neurons: which.
        width: how many there are.
        out: rows of the map, as many or twice as many.
    """
    return torch.cat([neurons + start for start in range(0, out, width)])


def check_plain(config: Any) -> None:
    """Refuse a quantised model.

    Raises:
        SafeglassesError: naming the method.
    """
    method = quantisation(config)
    if method is not None:
        raise SafeglassesError(
            "a quantised model cannot be tuned so that the result is exact",
            given=f"a model quantised by {method}",
            expected="float32, bfloat16 or float16 weights",
            do="tune the unquantised model; runtimes apply the adapter to a quantised copy of it as well",
        )


def _checked_sites(anatomy: Anatomy, text_config: Any, neurons: Selection, config: TuneConfig) -> list[Site]:
    if not anatomy.neurons:
        raise SafeglassesError(
            "the decoder has no feed-forward neurons that could be tuned one by one",
            given=anatomy.ffn_reason,
            expected="one linear map per layer, outside attention, that writes the residual stream",
            do="use another model",
        )
    sites = in_order(neurons.masks)
    expert = next((site for site in sites if site.expert is not None and anatomy.expert(site) is None), None)
    if expert is not None and expert.path in anatomy.linears:
        raise SafeglassesError(
            "neurons of experts that are modules of their own cannot be tuned",
            given=str(expert),
            expected="neurons that every token passes, or those of fused experts",
            do="leave these sites out: such an expert has no gradient in a step without a token for it",
        )
    check_tunable(anatomy, sites)
    known = set(anatomy.neurons)
    other = [site for site in sites if site.side != "in" or (site not in known and site.path in anatomy.linears)]
    if other:
        raise SafeglassesError(
            "only feed-forward neurons can be tuned",
            given=f"{other[0]}" + (f" and {len(other) - 1} more" if len(other) > 1 else ""),
            expected=f"inputs of the maps that write to the residual stream, such as {anatomy.neurons[0]}",
            do='find neurons at vlm.anatomy.sites("neurons")',
        )
    check_widths(anatomy, {site: len(neurons.masks[site]) for site in sites}, "the selection fits")
    _refuse_cross_attention(text_config, sites)
    empty = [site for site in sites if not bool(neurons.masks[site].any())]
    if len(empty) == len(sites):
        raise SafeglassesError(
            "no neuron is selected: nothing would be tuned",
            given=f"{len(sites)} sites without a selected neuron",
            expected="at least one neuron",
            do="select a larger share of the neurons",
        )
    blocks = {site: (site.layer, site.kind) for site in sites}
    filled = {block for site, block in blocks.items() if site not in empty}  # one expert is enough for its layer
    bare = [layer for layer, kind in dict.fromkeys(blocks.values()) if (layer, kind) not in filled]
    if bare and config.empty_layers == "refuse":
        layers = ", ".join(str(layer) for layer in bare[:8]) + (" …" if len(bare) > 8 else "")
        raise SafeglassesError(
            "the selection has no neuron in some layers",
            given=f"none in {len(bare)} of {len(set(blocks.values()))} layers: {layers}",
            expected="at least one neuron at every site of the selection",
            do="select a larger share, leave these sites out, or accept it: TuneConfig(empty_layers='skip')",
        )
    return [site for site in sites if site not in empty]


def check_tunable(anatomy: Anatomy, sites: Iterable[Site]) -> None:
    """Refuse fused experts whose rows cannot be trained, or whose change no adapter could hold.

    Raises:
        SafeglassesError: they cannot be entered, or there is one alone, which PEFT takes for a linear map.
    """
    sites = tuple(sites)
    check_reachable(anatomy, sites)
    for site in sites:
        found = anatomy.expert(site)
        if found is not None and found[0].n_experts == 1:
            raise SafeglassesError(
                "a single fused expert cannot be tuned: PEFT reads its 3-D parameters as those of a linear map",
                given=str(site),
                expected="at least two experts",
                do="leave the site out",
            )


def _refuse_freezing_experts(sites: list[Site]) -> None:
    fused = next((site for site in sites if site.fused), None)
    if fused is not None:
        raise SafeglassesError(
            "freeze does not work on fused experts",
            given=str(fused),
            expected="neurons that every token passes: what is to carry safety instead must be met by the same tokens",
            do="leave the sites of experts out, or use lora, rows or plain",
        )


def _refuse_cross_attention(text_config: Any, sites: list[Site]) -> None:
    crossing = set(getattr(text_config, "cross_attention_layers", None) or ())
    inside = [site for site in sites if site.layer in crossing]
    if inside:
        raise SafeglassesError(
            "layers of cross-attention are skipped by text without a picture: their neurons are not tuned",
            given=f"neurons in layers {', '.join(str(site.layer) for site in inside[:8])}",
            expected="neurons of the other layers",
            do="leave these sites out of the selection",
        )


def _spread(targets: list[Target], budget: int) -> list[Target]:
    """Give plain LoRA as many parameters as the budget allows: one rank everywhere, one more in some maps.

    Every map keeps at least rank 1, so that a tiny budget is exceeded.
    """
    per_rank = sum(target.out + target.into for target in targets)
    base = max(1, budget // per_rank)
    left = budget - base * per_rank
    found = []
    for target in targets:
        more = 0 < target.out + target.into <= left
        left -= (target.out + target.into) if more else 0
        found.append(replace(target, rank=base + more))
    return found
