"""The overlap atlas against sets, and its null against random sets."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safeglasses.errors import SafeglassesError
from safeglasses.find.overlap import Atlas, hypergeometric, overlap_atlas
from safeglasses.find.selection import Selection
from safeglasses.model.sites import Site

WIDTHS = (30, 50)
SITES = tuple(Site(f"layers.{i}.mlp.down_proj", "in") for i in range(2))
NAMES = ("en/image-dominant", "en/text-dominant", "sw/text-dominant")


def drawn(sizes: tuple[int, int], rng: np.random.Generator) -> Selection:
    masks = {}
    for site, width, size in zip(SITES, WIDTHS, sizes, strict=True):
        mask = torch.zeros(width, dtype=torch.bool)
        mask[torch.from_numpy(rng.permutation(width)[:size])] = True
        masks[site] = mask
    return Selection(masks)


@pytest.fixture(scope="module")
def sets() -> dict[str, Selection]:
    rng = np.random.default_rng(0)
    return {name: drawn(sizes, rng) for name, sizes in zip(NAMES, ((12, 20), (9, 0), (14, 25)), strict=True)}


@pytest.fixture(scope="module")
def atlas(sets: dict[str, Selection]) -> Atlas:
    return overlap_atlas(sets)


def test_counts_are_those_of_sets(sets: dict[str, Selection], atlas: Atlas) -> None:
    plain = {name: set(selection) for name, selection in sets.items()}
    for i, a in enumerate(NAMES):
        for j, b in enumerate(NAMES):
            both, either = plain[a] & plain[b], plain[a] | plain[b]
            assert float(atlas.directional()[i, j]) == len(both) / len(plain[a])
            assert float(atlas.jaccard()[i, j]) == len(both) / len(either)
            for layer, site in enumerate(SITES):
                here = [{n for n in s if n[0] == site} for s in (plain[a], plain[b])]
                share = float(atlas.directional_by_layer()[i, j, layer])
                index = float(atlas.jaccard_by_layer()[i, j, layer])
                if here[0]:
                    assert share == len(here[0] & here[1]) / len(here[0])
                else:
                    assert math.isnan(share)
                if here[0] | here[1]:
                    assert index == len(here[0] & here[1]) / len(here[0] | here[1])
                else:
                    assert math.isnan(index)
                expected = float(atlas.expected_by_layer()[i, j, layer])
                assert expected == pytest.approx(len(here[1]) / WIDTHS[layer]) if here[0] else math.isnan(expected)


def test_fused_experts_are_one_layer_and_random_sets_have_as_many_in_each_expert() -> None:
    sites = [Site(f"layers.3.mlp.experts.{number}", "in") for number in range(2)]
    chosen = {"en/text-dominant": ([0, 1, 2], [0]), "sw/text-dominant": ([2, 3], [])}
    sets = {
        name: Selection({s: torch.isin(torch.arange(4), torch.tensor(n)) for s, n in zip(sites, rows, strict=True)})
        for name, rows in chosen.items()
    }
    atlas = overlap_atlas(sets)
    record = json.loads(json.dumps(atlas.record(), allow_nan=False))
    assert (record["layers"], record["layer_neurons"]) == ([3], [8])
    assert [entry["by_layer"] for entry in record["sets"]] == [[4], [2]]
    (layer,) = record["by_layer"]
    assert layer["directional"] == [[1, 0.25], [0.5, 1]]
    assert layer["random_directional"][0][1] == 3 / 4 * 2 / 4  # three of A are in the one expert that B is in
    assert float(atlas.null().mean[0, 1]) == pytest.approx(3 * 2 / 4)


def test_the_null_is_what_random_sets_give(atlas: Atlas) -> None:
    rng, draws = np.random.default_rng(1), 4000
    null = atlas.null()
    for i, j in ((0, 1), (0, 2), (1, 2)):
        sizes = [tuple(atlas.sizes[row].tolist()) for row in (i, j)]
        shared = np.zeros(draws)
        for layer, width in enumerate(WIDTHS):  # one set may stand still
            hits = np.argsort(rng.random((draws, width)), axis=1)[:, : sizes[1][layer]] < sizes[0][layer]
            shared += hits.sum(axis=1)
        mean, sd = shared.mean(), shared.std()
        assert float(null.mean[i, j]) == pytest.approx(mean, abs=4 * sd / math.sqrt(draws) + 1e-12)
        inside = ((shared >= float(null.low[i, j])) & (shared <= float(null.high[i, j]))).mean()
        assert inside >= 0.94
        tight = ((shared > float(null.low[i, j])) & (shared < float(null.high[i, j]))).mean()
        assert tight <= 0.96
        seen = int(atlas.common[i, j].sum())
        assert float(null.p[i, j]) == pytest.approx((shared >= seen).mean(), abs=4 * 0.5 / math.sqrt(draws))
        assert float(null.mean[i, j]) == float(null.mean[j, i])
    assert null.mean.diagonal().isnan().all()


@given(st.integers(1, 60), st.data())
def test_hypergeometric_chances_are_binomials(population: int, data: st.DataObject) -> None:
    first, second = (data.draw(st.integers(0, population)) for _ in range(2))
    start, chances = hypergeometric(population, first, second)
    for x in range(min(first, second) + 1):
        exact = math.comb(first, x) * math.comb(population - first, second - x) if second - x >= 0 else 0
        exact /= math.comb(population, second)
        found = chances[x - start] if 0 <= x - start < len(chances) else 0.0
        assert found == pytest.approx(exact, abs=1e-11)
    mean = sum((start + i) * chance for i, chance in enumerate(chances))
    assert mean == pytest.approx(first * second / population, abs=1e-9)


def test_many_large_layers_are_quick_and_exact_in_the_mean() -> None:
    masks = {Site(f"layers.{i}.mlp.down_proj", "in"): torch.arange(12288) < 1200 + i for i in range(36)}
    other = {site: torch.arange(12288) >= 11000 for site in masks}
    null = overlap_atlas({"a": Selection(masks), "b": Selection(other)}).null()
    expected = sum((1200 + i) * 1288 / 12288 for i in range(36))
    assert float(null.mean[0, 1]) == pytest.approx(expected, rel=1e-9)
    assert float(null.p[0, 1]) == pytest.approx(1.0)
    assert float(null.low[0, 1]) < expected < float(null.high[0, 1])


def test_equal_sets_are_beyond_random_ones_and_disjoint_ones_are_not() -> None:
    masks = {SITES[0]: torch.arange(30) < 15, SITES[1]: torch.arange(50) < 25}
    inverse = {site: ~mask for site, mask in masks.items()}
    names = ("en/text-dominant", "sw/text-dominant", "it/text-dominant")
    atlas = overlap_atlas({name: Selection(m) for name, m in zip(names, (masks, masks, inverse), strict=True)})
    summary = atlas.summary()
    assert summary["cross_modal"]["pairs"] == 0
    assert summary["cross_modal"]["directional"] is None
    lingual = summary["cross_lingual"]
    assert lingual["pairs"] == 3
    assert lingual["beyond_random"] == 1
    assert lingual["directional"] == {"mean": pytest.approx(1 / 3), "low": 0.0, "high": 1.0}
    assert lingual["random_directional"]["mean"] == pytest.approx(0.5)


def test_record_is_json_and_says_the_same(atlas: Atlas) -> None:
    record = json.loads(json.dumps(atlas.record(), allow_nan=False))
    assert [entry["name"] for entry in record["sets"]] == list(NAMES)
    assert record["sets"][1] == {"name": NAMES[1], "neurons": 9, "by_layer": [9, 0]}
    assert record["directional"] == atlas.directional().tolist()
    assert record["by_layer"][1]["directional"][1] == [None, None, None]
    assert record["random"]["p"][0][0] is None
    assert record["random"]["directional"]["mean"][0][2] == pytest.approx(float(atlas.null().mean[0, 2]) / 32)


def test_one_set_or_other_sites_are_refused(sets: dict[str, Selection]) -> None:
    with pytest.raises(SafeglassesError) as caught:
        overlap_atlas({NAMES[0]: sets[NAMES[0]]})
    assert str(caught.value) == (
        "an overlap needs at least two sets of neurons\n"
        "  given:    1: en/image-dominant\n"
        "  expected: sets of several languages or risk types\n"
        "  do:       find safety neurons with a probe that holds more of them"
    )
    other = Selection({SITES[0]: torch.zeros(30, dtype=torch.bool)})
    with pytest.raises(SafeglassesError, match="selections over different sites cannot be combined"):
        overlap_atlas({"a": sets[NAMES[0]], "b": other})
