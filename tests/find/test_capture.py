"""Capture against one example at a time through plain hooks, and what goes wrong on the way."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from torch import Tensor

from safeglasses.data.examples import Example, Text, Turn
from safeglasses.defend.recipes import RECIPES
from safeglasses.errors import BadRow, SafeglassesError
from safeglasses.find import capture as module
from safeglasses.find.capture import Activations, capture
from safeglasses.find.pools import How, Pool
from safeglasses.model.chat import Batch, Span
from safeglasses.model.hooks import tap
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM, load

Make = Callable[..., Example]
SITES = (
    Site("layers.1.mlp.down_proj", "in"),
    Site("layers.0.self_attn.q_proj", "out"),
    Site("layers.1.mlp.up_proj", "out"),
)
POOLS = tuple(Pool(s, how) for s in get_args(Span) if s != "thought" for how in get_args(How))  # none thinks
LAST = (Pool("prompt", "last"), Pool("response", "max"))


def one_by_one(vlm: VLM, examples: list[Example]) -> dict[Site, Tensor]:
    """Pool over each example alone, from the model's own modules."""
    token = vlm.model.config.image_token_id
    columns: dict[Site, list[Tensor]] = {site: [] for site in SITES}
    for example in examples:
        alone = vlm.encode([example.chat()])
        seen: dict[Site, Tensor] = {}
        hooks = []
        keep = seen.__setitem__
        for site in SITES:
            target = vlm.model.get_submodule(vlm.anatomy.absolute(site))
            if site.side == "in":
                hooks.append(target.register_forward_pre_hook(lambda _, x, s=site, k=keep: k(s, x[0][0])))
            else:
                hooks.append(target.register_forward_hook(lambda _, __, y, s=site, k=keep: k(s, y[0])))
        with torch.no_grad():
            vlm.model(**alone.inputs)
        for hook in hooks:
            hook.remove()
        n = int(alone.prompt_length[0])
        for site, value in seen.items():
            ids = alone.inputs["input_ids"][0]
            spans = {"image": value[ids == token], "prompt": value[:n], "response": value[n:], "all": value}
            spans["text"] = value[:n][ids[:n] != token]
            ways = {"max": lambda v: v.amax(0), "mean": lambda v: v.mean(0), "last": lambda v: v[-1]}
            ways |= {"mean-abs": lambda v: v.abs().mean(0), "rms": lambda v: v.square().mean(0).sqrt()}
            columns[site].append(torch.stack([ways[pool.how](spans[pool.span]) for pool in POOLS]))
    return {site: torch.stack(values, dim=2) for site, values in columns.items()}


@pytest.fixture(scope="module")
def examples(make: Make) -> list[Example]:
    return [make(seed, pictures=1 + (seed % 3 == 0)) for seed in range(13)]


@pytest.fixture(scope="module")
def alone(tiny_vlm: VLM, examples: list[Example]) -> dict[Site, Tensor]:
    return one_by_one(tiny_vlm, examples)


def assert_same(found: Activations, expected: dict[Site, Tensor]) -> None:
    assert list(found.values) == list(expected)
    for site, values in expected.items():
        torch.testing.assert_close(found.values[site], values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 4, "auto"])
def test_equals_one_example_at_a_time(
    size: int | str, tiny_vlm: VLM, examples: list[Example], alone: dict[Site, Tensor]
) -> None:
    found = capture(tiny_vlm, examples, sites=SITES, pools=POOLS, batch_size=size)
    assert_same(found, alone)
    assert found.pools == POOLS
    assert found.ids == tuple(example.id for example in examples)
    assert found.labels.tolist() == [example.label == "toxic" for example in examples]


def test_counts_tokens(tiny_vlm: VLM, examples: list[Example]) -> None:
    found = capture(tiny_vlm, examples, sites=SITES[:1], pools=LAST)
    chats = [example.chat() for example in examples]
    prompts = tiny_vlm.lengths([example.chat(with_response=False) for example in examples])
    assert found.lengths["prompt_tokens"].tolist() == prompts
    total = found.lengths["prompt_tokens"] + found.lengths["response_tokens"]
    assert total.tolist() == tiny_vlm.lengths(chats)
    per_picture = found.lengths["image_tokens"] / torch.tensor([example.n_images for example in examples])
    assert len(set(per_picture.tolist())) == 1


def test_order_of_examples_is_the_callers(tiny_vlm: VLM, examples: list[Example]) -> None:
    one = capture(tiny_vlm, examples, sites=SITES[:1], pools=LAST, batch_size=3)
    other = capture(tiny_vlm, examples[::-1], sites=SITES[:1], pools=LAST, batch_size=3)
    assert other.ids == one.ids[::-1]
    torch.testing.assert_close(other.values[SITES[0]], one.values[SITES[0]].flip(2), rtol=1e-4, atol=1e-5)


