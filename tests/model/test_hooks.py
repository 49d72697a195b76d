import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import families
from safeglasses.errors import PartialMatch, SafeglassesError
from safeglasses.model.anatomy import module
from safeglasses.model.hooks import scaled, tap
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM, Chat

OUT = Site("layers.0.mlp.up_proj", "out")
IN = Site("layers.1.mlp.down_proj", "in")
GONE = Site("layers.7.mlp.up_proj", "out")


def logits(vlm: VLM) -> Tensor:
    with torch.no_grad():
        return vlm.forward(vlm.encode([Chat(families.messages(1), "a red dog")]))


def hooks_left(vlm: VLM) -> int:
    """Count hooks on linear maps; on whole layers transformers keeps some of its own."""
    maps = [module(vlm.model, vlm.anatomy, path) for path in vlm.anatomy.linears]
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in maps)


def test_tap_calls_back_once_per_site_and_forward(tiny_vlm: VLM) -> None:
    sites = tiny_vlm.anatomy.sites("linears") + tiny_vlm.anatomy.sites("neurons")
    seen: dict[Site, list[Tensor]] = {}
    with tap(tiny_vlm.model, tiny_vlm.anatomy, sites, lambda site, value: seen.setdefault(site, []).append(value)):
        columns = logits(tiny_vlm).shape[1]
    assert {site: len(values) for site, values in seen.items()} == dict.fromkeys(sites, 1)
    for site, (value,) in seen.items():
        assert value.shape == (1, columns, tiny_vlm.anatomy.width(site))
    down = module(tiny_vlm.model, tiny_vlm.anatomy, IN)
    assert torch.equal(down(seen[IN][0]), seen[Site(IN.path, "out")][0])
    assert hooks_left(tiny_vlm) == 0


@pytest.mark.parametrize("site", [OUT, IN], ids=str)
def test_scaled_equals_scaled_weights(tiny_vlm: VLM, site: Site) -> None:
    factor = torch.rand(48, generator=torch.Generator().manual_seed(0))
    other = copy.deepcopy(tiny_vlm.model)
    weight = other.get_parameter(tiny_vlm.anatomy.absolute(site) + ".weight")
    weight.data *= factor[:, None] if site.side == "out" else factor[None, :]
    with scaled(tiny_vlm.model, tiny_vlm.anatomy, {site: factor}):
        worn = logits(tiny_vlm)
    folded = logits(VLM(other, tiny_vlm.processor, tiny_vlm.anatomy, "copy"))
    assert not torch.allclose(worn, logits(tiny_vlm), atol=1e-2)
    torch.testing.assert_close(worn, folded, atol=1e-5, rtol=0)


def test_tap_sees_scaled_values_inside_scaled(tiny_vlm: VLM) -> None:
    factors = {OUT: torch.zeros(48), IN: torch.zeros(48)}
    seen: list[float] = []
    with (
        scaled(tiny_vlm.model, tiny_vlm.anatomy, factors),
        tap(
            tiny_vlm.model,
            tiny_vlm.anatomy,
            factors,
            lambda _site, value: seen.append(float(value.abs().max())),
        ),
    ):
        logits(tiny_vlm)
    assert seen == [0.0, 0.0]


@settings(max_examples=5, deadline=None)
@given(st.lists(st.floats(0, 2, width=32), min_size=48, max_size=48))
def test_off_is_bit_identical(tiny_vlm: VLM, values: list[float]) -> None:
    before = logits(tiny_vlm)
    with scaled(tiny_vlm.model, tiny_vlm.anatomy, {OUT: torch.tensor(values), IN: torch.tensor(values)}):
        logits(tiny_vlm)
    assert torch.equal(logits(tiny_vlm), before)


def test_identity_changes_no_bit(tiny_vlm: VLM) -> None:
    ones = {site: torch.ones(tiny_vlm.anatomy.width(site)) for site in tiny_vlm.anatomy.sites("linears")}
    before = logits(tiny_vlm)
    with scaled(tiny_vlm.model, tiny_vlm.anatomy, ones):
        assert torch.equal(logits(tiny_vlm), before)


def test_gradients_flow_into_factors(tiny_vlm: VLM) -> None:
    factors = {OUT: torch.ones(48, requires_grad=True), IN: torch.ones(48, requires_grad=True)}
    with scaled(tiny_vlm.model, tiny_vlm.anatomy, factors):
        tiny_vlm.forward(tiny_vlm.encode([Chat(families.messages(1), "a red dog")])).square().mean().backward()
    tiny_vlm.model.zero_grad(set_to_none=True)
    assert all(factor.grad is not None and bool(factor.grad.abs().sum() > 0) for factor in factors.values())


def test_factors_take_the_models_dtype(tiny_vlm: VLM) -> None:
    half = VLM(copy.deepcopy(tiny_vlm.model).bfloat16(), tiny_vlm.processor, tiny_vlm.anatomy, "copy")
    with scaled(half.model, half.anatomy, {OUT: torch.full((48,), 0.3)}):
        assert logits(half).dtype == torch.bfloat16


def test_exceptions_remove_hooks(tiny_vlm: VLM) -> None:
    before = logits(tiny_vlm)

    def fail(site: Site, value: Tensor) -> None:
        raise KeyError(site)

    with (
        pytest.raises(KeyError),
        scaled(tiny_vlm.model, tiny_vlm.anatomy, {IN: torch.zeros(48)}),
        tap(tiny_vlm.model, tiny_vlm.anatomy, [OUT], fail),
    ):
        logits(tiny_vlm)
    assert hooks_left(tiny_vlm) == 0
    assert torch.equal(logits(tiny_vlm), before)


def test_missing_sites_register_nothing(tiny_vlm: VLM) -> None:
    model, anatomy = tiny_vlm.model, tiny_vlm.anatomy
    with (
        pytest.raises(PartialMatch, match="1 of 2 modules are not linear maps"),
        scaled(model, anatomy, {OUT: torch.ones(48), GONE: torch.ones(48)}),
    ):
        pass
    with pytest.raises(PartialMatch), tap(model, anatomy, [OUT, GONE], lambda _site, _value: None):
        pass
    assert hooks_left(tiny_vlm) == 0


def test_wrong_width(tiny_vlm: VLM) -> None:
    with (
        pytest.raises(SafeglassesError) as caught,
        scaled(tiny_vlm.model, tiny_vlm.anatomy, {OUT: torch.ones(48), IN: torch.ones(32)}),
    ):
        pass
    assert str(caught.value) == (
        "factors do not fit their site\n"
        "  given:    shape (32,) for layers.1.mlp.down_proj:in\n"
        "  expected: shape (48,)\n"
        "  do:       use factors made for this model"
    )
    assert hooks_left(tiny_vlm) == 0
