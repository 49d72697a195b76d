"""The engine against capturing everything at once: shards, both engines, restarts, sharded models."""

from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from hypothesis import given
from hypothesis import strategies as st

from safeglasses.data.examples import Example
from safeglasses.errors import SafeglassesError
from safeglasses.find import engine as module
from safeglasses.find.capture import capture
from safeglasses.find.engine import Finished, Job, Setup, shard_size
from safeglasses.find.moments import Moments
from safeglasses.find.passes import Watch
from safeglasses.find.pools import Pool
from safeglasses.find.ranks import Ranks
from safeglasses.find.shards import Shards, cut
from safeglasses.find.statistic import HALF_A, HALF_B, LEFT_OUT, TOXIC, Samples
from safeglasses.model.vlm import VLM, load

Make = Callable[..., Example]
POOLS = (Pool("prompt", "last"), Pool("response", "max"))
N = 24
EXACT = Setup("exact", 2**30, shard=5, batch_size=3)
COUNTED = replace(EXACT, engine="histogram", bins=16)


@pytest.fixture(scope="module")
def rows(make: Make) -> list[Example]:
    return [make(seed, pictures=1 + (seed % 3 == 0)) for seed in range(N)]


def job(vlm: VLM, rows: list[Example], setup: Setup) -> Job:
    watch = Watch.on(vlm, vlm.anatomy.sites("neurons"), POOLS)
    return Job(vlm, rows, Samples.of(rows, POOLS), watch, setup)


@pytest.fixture(scope="module")
def expected(tiny_vlm: VLM, rows: list[Example]) -> dict[str, torch.Tensor]:
    found = capture(tiny_vlm, rows, sites=tiny_vlm.anatomy.sites("neurons"), pools=POOLS)
    values, samples = torch.cat(list(found.values.values()), dim=1), Samples.of(rows, POOLS)
    columns: dict[str, torch.Tensor] = {}
    for statistic in (Ranks(), Moments()):
        statistic.add(values, samples)
        columns |= statistic.finish()
    return columns | {"values": values}


@pytest.fixture(scope="module")
def exact(tiny_vlm: VLM, rows: list[Example]) -> Finished:
    return job(tiny_vlm, rows, EXACT).run()


def test_shards_change_nothing(exact: Finished, expected: dict[str, torch.Tensor]) -> None:
    assert exact.columns.keys() == expected.keys() - {"values"}
    for name, column in exact.columns.items():
        torch.testing.assert_close(column, expected[name], rtol=1e-3, atol=1e-4, equal_nan=True, msg=name)


def test_gives_back_single_neurons_in_the_order_of_the_examples(
    exact: Finished, expected: dict[str, torch.Tensor]
) -> None:
    values = exact.values([7, 2])
    assert values is not None
    torch.testing.assert_close(values, expected["values"][:, [7, 2]], rtol=1e-4, atol=1e-5)


def test_counts_tokens(exact: Finished, tiny_vlm: VLM, rows: list[Example]) -> None:
    prompts = tiny_vlm.lengths([row.chat(with_response=False) for row in rows])
    assert exact.lengths["prompt_tokens"].tolist() == prompts


def test_runs_of_neurons_change_nothing(exact: Finished, tiny_vlm: VLM, rows: list[Example]) -> None:
    small = job(tiny_vlm, rows, replace(EXACT, memory=4 * 10 * 2 * N * 4))  # ten neurons at a time
    assert len(list(small._runs())) > 3
    for name, column in small.run().columns.items():
        assert torch.equal(column.nan_to_num(9), exact.columns[name].nan_to_num(9)), name


def test_histogram_keeps_its_bound(tiny_vlm: VLM, rows: list[Example], exact: Finished) -> None:
    found = job(tiny_vlm, rows, COUNTED).run()
    off = (found.columns["auroc"] - exact.columns["auroc"]).abs()
    assert bool((off <= found.columns["auroc_bound"] + 1e-12).all())
    assert found.columns["auroc_bound"].max() < 0.25
    assert found.values([1]) is None
    assert {name: v.tolist() for name, v in found.lengths.items()} == {k: v.tolist() for k, v in exact.lengths.items()}
    for name in ("mean_toxic", "effect_size", "rms_change"):
        torch.testing.assert_close(found.columns[name], exact.columns[name], equal_nan=True)


