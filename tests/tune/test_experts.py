"""Shields on fused experts: trained as masked full gradients would, worn as unrolled experts would be, read by PEFT."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.inkling import InklingForCausalLM, InklingTextConfig
from transformers.models.llama4 import Llama4ForCausalLM, Llama4TextConfig

import families
from families.parts import text
from families.unrolled import NOT_OURS
from safeglasses.errors import PartialMatch, SafeglassesError, WrongBase
from safeglasses.files import read_json, sha256_file
from safeglasses.find.selection import Selection
from safeglasses.model.vlm import VLM, load
from safeglasses.ship.fold import fold_checkpoint
from safeglasses.tune.config import TuneConfig
from safeglasses.tune.layers import aliases_quiet
from safeglasses.tune.record import RECORD, write_record
from safeglasses.tune.shield import Shield
from safeglasses.tune.training import tune
from tune.conftest import examples_of, neurons_of, precise_of
from tune.test_equal import SETTINGS, config_of, order, train  # noqa: F401 (a fixture)

pytestmark = pytest.mark.filterwarnings(NOT_OURS)
CONFIG = TuneConfig(rank=2, alpha=4, learning_rate=3e-2, batch=2, micro_batch=2, max_steps=2, warmup=0.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny checkpoint of a family, built once."""
    home = tmp_path_factory.mktemp("moes")
    return lambda name: home / name if (home / name).exists() else families.build(name, home / name)


def fused_only(vlm: VLM) -> Selection:
    """Neurons of fused experts, none in one of them."""
    found = {site: mask for site, mask in neurons_of(vlm).masks.items() if site.fused}
    first = next(iter(found))
    return Selection({**found, first: torch.zeros_like(found[first])})


def rows_by_hand(vlm: VLM, neurons: Selection) -> dict[str, Tensor]:
    """Which numbers of each 3-D parameter may change, written out for the layouts of these tests."""
    masks = {}
    for site, mask in neurons.masks.items():
        experts, number = vlm.anatomy.expert(site) or pytest.fail(str(site))
        name = vlm.anatomy.absolute_path(f"{experts.path}.gate_up_proj")
        weight = vlm.model.get_parameter(name)
        whole = masks.setdefault(name, torch.zeros_like(weight, dtype=torch.bool))
        rows = mask.repeat_interleave(2) if experts.interleaved else mask.repeat(2)
        whole[number] = rows[None, :] if experts.transposed else rows[:, None]
    return masks


def masked_rows(vlm: VLM, neurons: Selection, taken: list[dict[str, Tensor]], config: TuneConfig) -> dict[str, Tensor]:
    masks = rows_by_hand(vlm, neurons)
    model = copy.deepcopy(vlm.model).requires_grad_(False)
    parameters: Any = {name: model.get_parameter(name).requires_grad_(True) for name in masks}
    train(model, parameters, dict(masks), taken, config)
    return {name: parameters[name].detach() - vlm.model.get_parameter(name).detach() for name in masks}


