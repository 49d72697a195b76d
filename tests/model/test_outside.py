"""Maps beyond the decoder, by hand for shapes that the page of all types shows, and their addresses."""

from collections.abc import Callable

import pytest

from safeglasses.errors import PartialMatch, SafeglassesError
from safeglasses.model.anatomy import Anatomy, module
from safeglasses.model.architectures import entry
from safeglasses.model.outside import REGIONS
from safeglasses.model.overview import overview
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM


def located(model_type: str) -> Anatomy:
    found = entry(model_type).anatomy
    assert found is not None
    return found


def last(found: Anatomy) -> dict[str, str]:
    return {region: paths[-1] for region in REGIONS if (paths := found.outside.paths(region))}


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [  # by hand, from each modelling file and default config: the last map of every region
        ("llava", {"vision": "/model.vision_tower.encoder.layers.23.mlp.fc2",
                   "projector": "/model.multi_modal_projector.linear_2"}),
        ("qwen3_vl", {"vision": "/model.visual.blocks.26.mlp.linear_fc2",
                      "projector": "/model.visual.deepstack_merger_list.2.linear_fc2"}),
        ("gemma3", {"vision": "/model.vision_tower.encoder.layers.11.mlp.fc2"}),  # its projector is a parameter
        ("gemma3n", {"vision": "/model.vision_tower.encoder.layers.11.mlp.fc2",
                     "projector": "/model.embed_vision.embedding_projection"}),  # not the audio's
        ("janus", {"vision": "/model.vision_model.encoder.layers.23.mlp.fc2",
                   "projector": "/model.aligner.hidden_layers.0"}),  # not what makes pictures
        ("pi0", {"vision": "/model.vlm.vision_tower.encoder.layers.26.mlp.fc2",
                 "projector": "/model.vlm.multi_modal_projector.linear"}),  # not the action expert
        ("florence2", {"vision": "/model.vision_tower.blocks.3.0.channel_block.ffn.fc2",
                       "projector": "/model.multi_modal_projector.image_projection",
                       "encoder": "/model.language_model.encoder.layers.11.fc2"}),
        ("idefics", {"vision": "/model.vision_model.encoder.layers.31.mlp.fc2",
                     "crossing": "/model.gated_cross_attn_layers.31.mlp.up_proj"}),
        ("got_ocr2", {"vision": "/model.vision_tower.layers.11.mlp.lin2",
                      "projector": "/model.multi_modal_projector.multimodal_projector"}),  # behind convolutions
        ("diffusion_gemma", {"vision": "/model.encoder.vision_tower.encoder.layers.15.mlp.down_proj.linear",
                             "projector": "/model.encoder.embed_vision.embedding_projection"}),
        ("llama", {}),
    ],
)  # fmt: skip
def test_last_map_of_every_region(model_type: str, expected: dict[str, str]) -> None:
    assert last(located(model_type)) == expected


def test_whose_tokens_they_read() -> None:
    idefics, mllama, florence = located("idefics"), located("mllama"), located("florence2")
    gated = "/model.gated_cross_attn_layers.0"
    assert idefics.stream(Site(f"{gated}.cross_attn.q_proj", "out")) == "decoder"
    assert idefics.stream(Site(f"{gated}.cross_attn.k_proj", "in")) == "picture"
    assert idefics.stream(Site(f"{gated}.mlp.down_proj", "in")) == "decoder"
    assert {mllama.stream(site) for site in mllama.sites("crossing")} == {"picture"}
    assert {mllama.stream(site) for site in mllama.sites("linears")} == {"decoder"}
    assert {florence.stream(site) for site in florence.sites(("encoder", "crossing"))} == {"encoder"}
    assert {florence.stream(site) for site in florence.sites(("vision", "projector"))} == {"picture"}
    with pytest.raises(SafeglassesError, match="keys and values of the decoder and of the encoder go through one map"):
        located("t5gemma2").stream(Site("layers.0.self_attn.v_proj", "out"))


def test_addresses(tiny_vlm: VLM) -> None:
    found = tiny_vlm.anatomy
    site = Site.parse("/model.vision_tower.encoder.layers.1.mlp.fc1:in")
    assert (site.outside, site.layer, site.expert, site.fused) == (True, 1, None, False)
    assert site.kind == "/model.vision_tower.encoder.layers.mlp.fc1:in"
    assert Site.parse(str(site)) == site
    assert (found.width(site), found.width(Site(site.path, "out"))) == (16, 24)
    assert found.neuron(found.address(site, 7)) == (site, 7)
    assert found.absolute(site) == "model.vision_tower.encoder.layers.1.mlp.fc1"
    assert module(tiny_vlm.model, found, site) is tiny_vlm.model.get_submodule(found.absolute(site))
    assert Site.parse("/model.multi_modal_projector.linear_1:out").layer == -1
    for wrong in (
        "/model.language_model.layers.0.mlp.up_proj",
        "/model.vision_tower.encoder.layers.2.mlp.fc1",
        "/lm_head",
    ):
        with pytest.raises(PartialMatch):
            found.width(Site(wrong, "out"))
    for text in ("//model.a:out", "/:out", "model./a:out", "/model.a/b:out"):
        with pytest.raises(SafeglassesError, match="not a site address"):
            Site.parse(text)


def test_no_site_is_twice(family: Callable[[str], VLM]) -> None:
    for name in ("llava", "mllama", "florence2", "qwen3_vl_moe"):
        found = family(name).anatomy
        sites = [*found.sites("linears"), *found.neurons]
        for region in (*REGIONS,):
            sites += found.outside.sites(region) if found.outside.paths(region) else ()
        paths = [found.absolute(site) for site in sites if not site.fused]
        assert len(set(zip(paths, (s.side for s in sites if not s.fused), strict=True))) == len(paths)
        assert all(path in dict(family(name).model.named_modules()) for path in paths)


def test_the_table_of_one_model(tiny_vlm: VLM) -> None:
    rows = overview(tiny_vlm.anatomy)["outside"]
    assert [row["kind"] for row in rows if row["region"] == "projector"] == [
        "/model.multi_modal_projector.linear_1", "/model.multi_modal_projector.linear_2"
    ]  # fmt: skip
    assert rows[0] == {
        "region": "vision", "kind": "/model.vision_tower.encoder.layers.self_attn.k_proj", "maps": 2, "in": 16,
        "out": 16, "first": "/model.vision_tower.encoder.layers.0.self_attn.k_proj:out",
    }  # fmt: skip