def test_keeps_the_models_dtype_unless_a_mean_needs_more(tiny: Path, examples: list[Example]) -> None:
    vlm = load(tiny, dtype="bfloat16")
    for pools, dtype in ((LAST, torch.bfloat16), ((*LAST, Pool("all", "mean")), torch.float32)):
        values = capture(vlm, examples[:3], sites=SITES[:1], pools=pools).values[SITES[0]]
        assert values.dtype == dtype
        assert bool(values.isfinite().all())


def test_progress_counts_examples(tiny_vlm: VLM, examples: list[Example]) -> None:
    calls: list[tuple[int, int]] = []
    capture(tiny_vlm, examples, sites=SITES[:1], pools=LAST, batch_size=5, progress=lambda *c: calls.append(c))
    done = [d for d, _ in calls]
    assert done == sorted(set(done))
    assert done[-1] == 13
    assert {total for _, total in calls} == {13}


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Watch forward passes; those of more than `most` rows run out of memory."""
    log = SimpleNamespace(most=99, sizes=[], repeats=1)
    forward = VLM.forward

    def limited(self: VLM, batch: Batch, *, logits_from: int | None = None) -> Tensor | None:
        log.sizes.append(len(batch.prompt_length))
        if log.sizes[-1] > log.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        logits = [forward(self, batch, logits_from=logits_from) for _ in range(log.repeats)]
        return logits[0] if logits else None

    monkeypatch.setattr(VLM, "forward", limited)
    return log


def test_out_of_memory_halves_and_loses_no_row(
    forwards: SimpleNamespace,
    tiny_vlm: VLM,
    examples: list[Example],
    alone: dict[Site, Tensor],
    caplog: pytest.LogCaptureFixture,
) -> None:
    forwards.most = 2
    found = capture(tiny_vlm, examples, sites=SITES, pools=POOLS, batch_size=8)
    assert_same(found, alone)
    assert [size for size in forwards.sizes if size > 2] == [8, 4]  # remembered for the batches that follow
    assert sum(size for size in forwards.sizes if size <= 2) == 13
    assert caplog.messages == [
        "out of memory with 8 examples per pass: going on with 4",
        "out of memory with 4 examples per pass: going on with 2",
    ]


def test_out_of_memory_on_one_example_is_an_error(
    forwards: SimpleNamespace, tiny_vlm: VLM, examples: list[Example]
) -> None:
    forwards.most = 0
    with pytest.raises(SafeglassesError) as caught:
        capture(tiny_vlm, examples[1:3], sites=SITES, pools=POOLS)
    assert str(caught.value) == (
        "out of memory on a single example\n"
        f"  given:    example {examples[1].id!r}\n"
        "  do:       use a larger device, spread the model with device_map, or leave the example out"
    )


def test_one_pass_for_all_pools_and_sites(forwards: SimpleNamespace, tiny_vlm: VLM, examples: list[Example]) -> None:
    capture(tiny_vlm, examples, sites=tiny_vlm.anatomy.sites("linears"), pools=POOLS, batch_size=4)
    assert sum(forwards.sizes) == len(examples)


def test_a_site_that_is_not_reached_is_an_error(
    forwards: SimpleNamespace, tiny_vlm: VLM, examples: list[Example]
) -> None:
    forwards.repeats = 0
    with pytest.raises(SafeglassesError) as caught:
        capture(tiny_vlm, examples[:1], sites=tiny_vlm.anatomy.sites("mlp"), pools=LAST)
    assert str(caught.value) == (
        "the forward pass does not reach some sites\n"
        "  given:    layers.0.mlp.gate_proj:out, layers.0.mlp.up_proj:out, layers.0.mlp.down_proj:out"
        " and 3 more\n"
        "  do:       leave these sites out"
    )


def test_where_the_whole_model_runs_twice_nothing_changes(
    forwards: SimpleNamespace, tiny_vlm: VLM, examples: list[Example], alone: dict[Site, Tensor]
) -> None:
    forwards.repeats = 2
    assert_same(capture(tiny_vlm, examples, sites=SITES, pools=POOLS, batch_size=4), alone)


def test_a_map_that_is_computed_twice_is_pooled_over_both(family: Callable[[str], VLM]) -> None:
    """Gemma 3n's router is asked before and behind a layer; the sites are those of the default recipe."""
    vlm = family("gemma3n_text")
    rows = [
        Example(f"{n}", (Turn("user", (Text("a dog " * n),)),), response="a cat " * n, label="toxic")
        for n in range(1, 5)
    ]
    pools = (Pool("prompt", "last"), *(Pool("response", how) for how in get_args(How)))
    found = capture(vlm, rows, sites=vlm.anatomy.sites(RECIPES["sgm"].sites), pools=pools, batch_size=2)
    router = Site("layers.1.altup.modality_router", "out")
    assert router in found.values
    assert all(bool(values.isfinite().all()) for values in found.values.values())
    for column, row in enumerate(rows):
        calls: list[Tensor] = []
        batch = vlm.encode([row.chat()])
        with (
            torch.no_grad(),
            tap(vlm.model, vlm.anatomy, [router], lambda _, value, calls=calls: calls.append(value[0])),
        ):
            vlm.model(**batch.inputs, use_cache=False)
        first, second = calls
        assert not torch.equal(first, second)
        n = int(batch.prompt_length[0])
        both = torch.cat([first[n:], second[n:]])
        ways = {"max": both.amax(0), "mean": both.mean(0), "last": second[-1], "mean-abs": both.abs().mean(0)}
        ways["rms"] = both.square().mean(0).sqrt()
        expected = torch.stack([second[n - 1], *(ways[pool.how] for pool in pools[1:])])
        torch.testing.assert_close(found.values[router][:, :, column], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("pool", "field"), [("response:max", "response"), ("image:mean", "pictures")])
