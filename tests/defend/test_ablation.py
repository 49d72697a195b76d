"""Ablating neurons and patching them, against hooks written out by hand."""

from dataclasses import replace

import pytest
import torch

from defend.conftest import batch_for, chats_for, glasses_for, logits_of
from find.conftest import example_of
from safeglasses.data.examples import Example, Text, Turn
from safeglasses.defend.ablation import Ablation, StandIns
from safeglasses.defend.glasses import Glasses
from safeglasses.defend.patching import Patch
from safeglasses.errors import PartialMatch, SafeglassesError
from safeglasses.find.selection import Selection
from safeglasses.model.hooks import tap
from safeglasses.model.sites import Site
from safeglasses.model.vlm import Chat

EXAMPLES = [example_of(i) for i in range(6)]


@pytest.fixture(scope="module")
def sites(tiny_vlm):
    return tiny_vlm.anatomy.sites("neurons")


@pytest.fixture(scope="module")
def some(tiny_vlm, sites):
    generator = torch.Generator().manual_seed(0)
    return Selection({s: torch.rand(tiny_vlm.anatomy.width(s), generator=generator) < 0.3 for s in sites})


@pytest.fixture(scope="module")
def stand_ins(tiny_vlm, sites):
    return StandIns.of(tiny_vlm, EXAMPLES, sites, tokens=24)


def values_of(vlm, sites, batch):
    found = {}
    with torch.no_grad(), tap(vlm.model, vlm.anatomy, sites, lambda site, value: found.update({site: value.clone()})):
        vlm.forward(batch)
    return found


def test_scaling_by_one_changes_no_bit_and_by_zero_equals_a_hook(tiny_vlm, some):
    batch = batch_for(tiny_vlm)
    plain = logits_of(tiny_vlm, batch)
    with Ablation(some, factor=1.0).worn(tiny_vlm):
        assert torch.equal(logits_of(tiny_vlm, batch), plain)
    decoder = tiny_vlm.model.get_decoder()
    handles = [
        decoder.get_submodule(site.path).register_forward_pre_hook(
            lambda _, args, mask=mask: (args[0].masked_fill(mask, 0.0),)
        )
        for site, mask in some.masks.items()
    ]
    by_hand = logits_of(tiny_vlm, batch)
    for handle in handles:
        handle.remove()
    with Ablation(some).worn(tiny_vlm):
        ablated = logits_of(tiny_vlm, batch)
    assert torch.equal(ablated, by_hand)
    assert not torch.equal(ablated, plain)
    assert torch.equal(logits_of(tiny_vlm, batch), plain)


def test_stand_ins_are_activations_of_real_tokens(tiny_vlm, sites, stand_ins):
    tokens = {site: [] for site in sites}
    for example in EXAMPLES:
        batch = tiny_vlm.encode([example.chat()])
        for site, value in values_of(tiny_vlm, sites, batch).items():
            tokens[site].append(value[0])
    for site in sites:
        pool, chosen = torch.cat(tokens[site]), stand_ins.values[site]
        assert chosen.shape == (24, tiny_vlm.anatomy.width(site))
        nearest = torch.cdist(chosen.double(), pool.double())
        assert nearest.min(1).values.max() < 1e-5
    rows = [torch.cdist(stand_ins.values[s].double(), torch.cat(tokens[s]).double()).argmin(1) for s in sites]
    assert all(torch.equal(rows[0], row) for row in rows)  # the same tokens at every site


def test_the_mean_is_held_and_other_neurons_are_their_own(tiny_vlm, sites, some, stand_ins):
    first = sites[0]
    only = Selection({s: mask & (s == first) for s, mask in some.masks.items()})
    batch = batch_for(tiny_vlm)
    plain = values_of(tiny_vlm, [first], batch)[first]
    with Ablation(only, "mean", stand_ins=stand_ins).worn(tiny_vlm):
        held = values_of(tiny_vlm, [first], batch)[first]
    mask = only.masks[first]
    assert torch.equal(held[..., ~mask], plain[..., ~mask])
    expected = stand_ins.values[first].double().mean(0)[mask]
    torch.testing.assert_close(held[..., mask].double(), expected.expand_as(held[..., mask]), rtol=1e-5, atol=1e-7)


