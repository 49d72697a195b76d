"""The saved folder as PEFT, transformers and pandas see it."""

import json

import pandas as pd
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from defend.conftest import batch_for, glasses_for, logits_of
from safeglasses.defend.adapters import check_names
from safeglasses.defend.glasses import Glasses
from safeglasses.defend.home import Home
from safeglasses.errors import SafeglassesError
from safeglasses.files import sha256_file
from safeglasses.model.sites import Site
from safeglasses.model.vlm import load

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "glasses.json", "neurons.parquet"]


def auto(vlm):
    return AutoModelForImageTextToText if vlm.is_multimodal else AutoModelForCausalLM


def mixed(vlm, **more):
    """Inputs of the first layer's feed-forward output map, outputs of every other linear map."""
    outs, ins = glasses_for(vlm, **more), glasses_for(vlm, what="neurons", seed=9)
    first = next(site for site in ins.factors if site.layer == 0)
    factors = {site: row for site, row in outs.factors.items() if site.path != first.path}
    return Glasses({**factors, first: ins.factors[first]}, outs.base_fingerprint, "mixed", strength=outs.strength)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # raised inside PEFT
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "llama"])
def test_worn_is_what_peft_does_bit_for_bit(family, folder_of, tmp_path):
    vlm = load(folder_of(family))
    batch, glasses = batch_for(vlm), mixed(vlm, strength=0.9)
    with glasses.worn(vlm):
        worn = logits_of(vlm, batch)
    glasses.save(tmp_path / "glasses", vlm)

    def logits(model):
        with torch.no_grad():
            return model.eval()(**batch.inputs).logits

    peft = PeftModel.from_pretrained(auto(vlm).from_pretrained(vlm.source), tmp_path / "glasses")
    assert (logits(peft) - worn).abs().max() == 0
    model = auto(vlm).from_pretrained(vlm.source)
    model.load_adapter(str(tmp_path / "glasses"))
    assert (logits(model) - worn).abs().max() == 0
    assert (logits(auto(vlm).from_pretrained(tmp_path / "glasses")) - worn).abs().max() == 0
    merged = peft.merge_and_unload()
    torch.testing.assert_close(logits(merged), worn, rtol=1e-4, atol=1e-5)


def test_save_and_load_are_inverse(tiny_vlm, tmp_path):
    columns = {"auroc prompt:last": {s: torch.rand(len(r)) for s, r in glasses_for(tiny_vlm).factors.items()}}
    glasses = glasses_for(tiny_vlm, strength=0.8, columns=columns, notes={"n": [1, 2], "λ": {"a": 0.5}})
    glasses.save(tmp_path / "a", tiny_vlm)
    again = Glasses.load(tmp_path / "a")
    assert again == glasses
    assert again.home == Home.of(tiny_vlm)
    assert again.home.decoder_path == "model.language_model"


def test_same_glasses_same_bytes(tiny_vlm, tmp_path):
    for name in "ab":
        glasses_for(tiny_vlm, columns={"q": glasses_for(tiny_vlm).factors}).save(tmp_path / name, tiny_vlm)
    Glasses.load(tmp_path / "a").save(tmp_path / "c")  # without the model
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == FILES
    for name in FILES:
        assert len({sha256_file(tmp_path / folder / name) for folder in "abc"}) == 1


def test_files_do_not_depend_on_the_order_of_sites(tiny_vlm, tmp_path):
    glasses = glasses_for(tiny_vlm)
    turned = Glasses(dict(reversed(glasses.factors.items())), glasses.base_fingerprint, glasses.recipe)
    glasses.save(tmp_path / "a", tiny_vlm)
    turned.save(tmp_path / "b", tiny_vlm)
    assert all(sha256_file(tmp_path / "a" / name) == sha256_file(tmp_path / "b" / name) for name in FILES)


def test_another_strength_without_the_model(tiny_vlm, tmp_path):
    glasses = glasses_for(tiny_vlm)
    glasses.save(tmp_path / "a", tiny_vlm)
    Glasses.load(tmp_path / "a").at(0.5).save(tmp_path / "b")
    again = Glasses.load(tmp_path / "b")
    assert again == glasses.at(0.5)
    key = "base_model.model.model.language_model.layers.1.mlp.up_proj.ia3_l"
    site = Site("layers.1.mlp.up_proj", "out")
    assert torch.equal(load_file(tmp_path / "b" / "adapter_model.safetensors")[key].flatten(), again.effective()[site])


def test_config_names_every_module(tiny_vlm, tmp_path):
    factors = {
        Site("layers.0.mlp.up_proj", "out"): torch.zeros(48),
        Site("layers.1.mlp.down_proj", "in"): torch.zeros(48),
    }
    Glasses(factors, tiny_vlm.fingerprint(), "test").save(tmp_path / "a", tiny_vlm)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == [
        "model.language_model.layers.0.mlp.up_proj",
        "model.language_model.layers.1.mlp.down_proj",
    ]
    assert config["feedforward_modules"] == ["model.language_model.layers.1.mlp.down_proj"]
    assert config["base_model_name_or_path"] == tiny_vlm.source
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {key: tuple(t.shape) for key, t in tensors.items()} == {
        "base_model.model.model.language_model.layers.0.mlp.up_proj.ia3_l": (48, 1),
        "base_model.model.model.language_model.layers.1.mlp.down_proj.ia3_l": (1, 48),
    }


