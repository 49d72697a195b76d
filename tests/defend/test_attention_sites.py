"""Recipes on attention's sites: neuron by neuron and head by head, from evidence to a file that PEFT wears."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from defend.conftest import batch_for, logits_of
from safeglasses.defend.calibrated import CalibratedRule
from safeglasses.defend.glasses import Glasses
from safeglasses.defend.recipes import RECIPES, Recipe, apply
from safeglasses.errors import SafeglassesError
from safeglasses.find.evidence import Evidence
from safeglasses.find.pools import Pool
from safeglasses.measure.calibrate import Effort
from safeglasses.measure.choosing import Choice
from safeglasses.measure.judges import refusal_judge
from safeglasses.measure.teaching import Teacher
from safeglasses.model.heads import Attention
from safeglasses.model.sites import Site

LAST, MAX = Pool("prompt", "last"), Pool("response", "max")


@pytest.fixture(scope="module")
def everywhere(tiny_vlm) -> Evidence:
    """Made-up AUROC at every site of the tiny llava."""
    parts, generator = tiny_vlm.anatomy, torch.Generator().manual_seed(0)
    sites = dict.fromkeys((*parts.sites("linears"), *parts.sites("heads"), *parts.sites("neurons")))
    auroc = {site: 0.3 + 0.7 * torch.rand(2, parts.width(site), generator=generator).double() for site in sites}
    return Evidence(auroc, None, (LAST, MAX), ((40, 40), (40, 40)), None, tiny_vlm.fingerprint(), "0")


@pytest.mark.parametrize("sites", ["neurons", "attention", "heads"])
def test_every_recipe_takes_other_sites(tiny_vlm, everywhere, sites):
    for name in ("aura", "sgm", "damp"):
        few = {"top_k": 20} if name == "damp" else {}
        recipe = replace(RECIPES[name], sites=sites, pools=(LAST, MAX), **few)
        glasses = apply(recipe, everywhere, anatomy=tiny_vlm.anatomy)
        assert tuple(glasses.factors) == tiny_vlm.anatomy.sites(sites)
    with pytest.raises(SafeglassesError, match="this recipe needs the model's anatomy"):
        apply(recipe, everywhere)


@pytest.mark.parametrize("sites", ["attention", "heads"])
def test_by_head_every_head_gets_the_mean_of_its_neurons(tiny_vlm, everywhere, sites):
    alone = replace(RECIPES["aura"], sites=sites, pools=(LAST,))
    one, together = (
        apply(recipe, everywhere, anatomy=tiny_vlm.anatomy).factors for recipe in (alone, replace(alone, by_head=True))
    )
    heads = {"q_proj": 4, "k_proj": 2, "v_proj": 2} if sites == "attention" else {"o_proj": 4}
    for site, row in together.items():
        number = heads.get(site.path.rpartition(".")[2])
        if number is None:
            assert site.path.endswith("o_proj")
            assert torch.equal(row, one[site])
            continue
        blocks, before = row.reshape(number, -1), one[site].reshape(number, -1)
        assert len(blocks.unique()) <= number < len(before.unique())
        torch.testing.assert_close(blocks, before.mean(dim=1, keepdim=True).expand_as(blocks))


def test_calibrated_by_head_there_is_one_strength_per_head_and_gradients_reach_it(tiny_vlm, everywhere):
    recipe = replace(RECIPES["sgm-calibrated"], sites="heads", by_head=True, confirmed=False)
    rule = CalibratedRule.from_evidence(
        everywhere,
        pools=recipe.pools,
        threshold=recipe.threshold,
        two_sided=True,
        granularity="neuron",
        sites=tiny_vlm.anatomy.sites("heads"),
        heads=recipe.heads(tiny_vlm.anatomy),
    )
    assert rule.n_strengths == 4 * 2
    assert rule.n_experts == 4 * 2 * 8
    strengths = rule.start(0.5).requires_grad_()
    (first, *_), rows = rule.sites, rule.factors(strengths)
    rows[first][:8].sum().backward()
    assert strengths.grad is not None
    assert strengths.grad[0, :8].unique().numel() == 1, "neurons of one head learn alike"
    assert not strengths.grad[0, 8:].any()
    glasses = apply(recipe, everywhere, anatomy=tiny_vlm.anatomy, strengths=strengths.detach())
    torch.testing.assert_close(glasses.factors[first], rows[first].detach())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # raised inside PEFT
def test_a_head_switched_off_is_a_head_whose_output_is_not_read(fresh, tmp_path):
    """Oracle: a factor of 0 on what head 2 writes is the output map without its columns; PEFT alone agrees."""
    vlm = fresh()
    site = Site("layers.1.self_attn.o_proj", "in")
    row = torch.ones(32)
    row[16:24] = 0
    glasses, batch = Glasses({site: row}, vlm.fingerprint(), "head"), batch_for(vlm)
    with glasses.worn(vlm):
        worn = logits_of(vlm, batch)
    assert not torch.equal(worn, logits_of(vlm, batch))
    glasses.save(tmp_path / "glasses", vlm)
    peft = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(vlm.source), tmp_path / "glasses")
    with torch.no_grad():
        assert torch.equal(peft.eval()(**batch.inputs).logits, worn)
        vlm.model.get_submodule(vlm.anatomy.absolute(site)).weight[:, 16:24] = 0
        torch.testing.assert_close(logits_of(vlm, batch), worn)


def test_recipe_files_know_heads(tmp_path):
    recipe = replace(RECIPES["sgm"], sites="heads", by_head=True)
    (tmp_path / "r.toml").write_text(recipe.to_toml(), encoding="utf-8")
    assert Recipe.from_toml(tmp_path / "r.toml") == recipe


def test_what_has_no_heads_is_refused(tiny_vlm):
    with pytest.raises(SafeglassesError, match="a recipe that cannot work") as error:
        replace(RECIPES["sgm"], by_head=True)
    assert error.value.given == "sgm: by_head with sites 'linears', not attention or heads"
    unknown = replace(tiny_vlm.anatomy, attention=Attention(tiny_vlm.anatomy.attention.maps))
    with pytest.raises(SafeglassesError, match="none of the recipe's sites has attention heads"):
        replace(RECIPES["sgm"], sites="attention", by_head=True).heads(unknown)


def test_where_one_map_writes_queries_keys_and_values_each_of_a_heads_gets_its_mean(family):
    parts = family("gpt2").anatomy
    recipe = replace(RECIPES["aura"], sites="attention", pools=(LAST,), by_head=True)
    generator = torch.Generator().manual_seed(0)
    auroc = {
        s: 0.6 + 0.4 * torch.rand(1, parts.width(s), generator=generator).double() for s in parts.sites("attention")
    }
    evidence = Evidence(auroc, None, (LAST,), ((40, 40),), None, family("gpt2").fingerprint(), "0")
    alone, together = (apply(one, evidence, anatomy=parts).factors for one in (replace(recipe, by_head=False), recipe))
    site = Site("layers.0.attn.c_attn".replace("layers", parts.layers_path), "out")
    blocks, before = together[site].reshape(12, 8), alone[site].reshape(12, 8)
    torch.testing.assert_close(blocks, before.mean(dim=1, keepdim=True).expand_as(blocks))
    assert len(blocks.unique()) == 12


@pytest.mark.parametrize("sites", ["mlp", "attention", "heads"])
def test_calibration_acts_on_the_recipes_sites_though_the_evidence_covers_more(tiny_vlm, everywhere, sites):
    recipe = replace(RECIPES["sgm-calibrated"], sites=sites, by_head=sites == "heads")
    teacher = Teacher(tiny_vlm, everywhere, refusal_judge(), recipe, Effort(), seed=0, max_new_tokens=4)
    rule = teacher.rule(Choice(("prompt:last", "response:max"), 0.52, 150.0))
    assert rule.sites == tiny_vlm.anatomy.sites(sites)
    assert rule.heads == recipe.heads(tiny_vlm.anatomy)
