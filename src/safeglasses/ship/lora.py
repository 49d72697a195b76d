"""Glasses as an exact LoRA: what a change of few rows or columns of a matrix is, not an approximation of it.

Output factors f on rows R change W by (f − 1) ∘ W there and nowhere else: ΔW = B A with B the one-hot columns of
R and A = (f − 1) ∘ W[R]. Input factors g on columns C give ΔW = B A with B = W[:, C] ∘ (g − 1) and A one-hot. Both
at once need the union |R| + |C|; no matrix needs more than its smaller side. The smallest of these is taken.

Every module is padded with zeros to one rank r, and ``lora_alpha`` = r: PEFT divides alpha by each module's own
rank, vLLM by the config's ``r``, llama.cpp by each tensor's own rank, and SGLang demands that all ranks are ``r``.
With unequal ranks (``rank_pattern``) no alpha is right for all four.

Source: Hu et al. 2021, "LoRA", eq. 3; ``peft/tuners/lora/layer.py``; vLLM ``vllm/lora/peft_helper.py`` and
``vllm/lora/layers/base_linear.py``; SGLang ``srt/lora/mem_pool.py``; llama.cpp ``src/llama-adapter.h``. Here nothing
is trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from safeglasses.defend.adapters import CONFIG, TENSORS, check_names, lora_config
from safeglasses.defend.factors import Factors, changed, in_order, refuse_fused, refuse_outside
from safeglasses.defend.home import Home
from safeglasses.defend.weights import PLAIN
from safeglasses.errors import SafeglassesError
from safeglasses.files import write_json
from safeglasses.model.anatomy import Anatomy, module
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM
from safeglasses.model.weights import whole

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as ``--max-lora-rank``: ``MaxLoRARanks`` in ``vllm/config/lora.py``."""
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LowRank:
    """A change of one linear map y = W x + b: ΔW = b_matrix a_matrix, and Δb."""

    a: Float[Tensor, "rank in"]
    """What LoRA calls A: reads the input."""
    b: Float[Tensor, "out rank"]
    """What LoRA calls B: writes the output."""
    bias: Float[Tensor, " out"] | None
    """Change of the bias; None when it does not change."""


@dataclass(frozen=True)
class LoRA:
    """What `write_lora` wrote."""

    rank: int
    """Rank of every module in the file: the largest that one needs."""
    ranks: Mapping[str, int]
    """Rank that each module needs, by path relative to the decoder."""
    biases: bool
    """Whether biases change (``lora_bias``), which PEFT alone loads."""
    dtype: torch.dtype
    """Of the tensors."""


def rank_of(rows: int, columns: int, out: int, into: int) -> int:
    """Return the rank that a change of so many rows and columns of an ``out × into`` matrix needs, at most."""
    return min(rows + columns, out, into)


def ranks_of(factors: Factors, anatomy: Anatomy) -> dict[str, int]:
    """Return the rank that each changed module needs, by its path, in the order of files.

    Raises:
        SafeglassesError: some are fused experts.
    """
    refuse_fused(changed(factors), "this LoRA")
    refuse_outside(changed(factors), "a LoRA in vLLM, SGLang or llama.cpp")
    counts: dict[str, list[int]] = {}
    for site in in_order(changed(factors)):
        counts.setdefault(site.path, [0, 0])[site.side == "in"] += int((factors[site] != 1).sum())
    return {
        path: rank_of(rows, columns, anatomy.linears[path], anatomy.in_features[path])
        for path, (rows, columns) in counts.items()
    }


