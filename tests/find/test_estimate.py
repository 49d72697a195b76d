"""Costs against independent sums; the engine rule against what it promises."""

import json
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

import families
from safeglasses.data.examples import Example, Text, Turn
from safeglasses.errors import SafeglassesError
from safeglasses.find import estimate as module
from safeglasses.find.estimate import (
    Choice,
    choose,
    estimate,
    exact_bytes,
    histogram_bytes,
    measure,
)
from safeglasses.find.passes import Watch, plan
from safeglasses.find.pools import Pool
from safeglasses.find.sizes import parse_bytes
from safeglasses.model.vlm import VLM, load

Make = Callable[..., Example]
LAST = (Pool("prompt", "last"), Pool("response", "max"))
LLAVA = 32 * (2 * 11008 + 4096)
"""MLP outputs of LLaVA-1.5-7B."""


def test_bytes_are_those_of_arrays() -> None:
    values = np.empty((2, 7, 11), np.float16)
    counts = np.empty((2, 7, 3, 256), np.int32)
    assert exact_bytes(7, 2, 11, 2) == values.nbytes
    for kind in (np.float16, np.float32):
        edges = np.empty((2, 7, 255), kind)
        assert histogram_bytes(7, 2, edges.itemsize) == counts.nbytes + edges.nbytes


@pytest.mark.parametrize(
    ("samples", "memory", "disk", "choice"),
    [
        (1000, "2GB", "0", ("exact", "memory", "all values, 1.67 GB, fit into 2.00 GB of memory")),
        (
            10**6,
            "8GB",
            "2.2TB",
            ("exact", "disk", "all values, 1.67 TB, exceed 8.00 GB of memory but not 1.76 TB of disk"),
        ),
        (
            10**6,
            "8GB",
            "2TB",
            (
                "histogram",
                "memory",
                "all values, 1.67 TB, exceed 8.00 GB of memory and 1.60 TB of disk; "
                "the counts, 2.99 GB, fit into memory",
            ),
        ),
    ],
)
def test_choices_for_llava(samples: int, memory: str, disk: str, choice: tuple[str, str, str]) -> None:
    free = parse_bytes(disk) if disk != "0" else 0
    assert choose(LLAVA, 1, samples, 2, parse_bytes(memory), free) == Choice(*choice)  # pyright: ignore[reportArgumentType]


def test_no_engine_fits() -> None:
    with pytest.raises(SafeglassesError) as caught:
        choose(LLAVA, 2, 10**6, 2, 4 * 10**9, 10**11)
    assert str(caught.value) == (
        "neither engine has the room that it needs\n"
        "  given:    835,584 neurons × 2 ways of pooling × 1,000,000 examples: "
        "3.34 TB exact, 5.99 GB as histograms of 256 bins\n"
        "  expected: at most 4.00 GB of memory, or for exact values 80.0 GB of disk (80% of what is free)\n"
        "  do:       give --memory 6.05GB or more; what fits now is one of: 558,347 of the neurons (fewer --sites); "
        "1 of the ways of pooling; 171 bins; 23,935 of the examples exactly"
    )


Sizes = st.tuples(st.integers(1, 10**7), st.integers(1, 6), st.integers(1, 10**9), st.sampled_from([2, 4]))


@given(Sizes, st.integers(0, 10**16), st.integers(0, 10**17))
@example((10, 1, 5, 2), 100, 0)  # exactly as large as the memory
def test_what_is_chosen_fits_and_is_the_first_that_does(job: tuple[int, int, int, int], memory: int, disk: int) -> None:
    exact, histogram = exact_bytes(*job), histogram_bytes(job[0], job[1], job[3])
    usable = int(0.8 * disk)
    try:
        found = choose(*job, memory, disk)
    except SafeglassesError:
        assert exact > max(memory, usable)
        assert histogram > memory
        return
    if found.engine == "histogram":
        assert exact > max(memory, usable)
        assert histogram <= memory
    else:
        assert exact <= (memory if found.where == "memory" else usable)
        assert found.where == "memory" or exact > memory


@given(Sizes, st.integers(0, 10**13))
def test_advice_fits_where_the_job_did_not(job: tuple[int, int, int, int], memory: int) -> None:
    neurons, pools, samples, itemsize = job
    try:
        choose(*job, memory, 0)
    except SafeglassesError as error:
        advice = error.do
    else:
        assume(False)
        return
    more, _, rest = advice.partition("; what fits now is one of: ")
    assert choose(*job, parse_bytes(more.removeprefix("give --memory ").removesuffix(" or more")), 0)
    for text in filter(None, rest.split("; ")):
        number, _, what = text.partition(" ")
        most = int(number.replace(",", ""))
        if what == "of the neurons (fewer --sites)":
            assert most < neurons
            assert choose(most, pools, samples, itemsize, memory, 0)
        elif what == "of the ways of pooling":
            assert most < pools
            assert choose(neurons, most, samples, itemsize, memory, 0)
        elif what == "bins":
            assert histogram_bytes(neurons, pools, itemsize, most) <= memory
            assert memory < histogram_bytes(neurons, pools, itemsize, most + 1)
        else:
            assert what == "of the examples exactly"
            assert choose(neurons, pools, most, itemsize, memory, 0).engine == "exact"


@pytest.fixture(scope="module")
def rows(make: Make) -> list[Example]:
    return [make(seed, pictures=1 + (seed % 3 == 0)) for seed in range(13)]