def test_resampling_gives_every_token_one_stand_in_for_all_sites(tiny_vlm, sites, some, stand_ins):
    batch, found = batch_for(tiny_vlm), []
    for _ in range(2):
        with Ablation(some, "resample", stand_ins=stand_ins).worn(tiny_vlm):
            found.append(values_of(tiny_vlm, sites, batch))
    rows = []
    for site in sites:
        assert torch.equal(found[0][site], found[1][site])
        mask = some.masks[site]
        distances = torch.cdist(
            found[0][site][..., mask].flatten(0, 1).double(), stand_ins.values[site][:, mask].double()
        )
        assert distances.min(1).values.max() < 1e-4
        rows.append(distances.argmin(1))
    assert all(torch.equal(rows[0], row) for row in rows)
    assert len(rows[0].unique()) > 1
    with Ablation(some, "resample", stand_ins=stand_ins, seed=1).worn(tiny_vlm):
        assert not torch.equal(values_of(tiny_vlm, sites[:1], batch)[sites[0]], found[0][sites[0]])


def test_answers_under_resampling_depend_on_the_seed_of_generation(tiny_vlm, some, stand_ins):
    ablation, asked = Ablation(some, "resample", stand_ins=stand_ins), {"max_new_tokens": 8, "temperature": 1.0}

    def answer(seed):
        with ablation.worn(tiny_vlm):
            return tiny_vlm.generate(chats_for(tiny_vlm), **asked, seed=seed)

    state = torch.get_rng_state()
    assert answer(3) == answer(3)
    assert torch.equal(state, torch.get_rng_state())


def test_what_it_does_identifies_it(some, stand_ins):
    other = some.matched(0)
    every = [
        Ablation(some), Ablation(other), Ablation(some, factor=0.5), Ablation(some, "mean", stand_ins=stand_ins),
        Ablation(some, "resample", stand_ins=stand_ins), Ablation(some, "resample", stand_ins=stand_ins, seed=1),
    ]  # fmt: skip
    assert len({a.identity for a in every}) == len(every)
    assert Ablation(some).identity == replace(every[0]).identity


def test_the_control_has_as_many_others_at_every_site(some):
    control = some.matched(1)
    assert control == some.matched(1)
    assert control != some.matched(2)
    for site, mask in some.masks.items():
        assert control.masks[site].sum() == mask.sum()
        assert not (control.masks[site] & mask).any()


def test_a_control_needs_room():
    site = Site("layers.0.mlp.down_proj", "in")
    with pytest.raises(SafeglassesError) as error:
        Selection({site: torch.tensor([True, True, False])}).matched(0)
    assert str(error.value) == (
        "too few neurons are left to draw a control from\n"
        "  given:    2 of 3 neurons of layers.0.mlp.down_proj:in are selected\n"
        "  expected: at most half of every site\n"
        "  do:       select fewer neurons"
    )


def test_what_cannot_be_ablated_is_refused(tiny_vlm, some, sites, stand_ins):
    with pytest.raises(SafeglassesError, match="nothing to ablate"):
        Ablation(some - some)
    with pytest.raises(SafeglassesError, match="nothing to patch"):
        Patch(glasses_for(tiny_vlm), some - some)
    part = StandIns({sites[0]: stand_ins.values[sites[0]]})
    with pytest.raises(SafeglassesError) as error:
        Ablation(some, "mean", stand_ins=part)
    assert str(error.value) == (
        "mean ablation needs ordinary activations of every site\n"
        f"  given:    none of {sites[1]}\n"
        "  do:       make them with StandIns.of(vlm, benign examples, sites)"
    )
    with pytest.raises(SafeglassesError, match="no examples to take ordinary activations from"):
        StandIns.of(tiny_vlm, [], sites)
    absent = Selection({Site("layers.9.mlp.down_proj", "in"): torch.ones(4, dtype=torch.bool)})
    with pytest.raises(PartialMatch), Ablation(absent).worn(tiny_vlm):
        pass
    narrow = Selection({sites[0]: torch.ones(4, dtype=torch.bool)})
    with pytest.raises(SafeglassesError, match="the neurons do not fit their site"), Ablation(narrow).worn(tiny_vlm):
        pass


