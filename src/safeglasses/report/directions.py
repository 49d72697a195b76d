"""What a neuron writes, and which tokens that promotes (the logit lens).

Source: reading vectors of the residual stream through the output embedding is nostalgebraist's logit lens;
columns of the feed-forward output map as values that promote tokens are Geva et al. 2022, arXiv 2203.14680.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from safeglasses.model.anatomy import module
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM

_WRITES = ("o_proj", "out_proj", "c_proj", "dense", "wo")
_VALUES = ("v_proj", "value", "wv")
_ASKS = ("q_proj", "k_proj", "query", "key", "wq", "wk")
_FUSED = ("qkv_proj", "c_attn")
_OUT_NORMS = {
    "mlp": ("post_feedforward_layernorm", "post_mlp_layernorm"),
    "attention": ("post_self_attn_layernorm",),
}
_CHUNK = 16384
_CANDIDATES = 64


@dataclass(frozen=True)
class Direction:
    """Where in the residual stream a neuron pushes when it fires."""

    vector: Float[Tensor, " hidden"] | None
    """The direction, float32 on the CPU; None if there is none."""
    said: str
    """Which direction it is, or why there is none; fit for a table."""


@dataclass(frozen=True)
class Words:
    """What a direction does to the next token."""

    promoted: tuple[str, ...]
    """Tokens whose logits rise most, first the highest."""
    demoted: tuple[str, ...]
    """Tokens whose logits fall most, first the lowest."""


def direction(vlm: VLM, site: Site, index: int) -> Direction:
    """Find the output direction of one neuron.

    * Outputs of maps that write the residual stream (feed-forward and attention output): the basis vector.
    * Inputs of those maps: the matching column.
    * Outputs of the feed-forward input maps (up, gate, fused gate-and-up): the matching column of the
      output map. Of a gated pair the sign of the other half decides which way it points; it is shown as for
      a positive partner.
    * Values: the matching columns of the attention output, summed over the query heads that share the value
      head (as if all of them looked at the same token alike).
    * Of fused experts: the column of the expert's down projection, or the basis vector for its output.
    * Queries and keys are compared with each other and written nowhere: none.

    Where the block's output passes a norm before the residual stream (Gemma, GLM), so does the direction.
    """
    anatomy = vlm.anatomy
    if anatomy.expert(site) is not None:
        return _of_expert(vlm, site, index)
    block = anatomy.block_of(site.path)
    if block is not None:
        return _feed_forward(vlm, site, index, block.down)
    return _attention(vlm, site, index)


def _feed_forward(vlm: VLM, site: Site, index: int, ffn: str) -> Direction:
    name, inner = ffn.rpartition(".")[2], vlm.anatomy.in_features[ffn]
    if site.path == ffn:
        if site.side == "out":
            return _basis(vlm, site, index, "mlp")
        return _column(vlm, ffn, [index], "mlp", f"its column of {name}")
    if site.side == "in":
        return Direction(None, "reads the residual stream, writes nowhere by itself")
    width = vlm.anatomy.linears[site.path]
    if width not in (inner, 2 * inner):
        return Direction(None, f"its {width:,} outputs do not match the {inner:,} inputs of {name}")
    return _column(vlm, ffn, [index % inner], "mlp", f"its column of {name}")


def _of_expert(vlm: VLM, site: Site, index: int) -> Direction:
    """Return the column of an expert's down projection, or the axis that its output is, as the router weighs them."""
    found = vlm.anatomy.expert(site)
    if found is None or found[0].hidden != vlm.anatomy.hidden_size:
        return Direction(None, "these experts write to a projection of the residual stream")
    experts, number = found
    if site.side == "out":
        return _basis(vlm, site, index, "mlp")
    weight = vlm.model.get_parameter(vlm.anatomy.absolute_path(f"{experts.path}.{experts.down}")).detach()
    if weight.is_meta or not weight.is_floating_point():
        return Direction(None, "its output weights are offloaded or quantised")
    chosen = (weight[number][index] if experts.transposed else weight[number][:, index]).float().cpu()
    if not chosen.any():
        return Direction(None, "its output weights are zero")
    said = f"its column of expert {number}'s {experts.down}"
    return _through_block_norm(vlm, site.layer, "mlp", Direction(chosen, said))


def _attention(vlm: VLM, site: Site, index: int) -> Direction:
    anatomy = vlm.anatomy
    parent, _, leaf = site.path.rpartition(".")
    beside = {p.rpartition(".")[2]: p for p in anatomy.linears if p.rpartition(".")[0] == parent}
    out = next((p for name, p in beside.items() if name in _WRITES), None)
    if out is None or anatomy.linears[out] != anatomy.hidden_size:
        return Direction(None, "no output map found beside it")
    name = out.rpartition(".")[2]
    if site.path == out and site.side == "out":
        return _basis(vlm, site, index, "attention")
    if site.path == out:
        return _column(vlm, out, [index], "attention", f"its column of {name}")
    if site.side == "in":
        return Direction(None, "reads the residual stream, writes nowhere by itself")
    asked = Direction(None, "compared with keys or queries, written nowhere: no output direction")
    if leaf in _FUSED:  # queries, then keys, then values
        queries = anatomy.in_features[out]
        values = (anatomy.linears[site.path] - queries) // 2
        if index < queries + values:
            return asked
        index, width = index - queries - values, values
    elif leaf in _VALUES:
        width = anatomy.linears[site.path]
    else:
        return asked if leaf in _ASKS else Direction(None, f"not worked out for {leaf}")
    columns = value_columns(index, width, anatomy.in_features[out], _head_size(vlm, width))
    if columns is None:
        return Direction(None, f"its {width:,} outputs do not match the inputs of {name}")
    return _column(vlm, out, columns, "attention", f"its column{'s' * (len(columns) > 1)} of {name}")