def test_counts_what_the_passes_really_hold(tiny_vlm: VLM, rows: list[Example]) -> None:
    sites = tiny_vlm.anatomy.sites("linears")
    found = estimate(tiny_vlm, rows[:9], rows[9:], sites=sites, pools=LAST, memory=10**9, disk=10**12)
    tokens = [int(tiny_vlm.encode([row.chat()]).attention_mask.sum()) for row in rows]
    batches = [
        tiny_vlm.encode([part[i].chat() for i in batch])
        for part in (rows[:9], rows[9:])
        for batch in plan(tiny_vlm, part)
    ]
    neurons = sum(tiny_vlm.anatomy.linears.values())
    assert (found.find, found.held_out, found.neurons, found.pools) == (9, 4, neurons, LAST)
    assert (found.tokens, found.tokens_max) == (sum(tokens), max(tokens))
    assert found.tokens_median == np.median(tokens)
    assert found.padded_tokens == sum(batch.attention_mask.numel() for batch in batches)
    assert found.exact_bytes == neurons * 2 * 9 * 4
    assert found.shards_bytes == neurons * 2 * 13 * 4
    assert found.choice.where == "memory"
    assert found.cost.forward_flops > 2 * found.tokens * sum(
        width * tiny_vlm.anatomy.in_features[path] for path, width in tiny_vlm.anatomy.linears.items()
    )
    assert min(found.cost.forward_seconds, found.cost.auroc_seconds, found.cost.timed_seconds) > 0


def test_a_mean_takes_four_bytes(tiny: Path, rows: list[Example]) -> None:
    vlm = load(tiny, dtype="bfloat16")
    for pools, size in ((LAST, 2), ((*LAST, Pool("all", "mean")), 4)):
        found = estimate(vlm, rows[:3], sites=vlm.anatomy.sites("mlp"), pools=pools, memory=10**9, disk=0)
        assert found.itemsize_bytes == size
        assert found.exact_bytes == found.shards_bytes == found.neurons * len(pools) * 3 * size


def test_record_is_flat_json_with_units(tiny_vlm: VLM, rows: list[Example]) -> None:
    found = estimate(tiny_vlm, rows[:3], sites=tiny_vlm.anatomy.sites("mlp"), pools=LAST, memory=10**9, disk=7)
    record = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert record.keys() == {
        *("neurons", "pools", "find", "held_out", "tokens_median", "tokens_max", "tokens", "padded_tokens"),
        *("itemsize_bytes", "memory_bytes", "disk_bytes", "exact_bytes", "shards_bytes", "histogram_bytes"),
        *("evidence_bytes", "engine", "where", "why", "forward_flops", "forward_seconds", "auroc_seconds"),
        *("timed_tokens", "timed_seconds"),
    }
    assert record["pools"] == ["prompt:last", "response:max"]
    assert record["disk_bytes"] == 7
    assert record["engine"] == "exact"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    """A text-only decoder: nothing but linear maps and attention."""
    return load(families.build("llama", tmp_path_factory.mktemp("tiny") / "llama"))


def plain(index: int, words: int) -> Example:
    return Example(str(index), (Turn("user", (Text("red " * words),)),), "dog", "toxic" if index % 2 else "non-toxic")


def test_flops_are_those_of_the_matrices(llama: VLM) -> None:
    rows = [plain(index, 5) for index in range(8)]
    found = estimate(llama, rows, sites=llama.anatomy.sites("linears"), pools=LAST, memory=10**9, disk=0)
    anatomy, text = llama.anatomy, llama.model.config
    tokens = found.tokens // 8
    maps = sum(width * anatomy.in_features[path] for path, width in anatomy.linears.items())
    heads = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    attention = 2 * 2 * tokens**2 * heads * anatomy.n_layers  # QKᵀ and its product with V, causality not counted
    logits = 2 * text.hidden_size * text.vocab_size  # of one token
    assert found.tokens == found.padded_tokens == 8 * tokens
    assert found.cost.forward_flops == 8 * (2 * tokens * maps + attention + logits)


def ticks() -> Iterator[float]:
    return map(float, count())


def test_seconds_are_scaled_by_tokens(llama: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [plain(index, 1 + index % 4) for index in range(40)]
    watch = Watch.on(llama, llama.anatomy.sites("mlp"), LAST)
    lengths = llama.lengths([row.chat() for row in rows])
    batches = plan(llama, rows, 20)
    monkeypatch.setattr(module, "CALIBRATION", 9.0)  # at a second per row: three rows for each of three batches
    found = measure(llama, rows, watch, batches, lengths, ticks().__next__)
    short, long = lengths[batches[0][2]], lengths[batches[1][2]]
    assert found.timed_seconds == 1.0
    assert found.timed_tokens == 3 * short + 2 * 3 * long
    padded = 20 * max(lengths[i] for i in batches[0]) + 20 * max(lengths)
    assert found.forward_seconds == pytest.approx(padded / found.timed_tokens)
    neurons = sum(llama.anatomy.width(site) for site in watch.sites)
    per_value = 1.0 / (2**21 // 40 * 40)
    assert found.auroc_seconds == pytest.approx(per_value * neurons * 2 * 40)


def test_nothing_runs_when_nothing_fits(tiny_vlm: VLM, rows: list[Example], monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> torch.Tensor:
        raise AssertionError("the model ran")

    monkeypatch.setattr(VLM, "forward", forbidden)
    with pytest.raises(SafeglassesError, match="neither engine has the room that it needs"):
        estimate(tiny_vlm, rows, sites=tiny_vlm.anatomy.sites("mlp"), pools=LAST, memory=1000, disk=0)
    with pytest.raises(SafeglassesError, match="nothing to capture"):
        estimate(tiny_vlm, [], sites=tiny_vlm.anatomy.sites("mlp"), pools=LAST, memory=10**9, disk=0)