def test_patching_every_neuron_restores_the_defence_and_none_leaves_nothing(tiny_vlm, sites):
    """Glasses on FFN neurons act through these neurons alone, so patching all of them is wearing the glasses."""
    glasses, batch = glasses_for(tiny_vlm, what="neurons"), batch_for(tiny_vlm)
    every = Selection({s: torch.ones(tiny_vlm.anatomy.width(s), dtype=torch.bool) for s in sites})
    plain = logits_of(tiny_vlm, batch)
    with glasses.worn(tiny_vlm):
        worn = logits_of(tiny_vlm, batch)
        texts = tiny_vlm.generate(chats_for(tiny_vlm), max_new_tokens=8, temperature=0.0, seed=0)
    with Patch(glasses, every).worn(tiny_vlm):
        assert torch.equal(logits_of(tiny_vlm, batch), worn)
        answers = tiny_vlm.generate(chats_for(tiny_vlm), max_new_tokens=8, temperature=0.0, seed=0)
        again = tiny_vlm.generate(chats_for(tiny_vlm), max_new_tokens=8, temperature=0.0, seed=0)
    assert answers == again == texts
    assert torch.equal(logits_of(tiny_vlm, batch), plain)
    first = Selection({s: mask & (s == sites[0]) for s, mask in every.masks.items()})
    with Patch(glasses, first).worn(tiny_vlm):
        part = logits_of(tiny_vlm, batch)
    alone = replace(glasses, factors={sites[0]: glasses.factors[sites[0]]})
    with alone.worn(tiny_vlm):
        assert torch.equal(part, logits_of(tiny_vlm, batch))


def test_maps_that_are_computed_twice_a_pass_are_patched_call_by_call(family):
    """Gemma 3n asks its routers before and behind a layer: what each call gave goes back into that call."""
    vlm = family("gemma3n_text")
    routers = [Site(path, "out") for path in vlm.anatomy.linears if path.endswith("modality_router")]
    batch = vlm.encode([Chat([{"role": "user", "content": "a red dog"}], "a cat")])
    factors = {site: torch.full((vlm.anatomy.width(site),), 0.2) for site in routers}
    glasses = Glasses(factors, vlm.fingerprint(), "test")
    with glasses.worn(vlm):
        worn = logits_of(vlm, batch)
    every = Selection({site: torch.ones(vlm.anatomy.width(site), dtype=torch.bool) for site in routers})
    with Patch(glasses, every).worn(vlm):
        assert torch.equal(logits_of(vlm, batch), worn)
    assert not torch.equal(logits_of(vlm, batch), worn)
    row = Example("row", (Turn("user", (Text("a dog"),)),), response="a cat", label="non-toxic")
    stand_ins = StandIns.of(vlm, [row], [*routers, *vlm.anatomy.sites("neurons")], tokens=3)
    assert {len(values) for values in stand_ins.values.values()} == {3}


def test_an_error_inside_a_patch_leaves_no_hook(tiny_vlm, some):
    batch = batch_for(tiny_vlm)
    plain = logits_of(tiny_vlm, batch)
    with pytest.raises(KeyboardInterrupt), Patch(glasses_for(tiny_vlm), some).worn(tiny_vlm):
        raise KeyboardInterrupt
    assert torch.equal(logits_of(tiny_vlm, batch), plain)
