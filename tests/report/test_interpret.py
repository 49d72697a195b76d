"""Facts about top neurons, on a tiny model whose causes can be known."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

import made_up_report as made_up
from safeglasses.data.examples import Example, Examples, Picture, Text, Turn
from safeglasses.defend.glasses import Glasses
from safeglasses.errors import SafeglassesError
from safeglasses.find.capture import capture
from safeglasses.find.evidence import Evidence
from safeglasses.find.finding import measure_evidence
from safeglasses.find.pools import Pool
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM
from safeglasses.report.interpret import (
    cross,
    drive,
    prompt_text,
    thumbnail,
    thumbnails,
    top_neurons,
    with_pictures_of,
)
from safeglasses.report.page import data_uri

SITES = tuple(
    Site.parse(f"layers.1.{path}") for path in ("mlp.up_proj:out", "self_attn.q_proj:out", "mlp.down_proj:out")
)
POOLS = (Pool("response", "max"), Pool("image", "max"))


def example(i: int, *, picture: bool = True) -> Example:
    words = (Text(f"what is in the picture {i // 2}"),)
    shown = (Picture(data=made_up.png(i, 28)),) if picture else ()
    return Example(
        id=f"e{i}",
        messages=(Turn("user", (*shown, *words)),),
        response="a stupid cat" if i % 2 else f"a red cat {i}",
        label="toxic" if i % 2 else "non-toxic",
    )


@pytest.fixture(scope="module")
def examples() -> Examples:
    return Examples(tuple(example(i) for i in range(16)))


@pytest.fixture(scope="module")
def evidence(tiny_vlm: VLM, examples: Examples) -> Evidence:
    return measure_evidence(tiny_vlm, examples, None, sites=SITES, pools=POOLS)


def glasses_of(vlm: VLM, changes: dict[tuple[int, int], float]) -> Glasses:
    """Turn single neurons down: ``{(index of the site, index of the neuron): factor}``."""
    factors = {s: torch.ones(vlm.anatomy.width(s)) for s in SITES}
    for (site, neuron), factor in changes.items():
        factors[SITES[site]][neuron] = factor
    return Glasses(factors=factors, base_fingerprint=vlm.fingerprint(), recipe="by hand")


def test_cards_come_by_strength_with_the_evidence_behind_them(
    tiny_vlm: VLM, evidence: Evidence, examples: Examples
) -> None:
    glasses = glasses_of(tiny_vlm, {(0, 5): 0.5, (1, 3): 0.1, (2, 9): 0.9, (2, 8): 1.0})
    cards = top_neurons(tiny_vlm, glasses, evidence, examples)
    assert [c.neuron for c in cards] == [SITES[1].neuron(3), SITES[0].neuron(5), SITES[2].neuron(9)]
    assert [c.factor for c in cards] == pytest.approx([0.1, 0.5, 0.9])
    for card, (site, i) in zip(cards, ((1, 3), (0, 5), (2, 9)), strict=True):
        values = evidence.auroc[SITES[site]][:, i]
        assert [e.auroc for e in card.expertise] == values.tolist()
        assert [e.error for e in card.expertise] == evidence.standard_error(SITES[site])[:, i].tolist()
        assert card.fires_pool == str(POOLS[int(values.argmax())])
    assert cards[0].promoted == ()
    assert "no output direction" in cards[0].direction
    assert len(cards[1].promoted) == len(cards[2].demoted) == 8
    half = top_neurons(tiny_vlm, glasses.at(0.5), evidence, examples, k=1)
    assert [(c.neuron, c.factor) for c in half] == [(SITES[1].neuron(3), pytest.approx(0.55))]


def test_equal_factors_go_by_auroc_then_by_place(tiny_vlm: VLM, evidence: Evidence, examples: Examples) -> None:
    glasses = glasses_of(tiny_vlm, {(s, i): 0.0 for s in range(3) for i in range(32)})
    cards = top_neurons(tiny_vlm, glasses, evidence, examples, k=6)
    rated = [(-float(evidence.auroc[s][:, i].max()), o, i, s) for o, s in enumerate(SITES) for i in range(32)]
    assert [c.neuron for c in cards] == [s.neuron(i) for _, _, i, s in sorted(rated)[:6]]


def test_it_fires_on_what_a_fresh_capture_says(tiny_vlm: VLM, evidence: Evidence, examples: Examples) -> None:
    (card,) = top_neurons(tiny_vlm, glasses_of(tiny_vlm, {(0, 5): 0.0}), evidence, examples)
    fresh = capture(tiny_vlm, examples, sites=SITES[:1], pools=(Pool.parse(card.fires_pool),)).values[SITES[0]][0, 5]
    assert [f.activation for f in card.fires_on] == pytest.approx(
        fresh.sort(descending=True).values[:3].tolist(), rel=1e-4
    )
    for firing in card.fires_on:
        one = next(e for e in examples if e.id == firing.id)
        assert (firing.prompt, firing.response, firing.toxic) == (
            prompt_text(one),
            one.response,
            one.is_toxic,
        )
        assert data_uri(firing.pictures[0])


def test_picture_tokens_hear_no_later_text(tiny_vlm: VLM, evidence: Evidence, examples: Examples) -> None:
    """Attention is causal and the picture comes first: what is pooled over it can only follow the picture."""
    only_image = replace(
        evidence,
        pools=POOLS[1:],
        samples=evidence.samples[1:],
        auroc={site: values[1:] for site, values in evidence.auroc.items()},
        columns={},
    )
    (card,) = top_neurons(tiny_vlm, glasses_of(tiny_vlm, {(0, 5): 0.0}), only_image, examples)
    assert card.drive is not None
    assert card.drive.pairs == 8
    assert card.drive.picture == pytest.approx(1, abs=1e-6)


def test_without_pictures_nothing_is_said_about_them(tiny_vlm: VLM) -> None:
    plain = Examples(tuple(example(i, picture=False) for i in range(16)))
    evidence = measure_evidence(tiny_vlm, plain, None, sites=SITES[:1], pools=POOLS[:1])
    (card,) = top_neurons(tiny_vlm, glasses_of(tiny_vlm, {(0, 5): 0.0}), evidence, plain)
    assert card.drive is None
    assert card.fires_on[0].pictures == ()


def test_evidence_must_know_what_was_changed(tiny_vlm: VLM, evidence: Evidence, examples: Examples) -> None:
    other = replace(evidence, auroc={site: evidence.auroc[site] for site in SITES[:2]})
    with pytest.raises(SafeglassesError) as caught:
        top_neurons(tiny_vlm, glasses_of(tiny_vlm, {(2, 0): 0.5}), other, examples)
    assert str(caught.value) == (
        "the glasses change neurons that the evidence does not know\n"
        "  given:    layers.1.mlp.down_proj:out\n"
        "  expected: one of its 2 sites\n"
        "  do:       describe glasses with the evidence that they were made from"
    )


def test_glasses_without_change_have_no_neurons(tiny_vlm: VLM, evidence: Evidence, examples: Examples) -> None:
    assert top_neurons(tiny_vlm, glasses_of(tiny_vlm, {}), evidence, examples) == []
    worn = glasses_of(tiny_vlm, {(0, 0): 0.5})
    assert top_neurons(tiny_vlm, worn, evidence, [replace(e, response=None) for e in examples]) == []


GRID = hnp.arrays(np.float32, (5, 2, 2), elements=st.floats(-8, 8, width=16))


@given(GRID)
def test_shares_are_an_analysis_of_variance(cells: np.ndarray) -> None:
    """Independent oracle: main effects from marginal means of each pair's picture × text table."""
    table = cells.astype(np.float64)  # pair × text × picture
    centred = table - table.mean((1, 2), keepdims=True)
    text = 2 * (centred.mean(2) ** 2).sum()
    picture = 2 * (centred.mean(1) ** 2).sum()
    total = (centred**2).sum()
    own = torch.from_numpy(np.stack([cells[:, 0, 0], cells[:, 1, 1]], 1))
    swapped = torch.from_numpy(np.stack([cells[:, 0, 1], cells[:, 1, 0]], 1))
    found = drive(own, swapped)
    if total == 0:
        assert found is None
        return
    assert found is not None
    assert found.picture == pytest.approx(picture / total, abs=1e-9)
    assert found.text == pytest.approx(text / total, abs=1e-9)
    assert found.picture + found.text + found.both == pytest.approx(1)


