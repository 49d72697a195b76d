"""Folding in memory: the same as wearing; and what is refused."""

import pytest
import torch
from torch import nn

from defend.conftest import batch_for, chats_for, glasses_for, logits_of
from safeglasses.defend.glasses import Glasses
from safeglasses.defend.weights import scale_weights
from safeglasses.errors import PartialMatch, SafeglassesError, WrongBase
from safeglasses.model.sites import Site
from safeglasses.model.vlm import load

UP, DOWN = Site("layers.0.mlp.up_proj", "out"), Site("layers.1.mlp.down_proj", "in")


def both_sides(vlm):
    return glasses_for(vlm) * glasses_for(vlm, what="neurons", seed=3).at(0.8)


@pytest.mark.parametrize("family", ["gpt2", "opt"])  # Conv1D with biases; biases
def test_both_sides_of_one_map_are_folded_as_worn(family, folder_of):
    """An adapter holds one side per map; tests/test_families.py has that, for every family."""
    vlm = load(folder_of(family))
    batch, chats, glasses = batch_for(vlm), chats_for(vlm), both_sides(vlm)
    with glasses.worn(vlm):
        worn = logits_of(vlm, batch)
        text = vlm.generate(chats, max_new_tokens=8, temperature=0.0, seed=0)
    glasses.fold(vlm)
    torch.testing.assert_close(logits_of(vlm, batch), worn, rtol=1e-4, atol=1e-5)
    assert vlm.generate(chats, max_new_tokens=8, temperature=0.0, seed=0) == text


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


def test_tied_embeddings_stay_as_they_are(folder_of):
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


def test_second_fold_and_wearing_after_it(fresh):
    vlm = fresh()
    base = vlm.fingerprint()
    glasses = glasses_for(vlm).fitted(vlm)
    glasses.fold(vlm)
    expected = (
        "this model already has glasses made for its base folded in; more would multiply with them\n"
        f"  given:    {vlm.source}, with test at strength 1 folded in\n"
        f"  expected: the model before folding: {glasses.home.source} (fingerprint {base})\n"
        "  do:       use the folded model as it is, or load the base model"
    )
    assert unchanged(vlm, lambda: glasses.fold(vlm), WrongBase) == expected
    assert unchanged(vlm, lambda: glasses.worn(vlm).__enter__(), WrongBase) == expected
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


def test_other_models(fresh):
    vlm = fresh()
    unchanged(vlm, lambda: Glasses({UP: torch.zeros(48)}, "sg1-other", "test").fold(vlm), WrongBase)
    unchanged(vlm, lambda: Glasses({UP: torch.zeros(47)}, vlm.fingerprint(), "test").fold(vlm), PartialMatch)
    message = unchanged(vlm, lambda: glasses_for(vlm).at(0).fold(vlm))
    assert message.startswith("these glasses change no neuron: folding them would silently do nothing\n")


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
