import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safeglasses.errors import SafeglassesError
from safeglasses.model.sites import SIDES, Site

NAMES = st.text(string.ascii_letters + "_", min_size=1, max_size=12)


@settings(deadline=None)
@given(NAMES, st.lists(NAMES | st.integers(0, 999).map(str), max_size=6), st.sampled_from(SIDES))
def test_every_address_round_trips(first: str, others: list[str], side) -> None:
    site = Site(".".join([first, *others]), side)
    assert Site.parse(str(site)) == site
    assert site.neuron(7).rpartition("#")[0] == str(site)


@settings(deadline=None)
@given(st.integers(0, 999), st.integers(0, 9999), st.sampled_from(["mlp.experts", "feed_forward.experts", "experts"]))
def test_experts_fused_or_not_tell_layer_number_and_kind(layer: int, number: int, place: str) -> None:
    fused = Site(f"model.layers.{layer}.{place}.{number}", "in")
    module = Site(f"model.layers.{layer}.{place}.{number}.down_proj", "in")
    assert fused.layer == module.layer == layer
    assert fused.expert == module.expert == number
    assert (fused.kind, module.kind) == (f"{place}:in", f"{place}.down_proj:in")


@pytest.mark.parametrize("path", ["layers.3.mlp.2", "layers.3.mlp.shared_experts.down_proj", "block.1.layer.2.wo"])
def test_other_numbers_are_no_experts(path: str) -> None:
    assert Site(path, "in").expert is None


def test_text_form_round_trips() -> None:
    site = Site("layers.12.mlp.down_proj", "in")
    assert str(site) == "layers.12.mlp.down_proj:in"
    assert Site.parse(str(site)) == site
    assert (site.layer, site.kind) == (12, "mlp.down_proj:in")
    assert site.neuron(4077) == "layers.12.mlp.down_proj:in#4077"


def test_layer_is_the_first_number() -> None:
    assert Site("layers.3.mlp.experts.7.down_proj", "out").layer == 3
    assert Site("lm_head", "out").layer == -1


@pytest.mark.parametrize("text", ["", "layers.0.mlp", "layers.0.mlp:both", ":in", "a b:in", "a..b:in", "a.:in"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(SafeglassesError, match="not a site address"):
        Site.parse(text)


def test_people_read_halves() -> None:
    fused = Site("layers.0.mlp.gate_up_proj", "out")
    assert [fused.address(i, 8) for i in (0, 3, 4, 7)] == [
        f"layers.0.mlp.gate_up_proj:{half}" for half in ("gate#0", "gate#3", "up#0", "up#3")
    ]
    assert Site("layers.0.mlp.up_gate_proj", "out").address(0, 8) == "layers.0.mlp.up_gate_proj:up#0"
    assert fused.address(3, 7) == fused.neuron(3)
    for plain in (Site("layers.0.mlp.gate_up_proj", "in"), Site("layers.0.mlp.up_proj", "out")):
        assert plain.address(5, 8) == plain.neuron(5)
    assert Site("layers.0.mlp.experts.3", "gate").address(5, 8) == "layers.0.mlp.experts.3:gate#5"
