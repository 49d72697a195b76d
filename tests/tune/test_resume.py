"""Killed and gone on with, finished and asked again, two processes instead of one: the same weights."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import families
from forked import Forked, ranks
from safeglasses.errors import SafeglassesError
from safeglasses.model.vlm import VLM
from safeglasses.tune.shield import Shield
from safeglasses.tune.trainer import COMPLETE, last_checkpoint
from safeglasses.tune.training import tune
from tune.apart import CONFIG, MODES, TOGETHER, train_slowly, train_together
from tune.conftest import examples_of, neurons_of, precise_of


def same(a: Shield, b: Shield, *, within: float = 0.0) -> bool:
    """Whether two shields hold the same change: to the bit, or to a share of the largest number."""
    return a.changes.keys() == b.changes.keys() and all(
        float((change.delta() - b.changes[path].delta()).abs().max()) <= within * float(change.delta().abs().max())
        for path, change in a.changes.items()
    )


def test_a_killed_training_goes_on_to_the_same_bits(tiny: Path, precise: VLM, tmp_path: Path) -> None:
    whole = tune(precise, neurons_of(precise), examples_of(precise), config=CONFIG)
    out, work = tmp_path / "shield", tmp_path / ".shield.training"
    process = Forked(train_slowly, tiny, out, said=tmp_path / "said")
    process.wait_for((work / "checkpoint-6" / COMPLETE).exists)
    process.kill()
    assert not out.exists()
    found = last_checkpoint(work)
    assert found is not None
    (work / "checkpoint-99").mkdir()  # one that was being written
    (work / "checkpoint-99" / "trained.safetensors").write_bytes(b"half")
    steps: list[int] = []

    class Watched:
        def stage(self, _name: str, _total: int | None = None) -> Any:
            from contextlib import nullcontext

            return nullcontext(lambda done, _total: steps.append(done))

        def say(self, _text: str) -> None: ...

    shield = tune(precise, neurons_of(precise), examples_of(precise), config=CONFIG, out=out, progress=Watched())
    assert steps[0] > 6
    assert steps[-1] == 12
    assert same(shield, whole)
    assert shield.notes["losses"] == whole.notes["losses"]
    assert not work.exists()
    assert same(Shield.load(out), whole)


def test_a_finished_training_is_read_and_another_is_refused(fresh: Callable[[], VLM], tmp_path: Path) -> None:
    vlm, out = fresh(), tmp_path / "shield"
    neurons, examples = neurons_of(vlm), examples_of(vlm)
    first = tune(vlm, neurons, examples, config=CONFIG, out=out)
    stamp = (out / "shield.json").stat().st_mtime_ns
    assert tune(vlm, neurons, examples, config=CONFIG, out=out).identity == first.identity
    assert (out / "shield.json").stat().st_mtime_ns == stamp
    others: dict[str, Callable[[], Any]] = {
        "neurons": lambda: tune(vlm, neurons_of(vlm, seed=1), examples, config=CONFIG, out=out),
        "examples": lambda: tune(vlm, neurons, examples[1:], config=CONFIG, out=out),
        "mode": lambda: tune(vlm, neurons, examples, mode="rows", config=CONFIG, out=out),
        "config": lambda: tune(vlm, neurons, examples, config=replace(CONFIG, seed=1), out=out),
    }
    for name, act in others.items():
        with pytest.raises(SafeglassesError) as caught:
            act()
        assert caught.value.what == "the folder belongs to another training"
        assert caught.value.given == f"{out}, with another {name}"
        assert caught.value.do == "choose another folder, or remove this one"


def test_two_processes_train_what_one_does(tiny: Path, precise: VLM, tmp_path: Path) -> None:
    mixture = families.build("qwen3_vl_moe", tmp_path / "qwen3_vl_moe")
    job = ranks(2, train_together, tiny, mixture, tmp_path, said=tmp_path / "said")
    assert [rank.wait() for rank in job] == [0, 0], job[0].err()
    for mode in MODES:
        one = tune(precise, neurons_of(precise), examples_of(precise), mode=mode, config=TOGETHER)
        assert same(Shield.load(tmp_path / mode), one, within=1e-9)
    experts = precise_of(mixture)
    one = tune(experts, neurons_of(experts), examples_of(experts), config=TOGETHER)
    assert same(Shield.load(tmp_path / "experts"), one, within=1e-9)