def vllm_rank(rank: int) -> int | None:
    """Return the ``--max-lora-rank`` that vLLM needs; None when it has none so large."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def check_ranks(ranks: Mapping[str, int], max_rank: int) -> None:
    """Refuse glasses that change more neurons of a matrix than a LoRA of `max_rank` holds.

    Raises:
        SafeglassesError: naming the worst matrix and the largest budget per matrix that fits.
    """
    over = {path: rank for path, rank in ranks.items() if rank > max_rank}
    if over:
        worst = max(over, key=lambda path: over[path])
        raise SafeglassesError(
            "a matrix changes more neurons than the LoRA may have ranks",
            given=f"{worst} changes {over[worst]:,}; {len(over)} of {len(ranks)} matrices change more than {max_rank}",
            expected=f"at most --max-rank {max_rank} per matrix (vLLM serves up to {VLLM_RANKS[-1]})",
            do=f"keep the strongest of each matrix, --top-per-matrix {max_rank} is the largest budget that fits and "
            "prints what it costs; or lose nothing: --to ia3, --to sglang, or safeglasses fold",
        )


def low_rank(
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    out: Float[Tensor, " out"] | None,
    into: Float[Tensor, " in"] | None,
) -> LowRank:
    """Factorise what factors on either side change: (out ∘ W ∘ into) − W, exact up to the rounding of ΔW.

    Computed in float64; at least one side has factors.
    """
    f = torch.ones(len(weight), dtype=torch.float64) if out is None else out.double()
    g = torch.ones(weight.shape[1], dtype=torch.float64) if into is None else into.double()
    rows, columns = (f != 1).nonzero().flatten(), (g != 1).nonzero().flatten()
    if len(rows) + len(columns) <= min(weight.shape):
        a = torch.cat([weight[rows].double() * (f[rows, None] * g - 1), _one_hot(columns, len(g))])
        rest = weight[:, columns].double() * (g[columns] - 1)
        rest[rows] = 0  # these rows are whole in the first block
        b = torch.cat([_one_hot(rows, len(f)).T, rest], dim=1)
    else:
        change, eye = weight.double() * (f[:, None] * g - 1), torch.eye(min(weight.shape), dtype=torch.float64)
        a, b = (change, eye) if len(f) <= len(g) else (eye, change)
    shift = None if bias is None or not bool(((f - 1) * bias.double()).any()) else (f - 1) * bias.double()
    return LowRank(a, b, shift)


def write_lora(
    folder: Path, vlm: VLM, effective: Factors, home: Home, *, max_rank: int = 512, dtype: torch.dtype | None = None
) -> LoRA:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` into an existing folder.

    Args:
        folder: where.
        vlm: the base model.
        effective: factors as they act, at least one of them not 1.
        home: the base model as files name it.
        max_rank: largest rank per matrix.
        dtype: of the tensors; by default the model's own.

    Raises:
        SafeglassesError: a matrix needs a larger rank, a weight is quantised or not loaded, or PEFT would match
            other modules too.
    """
    acting = changed(effective)
    needed = ranks_of(acting, vlm.anatomy)
    check_ranks(needed, max_rank)
    check_names(vlm.model, acting, home)
    kind = dtype or (vlm.dtype if vlm.dtype in PLAIN else torch.float32)
    rank = max(needed.values())
    found = {path: _of_module(vlm, path, acting) for path in needed}
    biases = any(change.bias is not None for change in found.values())
    tensors: dict[str, Tensor] = {}
    for path, change in found.items():
        key = f"{_PREFIX}{home.absolute(path)}"
        missing = rank - len(change.a)
        tensors[f"{key}.lora_A.weight"] = nn.functional.pad(change.a, (0, 0, 0, missing)).to(kind).contiguous()
        tensors[f"{key}.lora_B.weight"] = nn.functional.pad(change.b, (0, missing)).to(kind).contiguous()
        if biases:  # lora_bias holds for all modules of a config or for none
            shift = torch.zeros(len(change.b)) if change.bias is None else change.bias
            tensors[f"{key}.lora_B.bias"] = shift.to(kind)
    save_file(dict(sorted(tensors.items())), folder / TENSORS, metadata={"format": "pt"})
    write_json(folder / CONFIG, {**lora_config(home, needed, rank=rank, alpha=float(rank)), "lora_bias": biases})
    return LoRA(rank, needed, biases, kind)


def _of_module(vlm: VLM, path: str, acting: Factors) -> LowRank:
    linear = module(vlm.model, vlm.anatomy, path)
    weight = _plain(linear, "weight", vlm.anatomy.absolute_path(path))
    bias = _plain(linear, "bias", vlm.anatomy.absolute_path(path))
    if weight is None:
        raise SafeglassesError("a linear map without a weight", given=path)
    rows_first = weight.T if isinstance(linear, Conv1D) else weight  # Conv1D keeps (in, out)
    return low_rank(rows_first, bias, acting.get(Site(path, "out")), acting.get(Site(path, "in")))


def _plain(linear: nn.Module, leaf: str, name: str) -> Tensor | None:
    """Return a parameter's numbers, on the CPU.

    Raises:
        SafeglassesError: they are not there, or stand for others.
    """
    parameter = dict(linear.named_parameters(recurse=False)).get(leaf)
    if parameter is None:
        return None
    values = parameter.detach() if parameter.is_meta else whole(parameter)
    known = type(parameter) is nn.Parameter and type(values) is Tensor
    if values.is_meta or not known or values.dtype not in PLAIN:
        raise SafeglassesError(
            "an exact LoRA needs the numbers of the weights it changes",
            given=f"{name}.{leaf}: {type(parameter).__name__} of {parameter.dtype} on {parameter.device}",
            expected="loaded weights of " + ", ".join(str(d).removeprefix("torch.") for d in PLAIN),
            do="export from the unquantised checkpoint; runtimes apply the LoRA to a quantised copy of it as well",
        )
    return values.cpu()


def _one_hot(index: Tensor, width: int) -> Float[Tensor, "rank width"]:
    rows = torch.zeros(len(index), width, dtype=torch.float64)
    rows[torch.arange(len(index)), index] = 1
    return rows
