"""Glasses on the vision side, projectors and encoders: worn, taken off, saved, loaded by PEFT alone, folded."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from defend.conftest import batch_for, glasses_for, logits_of
from safeglasses.defend.glasses import Glasses
from safeglasses.defend.recipes import RECIPES, Recipe, apply
from safeglasses.errors import PartialMatch, SafeglassesError
from safeglasses.find.evidence import Evidence
from safeglasses.find.pools import Pool
from safeglasses.model.outside import REGIONS
from safeglasses.model.vlm import load
from safeglasses.run.fit import _elsewhere
from safeglasses.ship.export import export_ia3, export_lora, export_sglang
from safeglasses.ship.fold import fold_checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # raised inside PEFT
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),  # glm4v
]
FAMILIES = ("llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "glm4v", "mllama", "idefics", "florence2", "t5gemma2")


@pytest.mark.parametrize("family", FAMILIES)
def test_worn_saved_loaded_and_folded(family, folder_of, tmp_path):
    vlm = load(folder_of(family))
    batch = batch_for(vlm)
    before = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    plain = logits_of(vlm, batch)
    where = [region for region in REGIONS if vlm.anatomy.outside.paths(region)]
    glasses = glasses_for(vlm, what=(*where, "mlp"))
    assert {site.outside for site in glasses.factors} == {True, False}
    with glasses.worn(vlm):
        worn = logits_of(vlm, batch)
    assert float((worn - plain).abs().max()) > 1e-3
    assert torch.equal(logits_of(vlm, batch), plain)
    assert all(torch.equal(value, before[name]) for name, value in vlm.model.state_dict().items())
    vision = Glasses({s: row for s, row in glasses.factors.items() if s.outside}, glasses.base_fingerprint, "test")
    with vision.worn(vlm):
        assert float((logits_of(vlm, batch) - plain).abs().max()) > 1e-4, "the vision side must count"

    glasses.save(tmp_path / "glasses", vlm)
    again = Glasses.load(tmp_path / "glasses")
    assert again == glasses
    config = json.loads((tmp_path / "glasses" / "adapter_config.json").read_text())
    assert all(name in dict(vlm.model.named_modules()) for name in config["target_modules"])
    alone = AutoModelForImageTextToText.from_pretrained(folder_of(family))
    alone = PeftModel.from_pretrained(alone, tmp_path / "glasses").eval()
    with torch.no_grad():
        assert torch.equal(alone(**batch.inputs, use_cache=False).logits, worn)

    fold_checkpoint(folder_of(family), again, tmp_path / "folded")
    glasses.fold(vlm)
    folded = load(tmp_path / "folded")
    for name, value in vlm.model.state_dict().items():
        assert torch.equal(value, folded.model.state_dict()[name])
    torch.testing.assert_close(logits_of(folded, batch), worn, atol=2e-5, rtol=0)


def test_a_site_that_is_not_there(tiny_vlm, folder_of):
    glasses = glasses_for(tiny_vlm, what="projector")
    other = load(folder_of("gemma3"))
    with pytest.raises(PartialMatch) as caught, Glasses(glasses.factors, other.fingerprint(), "test").worn(other):
        pass
    assert "/model.multi_modal_projector.linear_1:out (no such module)" in caught.value.given
    with pytest.raises(SafeglassesError) as caught:
        other.anatomy.sites("projector")
    assert str(caught.value) == (
        "there are no sites = 'projector' in this model\n"
        "  given:    no linear map between a vision tower and the decoder was found\n"
        "  expected: one of vision\n"
        "  do:       list the model's sites with `safeglasses inspect MODEL`"
    )


def test_what_runtimes_would_leave_out(tiny_vlm, tmp_path):
    glasses = glasses_for(tiny_vlm, what=("projector", "mlp"))
    for export, what in (
        (export_lora, "a LoRA in vLLM, SGLang or llama.cpp"),
        (export_sglang, "SGLang's --forward-hooks"),
    ):
        with pytest.raises(SafeglassesError) as caught:
            export(tiny_vlm, glasses, tmp_path / "out")
        assert caught.value.what == (
            f"{what} reaches the language decoder alone: on vision towers, projectors and encoders it would do nothing"
        )
        assert caught.value.given == "/model.multi_modal_projector.linear_1:out, one of 2 such sites of 8"
    export_ia3(tiny_vlm, glasses, tmp_path / "ia3")
    assert Glasses.load(tmp_path / "ia3") == glasses
    assert "8 sites of the language decoder and beyond are scaled" in (tmp_path / "ia3" / "README.md").read_text()


def test_recipes_name_several_kinds_of_sites(tiny_vlm, tmp_path):
    pools = (Pool("prompt", "max"), Pool("response", "max"))
    recipe = Recipe("both", "", ("mlp", "projector"), pools, "gini")
    path = tmp_path / "both.toml"
    path.write_text(recipe.to_toml(), encoding="utf-8")
    assert Recipe.from_toml(path) == recipe
    parts, generator = tiny_vlm.anatomy, torch.Generator().manual_seed(0)
    sites = parts.sites(("mlp", "projector", "vision"))
    auroc = {site: torch.rand(2, parts.width(site), generator=generator).double() for site in sites}
    evidence = Evidence(auroc, None, pools, ((40, 40), (40, 40)), None, tiny_vlm.fingerprint(), "0")
    glasses = apply(recipe, evidence, anatomy=parts)
    assert tuple(glasses.factors) == parts.sites(("mlp", "projector"))
    path.write_text(path.read_text().replace('"projector"', '"attics"'), encoding="utf-8")
    with pytest.raises(SafeglassesError, match="the recipe file has a mistake"):
        Recipe.from_toml(path)


def test_named_recipes_reach_patches_where_they_are_asked_to():
    sgm, last = RECIPES["sgm"], Pool("prompt", "max")
    assert _elsewhere(sgm, "projector", by_head=False).pools == (last,)
    both = _elsewhere(sgm, ["mlp", "projector"], by_head=False)
    assert (both.pools, both.name, both.sites) == ((*sgm.pools, last), "sgm-mlp+projector", ("mlp", "projector"))
    assert _elsewhere(RECIPES["aura"], "vision", by_head=False).pools == RECIPES["aura"].pools
    assert _elsewhere(sgm, "encoder", by_head=False).pools == sgm.pools
