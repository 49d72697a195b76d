"""Which vector a neuron writes: against activations of the model itself, not against the same formulas."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import families
from families.unrolled import chat
from safeglasses.model.hooks import scaled, tap
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM, Chat, load
from safeglasses.report.directions import direction, value_columns, words

CHAT = Chat([{"role": "user", "content": [{"type": "text", "text": "what is in the picture"}]}])
LAYER = "layers.1."


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    return load(families.build("llama", tmp_path_factory.mktemp("families") / "llama"))


def site(vlm: VLM, kind: str) -> Site:
    return next(
        Site(p, s)
        for p in vlm.anatomy.linears
        for s in ("out", "in")
        if p.startswith(LAYER) and Site(p, s).kind == kind
    )


def written(vlm: VLM, where: Site, index: int, out: Site, amount: float = 1.0) -> torch.Tensor:
    """Push one neuron of every token up and return how the block's output moves, by running the model."""

    def output(push: float) -> torch.Tensor:
        module = vlm.model.get_submodule(vlm.anatomy.absolute(where))

        def pushed(_, inputs, value=None):
            moved = (inputs[0] if value is None else value).clone()
            moved[..., index] += push
            return moved if value is not None else (moved,)

        hook = module.register_forward_hook(pushed) if where.side == "out" else module.register_forward_pre_hook(pushed)
        found: list[torch.Tensor] = []
        try:
            with torch.no_grad(), tap(vlm.model, vlm.anatomy, (out,), lambda _, value: found.append(value)):
                vlm.forward(vlm.encode([CHAT]))
        finally:
            hook.remove()
        return found[0]

    return (output(amount) - output(0.0))[0]


@pytest.mark.parametrize("kind", ["mlp.down_proj:in", "mlp.down_proj:out"])
def test_feed_forward_directions_are_what_the_block_writes(vlm: VLM, kind: str) -> None:
    found = direction(vlm, site(vlm, kind), 7).vector
    assert found is not None
    for moved in written(vlm, site(vlm, kind), 7, site(vlm, "mlp.down_proj:out")):
        torch.testing.assert_close(moved, found, atol=1e-5, rtol=1e-4)


def test_a_value_neuron_writes_what_all_its_heads_write(vlm: VLM) -> None:
    """Every token's value is pushed alike, so every head of the group passes the push on whole."""
    where = site(vlm, "self_attn.v_proj:out")
    assert vlm.anatomy.width(where) < vlm.anatomy.hidden_size  # grouped queries, or this proves little
    for index in (0, vlm.anatomy.width(where) - 1):
        found = direction(vlm, where, index).vector
        assert found is not None
        for moved in written(vlm, where, index, site(vlm, "self_attn.o_proj:out")):
            torch.testing.assert_close(moved, found, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["mlp.up_proj:out", "mlp.gate_proj:out"])
def test_gated_neurons_write_along_their_column(vlm: VLM, kind: str) -> None:
    found = direction(vlm, site(vlm, kind), 3).vector
    assert found is not None
    moved = written(vlm, site(vlm, kind), 3, site(vlm, "mlp.down_proj:out"))
    moved = moved[moved.norm(dim=-1) > 1e-6]
    assert len(moved)
    torch.testing.assert_close(torch.cosine_similarity(moved, found, dim=-1).abs(), torch.ones(len(moved)))


def test_queries_keys_and_readers_have_no_direction(vlm: VLM) -> None:
    for kind in ("self_attn.q_proj:out", "self_attn.k_proj:out"):
        found = direction(vlm, site(vlm, kind), 0)
        assert found.vector is None
        assert found.said == "compared with keys or queries, written nowhere: no output direction"
    assert direction(vlm, site(vlm, "mlp.up_proj:in"), 0).said == "reads the residual stream, writes nowhere by itself"