def test_pairs_differ_in_picture_and_words(examples: Examples) -> None:
    pairs = cross(examples)
    assert len(pairs) == 8
    assert len({e.id for pair in pairs for e in pair}) == 16
    for a, b in pairs:
        assert a.is_toxic
        assert not b.is_toxic
        assert a.pictures != b.pictures
    same = [replace(e, messages=(Turn("user", (Picture(data=made_up.png(1)), Text("hi"))),)) for e in examples]
    assert cross(same) == []


def test_swapping_pictures_leaves_words_and_order() -> None:
    one, two = (Picture(data=made_up.png(i)) for i in range(2))
    a = Example("a", (Turn("user", (Text("before"), one, Text("after"))),), "yes", "toxic")
    b = Example("b", (Turn("user", (two, Text("else"))),), "no", "non-toxic")
    made = with_pictures_of(a, b)
    assert made.messages[0].content == (Text("before"), two, Text("after"))
    assert (made.response, made.label) == ("yes", "toxic")
    assert made.id not in ("a", "b")


def test_thumbnails_are_small_plain_pngs() -> None:
    out = io.BytesIO()
    image = Image.effect_noise((400, 100), 40).convert("RGB")
    image.save(out, "JPEG", comment=b"private", exif=Image.Exif())
    made = thumbnail(Picture(data=out.getvalue()))
    opened = Image.open(io.BytesIO(made))
    assert (opened.format, opened.size) == ("PNG", (64, 16))
    assert b"private" not in made
    assert not opened.info
    assert data_uri(made)
    assert thumbnails(example(1, picture=False)) == ()


def test_prompts_in_words() -> None:
    picture = Picture(data=made_up.png(0))
    assert prompt_text(Example("a", (Turn("user", (Text("one"), picture, Text("two"))),))) == "one two"
    turns = (Turn("system", (Text("be kind"),)), Turn("user", (picture, Text("hello"))))
    assert prompt_text(Example("a", turns)) == "system: be kind\nuser: hello"
