from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import families
from safeglasses.defend.factors import by_head
from safeglasses.errors import SafeglassesError
from safeglasses.model.anatomy import anatomy, module
from safeglasses.model.architectures import config_of, on_meta
from safeglasses.model.chat import Batch, Chat
from safeglasses.model.heads import Attention
from safeglasses.model.hooks import tap
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # glm4v's processor
FUSED = ("gpt2", "qwen3_5", "qwen3_5_moe")  # queries, keys and values in one map of the first layer


@pytest.mark.parametrize("name", families.FAMILIES)
def test_what_a_head_writes_follows_from_its_own_queries_keys_and_values_alone(
    family: Callable[[str], VLM], name: str
) -> None:
    """Brute force: move one head's slice of one map's weights, and see which slices of the output map's input move."""
    vlm = family(name)
    heads = vlm.anatomy.attention.heads
    layers = sorted({site.layer for site in heads if site not in _crossing(vlm)})
    assert layers, "no layer has heads"
    layer = layers[0]
    outputs = [site for site in heads if site.layer == layer and site.side == "in"]
    assert len(outputs) == (2 if name == "florence2" else 1)  # the decoder of BART also looks at its encoder
    batch = vlm.encode([Chat(families.messages(3, pictures=int(vlm.is_multimodal)), response="a red dog")])
    for output in outputs:
        beside = output.path.rpartition(".")[0]
        _check(vlm, batch, output, {s: n for s, n in heads.items() if s.path.rpartition(".")[0] == beside}, name)


def _check(vlm: VLM, batch: Batch, output: Site, here: dict[Site, int], name: str) -> None:
    sides = [site for site in here if site.side == "out"]
    assert len(sides) == (0 if name in FUSED else 3)
    before = _written(vlm, output, batch)
    for site in sides:
        weight = module(vlm.model, vlm.anatomy, site).get_parameter("weight")
        share = here[output] // here[site]  # query heads that look at one head of keys and values
        for head in range(here[site]):
            rows = slice(head * len(weight) // here[site], (head + 1) * len(weight) // here[site])
            kept = weight[rows].clone()
            with torch.no_grad():
                weight[rows] = kept.flip(0) * 1.5
                after = _written(vlm, output, batch)
                weight[rows] = kept
            moved = (after != before).any(dim=0).unflatten(0, (here[output], -1)).any(dim=1)
            expected = [head * share <= query < (head + 1) * share for query in range(here[output])]
            assert moved.tolist() == expected, (site, head)
    assert torch.equal(_written(vlm, output, batch), before)


def test_grouped_queries_share_keys_by_neighbourhood(tiny_vlm: VLM) -> None:
    found = tiny_vlm.anatomy
    numbers = {site.kind: n for site, n in found.attention.heads.items()}
    assert numbers == {
        "self_attn.q_proj:out": 4, "self_attn.k_proj:out": 2, "self_attn.v_proj:out": 2, "self_attn.o_proj:in": 4
    }  # fmt: skip
    assert [str(s) for s in found.sites("attention")[:4]] == [
        f"layers.0.self_attn.{name}_proj:out" for name in ("q", "k", "v", "o")
    ]
    assert [str(s) for s in found.sites("heads")] == [f"layers.{i}.self_attn.o_proj:in" for i in (0, 1)]


def test_the_keys_of_cross_attention_are_no_sites_but_its_queries_are(family: Callable[[str], VLM]) -> None:
    found = family("mllama").anatomy
    kinds = {site.kind for site in found.sites("attention")}
    assert {"cross_attn.q_proj:out", "cross_attn.o_proj:out"} <= kinds
    assert not {"cross_attn.k_proj:out", "cross_attn.v_proj:out"} & kinds


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [  # by hand, from each modelling file and default config
        ("kimi_k25", {"self_attn.o_proj:in": 128, "self_attn.q_b_proj:out": 128, "self_attn.kv_b_proj:out": 128}),
        ("qwen3_5", {"linear_attn.out_proj:in": 32, "self_attn.o_proj:in": 16, "self_attn.q_proj:out": 16,
                     "self_attn.k_proj:out": 4, "self_attn.v_proj:out": 4}),
        ("fuyu", {"self_attn.dense:in": 64}),
        ("blip", {f"{kind}.{name}": 8 for kind in ("attention", "crossattention")
                  for name in ("output.dense:in", "self.query:out", "self.key:out", "self.value:out")}),
    ],
)  # fmt: skip
def test_latent_linear_and_fused_attention(model_type: str, expected: dict[str, int]) -> None:
    found = anatomy(on_meta(config_of(model_type)[0]))
    assert {site.kind: n for site, n in found.attention.heads.items()} == expected


def test_a_head_is_turned_down_as_one() -> None:
    site, other = Site("layers.0.self_attn.o_proj", "in"), Site("layers.0.mlp.down_proj", "in")
    factors = {site: torch.tensor([0.0, 0.5, 1.0, 1.0, 0.2, 0.4]), other: torch.tensor([0.1, 0.9])}
    found = by_head(factors, {site: 3})
    assert torch.allclose(found[site], torch.tensor([0.25, 0.25, 1.0, 1.0, 0.3, 0.3]))
    assert torch.equal(found[other], factors[other])


def test_a_decoder_without_attention_says_so() -> None:
    for sites in (Attention().sites, Attention().sites_by_head):
        with pytest.raises(SafeglassesError, match="no attention whose maps and heads are known"):
            sites()


def _crossing(vlm: VLM) -> set[Site]:
    crossing = set(vlm.anatomy.cross_attention_layers)
    return {site for site in vlm.anatomy.attention.heads if site.layer in crossing}


def _written(vlm: VLM, output: Site, batch) -> Tensor:
    seen: list[Tensor] = []
    with tap(vlm.model, vlm.anatomy, [output], lambda _, value: seen.append(value)), torch.no_grad():
        vlm.forward(batch)
    return seen[0].reshape(-1, seen[0].shape[-1])