@given(head=st.integers(1, 8), groups=st.integers(1, 4), heads=st.integers(1, 4), data=st.data())
def test_value_columns_follow_repeated_heads(head: int, groups: int, heads: int, data: st.DataObject) -> None:
    """Independent oracle: repeat the value heads as attention does, and look where the index went."""
    values = heads * head
    index = data.draw(st.integers(0, values - 1))
    laid_out = torch.arange(values).reshape(heads, head).repeat_interleave(groups, dim=0).flatten()
    assert value_columns(index, values, groups * values, head) == torch.nonzero(laid_out == index)[:, 0].tolist()


def test_sizes_that_do_not_fit_give_nothing() -> None:
    assert value_columns(0, 10, 25, 5) is None
    assert value_columns(0, 10, 20, 3) is None
    assert value_columns(0, 10, 20, 0) is None


def test_words_are_those_with_the_highest_logits(vlm: VLM) -> None:
    """Independent oracle: the model's own norm and head, at a final state that points along the direction."""
    vector = torch.randn(vlm.anatomy.hidden_size, generator=torch.Generator().manual_seed(1))
    decoder = vlm.model.get_submodule(vlm.anatomy.decoder_path)
    with torch.no_grad():
        logits = vlm.model.get_output_embeddings()(decoder.norm(vector))
    special = set(vlm.tokenizer.all_special_ids)
    order = [i for i in logits.argsort(descending=True).tolist() if i not in special and i < len(vlm.tokenizer)]
    texts = [vlm.tokenizer.decode([i]).strip() for i in order]
    readable = list(dict.fromkeys(t for t in texts if any(c.isprintable() and c != "\ufffd" for c in t)))
    found = words(vlm, vector[None])[0]
    assert list(found.promoted) == readable[:8]
    assert len(found.demoted) == 8
    assert not set(found.promoted) & set(found.demoted)
    assert words(vlm, torch.zeros(0, vlm.anatomy.hidden_size)) == []


def test_opposite_directions_swap_promoted_and_demoted(vlm: VLM) -> None:
    vector = torch.randn(1, vlm.anatomy.hidden_size, generator=torch.Generator().manual_seed(2))
    (one,), (other,) = words(vlm, vector), words(vlm, -vector)
    assert (one.promoted, one.demoted) == (other.demoted, other.promoted)


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "glm4v", "opt"])
def test_other_families_give_a_direction_or_a_reason(family: str, tmp_path: Path) -> None:
    vlm = load(families.build(family, tmp_path / family))
    kinds = {Site(p, s).kind: Site(p, s) for p in vlm.anatomy.linears for s in ("out", "in")}
    for where in kinds.values():
        for index in {0, vlm.anatomy.width(where) - 1}:
            found = direction(vlm, where, index)
            assert found.said
            assert found.vector is None or (
                found.vector.shape == (vlm.anatomy.hidden_size,) and found.vector.isfinite().all()
            )
    assert sum(direction(vlm, where, 0).vector is not None for where in kinds.values()) >= 3


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "gpt_oss"])
def test_experts_write_what_their_neuron_adds(family: str, tmp_path: Path) -> None:
    """Against a difference: a neuron turned off takes its direction out of what the expert writes."""
    vlm = load(families.build(family, tmp_path / family))
    (experts, *_) = vlm.anatomy.experts.values()
    neuron, out = Site(experts.expert(1), "in"), Site(experts.expert(1), "out")
    off = torch.ones(experts.width)
    off[5] = 0
    batch, seen, active = vlm.encode([chat(vlm, 2, "a red dog")]), [], []
    with (
        torch.no_grad(),
        tap(vlm.model, vlm.anatomy, [out], lambda _, value: seen.append(value)),
        tap(vlm.model, vlm.anatomy, [neuron], lambda _, value: active.append(value[:, 5])),
    ):
        vlm.forward(batch)
        with scaled(vlm.model, vlm.anatomy, {neuron: off}):
            vlm.forward(batch)
    found = direction(vlm, neuron, 5)
    assert found.said == "its column of expert 1's down_proj"
    assert found.vector is not None
    torch.testing.assert_close(seen[0] - seen[1], active[0][:, None] * found.vector, atol=1e-4, rtol=1e-3)
    axis = direction(vlm, out, 3).vector
    assert axis is not None
    assert axis.nonzero().tolist() == [[3]]