def test_a_row_without_the_span_is_named(pool: str, field: str, tiny_vlm: VLM, make: Make) -> None:
    rows = [make(1), make(2, **{field: None if field == "response" else 0}), make(3)]
    span = pool.split(":")[0]
    with pytest.raises(BadRow) as caught:
        capture(tiny_vlm, rows, sites=SITES, pools=[Pool.parse(pool)])
    assert str(caught.value).startswith(
        f"nothing to pool {pool} over\n  given:    example 'row-2' has no token in its {span}\n"
    )


def test_memory_is_asked_for_before_the_work(
    forwards: SimpleNamespace, tiny_vlm: VLM, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**10))
    width = tiny_vlm.anatomy.width(SITES[0])
    with pytest.raises(SafeglassesError) as caught:
        capture(tiny_vlm, examples, sites=SITES[:1], pools=LAST)
    assert str(caught.value) == (
        "the pooled activations do not fit into memory\n"
        f"  given:    {width} neurons × 2 ways of pooling × 13 examples in torch.float32: 0.0 GiB\n"
        "  expected: at most 0.0 GiB\n"
        "  do:       use fewer examples (--limit), fewer sites (a recipe on the MLPs) "
        "or fewer ways of pooling"
    )
    assert forwards.sizes == []


def test_nothing_to_capture_is_an_error(tiny_vlm: VLM, examples: list[Example]) -> None:
    for rows, sites, pools in (([], SITES, LAST), (examples, (), LAST), (examples, SITES, ())):
        with pytest.raises(SafeglassesError) as caught:
            capture(tiny_vlm, rows, sites=sites, pools=pools)
        assert str(caught.value) == (
            "nothing to capture\n"
            f"  given:    {len(rows)} examples, {len(sites)} sites, {len(pools)} ways of pooling\n"
            "  expected: at least one of each"
        )


@pytest.mark.parametrize("size", [0, -1, "many"])
def test_batch_sizes_are_checked(size: int | str, tiny_vlm: VLM, examples: list[Example]) -> None:
    with pytest.raises(SafeglassesError) as caught:
        capture(tiny_vlm, examples, sites=SITES, pools=LAST, batch_size=size)
    assert str(caught.value) == f"not a batch size\n  given:    {size!r}\n  expected: a positive number, or auto"


@pytest.mark.parametrize("name", ["florence2", "t5gemma2"])
def test_the_decoder_of_an_encoder_decoder(family: Callable[[str], VLM], make: Make, name: str) -> None:
    vlm, examples = family(name), [make(seed) for seed in range(6)]
    sites, pools = vlm.anatomy.sites("linears"), (*LAST, Pool("all", "mean"))
    together = capture(vlm, examples, sites=sites, pools=pools, batch_size=4)
    assert together.lengths["prompt_tokens"].tolist() == [
        int(vlm.encode([e.chat(with_response=False)]).inputs["attention_mask"].sum()) for e in examples
    ]
    assert set(together.lengths["image_tokens"].tolist()) <= {9, 10}
    seen: dict[str, Tensor] = {}
    for site in sites:
        target = vlm.model.get_submodule(vlm.anatomy.absolute(site))
        target.register_forward_hook(lambda _m, _i, out, at=str(site): seen.update({at: out[0]}))
    try:
        for column, example in enumerate(examples):
            batch = vlm.encode([example.chat()])
            with torch.no_grad():
                vlm.model(**batch.inputs, use_cache=False)
            for site in sites:  # the start token, then the response
                value, found = seen[str(site)], together.values[site][:, :, column]
                for expected, row in zip((value[0], value[1:].amax(dim=0), value.mean(dim=0)), found, strict=True):
                    torch.testing.assert_close(row, expected, atol=1e-5, rtol=0)
    finally:
        for site in sites:
            vlm.model.get_submodule(vlm.anatomy.absolute(site))._forward_hooks.clear()
    with pytest.raises(SafeglassesError, match="no token to pool over at this site"):
        capture(vlm, examples, sites=sites, pools=[Pool("image", "max")])
