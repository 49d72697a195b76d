from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

import families
from safeglasses.errors import PartialMatch, SafeglassesError
from safeglasses.model.anatomy import anatomy, module
from safeglasses.model.blocks import Block
from safeglasses.model.chat import Chat
from safeglasses.model.experts import Experts
from safeglasses.model.hooks import tap
from safeglasses.model.overview import overview
from safeglasses.model.sites import SIDES, Site
from safeglasses.model.vlm import VLM

GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
QKVO = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
# by hand, from modelling files, where shapes differ: decoder, feed-forward maps (output last), attention's maps
EXPECTED: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    **dict.fromkeys(
        (
            "llava",
            "llava_next",
            "llava_onevision",
            "internvl",
            "mistral3",
            "aya_vision",
            "deepseek_vl",
            "video_llama_3",
        ),
        ("model.language_model", GATED, QKVO),
    ),
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "paligemma"), ("model.language_model", GATED, QKVO)
    ),
    "gemma4": ("model.language_model", GATED, (*QKVO, "per_layer_input_gate", "per_layer_projection")),
    "gemma3n_text": (
        "model",
        GATED,
        (
            *QKVO,
            *(f"altup.{name}" for name in ("correction_coefs", "prediction_coefs", "modality_router")),
            *("laurel.linear_left", "laurel.linear_right", "per_layer_input_gate", "per_layer_projection"),
        ),
    ),
    "qwen3_5": (
        "model.language_model",
        GATED,
        (
            *QKVO,
            *(f"linear_attn.in_proj_{name}" for name in ("a", "b", "qkv", "z")),
            "linear_attn.out_proj",
        ),
    ),
    "glm4v": ("model.language_model", ("mlp.gate_up_proj", "mlp.down_proj"), QKVO),
    **dict.fromkeys(("idefics2", "idefics3"), ("model.text_model", GATED, QKVO)),
    "blip_2": ("language_model", ("fc1", "fc2"), (*QKVO[:3], "self_attn.out_proj")),
    "phi": ("model", ("mlp.fc1", "mlp.fc2"), (*QKVO[:3], "self_attn.dense")),
    "mllama": (
        "model.language_model",
        GATED,
        (*QKVO, *(kind.replace("self_attn", "cross_attn") for kind in QKVO)),
    ),
    "llama": ("model", GATED, QKVO),
    "gpt2": ("transformer", ("mlp.c_fc", "mlp.c_proj"), ("attn.c_attn", "attn.c_proj")),
    "opt": ("model.decoder", ("fc1", "fc2"), (*QKVO[:3], "self_attn.out_proj")),
    "florence2": (
        "model.language_model",
        ("fc1", "fc2"),
        tuple(
            f"{place}.{leaf}"
            for place in ("self_attn", "encoder_attn")
            for leaf in ["q_proj", "k_proj", "v_proj", "out_proj"]
        ),
    ),
    "t5gemma2": ("model.decoder", GATED, QKVO),
}
WIDTHS = {"gemma3n_text": [48, 24]}


@pytest.mark.parametrize("name", [name for name in families.FAMILIES if name in EXPECTED])
def test_parts_of_every_family(family: Callable[[str], VLM], name: str) -> None:
    vlm = family(name)
    found = vlm.anatomy
    decoder, mlp, attention = EXPECTED[name]
    assert found.decoder_path == decoder
    assert (found.n_layers, found.hidden_size) == (2, 32)
    assert {Site(path, "out").kind.removesuffix(":out") for path in found.mlp} == set(mlp)
    assert {Site(path, "out").kind.removesuffix(":out") for path in found.linears} == {*mlp, *attention}
    assert found.ffn == tuple(f"{found.layers_path}.{layer}.{mlp[-1]}" for layer in range(2))
    assert len(found.sites("mlp")) == 2 * len(mlp)
    assert [(site.side, found.width(site)) for site in found.sites("neurons")] == [
        ("in", width) for width in WIDTHS.get(name, [48, 48])
    ]
    for site in found.sites("linears"):
        target = module(vlm.model, found, site)
        weight = vlm.model.get_parameter(found.absolute(site) + ".weight")
        assert target.weight is weight
        assert {found.width(site), found.width(replace(site, side="in"))} == set(weight.shape)


