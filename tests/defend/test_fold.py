"""Folding: the same as wearing, in ordinary checkpoints; and what is refused."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from defend.conftest import batch_for, chats_for, glasses_for, logits_of
from safeglasses.defend.fold import fold_checkpoint
from safeglasses.defend.glasses import Glasses
from safeglasses.defend.weights import scale_weights
from safeglasses.errors import PartialMatch, SafeglassesError, WrongBase
from safeglasses.model.sites import Site
from safeglasses.model.vlm import load

UP, DOWN = Site("layers.0.mlp.up_proj", "out"), Site("layers.1.mlp.down_proj", "in")


def both_sides(vlm):
    return glasses_for(vlm) * glasses_for(vlm, what="neurons", seed=3).at(0.8)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gpt2", "opt"])  # gpt2: Conv1D with biases; opt: biases
def test_folded_is_worn(family, folder_of, tmp_path):
    vlm = load(folder_of(family))
    batch, chats, glasses = batch_for(vlm), chats_for(vlm), both_sides(vlm)
    with glasses.worn(vlm):
        worn = logits_of(vlm, batch)
        text = vlm.generate(chats, max_new_tokens=8, temperature=0.0, seed=0)
    fold_checkpoint(vlm, glasses, tmp_path / "folded")
    torch.testing.assert_close(logits_of(vlm, batch), worn, rtol=1e-4, atol=1e-5)
    again = load(tmp_path / "folded")
    torch.testing.assert_close(logits_of(again, batch), worn, rtol=1e-4, atol=1e-5)
    assert again.generate(chats, max_new_tokens=8, temperature=0.0, seed=0) == text


def test_transformers_alone_serves_a_folded_checkpoint(fresh, tmp_path):
    vlm = fresh()
    batch, chats, glasses = batch_for(vlm), chats_for(vlm, 1), glasses_for(vlm)
    with glasses.worn(vlm):
        text = vlm.generate(chats, max_new_tokens=8, temperature=0.0, seed=0)[0]
    fold_checkpoint(vlm, glasses, tmp_path / "folded")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "folded")
    processor = AutoProcessor.from_pretrained(tmp_path / "folded")
    inputs = processor.apply_chat_template(
        chats[0].messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip() == text
    with torch.no_grad():
        torch.testing.assert_close(model(**batch.inputs).logits, logits_of(vlm, batch), rtol=0, atol=0)


def test_marker_and_card(fresh, tmp_path):
    vlm = fresh()
    base, glasses = vlm.fingerprint(), glasses_for(vlm, notes={"seed": 1}).at(0.5)
    fold_checkpoint(vlm, glasses, tmp_path / "folded")
    assert json.loads((tmp_path / "folded" / "safeglasses.json").read_text()) == {
        "schema": 1,
        "kind": "folded",
        "recipe": "test",
        "strength": 0.5,
        "n_neurons": glasses.n_neurons,
        "base": {"fingerprint": base, "source": vlm.source, "revision": None},
        "fingerprint": vlm.fingerprint(),
        "notes": {"seed": 1},
    }
    assert vlm.fingerprint() == load(tmp_path / "folded").fingerprint() != base
    card = (tmp_path / "folded" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n")


def test_only_scaled_weights_change(fresh):
    vlm = fresh()
    before = {name: p.detach().clone() for name, p in vlm.model.named_parameters()}
    row = torch.ones(48)
    row[5] = 0.5
    Glasses({UP: row, DOWN: row}, vlm.fingerprint(), "test").fold(vlm)
    after = dict(vlm.model.named_parameters())
    up, down = f"model.language_model.{UP.path}.weight", f"model.language_model.{DOWN.path}.weight"
    assert {n for n in before if not torch.equal(before[n], after[n])} == {up, down}
    assert torch.equal(after[up], before[up] * row[:, None])
    assert torch.equal(after[down], before[down] * row)


def test_biases_scale_with_outputs_only(folder_of):
    vlm = load(folder_of("opt"))
    path = "layers.0.fc1"
    linear = vlm.model.get_submodule(vlm.anatomy.absolute_path(path))
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    out, into = torch.rand(linear.out_features), torch.rand(linear.in_features)
    glasses = Glasses({Site(path, "out"): out, Site(path, "in"): into}, vlm.fingerprint(), "test")
    glasses.fold(vlm)
    assert torch.equal(linear.bias, bias * out)
    assert torch.equal(linear.weight, weight * out[:, None] * into)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_rounded_once(tiny, dtype):
    vlm = load(tiny, dtype=dtype)
    linear = vlm.model.get_submodule(vlm.anatomy.absolute_path(DOWN.path))
    before, out, into = linear.weight.detach().double(), torch.rand(32), torch.rand(48)
    scale_weights(vlm.model, vlm.anatomy, {DOWN: into, Site(DOWN.path, "out"): out})
    exact = (before.float() * out[:, None] * into).to(dtype)
    assert linear.weight.dtype == dtype
    assert torch.equal(linear.weight, exact)


def test_tied_embeddings_stay_as_they_are(folder_of, tmp_path):
    vlm = load(folder_of("gpt2"))
    vlm.model.lm_head.weight = vlm.model.transformer.wte.weight
    before = vlm.model.lm_head.weight.detach().clone()
    glasses_for(vlm).fold(vlm)
    assert vlm.model.lm_head.weight is vlm.model.transformer.wte.weight
    assert torch.equal(vlm.model.lm_head.weight, before)


# refusals


def unchanged(vlm, act, kind=SafeglassesError):
    """Run something that must be refused and leave the model as it was; return the message."""
    before = {name: p.detach().clone() for name, p in vlm.model.named_parameters() if not p.is_meta}
    with pytest.raises(kind) as error:
        act()
    after = dict(vlm.model.named_parameters())
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    return str(error.value)


def test_second_fold_and_wearing_after_it(fresh, tmp_path):
    vlm = fresh()
    base = vlm.fingerprint()
    glasses = glasses_for(vlm).fitted(vlm)
    fold_checkpoint(vlm, glasses, tmp_path / "folded")
    for where, model in (("memory", vlm), ("disk", load(tmp_path / "folded"))):
        expected = (
            "this model already has glasses made for its base folded in; more would multiply with them\n"
            f"  given:    {model.source}, with test at strength 1 folded in\n"
            f"  expected: the model before folding: {glasses.home.source} (fingerprint {base})\n"
            "  do:       use the folded model as it is, or load the base model"
        )
        assert unchanged(model, lambda m=model: glasses.fold(m), WrongBase) == expected, where
        assert unchanged(model, lambda m=model: glasses.worn(m).__enter__(), WrongBase) == expected, where
    other = glasses_for(vlm, seed=7)  # made for the folded model
    assert other.base_fingerprint != base
    other.fold(vlm)
    assert [record["base_fingerprint"] for record in vlm.model.config.safeglasses_folded] == [
        base,
        other.base_fingerprint,
    ]


def test_a_neuron_between_the_fingerprint_samples_is_caught_by_the_marker(fresh):
    vlm = fresh()
    glasses = Glasses({UP: torch.tensor([1.0, 0.999, *[1.0] * 46])}, vlm.fingerprint(), "test")
    glasses.fold(vlm)
    with pytest.raises(WrongBase, match="already has glasses"):
        glasses.fold(vlm)


def test_folder_that_holds_a_folded_model(fresh, tmp_path):
    vlm, glasses = fresh(), glasses_for(fresh())
    fold_checkpoint(fresh(), glasses, tmp_path / "folded")
    message = unchanged(vlm, lambda: fold_checkpoint(vlm, glasses, tmp_path / "folded"))
    assert message == (
        "this folder already holds a model with glasses folded in\n"
        f"  given:    {tmp_path / 'folded'}\n"
        "  expected: a new folder\n"
        "  do:       choose another name, or replace it with --overwrite (in Python: overwrite=True)"
    )
    fold_checkpoint(vlm, glasses, tmp_path / "folded", overwrite=True)


def test_refused_folds_leave_no_folder(fresh, tmp_path):
    vlm = fresh()
    wrong = Glasses({UP: torch.zeros(48)}, "sg1-other", "test")
    unchanged(vlm, lambda: fold_checkpoint(vlm, wrong, tmp_path / "folded"), WrongBase)
    narrow = Glasses({UP: torch.zeros(47)}, vlm.fingerprint(), "test")
    unchanged(vlm, lambda: fold_checkpoint(vlm, narrow, tmp_path / "folded"), PartialMatch)
    message = unchanged(vlm, lambda: fold_checkpoint(vlm, glasses_for(vlm).at(0), tmp_path / "folded"))
    assert message.startswith("these glasses change no neuron: folding them would silently do nothing\n")
    assert list(tmp_path.iterdir()) == []


def test_shared_weights(fresh):
    vlm = fresh()
    layers = vlm.model.get_submodule("model.language_model.layers")
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    glasses = Glasses({UP: torch.zeros(48)}, vlm.fingerprint(), "test")
    assert unchanged(vlm, lambda: glasses.fold(vlm)) == (
        "a weight shared with another module cannot be folded: both would change\n"
        "  given:    model.language_model.layers.0.mlp.up_proj.weight shares its memory with "
        "model.language_model.layers.1.mlp.up_proj.weight\n"
        "  expected: weights of their own for all maps that the glasses scale\n"
        "  do:       keep the adapter folder and wear it through PEFT, which scales activations"
    )


def test_overlapping_views(fresh):
    vlm = fresh()
    layers = vlm.model.get_submodule("model.language_model.layers")
    flat = torch.rand(2 * 48 * 32)
    layers[0].mlp.up_proj.weight = nn.Parameter(flat[: 48 * 32].view(48, 32))
    layers[1].mlp.up_proj.weight = nn.Parameter(flat[48 * 32 :].view(48, 32))  # one storage, no overlap
    scale_weights(vlm.model, vlm.anatomy, {UP: torch.full((48,), 0.5)})
    layers[1].mlp.up_proj.weight = nn.Parameter(flat[32 : 49 * 32].view(48, 32))
    with pytest.raises(SafeglassesError, match="a weight shared with another module"):
        scale_weights(vlm.model, vlm.anatomy, {UP: torch.zeros(48)})


class Packed(nn.Parameter):
    """Stands for the parameter classes of quantisation libraries."""


def quantised(parameter, how):
    if how == "integer":
        return nn.Parameter(parameter.to(torch.int8), requires_grad=False)
    if how == "float8":
        return nn.Parameter(parameter.to(torch.float8_e4m3fn), requires_grad=False)
    return Packed(parameter.detach())


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("integer", "Parameter of torch.int8"),
        ("float8", "Parameter of torch.float8_e4m3fn"),
        ("class", "Packed of torch.float32"),
    ],
)
def test_quantised_weights(fresh, how, what):
    vlm = fresh()
    linear = vlm.model.get_submodule(vlm.anatomy.absolute_path(UP.path))
    linear.weight = quantised(linear.weight.detach(), how)
    before = linear.weight.detach().clone()
    with pytest.raises(SafeglassesError) as error:
        scale_weights(vlm.model, vlm.anatomy, {UP: torch.zeros(48), DOWN: torch.zeros(48)})
    assert str(error.value) == (
        "a quantised or sharded weight cannot be folded\n"
        f"  given:    model.language_model.layers.0.mlp.up_proj.weight: {what}\n"
        "  expected: plain tensors of float32, bfloat16, float16, float64\n"
        "  do:       load the model unquantised (dtype=bfloat16), fold, then quantise the result; "
        "or keep the adapter folder and wear it through PEFT"
    )
    assert torch.equal(linear.weight.view(torch.uint8), before.view(torch.uint8))


def test_weights_that_are_not_loaded(fresh):
    vlm = fresh()
    linear = vlm.model.get_submodule(vlm.anatomy.absolute_path(UP.path))
    linear.weight = nn.Parameter(torch.empty(48, 32, device="meta"))
    assert unchanged(vlm, lambda: scale_weights(vlm.model, vlm.anatomy, {UP: torch.zeros(48)})) == (
        "a weight that is not loaded cannot be folded\n"
        "  given:    model.language_model.layers.0.mlp.up_proj.weight on the meta device "
        "(offloaded to disk or CPU)\n"
        "  expected: every decoder weight on a real device\n"
        "  do:       load the model without offloading: device_map=None or more memory"
    )


def test_text_only_checkpoint(folder_of, tmp_path):
    vlm = load(folder_of("llama"))
    fold_checkpoint(vlm, glasses_for(vlm), tmp_path / "folded")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    batch = batch_for(vlm)
    with torch.no_grad():
        assert torch.equal(model(**batch.inputs).logits, logits_of(vlm, batch))
