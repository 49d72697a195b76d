"""Evidence end to end against scikit-learn, and its file."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import false_discovery_control
from sklearn.metrics import roc_auc_score

from safeglasses.data.examples import Example, Examples
from safeglasses.errors import SafeglassesError
from safeglasses.find.engine import Setup
from safeglasses.find.evidence import Evidence
from safeglasses.find.finding import measure_evidence
from safeglasses.find.pools import Pool
from safeglasses.find.statistics import p_values, standard_error
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM, load

Make = Callable[..., Example]
POOLS = (Pool("prompt", "last"), Pool("response", "max"), Pool("all", "mean"))
UP, DOWN = Site("layers.0.mlp.up_proj", "out"), Site("layers.1.mlp.down_proj", "in")


@pytest.fixture(scope="module")
def find(make: Make) -> Examples:
    return Examples(tuple(make(seed) for seed in range(24)))


@pytest.fixture(scope="module")
def held_out(make: Make) -> Examples:
    return Examples(tuple(make(seed) for seed in range(50, 59)))


@pytest.fixture(scope="module")
def measured(tiny_vlm: VLM, find: Examples, held_out: Examples) -> Evidence:
    return measure_evidence(
        tiny_vlm, find, held_out, sites=(UP, DOWN), pools=POOLS, setup=Setup("exact", 2**30, batch_size=5)
    )


def fixed() -> Evidence:
    """Made of constants, so that its file is the same everywhere."""
    rows = torch.arange(12, dtype=torch.float64).reshape(2, 6) / 16
    return Evidence(
        auroc={UP: rows, DOWN: rows[:, :3]},
        held_out={UP: 1 - rows, DOWN: 1 - rows[:, :3]},
        pools=POOLS[:2],
        samples=((30, 40), (25, 35)),
        held_out_samples=((7, 8), (5, 6)),
        base_fingerprint="sg1-0123",
        source_sha256="ab" * 32,
        confounds={"response_tokens": 0.5625},
        columns={
            name: {UP: (rows - shift).float(), DOWN: (rows[:, :3] - shift).float()}
            for name, shift in (("mean_toxic", 0.5), ("mean_abs_toxic", 0.0))
        },
        weight_norms={DOWN: torch.tensor([1.0, 2.0, 4.0])},
        engine="histogram",
        certainty={"pools": [{"selected": 3}]},
    )


@pytest.mark.parametrize("part", ["auroc", "held_out"])
def test_equals_scikit_learn_on_one_example_at_a_time(
    part: str, measured: Evidence, tiny_vlm: VLM, find: Examples, held_out: Examples
) -> None:
    rows = find if part == "auroc" else held_out
    labels = [row.label == "toxic" for row in rows]
    hidden: dict[Site, list[torch.Tensor]] = {UP: [], DOWN: []}
    up = tiny_vlm.model.get_submodule(tiny_vlm.anatomy.absolute(UP))
    down = tiny_vlm.model.get_submodule(tiny_vlm.anatomy.absolute(DOWN))
    hooks = [
        up.register_forward_hook(lambda _, __, y: hidden[UP].append(y[0])),
        down.register_forward_pre_hook(lambda _, x: hidden[DOWN].append(x[0][0])),
    ]
    starts = []
    for row in rows:
        alone = tiny_vlm.encode([row.chat()])
        starts.append(int(alone.prompt_length[0]))
        with torch.no_grad():
            tiny_vlm.model(**alone.inputs)
    for hook in hooks:
        hook.remove()
    for site, values in hidden.items():
        pooled = torch.stack(
            [torch.stack([v[n - 1], v[n:].amax(0), v.mean(0)]) for v, n in zip(values, starts, strict=True)]
        )
        expected = [[roc_auc_score(labels, pooled[:, p, i]) for i in range(pooled.shape[2])] for p in range(3)]
        found = getattr(measured, part)[site]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


def test_says_what_it_was_made_from(measured: Evidence, tiny_vlm: VLM, find: Examples) -> None:
    assert measured.samples == ((12, 12),) * 3
    assert measured.held_out_samples == ((4, 5),) * 3
    assert measured.base_fingerprint == tiny_vlm.fingerprint()
    assert measured.source_sha256 == find.sha256
    assert measured.pools == POOLS


def test_confounds_are_rated_like_neurons(measured: Evidence, tiny_vlm: VLM, find: Examples) -> None:
    whole = tiny_vlm.lengths([row.chat() for row in find])
    prompt = tiny_vlm.lengths([row.chat(with_response=False) for row in find])
    labels = [row.label == "toxic" for row in find]
    assert measured.confounds == pytest.approx(
        {
            "response_tokens": roc_auc_score(labels, [w - p for w, p in zip(whole, prompt, strict=True)]),
            "prompt_tokens": roc_auc_score(labels, prompt),
            "image_tokens": 0.5,
            "response_characters": roc_auc_score(labels, [len(row.response or "") for row in find]),
        }
    )


def test_progress_goes_through_both_parts(tiny_vlm: VLM, find: Examples, held_out: Examples) -> None:
    calls: list[tuple[int, int]] = []
    measure_evidence(tiny_vlm, find, held_out, sites=(UP,), pools=POOLS[:1], progress=lambda *call: calls.append(call))
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert calls[-1] == (33, 33)


def test_without_held_out_examples_there_are_no_held_out_values(tiny_vlm: VLM, find: Examples) -> None:
    evidence = measure_evidence(tiny_vlm, find, sites=(UP,), pools=POOLS[:1])
    assert evidence.held_out is None
    assert evidence.held_out_samples is None


def paired(prompts: list[Example], responses: dict[str, str]) -> Examples:
    """One row per prompt and label, with the same response texts everywhere."""
    return Examples(
        tuple(
            replace(prompt, id=f"{prompt.id} {label}", response=f"{text} {prompt.id}", label=label)
            for prompt in prompts
            for label, text in responses.items()
        )
    )


def test_before_the_response_each_prompt_is_one_sample(tiny_vlm: VLM, find: Examples) -> None:
    both = paired(list(find[:6]), {"toxic": "stupid idiot", "non-toxic": "kindly"})
    rest = paired(list(find[6:10]), {"non-toxic": "a red dog"})
    rows = Examples(tuple(both.non_toxic) + tuple(both.toxic) + tuple(rest))
    evidence = measure_evidence(tiny_vlm, rows, sites=(UP,), pools=POOLS)
    assert evidence.samples == ((6, 4), (6, 10), (6, 10))
    once = Examples(tuple(both.toxic) + tuple(rest))
    expected = measure_evidence(tiny_vlm, once, sites=(UP,), pools=POOLS[:1])
    torch.testing.assert_close(evidence.auroc[UP][0], expected.auroc[UP][0], rtol=0, atol=1e-6)


def test_shared_prompts_say_nothing_and_that_is_said(
    tiny_vlm: VLM, find: Examples, caplog: pytest.LogCaptureFixture
) -> None:
    rows = paired(list(find[:4]), {"toxic": "stupid idiot", "non-toxic": "kindly"})
    evidence = measure_evidence(tiny_vlm, rows, rows, sites=(UP,), pools=POOLS[:2])
    assert evidence.samples == evidence.held_out_samples == ((4, 0), (4, 4))
    assert set(evidence.auroc[UP][0].tolist()) == {0.5}
    assert set(evidence.standard_error(UP)[0].tolist()) == {0.5}
    assert set(evidence.q_values(POOLS[0])[UP].tolist()) == {1.0}
    assert caplog.messages == ["both classes share their prompts, so prompt:last says nothing: every neuron gets 0.5"]


def test_one_class_is_an_error_before_the_work(tiny_vlm: VLM, find: Examples) -> None:
    with pytest.raises(SafeglassesError) as caught:
        measure_evidence(tiny_vlm, find, find.toxic, sites=(UP,), pools=POOLS)
    assert str(caught.value) == (
        "the held-out examples do not hold both classes\n"
        "  given:    12 toxic and 0 non-toxic examples\n"
        "  expected: at least one of each\n"
        "  do:       add examples of the missing class"
    )


def test_nan_is_an_error_that_names_the_neuron(tiny: Path, find: Examples) -> None:
    vlm = load(tiny)
    with torch.no_grad():
        vlm.model.get_submodule(vlm.anatomy.absolute(UP)).weight[3] = torch.inf  # inf - inf somewhere
    with pytest.raises(SafeglassesError) as caught:
        measure_evidence(vlm, find, sites=(DOWN, UP), pools=POOLS[:1])
    assert caught.value.what == "a value is not a number (NaN)"


def test_statistics_of_a_site() -> None:
    evidence = fixed()
    assert evidence.gini(DOWN).tolist() == [[-1.0, -0.875, -0.75], [-0.25, -0.125, 0.0]]
    assert evidence.standard_error(UP).shape == (2, 6)
    assert torch.equal(evidence.standard_error(UP)[1], standard_error(evidence.auroc[UP][1], 25, 35))


def test_q_values_count_all_neurons_of_the_pool() -> None:
    evidence = fixed()
    flat = torch.cat([evidence.auroc[UP][1], evidence.auroc[DOWN][1]])
    expected = false_discovery_control(p_values(flat, 25, 35).numpy())
    found = evidence.q_values(POOLS[1])
    assert list(found) == [UP, DOWN]
    assert torch.cat(list(found.values())).tolist() == pytest.approx(expected.tolist())


def test_a_pool_that_was_not_measured_is_an_error() -> None:
    with pytest.raises(SafeglassesError) as caught:
        fixed().q_values(POOLS[2])
    assert str(caught.value) == (
        "the evidence was not measured for this way of pooling\n"
        "  given:    all:mean\n"
        "  expected: prompt:last or response:max"
    )


@pytest.mark.parametrize("with_held_out", [True, False])
def test_save_and_load_is_identity(with_held_out: bool, tmp_path: Path) -> None:
    one = fixed() if with_held_out else replace(fixed(), held_out=None, held_out_samples=None)
    two = Evidence.load(one.save(tmp_path / "deep" / "evidence.safetensors"))
    assert list(two.auroc) == list(one.auroc)
    for name in ("auroc", "held_out"):
        before, after = getattr(one, name), getattr(two, name)
        assert (before is None) == (after is None)
        assert before is None or all(torch.equal(before[site], after[site]) for site in before)
    for name in (
        "pools",
        "samples",
        "held_out_samples",
        "base_fingerprint",
        "source_sha256",
        "confounds",
        "engine",
        "certainty",
    ):
        assert getattr(two, name) == getattr(one, name)


def test_save_and_load_keeps_every_column(tmp_path: Path) -> None:
    one = fixed()
    two = Evidence.load(one.save(tmp_path / "evidence.safetensors"))
    assert list(two.columns) == ["mean_toxic", "mean_abs_toxic"]
    for name, column in one.columns.items():
        assert all(torch.equal(values, two.columns[name][site]) for site, values in column.items())
    assert list(two.weight_norms) == [DOWN]
    assert torch.equal(two.weight_norms[DOWN], one.weight_norms[DOWN])


def test_importance_weighs_the_mean_by_the_outgoing_weights(measured: Evidence, tiny_vlm: VLM) -> None:
    weight = tiny_vlm.model.get_submodule(tiny_vlm.anatomy.absolute(DOWN)).weight
    expected = measured.columns["mean_toxic"][DOWN].abs() * weight.norm(dim=0)
    torch.testing.assert_close(measured.importance(DOWN).float(), expected)
    other = measured.columns["mean_abs_non_toxic"][DOWN] * weight.norm(dim=0)
    torch.testing.assert_close(measured.importance(DOWN, "non_toxic", signed=False).float(), other)
    with pytest.raises(SafeglassesError) as caught:
        measured.importance(UP)
    assert str(caught.value) == (
        "no importance is known there\n"
        "  given:    layers.0.mlp.up_proj:out\n"
        "  expected: one of layers.1.mlp.down_proj:in\n"
        "  do:       measure the evidence at the neurons' own sites: sites = neurons"
    )


def test_file_is_byte_stable(tmp_path: Path) -> None:
    path = fixed().save(tmp_path / "evidence.safetensors")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == GOLDEN
    Evidence.load(path).save(path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == GOLDEN
    assert [p.name for p in tmp_path.iterdir()] == ["evidence.safetensors"]


GOLDEN = "942b6999bab2ca61687a866e9c6e69341f56ef198a701ebde603760208485e36"


def test_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "evidence.safetensors"
    save_file({"find/a": torch.zeros(1)}, path, {"safeglasses": json.dumps({"schema": 1})})
    with pytest.raises(SafeglassesError) as caught:
        Evidence.load(path)
    assert str(caught.value) == (
        "not evidence that this version reads\n"
        f"  given:    {path}, schema 1\n"
        "  expected: schema 2\n"
        "  do:       measure it again, or use the version of safeglasses that wrote it"
    )
    save_file({"find/a": torch.zeros(1)}, path)
    with pytest.raises(SafeglassesError, match="schema None"):
        Evidence.load(path)


def test_a_file_with_tensors_missing_is_refused(tmp_path: Path) -> None:
    path = fixed().save(tmp_path / "evidence.safetensors")
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    del tensors[f"held-out/{DOWN}"]
    save_file(tensors, path, header)
    with pytest.raises(SafeglassesError) as caught:
        Evidence.load(path)
    assert str(caught.value) == (
        "the evidence file does not hold what it says\n"
        f"  given:    {path}, 1 tensors missing or too many\n"
        "  expected: 9 tensors\n"
        "  do:       measure it again"
    )


def test_unreadable_files_are_errors(tmp_path: Path) -> None:
    missing = tmp_path / "evidence.safetensors"
    with pytest.raises(SafeglassesError) as caught:
        Evidence.load(missing)
    assert str(caught.value) == (
        f"no such evidence file\n  given:    {missing}\n"
        "  do:       make it with `safeglasses capture` or `safeglasses fit`"
    )
    missing.write_bytes(b"half a file")
    with pytest.raises(SafeglassesError, match="the evidence file cannot be read"):
        Evidence.load(missing)