def value_columns(index: int, values: int, inputs: int, head: int) -> list[int] | None:
    """Return the inputs of the attention output that a value neuron feeds: one per query head of its group.

    Args:
        index: of the neuron among the outputs of the value map.
        values: outputs of the value map.
        inputs: inputs of the attention output map.
        head: size of one head.

    Returns:
        None if the sizes do not fit each other.
    """
    if head < 1 or values % head or inputs % values:
        return None
    group = inputs // values
    return [(index // head * group + i) * head + index % head for i in range(group)]


def _head_size(vlm: VLM, values: int) -> int:
    config = vlm.model.config.get_text_config(decoder=True)
    size = getattr(config, "head_dim", None)
    return size or vlm.anatomy.hidden_size // getattr(config, "num_attention_heads", 1) or values


def _basis(vlm: VLM, site: Site, index: int, block: str) -> Direction:
    vector = torch.zeros(vlm.anatomy.hidden_size)
    vector[index] = 1
    return _through_block_norm(vlm, site.layer, block, Direction(vector, "its axis of the residual stream"))


def _column(vlm: VLM, path: str, columns: Sequence[int], block: str, said: str) -> Direction:
    linear = module(vlm.model, vlm.anatomy, path)
    weight = linear.get_parameter("weight")
    if weight.is_meta or not weight.is_floating_point():
        return Direction(None, "its output weights are offloaded or quantised")
    weight = weight.detach()
    chosen = (
        weight[list(columns)].float().sum(0) if isinstance(linear, Conv1D) else weight[:, list(columns)].float().sum(1)
    )
    if not chosen.any():
        return Direction(None, "its output weights are zero")
    return _through_block_norm(vlm, Site(path, "out").layer, block, Direction(chosen.cpu(), said))


def _through_block_norm(vlm: VLM, layer: int, block: str, found: Direction) -> Direction:
    """Pass a direction through the norm that some families have between a block and the residual stream."""
    children = dict(_layer(vlm, layer).named_children())
    names = _OUT_NORMS[block]
    if block == "attention" and "pre_feedforward_layernorm" in children:  # else this name is the next block's own norm
        names = (*names, "post_attention_layernorm")
    norm = next((children[name] for name in names if name in children), None)
    if norm is None or found.vector is None:
        return found
    return Direction(_through(norm, found.vector[None])[0], found.said)


def _layer(vlm: VLM, layer: int) -> nn.Module:
    return vlm.model.get_submodule(vlm.anatomy.absolute_path(f"{vlm.anatomy.layers_path}.{layer}"))


def _through(norm: nn.Module, vectors: Float[Tensor, "sample hidden"]) -> Float[Tensor, "sample hidden"]:
    """Apply a norm's linear part: its value at the vectors (scaled to mean square 1) minus its value at 0."""
    weight = next(norm.parameters(), None)
    if weight is not None and weight.is_meta:
        return vectors
    unit = vectors / vectors.square().mean(-1, keepdim=True).sqrt()
    unit = unit if weight is None else unit.to(weight)
    with torch.no_grad():
        return (norm(unit) - norm(torch.zeros_like(unit))).float().cpu()


def _final_norm(vlm: VLM) -> nn.Module | None:
    """Return the last norm among the direct children of the module that holds the layers."""
    path = vlm.anatomy.layers_path.rpartition(".")[0]
    decoder = vlm.model.get_submodule(vlm.anatomy.absolute_path(path).strip("."))
    norms = [child for child in decoder.children() if "norm" in type(child).__name__.lower()]
    return norms[-1] if norms else None


def words(vlm: VLM, vectors: Float[Tensor, "sample hidden"], k: int = 8) -> list[Words]:
    """Read directions off: final norm, output embedding, the tokens at both ends.

    Special tokens, blanks, control characters and broken bytes are left out.

    Args:
        vlm: the model.
        vectors: directions in the residual stream.
        k: how many tokens at each end.

    Returns:
        One record per direction; empty ones if the model has no output embedding at hand.
    """
    embedding = vlm.model.get_output_embeddings()
    if not isinstance(embedding, nn.Module) or not len(vectors):
        return [Words((), ()) for _ in vectors]
    weight = embedding.get_parameter("weight").detach()
    norm = _final_norm(vlm)
    read = vectors if norm is None else _through(norm, vectors)
    if weight.is_meta or weight.shape[1] != read.shape[1]:
        return [Words((), ()) for _ in vectors]
    tokens = min(len(vlm.tokenizer), len(weight))
    logits = torch.cat([chunk.float().cpu() @ read.T for chunk in weight[:tokens].split(_CHUNK)])
    logits[[i for i in vlm.tokenizer.all_special_ids if i < tokens]] = float("nan")
    return [Words(_ends(vlm, column, k), _ends(vlm, -column, k)) for column in logits.T]


def _ends(vlm: VLM, scores: Float[Tensor, " token"], k: int) -> tuple[str, ...]:
    """Return the texts of the `k` highest tokens, each once."""
    scores = scores.nan_to_num(float("-inf"), float("inf"), float("-inf"))
    top = scores.topk(min(_CANDIDATES, len(scores)))
    found: dict[str, None] = {}
    for score, token in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        text = str(vlm.tokenizer.decode([token])).strip()
        if score > float("-inf") and any(c.isprintable() and c != "\ufffd" for c in text):
            found[text] = None
    return tuple(list(found)[:k])