def test_table_counts_neurons(tiny_vlm: VLM) -> None:
    table = overview(tiny_vlm.anatomy)
    assert table["decoder"] == "model.language_model"
    assert table["linears"][-1] == {
        "kind": "mlp.down_proj", "layers": 2, "maps": 2, "in": 48, "out": 32, "mlp": True, "halves": []
    }  # fmt: skip
    assert table["neurons"] == {
        "linears": 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32), "mlp": 2 * 128, "ffn": 96, "experts": 0
    }  # fmt: skip


def test_fused_experts_have_addresses_of_their_own(family: Callable[[str], VLM]) -> None:
    found = family("qwen3_vl_moe").anatomy
    assert found.ffn == found.mlp == ()
    (first, _) = found.experts.values()
    assert first == Experts(
        path="layers.0.mlp.experts",
        n_experts=4,
        width=24,
        hidden=32,
        makers=("gate_up_proj",),
        down="down_proj",
        gated=True,
        transposed=False,
        interleaved=False,
        biased=False,
        routed=True,
        dispatched=True,
    )
    assert [str(site) for site in found.sites("neurons")[3:5]] == [
        "layers.0.mlp.experts.3:in",
        "layers.1.mlp.experts.0:in",
    ]
    assert [str(site) for site in found.sites("mlp")[:3]] == [
        "layers.0.mlp.experts.0:gate",
        "layers.0.mlp.experts.0:up",
        "layers.0.mlp.experts.0:out",
    ]
    assert len(found.sites("linears")) == 8
    assert [found.width(Site("layers.0.mlp.experts.3", side)) for side in SIDES] == [24, 32, 24, 24]
    assert found.expert(Site("layers.1.mlp.experts.2", "in")) == (found.experts["layers.1.mlp.experts"], 2)
    assert found.expert(Site("layers.0.self_attn.q_proj", "in")) is None


def test_fused_experts_are_refused_where_modules_are_needed(family: Callable[[str], VLM]) -> None:
    vlm = family("qwen3_vl_moe")
    with pytest.raises(PartialMatch) as caught:
        vlm.anatomy.require_linear(vlm.anatomy.neurons)
    assert str(caught.value) == (
        "fused experts are no modules: this works on linear maps alone\n"
        "  given:    layers.0.mlp.experts.0, layers.0.mlp.experts.1, layers.0.mlp.experts.2 …: "
        "slices of 3-D parameters\n"
        "  expected: linear maps\n"
        '  do:       use sites="linears", which leaves fused experts out'
    )
    with pytest.raises(PartialMatch, match="1 of 1 modules are not linear maps"):
        vlm.anatomy.width(Site("layers.0.mlp.experts.4", "in"))  # it has 4


def test_experts_that_are_modules_are_blocks_each() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = nn.Linear(8, 8)
            self.experts = nn.ModuleList(
                nn.ModuleDict({"up": nn.Linear(8, 4), "act": nn.ReLU(), "down": nn.Linear(4, 8)}) for _ in range(3)
            )

    found = anatomy(_Stub(nn.ModuleList([Layer(), Layer()])))
    assert found.ffn[:3] == tuple(f"layers.0.experts.{expert}.down" for expert in range(3))
    assert found.blocks[4] == Block(("layers.1.experts.1.up",), "layers.1.experts.1.down")
    assert found.block_of("layers.1.experts.1.up") == found.blocks[4]
    assert {site.expert for site in found.sites("neurons")} == {0, 1, 2}
    assert {site.kind for site in found.sites("neurons")} == {"experts.down:in"}


def test_maps_that_nothing_feeds_are_no_blocks() -> None:
    layer = nn.ModuleDict({"one": nn.ModuleDict({"a": nn.Linear(4, 8)}), "two": nn.ModuleDict({"b": nn.Linear(4, 8)})})
    found = anatomy(_Stub(nn.ModuleList([layer, deepcopy(layer)])))
    with pytest.raises(SafeglassesError) as caught:
        found.sites("mlp")
    assert str(caught.value) == (
        "the decoder's feed-forward blocks have no linear maps of their own\n"
        "  given:    layer 0 has 2 maps that could end a feed-forward block (layers.0.one.a, layers.0.two.b …) "
        "and none that makes what they read\n"
        "  expected: one linear map per layer, outside attention, that writes the residual stream\n"
        '  do:       use sites="linears": on this model it acts on the linear maps that exist'
    )
    assert len(found.sites("linears")) == 4


