from collections.abc import Callable
from dataclasses import replace

import pytest
from torch import nn

import families
from safeglasses.errors import PartialMatch, SafeglassesError
from safeglasses.model.anatomy import anatomy, module
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM

GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
QKVO = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
# by hand, from each family's modelling file: decoder, feed-forward maps (output last), attention's maps
EXPECTED: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    **dict.fromkeys(
        ("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"),
        ("model.language_model", GATED, QKVO),
    ),
    "gemma3": ("model.language_model", GATED, QKVO),
    "mistral3": ("model.language_model", GATED, QKVO),
    "glm4v": ("model.language_model", ("mlp.gate_up_proj", "mlp.down_proj"), QKVO),
    "idefics3": ("model.text_model", GATED, QKVO),
    "mllama": (
        "model.language_model",
        GATED,
        (*QKVO, *(kind.replace("self_attn", "cross_attn") for kind in QKVO)),
    ),
    "llama": ("model", GATED, QKVO),
    "gpt2": ("transformer", ("mlp.c_fc", "mlp.c_proj"), ("attn.c_attn", "attn.c_proj")),
    "opt": ("model.decoder", ("fc1", "fc2"), (*QKVO[:3], "self_attn.out_proj")),
    "qwen3_vl_moe": ("model.language_model", (), QKVO),
}


def test_every_family_is_expected() -> None:
    assert set(EXPECTED) | {"mistral3"} == {*families.FAMILIES, "mistral3"}  # it needs torchvision


@pytest.mark.parametrize("name", families.FAMILIES)
def test_parts_of_every_family(family: Callable[[str], VLM], name: str) -> None:
    vlm = family(name)
    found = vlm.anatomy
    decoder, mlp, attention = EXPECTED[name]
    assert found.decoder_path == decoder
    assert (found.n_layers, found.hidden_size) == (2, 32)
    assert {Site(path, "out").kind.removesuffix(":out") for path in found.mlp} == set(mlp)
    assert {Site(path, "out").kind.removesuffix(":out") for path in found.linears} == {*mlp, *attention}
    if mlp:
        assert found.ffn == tuple(f"{found.layers_path}.{layer}.{mlp[-1]}" for layer in range(2))
        assert len(found.sites("mlp")) == 2 * len(mlp)
        assert all(site.side == "in" and found.width(site) == 48 for site in found.sites("neurons"))
    for site in found.sites("linears"):
        target = module(vlm.model, found, site)
        weight = vlm.model.get_parameter(found.absolute(site) + ".weight")
        assert target.weight is weight
        assert {found.width(site), found.width(replace(site, side="in"))} == set(weight.shape)


def test_table_counts_neurons(tiny_vlm: VLM) -> None:
    table = tiny_vlm.anatomy.table()
    assert table["decoder"] == "model.language_model"
    assert table["linears"][-1] == {"kind": "mlp.down_proj", "layers": 2, "in": 48, "out": 32, "mlp": True}
    assert table["neurons"] == {"linears": 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32), "mlp": 2 * 128, "ffn": 96}


def test_fused_experts_say_what_is_possible(family: Callable[[str], VLM]) -> None:
    found = family("qwen3_vl_moe").anatomy
    with pytest.raises(SafeglassesError) as caught:
        found.sites("mlp")
    assert str(caught.value) == (
        "the decoder's feed-forward blocks have no linear maps of their own\n"
        "  given:    layer 0 has no linear map of width 32 outside attention; fused experts are kept as one "
        "tensor, not as linear maps\n"
        "  expected: one linear map per layer, outside attention, that writes the residual stream\n"
        '  do:       use sites="linears": on this model it acts on the attention\'s linear maps only'
    )
    assert len(found.sites("linears")) == 8


def test_experts_kept_apart_are_no_single_output() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = nn.Linear(8, 8)
            self.experts = nn.ModuleList(nn.ModuleDict({"down": nn.Linear(4, 8)}) for _ in range(3))

    found = anatomy(_Stub(nn.ModuleList([Layer(), Layer()])))
    assert found.ffn == ()
    assert found.ffn_reason == (
        "layer 0 has 3 candidates in 3 blocks (layers.0.experts.0.down, layers.0.experts.1.down …), "
        "as mixtures of experts do"
    )
    assert len(found.sites("linears")) == 8


def test_square_blocks_take_the_last_map() -> None:
    layers = nn.ModuleList(
        nn.ModuleDict({"attn": nn.Linear(8, 8), "mlp": nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))})
        for _ in range(2)
    )
    found = anatomy(_Stub(layers))
    assert found.ffn == ("layers.0.mlp.2", "layers.1.mlp.2")
    assert found.mlp == ("layers.0.mlp.0", "layers.0.mlp.2", "layers.1.mlp.0", "layers.1.mlp.2")


def test_no_decoder() -> None:
    with pytest.raises(SafeglassesError) as caught:
        anatomy(nn.Linear(2, 2))
    assert str(caught.value) == (
        "no language decoder found\n"
        "  given:    Linear\n"
        "  expected: a transformers model whose get_decoder() returns one of its own modules\n"
        "  do:       load the model with safeglasses.load, or pass the whole model, not a part of it"
    )


def test_no_layers() -> None:
    with pytest.raises(SafeglassesError) as caught:
        anatomy(_Stub(nn.ModuleList([nn.Linear(8, 8)] * 3)))
    assert str(caught.value) == (
        "the decoder's layers were not found\n"
        "  given:    _Decoder with num_hidden_layers=2, hidden_size=8\n"
        "  expected: one ModuleList as long as the text config's num_hidden_layers\n"
        "  do:       use a decoder-only transformer whose layers are separate modules"
    )


def test_no_linear_maps() -> None:
    found = anatomy(_Stub(nn.ModuleList([nn.Identity(), nn.Identity()])))
    with pytest.raises(SafeglassesError, match="the decoder has no linear maps"):
        found.sites("linears")


def test_unknown_site(tiny_vlm: VLM) -> None:
    with pytest.raises(PartialMatch) as caught:
        module(tiny_vlm.model, tiny_vlm.anatomy, Site("layers.99.mlp.up_proj", "out"))
    assert str(caught.value) == (
        "1 of 1 modules are not linear maps of this decoder\n"
        "  given:    layers.99.mlp.up_proj\n"
        "  expected: one of 14, layers.0.self_attn.q_proj … layers.1.mlp.down_proj\n"
        "  do:       list the model's sites with `safeglasses inspect MODEL`"
    )


class _Decoder(nn.Module):
    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers


class _Stub(nn.Module):
    """A model with two layers of width 8, as its config says."""

    num_hidden_layers = 2
    hidden_size = 8

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.decoder = _Decoder(layers)

    @property
    def config(self) -> "_Stub":
        return self

    def get_text_config(self, decoder: bool) -> "_Stub":
        return self

    def get_decoder(self) -> nn.Module:
        return self.decoder
