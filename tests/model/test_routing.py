from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import families
from families.unrolled import NOT_OURS, chat, hooked, unrolled
from safeglasses.defend.glasses import Glasses
from safeglasses.errors import PartialMatch, SafeglassesError
from safeglasses.model import routing as entered
from safeglasses.model.experts import Experts
from safeglasses.model.hooks import replaced, scaled, tap, tap_routed
from safeglasses.model.routes import Routing
from safeglasses.model.routing import NAME
from safeglasses.model.sites import Side, Site
from safeglasses.model.vlm import VLM, Batch, load

pytestmark = pytest.mark.filterwarnings(NOT_OURS)
QWEN = "qwen3_vl_moe"


@pytest.fixture(params=families.MIXTURES)
def vlm(request: pytest.FixtureRequest, family: Callable[[str], VLM]) -> VLM:
    return family(request.param)


def batch_of(vlm: VLM) -> Batch:
    return vlm.encode([chat(vlm, index, "a red dog " * index) for index in (1, 3)])


def logits(vlm: VLM, model: nn.Module | None = None) -> Tensor:
    with torch.no_grad():
        return (model or vlm.model)(**batch_of(vlm).inputs, use_cache=False).logits


def all_sites(vlm: VLM) -> tuple[Site, ...]:
    return tuple(site for fused in vlm.anatomy.experts.values() for site in fused.sites("gate", "up", "in", "out"))


def factors_of(vlm: VLM) -> dict[Site, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {site: torch.rand(vlm.anatomy.width(site), generator=generator) for site in all_sites(vlm)[::3]}


def implementations(vlm: VLM) -> set[str | None]:
    modules: list[Any] = [vlm.model.get_submodule(vlm.anatomy.absolute_path(path)) for path in vlm.anatomy.experts]
    return {module.config._experts_implementation for module in modules}


def test_values_are_those_of_unrolled_experts(vlm: VLM) -> None:
    model, made = unrolled(vlm)
    sites = all_sites(vlm)
    ours: dict[Site, Tensor] = {}
    theirs: dict[Site, Tensor] = {}
    before = logits(vlm)
    with tap(vlm.model, vlm.anatomy, sites, ours.__setitem__):
        seen = logits(vlm)
    with hooked(made, {site: lambda value, site=site: theirs.update({site: value}) for site in sites}):
        expected = logits(vlm, model)
    assert ours.keys() == theirs.keys()
    assert len(ours) > len(sites) // 2
    for site, value in ours.items():
        torch.testing.assert_close(value, theirs[site], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen, before, atol=1e-5, rtol=1e-5)


def test_scaling_is_that_of_unrolled_experts_and_leaves_nothing(vlm: VLM) -> None:
    model, made = unrolled(vlm)
    factors, before, was = factors_of(vlm), logits(vlm), implementations(vlm)
    with scaled(vlm.model, vlm.anatomy, factors):
        assert implementations(vlm) == {NAME}
        ours = logits(vlm)
    with hooked(made, {site: lambda value, row=row: value * row for site, row in factors.items()}):
        expected = logits(vlm, model)
    assert not torch.allclose(ours, before, atol=1e-2)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(vlm), before)
    assert implementations(vlm) == was


def test_replacing_is_that_of_unrolled_experts(vlm: VLM) -> None:
    model, made = unrolled(vlm)
    sites = [site for site in all_sites(vlm) if site.side in ("up", "in")][1::2]
    with replaced(vlm.model, vlm.anatomy, dict.fromkeys(sites, torch.tanh)):
        ours = logits(vlm)
    with hooked(made, dict.fromkeys(sites, torch.tanh)):
        expected = logits(vlm, model)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_gradients_of_factors_are_those_of_unrolled_experts(vlm: VLM) -> None:
    model, made = unrolled(vlm)
    ours, theirs = ({site: row.clone().requires_grad_() for site, row in factors_of(vlm).items()} for _ in range(2))
    batch = batch_of(vlm)
    with scaled(vlm.model, vlm.anatomy, ours):
        vlm.model(**batch.inputs, use_cache=False).logits.logsumexp(-1).sum().backward()
    with hooked(made, {site: lambda value, row=row: value * row for site, row in theirs.items()}):
        model(**batch.inputs, use_cache=False).logits.logsumexp(-1).sum().backward()
    for site, row in ours.items():
        expected = theirs[site].grad
        torch.testing.assert_close(
            torch.zeros_like(row) if row.grad is None else row.grad,
            torch.zeros_like(row) if expected is None else expected,
            atol=1e-3,
            rtol=1e-3,
        )
    vlm.model.zero_grad()


def test_rows_are_told_by_token(vlm: VLM) -> None:
    """Also where a part of the tokens goes to other experts: Ernie's have only those of pictures."""
    model, made = unrolled(vlm)
    batch = batch_of(vlm)
    every: dict[str, Tensor] = {}
    found: dict[str, Routing] = {}

    def see(experts: Experts, _side: Side, routing: Routing, _value: Tensor) -> None:
        found[experts.path] = routing

    wanted: list[tuple[Experts, Side]] = [(fused, "in") for fused in vlm.anatomy.experts.values()]
    with tap_routed(vlm.model, vlm.anatomy, wanted, see, tokens=batch.inputs["input_ids"].numel()):
        logits(vlm)
    logits(vlm, model)
    types = batch.inputs.get("moe_mm_token_type_ids")
    for path, routing in found.items():
        rows = torch.arange(batch.inputs["input_ids"].numel())
        if types is not None:
            rows = rows[types.flatten().bool() == ("vision" in path)]
        for number, sent in made[path].sent:
            assert torch.equal(routing.row[routing.expert == number], rows[sent])
    assert found and not every


