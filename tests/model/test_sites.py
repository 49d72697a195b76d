import pytest

from safeglasses.errors import SafeglassesError
from safeglasses.model.sites import Site


def test_text_form_round_trips() -> None:
    site = Site("layers.12.mlp.down_proj", "in")
    assert str(site) == "layers.12.mlp.down_proj:in"
    assert Site.parse(str(site)) == site
    assert (site.layer, site.kind) == (12, "mlp.down_proj:in")
    assert site.neuron(4077) == "layers.12.mlp.down_proj:in#4077"


def test_layer_is_the_first_number() -> None:
    assert Site("layers.3.mlp.experts.7.down_proj", "out").layer == 3
    assert Site("lm_head", "out").layer == -1


@pytest.mark.parametrize("text", ["", "layers.0.mlp", "layers.0.mlp:both", ":in", "a b:in"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(SafeglassesError, match="not a site address"):
        Site.parse(text)
