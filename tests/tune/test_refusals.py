"""Every kind of bad input, and what is said about it; all before anything is trained."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig

import families
from safeglasses.errors import BadRow, PartialMatch, SafeglassesError
from safeglasses.find.selection import Selection
from safeglasses.model.blocks import Block
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM, load
from safeglasses.tune.config import TuneConfig
from safeglasses.tune.targets import makers_of
from safeglasses.tune.training import tune
from tune.conftest import examples_of, neurons_of

CONFIG = TuneConfig(rank=2, alpha=4, batch=2, micro_batch=2, max_steps=1)


def refusal(act: Callable[[], Any], kind: type[SafeglassesError] = SafeglassesError) -> SafeglassesError:
    with pytest.raises(kind) as caught:
        act()
    assert type(caught.value) is kind
    return caught.value


def test_selections(tiny_vlm: VLM) -> None:
    neurons, examples = neurons_of(tiny_vlm), examples_of(tiny_vlm)
    first, second = neurons.masks
    empty = torch.zeros_like(neurons.masks[first])

    def of(masks: dict[Site, torch.Tensor], **changes: Any) -> Callable[[], Any]:
        return lambda: tune(tiny_vlm, Selection(masks), examples, config=replace(CONFIG, **changes))

    found = refusal(of({first: neurons.masks[first], second: empty}))
    assert str(found) == (
        "the selection has no neuron in some layers\n"
        "  given:    none in 1 of 2 layers: 1\n"
        "  expected: at least one neuron at every site of the selection\n"
        "  do:       select a larger share, leave these sites out, or accept it: TuneConfig(empty_layers='skip')"
    )
    found = refusal(of({first: empty, second: empty}, empty_layers="skip"))
    assert found.what == "no neuron is selected: nothing would be tuned"
    assert refusal(of({})).what == "no neuron is selected: nothing would be tuned"
    out = Site("layers.0.mlp.up_proj", "out")
    found = refusal(of({out: empty}))
    assert (found.what, found.given) == ("only feed-forward neurons can be tuned", "layers.0.mlp.up_proj:out")
    found = refusal(of({first: empty[:5]}), PartialMatch)
    assert found.what == "the selection fits only a part of this model"
    full = Selection({first: ~empty})
    found = refusal(lambda: tune(tiny_vlm, full, examples, mode="freeze", config=CONFIG))
    assert found.what == "freezing every neuron of a layer leaves nothing to train"


def test_layers_may_be_skipped_and_left_alone(fresh: Callable[[], VLM]) -> None:
    vlm = fresh()
    first, second = (neurons := neurons_of(vlm)).masks
    some = Selection({first: neurons.masks[first], second: torch.zeros_like(neurons.masks[second])})
    skipped = tune(vlm, some, examples_of(vlm), config=replace(CONFIG, empty_layers="skip"))
    left = tune(vlm, Selection({first: neurons.masks[first]}), examples_of(vlm), config=CONFIG)
    assert skipped.changes.keys() == {"layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"}
    assert skipped.identity == left.identity
    assert skipped.neurons == left.neurons


def test_models(tmp_path: Path, tiny_vlm: VLM) -> None:
    experts = load(families.build("qwen3_vl_moe", tmp_path / "moe"))
    found = refusal(lambda: tune(experts, neurons_of(experts), examples_of(experts), mode="freeze", config=CONFIG))
    assert found.what == "freeze does not work on fused experts"
    assert found.given == "layers.0.mlp.experts.0:in"
    assert "use lora, rows or plain" in found.do
    parts = tiny_vlm.anatomy
    down = parts.ffn[0]
    nameless = replace(parts, blocks=(Block(("wi",), down),), linears={"wi": 2 * parts.in_features[down]})
    found = refusal(lambda: makers_of(nameless, down))
    assert str(found) == (
        "no linear map makes these neurons one by one\n"
        "  given:    layers.0.mlp.down_proj reads 48 neurons; beside it: wi with 96 outputs\n"
        "  expected: gate_proj and up_proj, fc1, or gate_up_proj: an output per neuron, or per half of one\n"
        "  do:       use amplify, or glasses"
    )
    crossing = load(families.build("mllama", tmp_path / "mllama"))
    neurons = neurons_of(crossing)
    found = refusal(lambda: tune(crossing, neurons, examples_of(crossing), config=CONFIG))
    assert str(found) == (
        "layers of cross-attention are skipped by text without a picture: their neurons are not tuned\n"
        "  given:    neurons in layers 1\n"
        "  expected: neurons of the other layers\n"
        "  do:       leave these sites out of the selection"
    )
    others = Selection({site: mask for site, mask in neurons.masks.items() if site.layer != 1})
    assert tune(crossing, others, examples_of(crossing), config=CONFIG).counts.neurons == len(others)


def test_quantised_models(fresh: Callable[[], VLM]) -> None:
    vlm = fresh()
    vlm.model.config.quantization_config = {"quant_method": "gptq"}
    found = refusal(lambda: tune(vlm, neurons_of(vlm), examples_of(vlm), config=CONFIG))
    assert found.what == "a quantised model cannot be tuned so that the result is exact"
    assert found.given == "a model quantised by gptq"


def test_examples(tiny_vlm: VLM) -> None:
    neurons, (first, *rest) = neurons_of(tiny_vlm), examples_of(tiny_vlm)
    assert refusal(lambda: tune(tiny_vlm, neurons, [], config=CONFIG)).what == "nothing to tune on"
    found = refusal(lambda: tune(tiny_vlm, neurons, [*rest, replace(first, response=" ")], config=CONFIG), BadRow)
    assert (found.what, found.given) == ("an example has no target", "row e0-0 without a response")
    long = replace(first, response="red dog " * 500)
    found = refusal(lambda: tune(tiny_vlm, neurons, [*rest, long], config=CONFIG), BadRow)
    assert found.what == "an example is longer than the model's context"
    assert found.given.startswith("row e0-0 with 1,")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"rank": 0}, "not a way to tune"),
        ({"dropout": 1.0}, "not a way to tune"),
        ({"weight_decay": -0.1}, "not a way to tune"),
        ({"micro_batch": 3}, "a batch must be whole micro-batches"),
        ({"trainer": {"learning_rate": 1.0}}, "an option of the training has a place of its own"),
        ({"trainer": {"bf16": True}}, "no bf16 here"),
        ({"trainer": {"report_to": {1}}}, "trainer must be JSON-ready"),
        (
            {"trainer": {"deepspeed": {"zero_optimization": {"stage": 3}}}},
            "DeepSpeed's stage 3 hides the weights that must be seen to stay as they are",
        ),
    ],
)
def test_numbers(changes: dict[str, Any], what: str) -> None:
    assert refusal(lambda: TuneConfig(**changes)).what == what


def test_unknown_options_and_modes(tiny_vlm: VLM) -> None:
    neurons, examples = neurons_of(tiny_vlm), examples_of(tiny_vlm)
    odd = replace(CONFIG, trainer={"nonsense": 1})
    found = refusal(lambda: tune(tiny_vlm, neurons, examples, config=odd))
    assert found.what == "transformers knows no such option of a training"
    alone = replace(CONFIG, trainer={"fsdp": True})
    found = refusal(lambda: tune(tiny_vlm, neurons, examples, config=alone))
    assert found.what == "FSDP is asked for where it cannot be turned on"
    assert found.given == "1 process(es), the model on the CPU"


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ({"init_lora_weights": "pissa"}, "PiSSA, OLoRA and the like start with a B other than zero"),
        ({"init_lora_weights": "olora"}, "PiSSA, OLoRA and the like start with a B other than zero"),
        ({"init_lora_weights": False}, "PiSSA, OLoRA and the like start with a B other than zero"),
        ({"use_dora": True}, "DoRA rescales whole rows"),
        ({"use_rslora": True}, "the scaling is alpha / rank"),
        ({"bias": "all"}, "biases of all rows would move"),
        ({"modules_to_save": ["lm_head"]}, "modules that are saved whole are trained whole"),
        ({"target_modules": ["q_proj"]}, "the modules follow from the neurons"),
        ({"rank_pattern": {"up_proj": 4}}, "only rank, alpha and dropout are free"),
    ],
)
def test_what_leaves_the_selection_is_refused(option: dict[str, Any], why: str) -> None:
    (name, value), *_ = option.items()
    found = refusal(lambda: TuneConfig.from_peft(LoraConfig(**option)))
    assert found.what == "this option of LoRA leaves the selected neurons"
    assert found.given == f"LoraConfig({name}={value!r})" or name == "target_modules"
    assert found.do.startswith(f"leave it out: {why}")


@given(rank=st.integers(1, 64), alpha=st.integers(1, 64), dropout=st.floats(0, 0.9))
def test_plain_lora_configs_are_taken(rank: int, alpha: int, dropout: float) -> None:
    config = TuneConfig.from_peft(LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout), epochs=1)
    assert (config.rank, config.alpha, config.dropout, config.epochs) == (rank, alpha, dropout, 1)


def test_a_training_that_comes_apart_is_an_error(fresh: Callable[[], VLM], tmp_path: Path) -> None:
    vlm = fresh()
    wild = replace(CONFIG, learning_rate=1e30, clip=0, max_steps=8, warmup=0.0)
    found = refusal(lambda: tune(vlm, neurons_of(vlm), examples_of(vlm), config=wild, out=tmp_path / "shield"))
    assert found.what == "the training came apart"
    assert found.do == "lower the learning rate"
    assert list(tmp_path.iterdir()) == []
    assert not any(not torch.isfinite(p).all() for p in vlm.model.parameters())
