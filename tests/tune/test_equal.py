"""What is trained is what masking full gradients trains, step for step; nothing else moves by a bit."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import get_linear_schedule_with_warmup

import families
from families.unrolled import NOT_OURS
from safeglasses.find.selection import Selection
from safeglasses.model.hooks import tap
from safeglasses.model.vlm import VLM, load
from safeglasses.tune import encoding
from safeglasses.tune.config import TuneConfig
from safeglasses.tune.folder import moved
from safeglasses.tune.layers import aliases_quiet
from safeglasses.tune.shield import Shield
from safeglasses.tune.training import tune
from tune.conftest import examples_of, neurons_of

STEPS = 20
SETTINGS = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "clipping": {"clip": 1e-3},
    "accumulation": {"batch": 4, "micro_batch": 1},
    "all": {"weight_decay": 0.1, "clip": 1e-3, "batch": 4, "micro_batch": 2},
}


def config_of(**changes: Any) -> TuneConfig:
    options = {"rank": 4, "alpha": 8, "dropout": 0.0, "learning_rate": 1e-2, "clip": 0.0, "batch": 2, "micro_batch": 2}
    return TuneConfig(**{**options, "max_steps": STEPS, "epochs": 100, **changes})


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The micro-batches in the order in which they are taken."""
    taken: list[dict[str, Tensor]] = []
    plain = encoding.Microbatches.__getitem__

    def note(self: encoding.Microbatches, index: int) -> dict[str, Tensor]:
        taken.append(plain(self, index))
        return taken[-1]

    monkeypatch.setattr(encoding.Microbatches, "__getitem__", note)
    return taken


def masks_of(vlm: VLM, neurons: Selection) -> dict[str, Tensor]:
    """Which rows may change, by module inside the whole model; named, not found by our own code."""
    fused = "layers.0.mlp.gate_up_proj" in vlm.anatomy.linears
    return {
        vlm.anatomy.absolute_path(site.path.replace("down_proj", name)): mask.repeat(2) if fused else mask
        for site, mask in neurons.masks.items()
        for name in (("gate_up_proj",) if fused else ("gate_proj", "up_proj"))
    }


