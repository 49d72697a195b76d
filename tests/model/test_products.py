"""Experts that compute in a way of their own, seen through their products: against the same ones in other clothes."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.inkling import InklingForCausalLM, InklingTextConfig
from transformers.models.llama4 import Llama4ForCausalLM, Llama4TextConfig
from transformers.models.step3p7 import Step3p7Config, Step3p7ForConditionalGeneration
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

from families.parts import text, vision
from families.unrolled import chat
from find.conftest import example_of
from safeglasses.defend.glasses import Glasses
from safeglasses.errors import SafeglassesError
from safeglasses.find.capture import capture
from safeglasses.find.pools import Pool
from safeglasses.model.anatomy import anatomy
from safeglasses.model.experts import find_experts
from safeglasses.model.hooks import scaled, tap
from safeglasses.model.products import Products
from safeglasses.model.sites import Side, Site
from safeglasses.model.vlm import VLM
from safeglasses.ship.fold import fold_checkpoint

SIDES: tuple[Side, ...] = ("gate", "up", "in", "out")
POOLS = tuple(map(Pool.parse, ("prompt:last", "response:max", "all:mean")))


def sharpened(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if not name.endswith("norm.weight"):
            parameter.data.normal_(0, 0.15, generator=generator)
    return model.eval()


def vlm_of(model: Any, like: VLM) -> VLM:
    return VLM(model, like.processor, anatomy(model), "made up")


@pytest.fixture(scope="module")
def qwen(family: Callable[[str], VLM]) -> VLM:
    return family("qwen3_vl_moe")


@pytest.fixture(scope="module")
def stepped(qwen: VLM) -> VLM:
    """Qwen3-VL-MoE with Step 3.7's loop over experts, which computes the same outside of transformers' interface."""
    model: Any = copy.deepcopy(qwen.model)
    for path in qwen.anatomy.experts:
        old = model.get_submodule(qwen.anatomy.absolute_path(path))
        sizes = {"num_local_experts": 4, "hidden_size": 32, "moe_intermediate_size": 24}
        new = Step3p7Experts(SimpleNamespace(**sizes, hidden_act="silu"))
        new.load_state_dict(old.state_dict())
        parent, _, leaf = qwen.anatomy.absolute_path(path).rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
    return vlm_of(model.eval(), qwen)


@pytest.fixture(scope="module")
def llama4(family: Callable[[str], VLM]) -> VLM:
    config = Llama4TextConfig(
        **text(head_dim=8, num_local_experts=4, num_experts_per_tok=2, intermediate_size_mlp=48, attn_scale=0.1)
    )
    return vlm_of(sharpened(Llama4ForCausalLM(config)), family("llama"))


@pytest.fixture(scope="module")
def inkling(family: Callable[[str], VLM]) -> VLM:
    heads = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "d_rel": 4}
    moe = {"moe_intermediate_size": 24, "n_routed_experts": 4, "n_shared_experts": 2, "num_experts_per_tok": 2}
    config = InklingTextConfig(**text(head_dim=8, sliding_window_size=8, rel_extent=16, **heads, **moe))
    return vlm_of(sharpened(InklingForCausalLM(config)), family("llama"))


@pytest.fixture(scope="module")
def step(family: Callable[[str], VLM]) -> VLM:
    """Step 3.7 itself, asked without pictures: a dense layer, then one of experts beside a shared one."""
    moe = {"moe_intermediate_size": 24, "share_expert_dim": 24, "n_routed_experts": 4, "num_experts_per_tok": 2}
    layers = {"mlp_layer_types": ["dense", "sparse"], "layer_types": ["full_attention"] * 2, "sliding_window": 8}
    config = Step3p7Config(text_config=text(head_dim=8, **moe, **layers), vision_config=vision(image_size=32))
    return vlm_of(sharpened(Step3p7ForConditionalGeneration(config)), family("llama"))


def logits(vlm: VLM) -> Tensor:
    with torch.no_grad():
        return vlm.forward(vlm.encode([chat(vlm, index, "a red dog " * index) for index in (1, 3)]))


def sites_of(vlm: VLM) -> tuple[Site, ...]:
    return tuple(site for fused in vlm.anatomy.experts.values() for site in fused.sites(*SIDES))


def factors_of(vlm: VLM) -> dict[Site, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {site: torch.rand(vlm.anatomy.width(site), generator=generator) for site in sites_of(vlm)[::3]}


def values_of(vlm: VLM, factors: dict[Site, Tensor] | None = None) -> dict[Site, Tensor]:
    seen: dict[Site, Tensor] = {}
    with scaled(vlm.model, vlm.anatomy, factors or {}), tap(vlm.model, vlm.anatomy, sites_of(vlm), seen.__setitem__):
        logits(vlm)
    return seen


def test_a_loop_over_experts_is_what_transformers_interface_gives(qwen: VLM, stepped: VLM) -> None:
    assert not any(fused.dispatched for fused in stepped.anatomy.experts.values())
    factors = factors_of(qwen)
    for mine, theirs in (
        (values_of(stepped), values_of(qwen)),
        (values_of(stepped, factors), values_of(qwen, factors)),
    ):
        assert mine.keys() == theirs.keys()
        for site, value in theirs.items():
            order, other = value.sum(-1).argsort(), mine[site].sum(-1).argsort()  # rows come in the loop's order
            torch.testing.assert_close(mine[site][other], value[order], atol=1e-5, rtol=1e-4)
    before = logits(stepped)
    with scaled(stepped.model, stepped.anatomy, factors):
        ours = logits(stepped)
    with scaled(qwen.model, qwen.anatomy, factors):
        torch.testing.assert_close(ours, logits(qwen), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours, before, atol=1e-2)
    assert torch.equal(logits(stepped), before)


def test_a_loop_is_captured_as_the_interface_is(qwen: VLM, stepped: VLM) -> None:
    rows, sites = [example_of(seed) for seed in range(8)], sites_of(qwen)
    mine, theirs = (capture(v, rows, sites=sites, pools=POOLS, batch_size=3).values for v in (stepped, qwen))
    for site in sites:
        torch.testing.assert_close(mine[site], theirs[site], atol=1e-4, rtol=1e-3, equal_nan=True)


def test_gradients_flow_through_a_loop(qwen: VLM, stepped: VLM) -> None:
    found = []
    for vlm in (qwen, stepped):
        factors = {site: row.clone().requires_grad_() for site, row in factors_of(vlm).items()}
        batch = vlm.encode([chat(vlm, 1, "a red dog")])
        with scaled(vlm.model, vlm.anatomy, factors):
            vlm.model(**batch.inputs, use_cache=False).logits.logsumexp(-1).sum().backward()
        found.append({s: torch.zeros_like(row) if row.grad is None else row.grad for s, row in factors.items()})
        vlm.model.zero_grad()
    for site, grad in found[0].items():
        torch.testing.assert_close(found[1][site], grad, atol=1e-3, rtol=1e-3)


class Llama4Unrolled(nn.Module):
    """Llama 4's experts as linear maps, told by the router's logits who is sent where."""

    def __init__(self, fused: Any, router: Any) -> None:
        super().__init__()
        self.maps: Any = nn.ModuleList()
        for both, down in zip(fused.gate_up_proj, fused.down_proj, strict=True):
            expert = nn.ModuleDict({name: nn.Linear(1, 1, bias=False) for name in ("gate", "up", "down")})
            for name, weight in zip(expert, (*both.chunk(2, dim=1), down), strict=True):
                expert[name].weight = nn.Parameter(weight.T.clone())
            self.maps.append(expert)
        self.seen: dict[tuple[int, Side], Tensor] = {}
        self.factors: dict[tuple[int, Side], Tensor] = {}
        router.register_forward_hook(lambda _m, _a, out: setattr(self, "logits", out[1]))
        self.logits: Any = None
        self.top_k = router.top_k

    def forward(self, given: Tensor) -> Tensor:
        given = given.view(len(self.maps), -1, given.shape[-1])
        sent = torch.zeros_like(self.logits, dtype=torch.bool).scatter_(1, self.logits.topk(self.top_k).indices, True)
        total = torch.zeros_like(given)
        for number, expert in enumerate(self.maps):
            rows = sent[:, number]

            def kept(side: Side, value: Tensor, number: int = number) -> Tensor:
                value = value * self.factors.get((number, side), 1)
                self.seen[number, side] = value
                return value

            x = given[number][rows]
            gate, up = kept("gate", expert["gate"](x)), kept("up", expert["up"](x))
            total[number][rows] = kept("out", expert["down"](kept("in", up * functional.silu(gate))))
        return total.view(-1, given.shape[-1])


def test_all_experts_at_once_are_those_of_unrolled_ones(llama4: VLM) -> None:
    model: Any = copy.deepcopy(llama4.model)
    made = {}
    for path in llama4.anatomy.experts:
        block = model.get_submodule(llama4.anatomy.absolute_path(path).rpartition(".")[0])
        made[path] = block.experts = Llama4Unrolled(block.experts, block.router)
    other = VLM(model, llama4.processor, llama4.anatomy, "unrolled")
    for factors in ({}, factors_of(llama4)):
        for path, experts in made.items():
            experts.factors = {
                (int(site.path.rpartition(".")[2]), site.side): row
                for site, row in factors.items()
                if site.path.rpartition(".")[0] == path
            }
        expected = logits(other)
        seen = values_of(llama4, factors)
        for site, value in seen.items():
            path, _, number = site.path.rpartition(".")
            torch.testing.assert_close(value, made[path].seen[int(number), site.side], atol=1e-5, rtol=1e-4)
        assert sum(len(values) for values in seen.values()) == sum(
            len(values) for experts in made.values() for values in experts.seen.values()
        )
        with scaled(llama4.model, llama4.anatomy, factors):
            torch.testing.assert_close(logits(llama4), expected, atol=1e-4, rtol=1e-4)


def test_capture_of_all_experts_leaves_out_who_was_not_sent(llama4: VLM) -> None:
    rows = [example_of(seed, pictures=0) for seed in range(6)]
    sites = sites_of(llama4)
    found = capture(llama4, rows, sites=sites, pools=POOLS, batch_size=2).values
    alone = capture(llama4, rows, sites=sites, pools=POOLS, batch_size=1).values
    empty = torch.cat([values.isnan().flatten() for values in found.values()]).float().mean()
    assert 0.02 < empty < 0.9
    for site in sites:
        torch.testing.assert_close(found[site], alone[site], atol=1e-5, rtol=1e-3, equal_nan=True)


def test_a_router_that_is_a_linear_map_is_no_site(llama4: VLM) -> None:
    """It gives a pair: there is no value to pool or to scale."""
    path = next(iter(llama4.anatomy.experts)).rpartition(".")[0]
    router = llama4.model.get_submodule(llama4.anatomy.absolute_path(f"{path}.router"))
    assert isinstance(router, nn.Linear)
    assert f"{path}.router" not in llama4.anatomy.linears
    sites = llama4.anatomy.sites("linears")
    found = capture(llama4, [example_of(0, pictures=0)], sites=sites, pools=POOLS, batch_size=1)
    assert found.values.keys() == set(sites)


def test_shared_experts_with_gates_apart(inkling: VLM) -> None:
    kinds = {path.rpartition(".")[2]: fused for path, fused in inkling.anatomy.experts.items()}
    assert kinds["experts"].dispatched
    assert not kinds["shared_experts"].dispatched
    path = kinds["shared_experts"].path
    module: Any = inkling.model.get_submodule(inkling.anatomy.absolute_path(path))
    given: dict[str, Tensor] = {}
    handle = module.register_forward_pre_hook(
        lambda _m, args, kwargs: given.update(x=args[0].reshape(-1, 32), gammas=kwargs["gammas"].reshape(-1, 2)),
        with_kwargs=True,
    )
    seen = values_of(inkling)
    handle.remove()
    for number in range(2):
        gate, up = (given["x"] @ p[number].T for p in (module.gate_proj, module.up_proj))
        neurons = functional.silu(gate) * up * given["gammas"][:, number, None]
        expected = dict(zip(SIDES, (gate, up, neurons, neurons @ module.down_proj[number].T), strict=True))
        for side, value in expected.items():
            torch.testing.assert_close(seen[Site(f"{path}.{number}", side)], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama4", "inkling", "step", "stepped"])
def test_folded_is_worn_in_memory_and_on_disk(
    name: str, request: pytest.FixtureRequest, family: Callable[[str], VLM], tmp_path: Path
) -> None:
    vlm: VLM = request.getfixturevalue(name)
    vlm = VLM(copy.deepcopy(vlm.model), vlm.processor, vlm.anatomy, "made up")
    glasses = Glasses(factors_of(vlm), vlm.fingerprint(), "made up")
    folder = None
    if name != "stepped":
        vlm.model.save_pretrained(tmp_path / "base")
        vlm.processor.save_pretrained(tmp_path / "base")
        saved = glasses.save(tmp_path / "glasses", vlm)
        assert Glasses.load(saved) == glasses
        folder = fold_checkpoint(tmp_path / "base", saved, tmp_path / "folded").folder
    before = logits(vlm)
    with glasses.worn(vlm):
        worn = logits(vlm)
    assert not torch.allclose(worn, before, atol=1e-2)
    glasses.fold(vlm)
    torch.testing.assert_close(logits(vlm), worn, atol=1e-4, rtol=1e-4)
    if folder is not None:
        again = dict(type(vlm.model).from_pretrained(folder).named_parameters())
        assert all(torch.equal(parameter, again[path]) for path, parameter in vlm.model.named_parameters())


class Odd(nn.Module):
    """Experts whose forward does with them what it is told."""

    def __init__(self, how: Callable[..., Tensor]) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(2, 4, 6))
        self.down_proj = nn.Parameter(torch.randn(2, 3, 4))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda m, x: torch.einsum("th,ehw->etw", x, m.gate_up_proj), "einsum"),
        (lambda m, x: x @ (2 * m.gate_up_proj[0]), "mul"),
        (lambda m, x: torch.bmm(x.expand(2, -1, -1), m.gate_up_proj), "no product with down_proj"),
        (lambda _, x: x, "no product with down_proj"),
        (lambda m, x: x.flip(0) @ m.gate_up_proj[1], "rows that it did not take from what it was given"),
        (lambda m, x: m.gate_up_proj[0].T @ x.T, "matmul"),
        (lambda m, x: functional.linear(x, m.gate_up_proj[0].T, torch.ones(6)), "linear with a bias"),
    ],
)
def test_what_is_not_understood_is_an_error_and_leaves_nothing(how: Callable[..., Tensor], said: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleDict({"experts": Odd(how)})])

    model: Any = Model()
    x = torch.randn(5, 4)
    (experts,) = find_experts(model, "layers").values()
    module = model.layers[0]["experts"]
    shown: list[Side] = []
    products = Products(module, experts, lambda side, _routing, value: (shown.append(side), value)[1])
    plain = module(x)
    products.begin(x)
    try:
        with pytest.raises(SafeglassesError, match="compute in a way of their own that is not understood") as caught:
            module(x)
            products.check()
    finally:
        products.end()
    assert said in caught.value.given
    assert torch.equal(module(x), plain)