def masked_lora(vlm: VLM, neurons: Selection, taken: list[dict[str, Tensor]], config: TuneConfig) -> dict[str, Tensor]:
    """PEFT's own LoRA of the parameters: the selected experts' A as ours starts, of B the neurons' rows alone."""
    masks, anatomy = rows_by_hand(vlm, neurons), vlm.anatomy
    lora = LoraConfig(r=config.rank, lora_alpha=int(config.alpha), target_parameters=list(masks))
    with torch.random.fork_rng(), aliases_quiet():
        peft: Any = get_peft_model(copy.deepcopy(vlm.model), lora)
        torch.manual_seed(config.seed)
        parameters: dict[str, nn.Parameter] = {}
        wanted: dict[str, Tensor | None] = {}
        for path, experts in anatomy.experts.items():
            layer = peft.get_submodule(f"base_model.model.{anatomy.absolute_path(path)}")
            some = [n for n in range(experts.n_experts) if neurons.masks[experts.sites("in")[n]].any()]
            a, b = (getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B"))
            start = torch.empty(len(some) * config.rank, a.shape[1], dtype=a.dtype)
            nn.init.kaiming_uniform_(start, a=5**0.5)
            a.data.zero_()
            a.data.unflatten(0, (experts.n_experts, -1))[some] = start.view(len(some), config.rank, -1)
            mask = masks[anatomy.absolute_path(f"{path}.gate_up_proj")]
            rows = mask.any(dim=1 if experts.transposed else 2)  # [expert, out]
            kept = torch.zeros(experts.n_experts, config.rank, a.shape[1], dtype=torch.bool)
            kept[some] = True
            parameters |= {f"{path}.A": a, f"{path}.B": b}
            wanted |= {
                f"{path}.A": kept.flatten(0, 1),
                f"{path}.B": rows.T[:, None].repeat(1, config.rank, 1).flatten(1),
            }
        train(peft, parameters, wanted, taken, config)
    return {
        anatomy.absolute_path(f"{path}.gate_up_proj"): peft.get_submodule(
            f"base_model.model.{anatomy.absolute_path(path)}"
        )
        .get_delta_weight("default")
        .detach()
        for path in anatomy.experts
    }


def deltas(vlm: VLM, shield: Shield) -> dict[str, Tensor]:
    """The change of every 3-D parameter, put together without `Stack`."""
    found: dict[str, Tensor] = {}
    for change in shield.changes.values():
        assert change.part is not None
        name = vlm.anatomy.absolute_path(change.part.parameter)
        whole = found.setdefault(name, torch.zeros_like(vlm.model.get_parameter(name), dtype=torch.float64))
        whole[change.part.number] = change.delta().T if change.part.transposed else change.delta()
    return found


@pytest.mark.parametrize("mode", ["lora", "rows"])
@pytest.mark.parametrize(
    ("family", "setting"), [("qwen3_vl_moe", "all"), ("qwen3_vl_moe", "plain"), ("gpt_oss", "all")]
)
def test_tuning_equals_masked_full_gradients(
    checkpoint: Callable[[str], Path],
    order: list[dict[str, Tensor]],  # noqa: F811
    family: str,
    setting: str,
    mode: Any,
) -> None:
    vlm = precise_of(checkpoint(family))
    config, neurons = config_of(**SETTINGS[setting]), fused_only(vlm)
    before = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    shield = tune(vlm, neurons, examples_of(vlm), mode=mode, config=config)
    after = vlm.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    expected = (masked_lora if mode == "lora" else masked_rows)(vlm, neurons, order, config)
    masks, found = rows_by_hand(vlm, neurons), deltas(vlm, shield)
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        largest = float(change.abs().max())
        assert largest > 1e-3
        assert float((found[name] - change).abs().max()) <= 1e-6 * largest
        assert not found[name][~masks[name]].any()
    assert shield.counts.neurons == len(neurons)
    assert shield.counts.touched_weights == sum(int(mask.sum()) for mask in masks.values())


@pytest.mark.parametrize("family", families.MIXTURES)
def test_worn_saved_read_by_peft_and_folded_are_one(
    checkpoint: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    source = checkpoint(family)
    vlm = load(source)
    mode: Any = ("lora", "rows", "plain")[families.MIXTURES.index(family) % 3]
    neurons = neurons_of(vlm)
    if family == "glm4v_moe":  # of its linear maps PEFT thinks that they are experts
        with pytest.raises(SafeglassesError, match="PEFT takes linear maps of this model for experts"):
            tune(vlm, neurons, examples_of(vlm, 4), mode=mode, config=CONFIG)
        neurons = fused_only(vlm)
    shield = tune(vlm, neurons, examples_of(vlm, 4), mode=mode, config=CONFIG)
    again = Shield.load(shield.save(tmp_path / "shield"))
    assert again.identity == shield.identity
    batch = vlm.encode([example.chat() for example in examples_of(vlm, 4)[1::2]])
    worn_by_peft, on_disk = load(source), fold_checkpoint(source, again, tmp_path / "folded")
    with aliases_quiet():
        peft = PeftModel.from_pretrained(worn_by_peft.model, str(tmp_path / "shield"))
    with torch.no_grad():
        plain = vlm.forward(batch)
        with again.worn(vlm):
            worn = vlm.forward(batch)
        assert float((worn - plain).abs().max()) > 1e-3
        assert torch.equal(vlm.forward(batch), plain)
        assert {name for name, p in peft.named_parameters() if ".lora_" in name}
        torch.testing.assert_close(worn_by_peft.forward(batch), worn, rtol=0, atol=1e-5)
        again.fold(vlm)
        torch.testing.assert_close(vlm.forward(batch), worn, rtol=0, atol=1e-5)
        folded = load(on_disk.folder)
    assert all(torch.equal(value, vlm.model.state_dict()[name]) for name, value in folded.model.state_dict().items())


@pytest.fixture(scope="module")
def shield_folder(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    vlm = load(checkpoint("qwen3_vl_moe"))
    folder = tmp_path_factory.mktemp("shields") / "shield"
    tune(vlm, fused_only(vlm), examples_of(vlm, 2), config=CONFIG).save(folder)
    return folder


def test_another_base_is_refused(checkpoint: Callable[[str], Path], shield_folder: Path, tmp_path: Path) -> None:
    shield, other = Shield.load(shield_folder), load(checkpoint("aria"))
    with pytest.raises(WrongBase), shield.worn(other):
        pass
    with pytest.raises(WrongBase):
        shield.fold(other)
    with pytest.raises(WrongBase):
        fold_checkpoint(checkpoint("aria"), shield, tmp_path / "out")
    with pytest.raises(PartialMatch, match="the shield fits only a part") as caught, shield.worn(other.model):
        pass
    assert "layers.0.mlp.experts.1.gate_up_proj (another size or layout)" in caught.value.given
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["another expert", "another neuron"])
def test_an_adapter_of_more_than_the_selection_is_refused(shield_folder: Path, tmp_path: Path, where: str) -> None:
    """Also where every hash was written anew: what is not selected must be zero."""
    folder = tmp_path / "shield"
    folder.mkdir()
    for file in shield_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if "layers.0" in name and "lora_B" in name)
    b = tensors[name].unflatten(1, (-1, 4))  # [out, rank, expert]
    row = int((b[:, 0, 1] == 0).nonzero()[0])
    b[row, 0, 0 if where == "another expert" else 1] = 1.0
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    record = read_json(folder / RECORD)
    record["files"]["adapter_model.safetensors"] = sha256_file(folder / "adapter_model.safetensors")
    write_record(folder, {key: value for key, value in record.items() if key not in ("schema", "sha256")})
    with pytest.raises(PartialMatch, match="the adapter changes what is not selected"):
        Shield.load(folder)


def _llama4(vocabulary: int) -> Any:
    options = text(head_dim=8, num_local_experts=4, num_experts_per_tok=2, intermediate_size_mlp=48, attn_scale=0.1)
    return Llama4ForCausalLM(Llama4TextConfig(**{**options, "vocab_size": vocabulary}))


def _inkling(vocabulary: int) -> Any:
    heads = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "d_rel": 4}
    moe = {"moe_intermediate_size": 24, "n_routed_experts": 4, "n_shared_experts": 2, "num_experts_per_tok": 2}
    options = text(head_dim=8, sliding_window_size=8, rel_extent=16, **heads, **moe)
    return InklingForCausalLM(InklingTextConfig(**{**options, "vocab_size": vocabulary}))


