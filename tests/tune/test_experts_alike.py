"""Shields on fused experts beside the same experts taken apart, beside glasses and each other, trained otherwise."""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

import families
from families.unrolled import NOT_OURS, Unrolled, hooked, unrolled
from safeglasses.defend.glasses import Glasses
from safeglasses.find.selection import Selection
from safeglasses.model.anatomy import anatomy
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM
from safeglasses.tune import trainer
from safeglasses.tune.change import Change
from safeglasses.tune.config import TuneConfig
from safeglasses.tune.conflicts import claims
from safeglasses.tune.counting import counts_of
from safeglasses.tune.shield import Shield
from safeglasses.tune.targets import targets_of
from safeglasses.tune.training import tune
from tune.conftest import examples_of, neurons_of, precise_of

pytestmark = pytest.mark.filterwarnings(NOT_OURS)
RARE = 0
"""An expert that some examples do not meet."""
CONFIG = TuneConfig(rank=2, alpha=4, learning_rate=3e-2, batch=2, micro_batch=2, max_steps=2, warmup=0.0)


def fused_only(vlm: VLM, *, seed: int = 0) -> Selection:
    return Selection({site: mask for site, mask in neurons_of(vlm, seed=seed).masks.items() if site.fused})


def made_up(vlm: VLM, neurons: Selection, *, seed: int) -> Shield:
    """A shield of random numbers, not trained."""
    targets = targets_of(vlm.anatomy, vlm.model.config.get_text_config(decoder=True), neurons, "lora", CONFIG)
    generator = torch.Generator().manual_seed(seed)
    changes = {
        t.path: Change(
            t.out,
            t.into,
            torch.randn(t.rank, t.into, generator=generator),
            torch.randn(t.n_rows, t.rank, generator=generator),
            t.rows,
            None,
            0.1,
            t.part,
        )
        for t in targets
    }
    return Shield("lora", changes, neurons, vlm.fingerprint(), counts_of(targets, neurons, vlm.model))


def dimmed(vlm: VLM) -> Glasses:
    """Factors of every side of every other expert."""
    generator = torch.Generator().manual_seed(7)
    sites = [s for e in vlm.anatomy.experts.values() for s in e.sites("gate", "up", "in", "out") if s.expert in (0, 2)]
    return Glasses(
        {s: torch.rand(vlm.anatomy.width(s), generator=generator) for s in sites}, vlm.fingerprint(), "made up"
    )


def added_by_hand(made: dict[str, Unrolled], vlm: VLM, shield: Shield) -> None:
    """Add a shield to experts that were taken apart."""
    for change in shield.changes.values():
        assert change.part is not None
        delta, expert = change.delta().float(), made[change.part.module][change.part.number]
        interleaved = vlm.anatomy.experts[change.part.module].interleaved
        halves = (delta[0::2], delta[1::2]) if interleaved else delta.chunk(2)
        for name, half in zip(("gate_proj", "up_proj"), halves, strict=True):
            expert.get_parameter(f"{name}.weight").data += half


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "gpt_oss"])
def test_worn_with_glasses_and_another_it_is_what_experts_taken_apart_compute(
    family: Callable[[str], VLM], name: str
) -> None:
    """In whatever order they are put on; what both shields change of a neuron adds up; off is off to the bit."""
    vlm = family(name)
    glasses, shields = dimmed(vlm), [made_up(vlm, fused_only(vlm, seed=seed), seed=seed) for seed in (0, 1)]
    assert len(shields[0].neurons & shields[1].neurons)
    batch = vlm.encode([example.chat() for example in examples_of(vlm, 4)[::2]])
    model, made = unrolled(vlm)
    for shield in shields:
        added_by_hand(made, vlm, shield)
    taken_apart = replace(vlm, model=model)
    scale = {site: lambda value, row=row: value * row for site, row in glasses.effective().items()}
    with torch.no_grad():
        plain = vlm.forward(batch)
        with hooked(made, scale):
            expected = taken_apart.forward(batch)
        assert float((expected - plain).abs().max()) > 0.1
        for order in ((glasses, *shields), (*shields, glasses), (shields[1], glasses, shields[0])):
            with ExitStack() as worn:
                for one in order:
                    worn.enter_context(one.worn(vlm))
                torch.testing.assert_close(vlm.forward(batch), expected, rtol=0, atol=2e-5)
        pairs = []
        for order in ((glasses, shields[0]), (shields[0], glasses)):
            with order[0].worn(vlm), order[1].worn(vlm):
                pairs.append(vlm.forward(batch))
        assert torch.equal(*pairs)
        assert torch.equal(vlm.forward(batch), plain)