def train(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    masks: dict[str, Tensor | None],
    order: Sequence[dict[str, Tensor]],
    config: TuneConfig,
) -> None:
    """Plain PyTorch: full gradients, masked, then clipped; what a step moves outside the mask is put back."""
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = get_linear_schedule_with_warmup(optimizer, round(config.warmup * STEPS), STEPS)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    share = config.batch // config.micro_batch
    at = 0
    for _ in range(STEPS):
        taken = order[at : at + share]
        at += share
        count = sum(int((batch["labels"] != -100).sum()) for batch in taken)
        for batch in taken:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            logits = model(**inputs).logits[:, :-1]
            wanted = batch["labels"][:, 1:]
            total = functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="sum")
            (total / count).backward()
        for name, mask in masks.items():
            gradient = parameters[name].grad
            if mask is not None and gradient is not None:
                gradient[~mask] = 0
        if config.clip:
            nn.utils.clip_grad_norm_(parameters.values(), config.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, mask in masks.items():
                if mask is not None:
                    parameters[name][~mask] = before[name][~mask]


def masked_lora(
    vlm: VLM, neurons: Selection, order: Sequence[dict[str, Tensor]], config: TuneConfig
) -> dict[str, Tensor]:
    """PEFT's own LoRA with the whole of B, its gradient masked; returns the changes by module."""
    masks = masks_of(vlm, neurons)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        lora = LoraConfig(r=config.rank, lora_alpha=int(config.alpha), lora_dropout=0.0, target_modules=list(masks))
        with aliases_quiet():
            peft: Any = get_peft_model(copy.deepcopy(vlm.model), lora)
    parameters = {name: p for name, p in peft.named_parameters() if p.requires_grad}
    rows = {
        name: masks[name.removeprefix("base_model.model.").removesuffix(".lora_B.default.weight")]
        if ".lora_B." in name
        else None
        for name in parameters
    }
    train(peft, parameters, rows, order, config)
    return {name: peft.get_submodule(f"base_model.model.{name}").get_delta_weight("default").detach() for name in masks}


def masked_rows(
    vlm: VLM, neurons: Selection, order: Sequence[dict[str, Tensor]], config: TuneConfig
) -> dict[str, Tensor]:
    """The weights themselves, their full gradients masked; returns the changes by module."""
    masks = masks_of(vlm, neurons)
    model = copy.deepcopy(vlm.model).requires_grad_(False)
    parameters = {f"{name}.weight": model.get_parameter(f"{name}.weight").requires_grad_(True) for name in masks}
    train(model, parameters, {f"{name}.weight": mask for name, mask in masks.items()}, order, config)
    return {
        name: parameters[f"{name}.weight"].detach() - vlm.model.get_parameter(f"{name}.weight").detach()
        for name in masks
    }


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("mode", ["lora", "rows"])
def test_tuning_equals_masked_full_gradients(
    precise: VLM, order: list[dict[str, Tensor]], mode: Any, setting: str
) -> None:
    config, neurons = config_of(**SETTINGS[setting]), neurons_of(precise)
    shield = tune(precise, neurons, examples_of(precise), mode=mode, config=config)
    expected = (masked_lora if mode == "lora" else masked_rows)(precise, neurons, order, config)
    masks = masks_of(precise, neurons)
    found = {precise.anatomy.absolute_path(path): change.delta() for path, change in shield.changes.items()}
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        largest = float(change.abs().max())
        assert largest > 1e-3
        assert float((found[name] - change).abs().max()) <= 1e-6 * largest
        assert not found[name][~masks[name]].any()


@pytest.mark.parametrize(("mode", "within"), [("lora", 1e-6), ("rows", 1e-5)])  # the reference rounds whole weights
def test_in_float32_only_rounding_differs(
    tiny_vlm: VLM, order: list[dict[str, Tensor]], mode: Any, within: float
) -> None:
    config, neurons = config_of(**SETTINGS["all"]), neurons_of(tiny_vlm)
    shield = tune(tiny_vlm, neurons, examples_of(tiny_vlm), mode=mode, config=config)
    expected = (masked_lora if mode == "lora" else masked_rows)(tiny_vlm, neurons, order, config)
    for path, change in shield.changes.items():
        reference = expected[tiny_vlm.anatomy.absolute_path(path)]
        assert float((change.delta() - reference).abs().max()) <= within * float(reference.abs().max())


@pytest.mark.filterwarnings(NOT_OURS)
@pytest.mark.parametrize("mode", ["lora", "rows"])
def test_both_halves_of_a_fused_map_are_tuned(mode: Any, order: list[dict[str, Tensor]], tmp_path: Path) -> None:
    """The rows of a neuron's gate and of its up; no other neuron of the first layer moves; the file says the same."""
    vlm = load(families.build("glm4v", tmp_path / "model"), dtype=torch.float64)
    config, neurons = config_of(**SETTINGS["all"]), neurons_of(vlm)
    shield = tune(vlm, neurons, examples_of(vlm), mode=mode, config=config)
    expected = (masked_lora if mode == "lora" else masked_rows)(vlm, neurons, order, config)
    for path, change in shield.changes.items():
        reference = expected[vlm.anatomy.absolute_path(path)]
        assert float((change.delta() - reference).abs().max()) <= 1e-6 * float(reference.abs().max())
    site, batch, seen = next(iter(neurons.masks)), vlm.encode([examples_of(vlm)[1].chat()]), []
    with torch.no_grad(), tap(vlm.model, vlm.anatomy, [site], lambda _, value: seen.append(value[0])):
        vlm.forward(batch)
        with shield.worn(vlm):
            vlm.forward(batch)
    assert torch.equal((seen[0] != seen[1]).any(dim=0), neurons.masks[site])
    again = Shield.load(shield.save(tmp_path / "shield"))
    assert again.identity == shield.identity
    change = moved(again.neurons, again.changes)[site]
    assert torch.equal(change > 0, neurons.masks[site])
    table = pq.read_table(tmp_path / "shield/neurons.parquet")
    assert len(table) == len(neurons)