def test_pandas_reads_the_table(tiny_vlm, tmp_path):
    up, down = Site("layers.0.mlp.up_proj", "out"), Site("layers.1.mlp.down_proj", "in")
    factors = {down: torch.ones(48), up: torch.ones(48)}
    factors[up][[3, 40]] = torch.tensor([0.25, 0.0])
    factors[down][7] = 1.5
    columns = {"auroc response:max": {up: torch.linspace(0, 1, 48)}}
    Glasses(factors, tiny_vlm.fingerprint(), "test", columns=columns).save(tmp_path / "a", tiny_vlm)
    table = pd.read_parquet(tmp_path / "a" / "neurons.parquet")
    assert list(table.columns) == ["site", "layer", "kind", "index", "neuron", "factor", "auroc response:max"]
    assert table.drop(columns=["neuron", "auroc response:max"]).values.tolist() == [
        ["layers.0.mlp.up_proj:out", 0, "mlp.up_proj:out", 3, 0.25],
        ["layers.0.mlp.up_proj:out", 0, "mlp.up_proj:out", 40, 0.0],
        ["layers.1.mlp.down_proj:in", 1, "mlp.down_proj:in", 7, 1.5],
    ]
    assert table["auroc response:max"].isna().tolist() == [False, False, True]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_both_sides_of_a_gated_block_move_to_up(tiny_vlm, tmp_path):
    glasses = glasses_for(tiny_vlm) * glasses_for(tiny_vlm, what="neurons", seed=5)
    glasses.save(tmp_path / "a", tiny_vlm)
    assert json.loads((tmp_path / "a" / "glasses.json").read_text())["moved"] == {
        f"layers.{i}.mlp.down_proj:in": f"layers.{i}.mlp.up_proj:out" for i in range(2)
    }
    assert Glasses.load(tmp_path / "a") == glasses
    batch = batch_for(tiny_vlm)
    with glasses.worn(tiny_vlm):
        worn = logits_of(tiny_vlm, batch)
    model = auto(tiny_vlm).from_pretrained(tiny_vlm.source)
    peft = PeftModel.from_pretrained(model, tmp_path / "a").eval()
    with torch.no_grad():
        torch.testing.assert_close(peft(**batch.inputs).logits, worn, rtol=1e-4, atol=1e-5)


def test_both_sides_elsewhere_are_refused(tiny_vlm, tmp_path):
    path = "layers.0.self_attn.o_proj"
    factors = {Site(path, "in"): torch.zeros(32), Site(path, "out"): torch.zeros(32)}
    with pytest.raises(SafeglassesError) as error:
        Glasses(factors, tiny_vlm.fingerprint(), "test").save(tmp_path / "a", tiny_vlm)
    assert str(error.value) == (
        "an IA3 adapter scales a module's input or its output, not both\n"
        "  given:    both sides of 1 modules: layers.0.self_attn.o_proj\n"
        "  expected: one side per module; in gated blocks the inputs of down_proj can move to up_proj\n"
        "  do:       save(folder, vlm) with the model, or fold the glasses: safeglasses fold takes both sides"
    )
    assert not (tmp_path / "a").exists()


def test_names_that_peft_would_match_twice():
    model = torch.nn.ModuleDict({"up": torch.nn.Linear(2, 2)})
    model["vision"] = torch.nn.ModuleDict({"up": torch.nn.Linear(2, 2)})
    home = Home("m", None, "", multimodal=True, conv1d=False)
    with pytest.raises(SafeglassesError) as error:
        check_names(model, {Site("up", "out"): torch.zeros(2)}, home)
    assert str(error.value) == (
        "PEFT would apply these glasses to another module as well\n"
        "  given:    vision.up ends with up\n"
        "  expected: module paths that are unambiguous in this model\n"
        "  do:       fold the glasses instead: safeglasses fold"
    )
    check_names(model, {Site("vision.up", "out"): torch.zeros(2)}, home)


def test_model_must_be_known_to_save(tmp_path):
    with pytest.raises(SafeglassesError) as error:
        Glasses({Site("layers.0.mlp.up_proj", "out"): torch.zeros(4)}, "sg1-a", "test").save(tmp_path / "a")
    assert str(error.value) == (
        "the adapter must name the modules of its base model, which these glasses do not know\n"
        "  do:       give the model: glasses.save(folder, vlm)"
    )


def test_saving_nothing_is_refused(tiny_vlm, tmp_path):
    glasses = glasses_for(tiny_vlm).at(0)
    with pytest.raises(SafeglassesError) as error:
        glasses.save(tmp_path / "a", tiny_vlm)
    assert str(error.value) == (
        "these glasses change no neuron: saving them would silently do nothing\n"
        "  given:    recipe test, strength 0, 14 sites\n"
        "  expected: at least one neuron with a factor other than 1, and a strength above 0\n"
        "  do:       lower the recipe's threshold, or raise the strength"
    )


def test_overwriting_is_asked_for(tiny_vlm, tmp_path):
    glasses_for(tiny_vlm).save(tmp_path / "a", tiny_vlm)
    with pytest.raises(SafeglassesError, match="the output is already there"):
        glasses_for(tiny_vlm, seed=1).save(tmp_path / "a", tiny_vlm)
    glasses_for(tiny_vlm, seed=1).save(tmp_path / "a", tiny_vlm, overwrite=True)
    assert Glasses.load(tmp_path / "a") == glasses_for(tiny_vlm, seed=1)