def test_claims_count_neurons_of_the_very_expert(family: Callable[[str], VLM]) -> None:
    """Glasses on a neighbour, or on the same neuron of another expert, claim nothing."""
    vlm = family("qwen3_vl_moe")
    first, second, third, _ = vlm.anatomy.experts["layers.0.mlp.experts"].sites("in")
    width = vlm.anatomy.width(first)
    neurons = Selection({site: torch.arange(width) < 4 for site in (first, second)})
    row = torch.ones(width)
    row[2:6] = 0.4
    gates = {Site(site.path, "gate"): torch.where(torch.arange(width) == 3, 0.5, 1.0) for site in (first, second)}
    factors = {first: row, third: row, **gates}
    found = claims(made_up(vlm, neurons, seed=0), Glasses(factors, vlm.fingerprint(), "made up"))
    assert found.record() == {
        "tuned": 8,
        "scaled": 5,
        "both": 3,
        "silenced": 2,
        "by_layer": {"0": 3},
        "lowest": [
            {"neuron": f"{first}#3", "factor": pytest.approx(0.2)},
            {"neuron": f"{first}#2", "factor": pytest.approx(0.4)},
            {"neuron": f"{second}#3", "factor": pytest.approx(0.5)},
        ],
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.build("qwen3_vl_moe", tmp_path_factory.mktemp("experts") / "qwen3_vl_moe")


@pytest.fixture
def doubles(source: Path) -> VLM:
    return precise_of(source)


def same(one: Shield, other: Shield, *, within: float) -> None:
    assert one.changes.keys() == other.changes.keys()
    for path, change in one.changes.items():
        torch.testing.assert_close(other.changes[path].delta(), change.delta(), rtol=0, atol=within)


LONGER = replace(CONFIG, dropout=0.0, weight_decay=0.1, micro_batch=1, max_steps=6, checkpoint_every=2)


def test_interrupted_or_checkpointed_it_is_the_same_training(
    doubles: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    neurons, examples, out = fused_only(doubles), examples_of(doubles), tmp_path / "shield"
    whole = tune(doubles, neurons, examples, config=LONGER)
    light = tune(doubles, neurons, examples, config=replace(LONGER, gradient_checkpointing=True))
    same(whole, light, within=1e-12)
    before, steps = set(doubles.model.state_dict()), list[int]()

    def stop(_self: Any, _args: Any, state: Any, *_: Any, **__: Any) -> None:
        steps.append(state.global_step)
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr(trainer.Watch, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            tune(doubles, neurons, examples, config=LONGER, out=out)
    assert set(doubles.model.state_dict()) == before
    assert not out.exists()
    seen = len(steps)
    monkeypatch.setattr(
        trainer.Watch, "on_step_end", lambda _self, _args, state, *_, **__: steps.append(state.global_step)
    )
    assert tune(doubles, neurons, examples, config=LONGER, out=out).identity == whole.identity
    assert steps[seen] == 5  # on from the checkpoint of step 4
    assert Shield.load(out).identity == whole.identity


def test_experts_that_compute_one_after_the_other_train_as_well_without_a_token(doubles: VLM) -> None:
    """Step 3.7 leaves out experts that no token is sent to: decay acts on what is trained of them all the same."""
    examples, model = examples_of(doubles), copy.deepcopy(doubles.model)
    for path in doubles.anatomy.experts:
        parent, _, leaf = doubles.anatomy.absolute_path(path).rpartition(".")
        for one in (doubles.model, model):
            router: Any = one.get_submodule(f"{parent}.gate")
            router.top_k = 1
            router.weight.data[RARE] = 0
        sizes = {"num_local_experts": 4, "hidden_size": 32, "moe_intermediate_size": 24}
        new = Step3p7Experts(SimpleNamespace(**sizes, hidden_act="silu")).double()
        new.load_state_dict(model.get_submodule(f"{parent}.{leaf}").state_dict())
        setattr(model.get_submodule(parent), leaf, new)
    looping = replace(doubles, model=model, anatomy=anatomy(model))
    neurons = Selection({site: mask for site, mask in fused_only(doubles).masks.items() if site.expert == RARE})
    apart, made = unrolled(doubles)
    with torch.no_grad():
        replace(doubles, model=apart.double()).forward(doubles.encode([examples[1].chat()]))
    assert any(RARE not in {number for number, _ in experts.sent} for experts in made.values())
    config = replace(LONGER, batch=1, max_steps=8)
    same(*(tune(vlm, neurons, examples, config=config) for vlm in (doubles, looping)), within=1e-12)