@pytest.mark.parametrize("make", [_llama4, _inkling])
def test_experts_in_code_of_their_own(
    checkpoint: Callable[[str], Path], make: Callable[[int], Any], tmp_path: Path
) -> None:
    """Llama 4 keeps inputs first, does not say so to PEFT, and lets the router scale what experts read.

    Inkling's shared ones have gate and up as two parameters of one module.
    """
    source, like = tmp_path / "model", load(checkpoint("gpt_oss"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make(like.model.config.vocab_size).eval()
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.data.normal_(0, 0.15)
    model.save_pretrained(source)
    like.processor.save_pretrained(source)
    vlm = load(source)
    config = replace(CONFIG, gradient_checkpointing=True)
    shield = tune(vlm, neurons_of(vlm), examples_of(vlm, 4), config=config)
    plain = tune(vlm, neurons_of(vlm), examples_of(vlm, 4), config=CONFIG)
    for path, change in plain.changes.items():
        torch.testing.assert_close(shield.changes[path].delta(), change.delta(), rtol=0, atol=1e-5)
    again, other = Shield.load(shield.save(tmp_path / "shield")), load(source)
    assert again.identity == shield.identity
    on_disk = fold_checkpoint(source, again, tmp_path / "folded")
    batch = vlm.encode([example.chat() for example in examples_of(vlm, 4)])
    with aliases_quiet():
        PeftModel.from_pretrained(other.model, str(tmp_path / "shield"))
    with torch.no_grad():
        untouched = vlm.forward(batch)
        with again.worn(vlm):
            worn = vlm.forward(batch)
        assert float((worn - untouched).abs().max()) > 1e-3
        torch.testing.assert_close(other.forward(batch), worn, rtol=0, atol=1e-5)
        again.fold(vlm)
        torch.testing.assert_close(vlm.forward(batch), worn, rtol=0, atol=1e-5)
        folded = load(on_disk.folder)
    assert all(torch.equal(value, vlm.model.state_dict()[name]) for name, value in folded.model.state_dict().items())