@pytest.mark.parametrize("setup", [EXACT, COUNTED])
def test_goes_on_behind_the_last_finished_shard(
    setup: Setup, tiny_vlm: VLM, rows: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured: list[list[int]] = []
    whole = Job._capture

    def counted(self: Job, shard: list[int], before: int) -> tuple[torch.Tensor, torch.Tensor]:
        if len(captured) == 3:
            raise KeyboardInterrupt
        captured.append(shard)
        return whole(self, shard, before)

    monkeypatch.setattr(Job, "_capture", counted)
    with pytest.raises(KeyboardInterrupt):
        job(tiny_vlm, rows, replace(setup, folder=tmp_path / "kept")).run()
    before = list(captured)
    captured.clear()
    again = job(tiny_vlm, rows, replace(setup, folder=tmp_path / "kept"))
    found = again.run()
    assert len(before) == 3
    assert sorted(chain(*before, *captured)) == list(range(N))  # nothing twice, nothing left out
    monkeypatch.setattr(Job, "_capture", whole)
    undisturbed = job(tiny_vlm, rows, setup).run()
    for name, column in found.columns.items():
        assert torch.equal(column.nan_to_num(9), undisturbed.columns[name].nan_to_num(9)), name


def test_a_broken_shard_is_named(tiny_vlm: VLM, rows: list[Example], tmp_path: Path) -> None:
    Shards(tmp_path).put(0, torch.zeros(2, 3, 4), torch.zeros(3, 4, dtype=torch.int64))
    path = tmp_path / "000000.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(SafeglassesError) as caught:
        Shards(tmp_path).rows(0, 0, 1)
    assert caught.value.what == "a shard cannot be read"
    assert caught.value.given.startswith(str(path))
    assert caught.value.do == "delete it and run the same again"


def test_nan_names_the_neuron(tiny_vlm: VLM, rows: list[Example], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = module.passes
    width = tiny_vlm.anatomy.width(tiny_vlm.anatomy.sites("neurons")[0])

    def spoiled(*args: object) -> object:
        for done in whole(*args):
            done.values[:, width + 2] = torch.nan
            yield done

    monkeypatch.setattr(module, "passes", spoiled)
    for setup in (EXACT, replace(EXACT, memory=4 * 10 * 2 * N * 4), COUNTED):
        with pytest.raises(SafeglassesError) as caught:
            job(tiny_vlm, rows, setup).run()
        assert caught.value.given == "layers.1.mlp.down_proj:in#2"


def test_memory_decides_the_size_of_shards(tiny_vlm: VLM) -> None:
    watch = Watch.on(tiny_vlm, tiny_vlm.anatomy.sites("neurons"), POOLS)
    assert shard_size(watch, 100, 2**40) == 1024
    assert shard_size(watch, 100, 4 * 100 * 2 * 4 * 50) == 50
    assert shard_size(watch, 100, 1) == 16


@given(st.lists(st.integers(0, 30), min_size=1, max_size=200), st.integers(1, 40), st.integers(0, 5))
def test_shards_hold_every_sample_once_and_keep_pairs_together(clusters: list[int], size: int, seed: int) -> None:
    shards = cut(torch.tensor(clusters), size, seed)
    assert sorted(chain(*shards)) == list(range(len(clusters)))
    assert shards == cut(torch.tensor(clusters), size, seed)
    assert all(shards)
    for cluster in set(clusters):
        if clusters.count(cluster) <= size:
            assert sum(any(clusters[row] == cluster for row in shard) for shard in shards) == 1
        assert all(len(shard) < 2 * size for shard in shards)


def test_groups(make: Make) -> None:
    rows = [make(seed) for seed in range(8)]
    twin = replace(rows[1], id="twin", label="non-toxic", response="kindly")
    samples = Samples.of([*rows, twin], POOLS)
    prompt, response = samples.groups.tolist()
    assert [g == TOXIC for g in response] == [row.is_toxic for row in [*rows, twin]]
    assert set(response) == {TOXIC, HALF_A, HALF_B}
    assert prompt == [*response[:-1], LEFT_OUT]  # the prompt is toxic once one of its responses is
    assert samples.clusters[8] == samples.clusters[1]
    assert samples.counts() == ((4, 4), (4, 5))
    assert Samples.of([*rows, twin], POOLS, seed=1).groups.tolist() != samples.groups.tolist()


def test_a_model_placed_by_a_device_map_gives_the_same_activations(
    tiny: Path, exact: Finished, rows: list[Example]
) -> None:
    placed = load(tiny)
    layers = {f"model.language_model.layers.{i}": "cpu" for i in range(placed.anatomy.n_layers)}
    rest = dict.fromkeys(("model.vision_tower", "model.multi_modal_projector", "lm_head"), "cpu")
    rest |= {f"model.language_model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb")}
    dispatch_model(placed.model, {**rest, **layers}, force_hooks=True)  # as device_map="auto" does on several devices
    assert "_hf_hook" in vars(placed.model.get_submodule("model.language_model.layers.1"))
    for name, column in job(placed, rows, EXACT).run().columns.items():
        assert torch.equal(column.nan_to_num(9), exact.columns[name].nan_to_num(9)), name
