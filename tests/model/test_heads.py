"""Heads against brute force: move one head's block of one map, and see whose outputs move."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn

import families
from safeglasses.defend.factors import by_head
from safeglasses.errors import SafeglassesError
from safeglasses.model.anatomy import Anatomy, anatomy
from safeglasses.model.architectures import config_of, on_meta
from safeglasses.model.chat import Chat
from safeglasses.model.heads import Attention
from safeglasses.model.hooks import replaced, tap
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # glm4v's processor
FUSED = ("gpt2", "qwen3_5", "qwen3_5_moe")  # queries, keys and values in one map of the first layer
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 50,
    "pad_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2}
AT_ONCE = {  # in every order that transformers knows, and linear attention whose keys have a width of their own
    "bloom": ("BloomForCausalLM", SMALL),
    "codegen": ("CodeGenForCausalLM", {**SMALL, "num_attention_heads": 8, "rotary_dim": 4}),
    "dbrx": ("DbrxForCausalLM", {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 50, "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 2},
    }),
    "falcon": ("FalconForCausalLM", {**SMALL, "multi_query": False}),
    "falcon of one key": ("FalconForCausalLM", {**SMALL, "multi_query": True}),
    "falcon of groups": ("FalconForCausalLM", {**SMALL, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", {**SMALL, "multi_query": False}),
    "gpt_bigcode of one key": ("GPTBigCodeForCausalLM", {**SMALL, "multi_query": True}),
    "gpt_neox": ("GPTNeoXForCausalLM", SMALL),
    "gpt_neox_japanese": ("GPTNeoXJapaneseForCausalLM", SMALL),
    "mimo_v2_flash": ("MiMoV2FlashForCausalLM", {
        **GROUPED, "head_dim": 12, "v_head_dim": 8, "layer_types": ["full_attention"] * 2,
    }),
    "mpt": ("MptForCausalLM", {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 50}),
    "olmo_hybrid": ("OlmoHybridForCausalLM", {
        **SMALL, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 16,
    }),
    "persimmon": ("PersimmonForCausalLM", SMALL),
    "phi3": ("Phi3ForCausalLM", GROUPED),
}  # fmt: skip


@pytest.mark.parametrize("name", families.FAMILIES)
def test_what_a_head_writes_follows_from_its_own_queries_keys_and_values_alone(
    family: Callable[[str], VLM], name: str
) -> None:
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
        here = {s: n for s, n in heads.items() if s.path.rpartition(".")[0] == beside}
        assert sum(site.side == "out" for site in here) == (1 if name in FUSED else 3)
        _check(vlm.model, vlm.anatomy, lambda: vlm.forward(batch), output, here)


@pytest.mark.parametrize("name", AT_ONCE)
def test_queries_keys_and_values_of_one_map(name: str) -> None:
    """In whatever order a map writes them, each block of a head's width is the queries, keys or values of one head."""
    kind, options = AT_ONCE[name]
    built = getattr(transformers, kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = built(built.config_class(**options)).eval()
        for parameter in model.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    found = anatomy(model)
    layer = {site: n for site, n in found.attention.heads.items() if site.layer == 0}
    assert sum(site.side == "out" for site in layer) == (3 if name in ("mimo_v2_flash", "olmo_hybrid") else 1)
    (output,) = [site for site in layer if site.side == "in"]
    ids = torch.arange(1, 9)[None]
    _check(model, found, lambda: model(input_ids=ids, use_cache=False), output, layer)


def _check(
    model: nn.Module, found: Anatomy, forward: Callable[[], object], output: Site, here: dict[Site, int]
) -> None:
    n = here[output]

    def moved(site: Site | None = None, block: int = 0) -> Tensor:
        seen: list[Tensor] = []

        def turn(value: Tensor) -> Tensor:
            rows, other = value.unflatten(-1, (here[site], -1)), value.unflatten(-1, (here[site], -1)).clone()
            other[..., block, :] = rows[..., block, :].flip(-1) * 1.5
            return other.flatten(-2)

        visits = {} if site is None else {site: turn}
        with torch.no_grad(), replaced(model, found, visits), tap(model, found, [output], lambda _, v: seen.append(v)):
            forward()
        (value,) = seen
        return value.reshape(-1, n, value.shape[-1] // n)

    before = moved()
    for site, number in here.items():
        if site == output:
            continue
        groups = [
            tuple((moved(site, block) != before).any(dim=(0, 2)).nonzero()[:, 0].tolist()) for block in range(number)
        ]
        share = n // number
        if number <= n:  # a map of its own
            assert groups == [tuple(range(j * share, (j + 1) * share)) for j in range(number)], site
            continue
        others = (number - n) // 2  # n blocks of one role, two of as many others, in whatever order
        shares = Counter(tuple(range(j * n // others, (j + 1) * n // others)) for j in range(others))
        assert Counter(groups) == Counter((head,) for head in range(n)) + shares + shares, site
    assert torch.equal(moved(), before)


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
        ("qwen3_5", {"linear_attn.out_proj:in": 32, "linear_attn.in_proj_qkv:out": 64, "self_attn.o_proj:in": 16,
                     "self_attn.q_proj:out": 16, "self_attn.k_proj:out": 4, "self_attn.v_proj:out": 4}),
        ("fuyu", {"self_attn.dense:in": 64, "self_attn.query_key_value:out": 192}),
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
