"""Neurons of fused experts: pooled and rated over what the router sent them, against unrolled ones and scikit-learn."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from families.unrolled import NOT_OURS, hooked, unrolled
from safeglasses.data.examples import Example, Examples
from safeglasses.errors import SafeglassesError
from safeglasses.find.capture import capture
from safeglasses.find.engine import Setup
from safeglasses.find.enough import FEWEST
from safeglasses.find.evidence import Evidence
from safeglasses.find.finding import measure_evidence
from safeglasses.find.pools import Pool
from safeglasses.find.selection import Selection
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM

Make = Callable[..., Example]
pytestmark = pytest.mark.filterwarnings(NOT_OURS)
FAMILIES = ("qwen3_vl_moe", "glm4v_moe", "ernie4_5_vl_moe", "qwen3_5_moe")
POOLS = tuple(map(Pool.parse, ("prompt:last", "response:max", "all:mean", "image:rms", "text:mean-abs")))
N = 48
EXACT = Setup("exact", 2**30, shard=13, batch_size=4)
HOW: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "max": lambda rows: rows.max(axis=0),
    "mean": lambda rows: rows.mean(axis=0),
    "rms": lambda rows: np.sqrt((rows**2).mean(axis=0)),
    "mean-abs": lambda rows: np.abs(rows).mean(axis=0),
}


@pytest.fixture(scope="module")
def rows(make: Make) -> list[Example]:
    return [make(seed) for seed in range(N)]


def sites_of(vlm: VLM) -> tuple[Site, ...]:
    fused = [site for experts in vlm.anatomy.experts.values() for site in experts.sites("up", "in")]
    return (*(site for site in vlm.anatomy.sites("neurons") if site.expert is None), *fused)


def naive(vlm: VLM, rows: list[Example]) -> dict[Site, np.ndarray]:
    """Pool unrolled experts, one example and one expert at a time: ``[pool, neuron, sample]``, NaN without a token."""
    model, made = unrolled(vlm)
    found = {
        s: np.full((len(POOLS), vlm.anatomy.width(s), len(rows)), np.nan) for s in sites_of(vlm) if s.expert is not None
    }
    for sample, row in enumerate(rows):
        batch = vlm.encode([row.chat()])
        seen: dict[Site, Tensor] = {}
        for experts in made.values():
            experts.sent.clear()
        visits = {site: lambda value, site=site, seen=seen: seen.update({site: value}) for site in found}
        with torch.no_grad(), hooked(made, visits):
            model(**batch.inputs, use_cache=False)
        types = batch.inputs.get("moe_mm_token_type_ids")
        for path, experts in made.items():
            every = torch.arange(batch.inputs["input_ids"].numel())
            given = every if types is None else every[types[0].bool() == ("vision" in path)]
            for number, sent in experts.sent:
                for side in ("up", "in"):
                    site = Site(f"{path}.{number}", side)
                    for i, pool in enumerate(POOLS):
                        span = batch.span(pool.span)[0].nonzero()[:, 0]
                        span = span[-1:] if pool.how == "last" else span
                        kept = torch.isin(given[sent], span)
                        if kept.any():
                            values = seen[site][kept].double().numpy()
                            found[site][i, :, sample] = HOW.get(pool.how, HOW["max"])(values)
    return found


@pytest.fixture(params=FAMILIES)
def vlm(request: pytest.FixtureRequest, family: Callable[[str], VLM]) -> VLM:
    return family(request.param)


def test_values_aurocs_and_counts_are_those_of_unrolled_experts(vlm: VLM, rows: list[Example]) -> None:
    some, sites = rows[:20], sites_of(vlm)
    expected, labels = naive(vlm, some), np.array([row.is_toxic for row in some])
    values = capture(vlm, some, sites=sites, pools=POOLS, batch_size=4).values
    for site, wanted in expected.items():
        np.testing.assert_allclose(values[site].numpy(), wanted, rtol=1e-3, atol=1e-4)
    empty = np.concatenate([np.isnan(wanted).ravel() for wanted in expected.values()])
    assert 0.05 < empty.mean() < 0.95
    found = measure_evidence(vlm, Examples(tuple(some)), sites=sites, pools=POOLS[:3], setup=EXACT, resamples=0)
    checked = 0
    for site, wanted in expected.items():
        met = found.met(site)
        assert met is not None
        for i in range(3):
            there = ~np.isnan(wanted[i, 0])
            assert set(met[0][i].tolist()) == {float((there & labels).sum())}
            assert set(met[1][i].tolist()) == {float((there & ~labels).sum())}
            for neuron in range(0, wanted.shape[1], 7):
                both = 0 < labels[there].sum() < there.sum()
                auroc = roc_auc_score(labels[there], wanted[i, neuron][there]) if both else 0.5
                assert abs(float(found.auroc[site][i, neuron]) - auroc) < 0.03  # a pair may swap by rounding
                checked += both
    assert checked > 50
    dense = found.met(next(site for site in sites if site.expert is None)) if len(sites) > len(expected) else None
    assert dense is None or set(dense[0][0].tolist()) == {10.0}


@pytest.fixture(scope="module")
def exact(family: Callable[[str], VLM], rows: list[Example]) -> Evidence:
    vlm = family("qwen3_vl_moe")
    return measure_evidence(vlm, Examples(tuple(rows)), sites=sites_of(vlm), pools=POOLS[:3], setup=EXACT, resamples=20)


def test_histogram_keeps_its_bound_and_counts(
    family: Callable[[str], VLM], rows: list[Example], exact: Evidence, tmp_path: Path
) -> None:
    vlm = family("qwen3_vl_moe")
    setup = replace(EXACT, engine="histogram", bins=32, folder=tmp_path / "counts")
    options = {"sites": sites_of(vlm), "pools": POOLS[:3], "setup": setup, "resamples": 20}
    found = measure_evidence(vlm, Examples(tuple(rows)), **options)
    for site, values in found.auroc.items():
        bound = found.columns["auroc_bound"][site].double()
        assert bool(((values - exact.auroc[site]).abs() <= bound + 1e-6).all())
        for name in ("n_toxic", "n_non_toxic"):
            assert torch.equal(found.columns[name][site], exact.columns[name][site])
        for name in ("mean_toxic", "effect_size", "rms_change"):
            torch.testing.assert_close(found.columns[name][site], exact.columns[name][site], equal_nan=True)
    again = measure_evidence(vlm, Examples(tuple(rows)), **options)
    assert all(torch.equal(again.auroc[site], values) for site, values in found.auroc.items())


def test_shards_and_runs_of_neurons_change_nothing(
    family: Callable[[str], VLM], rows: list[Example], exact: Evidence
) -> None:
    vlm = family("qwen3_vl_moe")
    other = replace(EXACT, shard=N, memory=4 * 10 * 3 * N * 4)  # ten neurons at a time
    found = measure_evidence(
        vlm, Examples(tuple(rows)), sites=sites_of(vlm), pools=POOLS[:3], setup=other, resamples=20
    )
    for site, values in found.auroc.items():
        torch.testing.assert_close(values, exact.auroc[site], atol=0.01, rtol=0)
        assert torch.equal(found.columns["n_toxic"][site], exact.columns["n_toxic"][site])


def test_few_samples_are_said_and_not_selected(
    exact: Evidence, family: Callable[[str], VLM], rows: list[Example], caplog: pytest.LogCaptureFixture
) -> None:
    pool = POOLS[0]
    met = {site: torch.minimum(*exact.met(site))[0] for site in exact.auroc}  # type: ignore[misc]
    few = {site: counts < FEWEST for site, counts in met.items()}
    assert any(mask.any() for mask in few.values())
    assert not all(mask.all() for mask in few.values())
    n_rated = sum(int((~mask).sum()) for mask in few.values())
    for chosen in (Selection.above(exact, pool, -1.0), Selection.fdr(exact, pool, 1.0, held_out=False)):
        assert all(torch.equal(mask, ~few[site]) for site, mask in chosen.masks.items())
    top = Selection.top(exact, pool, n_rated)
    assert all(torch.equal(mask, ~few[site]) for site, mask in top.masks.items())
    with pytest.raises(SafeglassesError, match="no such number of neurons"):
        Selection.top(exact, pool, n_rated + 1)
    vlm = family("qwen3_vl_moe")
    with caplog.at_level(logging.WARNING):
        measure_evidence(vlm, Examples(tuple(rows[:24])), sites=sites_of(vlm), pools=[pool], setup=EXACT, resamples=0)
    assert any("fewer than 10 samples of a class have a value at" in record.message for record in caplog.records)


def test_saves_and_loads(exact: Evidence, tmp_path: Path) -> None:
    again = Evidence.load(exact.save(tmp_path / "evidence.safetensors"))
    for pool in POOLS[:3]:
        assert all(torch.equal(q, exact.q_values(pool)[site]) for site, q in again.q_values(pool).items())


def test_evidence_of_linear_maps_has_no_counts(tiny_vlm: VLM, rows: list[Example]) -> None:
    found = measure_evidence(
        tiny_vlm, Examples(tuple(rows)), sites=tiny_vlm.anatomy.sites("neurons"), pools=POOLS[:1], resamples=0
    )
    assert "n_toxic" not in found.columns
    assert all(mask.all() for mask in found.rated(POOLS[0]).values())