def test_side_paths_and_mixers_are_no_blocks() -> None:
    class MixerAttention(nn.Module):
        """Attention that its path does not tell."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.o = nn.Linear(8, 8), nn.Linear(8, 8)

    class Layer(nn.Module):
        def __init__(self, mixer: nn.Module) -> None:
            super().__init__()
            self.mixer = mixer
            self.low_rank = nn.ModuleDict({"left": nn.Linear(8, 2), "right": nn.Linear(2, 8)})
            self.mlp = nn.ModuleDict({"up": nn.Linear(8, 16), "act_fn": nn.ReLU(), "down": nn.Linear(16, 8)})
            self.side_gate, self.side_projection, self.act_fn = nn.Linear(8, 2), nn.Linear(2, 8), nn.ReLU()

    convolution = nn.ModuleDict({"conv": nn.Conv1d(4, 4, 3), "widen": nn.Linear(8, 16), "narrow": nn.Linear(16, 8)})
    found = anatomy(_Stub(nn.ModuleList([Layer(MixerAttention()), Layer(convolution)])))
    assert found.mlp == tuple(f"layers.{layer}.mlp.{name}" for layer in range(2) for name in ("up", "down"))


def test_layers_may_lack_a_block() -> None:
    block = nn.ModuleDict({"up": nn.Linear(8, 16), "down": nn.Linear(16, 8)})
    found = anatomy(_Stub(nn.ModuleList([nn.ModuleDict({"attn": nn.Linear(8, 8)}), nn.ModuleDict({"mlp": block})])))
    assert found.ffn == ("layers.1.mlp.down",)
    assert found.layers_without_neurons == (0,)


def test_halves_of_a_fused_map_are_addressed_apart(family: Callable[[str], VLM]) -> None:
    found = family("glm4v").anatomy
    site = Site("layers.1.mlp.gate_up_proj", "out")
    assert found.width(site) == 96
    assert found.address(site, 3) == "layers.1.mlp.gate_up_proj:gate#3"
    assert found.address(site, 51) == "layers.1.mlp.gate_up_proj:up#3"
    assert all(found.neuron(found.address(site, index)) == (site, index) for index in range(96))
    assert found.neuron("layers.1.mlp.gate_up_proj:out#51") == (site, 51)
    assert found.address(Site("layers.1.mlp.down_proj", "in"), 3) == "layers.1.mlp.down_proj:in#3"
    with pytest.raises(SafeglassesError) as caught:
        found.neuron("layers.1.mlp.gate_up_proj:up#48")
    assert str(caught.value) == (
        "no such neuron\n"
        "  given:    'layers.1.mlp.gate_up_proj:up#48'\n"
        "  expected: layers.1.mlp.gate_up_proj:up#0 … layers.1.mlp.gate_up_proj:up#47"
    )
    with pytest.raises(PartialMatch, match="a linear map has no side 'gate'"):
        found.neuron("layers.1.mlp.down_proj:gate#0")


def test_default_sites_of_cross_attention_see_every_token(family: Callable[[str], VLM]) -> None:
    vlm = family("mllama")
    sites, seen = vlm.anatomy.sites("linears"), {}
    assert vlm.anatomy.cross_attention_keys == ("layers.1.cross_attn.k_proj", "layers.1.cross_attn.v_proj")
    assert len(sites) == len(vlm.anatomy.linears) - 2
    batch = vlm.encode([Chat(families.messages(index), "ok then") for index in range(3)])
    with torch.no_grad(), tap(vlm.model, vlm.anatomy, sites, lambda site, value: seen.setdefault(site, value.shape)):
        vlm.forward(batch)
    tokens = batch.inputs["input_ids"].numel()
    assert all(seen[site].numel() == tokens * vlm.anatomy.width(site) for site in sites)


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