def test_contexts_nest_and_survive_exceptions(family: Callable[[str], VLM]) -> None:
    vlm = family(QWEN)
    before, was, site = logits(vlm), implementations(vlm), Site("layers.0.mlp.experts.1", "in")
    off = torch.zeros(24)
    seen: list[float] = []
    with (
        scaled(vlm.model, vlm.anatomy, {site: off}),
        tap(vlm.model, vlm.anatomy, [site], lambda _, value: seen.append(float(value.abs().max()))),
    ):
        logits(vlm)
    assert seen == [0.0]

    def fail(_site: Site, _value: Tensor) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), tap(vlm.model, vlm.anatomy, [site], fail):
        logits(vlm)
    assert implementations(vlm) == was
    assert torch.equal(logits(vlm), before)


def test_ends_in_any_order(family: Callable[[str], VLM]) -> None:
    vlm = family(QWEN)
    before, was = logits(vlm), implementations(vlm)
    first = scaled(vlm.model, vlm.anatomy, {Site("layers.0.mlp.experts.1", "in"): torch.zeros(24)})
    second = scaled(vlm.model, vlm.anatomy, {Site("layers.1.mlp.experts.2", "up"): torch.zeros(24)})
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert implementations(vlm) == {NAME}
    second.__exit__(None, None, None)
    assert implementations(vlm) == was
    assert torch.equal(logits(vlm), before)


def test_what_is_not_there_is_refused_before_anything_changes(family: Callable[[str], VLM]) -> None:
    vlm = family(QWEN)
    was = implementations(vlm)
    for site in (Site("layers.0.mlp.experts.4", "in"), Site("layers.9.mlp.experts.0", "in")):
        with pytest.raises(PartialMatch), scaled(vlm.model, vlm.anatomy, {site: torch.ones(24)}):
            pass
    with (
        pytest.raises(SafeglassesError, match="factors do not fit their site"),
        scaled(vlm.model, vlm.anatomy, {Site("layers.0.mlp.experts.0", "in"): torch.ones(23)}),
    ):
        pass
    assert implementations(vlm) == was


def test_without_what_transformers_keeps_to_itself(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The grouped product is private: in terms of what is public the values are the same."""
    factors = factors_of(vlm)
    with scaled(vlm.model, vlm.anatomy, factors):
        expected = logits(vlm)
        monkeypatch.setattr(entered, "_grouped", entered._by_expert)
        torch.testing.assert_close(logits(vlm), expected, atol=1e-4, rtol=1e-4)


def test_a_config_without_the_entry_is_refused_and_left_alone(
    family: Callable[[str], VLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = family(QWEN)
    before = logits(vlm)
    monkeypatch.setattr(entered, "_IMPLEMENTATION", "_gone")
    with pytest.raises(SafeglassesError) as caught, scaled(vlm.model, vlm.anatomy, factors_of(vlm)):
        pass
    assert str(caught.value) == (
        "this version of transformers keeps the implementation of experts elsewhere\n"
        f"  given:    transformers {transformers.__version__}: no _gone in Qwen3VLMoeTextConfig\n"
        "  expected: a version that safeglasses was tested with, such as 5.23\n"
        '  do:       install that, or use sites="linears", which leaves fused experts out'
    )
    monkeypatch.undo()
    assert torch.equal(logits(vlm), before)


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "gpt_oss"])
def test_bfloat16_is_that_of_unrolled_experts(name: str, tmp_path: Path) -> None:
    """In the first layer with experts: behind it, rounding sends tokens to other experts."""
    vlm = load(families.build(name, tmp_path / name), dtype="bfloat16")
    model, made = unrolled(vlm)
    for experts in made.values():
        experts.to(torch.bfloat16)
    sites = next(iter(vlm.anatomy.experts.values())).sites("gate", "up", "in", "out")
    factors = {site: row for site, row in factors_of(vlm).items() if site in sites}
    ours: dict[Site, Tensor] = {}
    for worn in ({}, factors):
        theirs: dict[Site, Tensor] = {}

        def see(value: Tensor, site: Site, worn: dict[Site, Tensor], theirs: dict[Site, Tensor]) -> Tensor:
            theirs[site] = value * worn[site].to(value) if site in worn else value
            return theirs[site]

        ours.clear()
        with scaled(vlm.model, vlm.anatomy, worn), tap(vlm.model, vlm.anatomy, sites, ours.__setitem__):
            logits(vlm)
        with hooked(made, {site: partial(see, site=site, worn=worn, theirs=theirs) for site in sites}):
            logits(vlm, model)
        assert ours.keys() == theirs.keys()
        for site, value in ours.items():
            assert value.dtype == torch.bfloat16
            torch.testing.assert_close(value, theirs[site], atol=3e-2, rtol=3e-2)
    Glasses(factors, vlm.fingerprint(), "made up").fold(vlm)
    folded: dict[Site, Tensor] = {}
    with tap(vlm.model, vlm.anatomy, [site for site in sites if site.side == "out"], folded.__setitem__):
        logits(vlm)
    for site, value in folded.items():
        torch.testing.assert_close(value, ours[site], atol=3e-2, rtol=3e-2)
