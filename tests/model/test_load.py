import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import is_torchvision_available

import families
from safeglasses.errors import SafeglassesError
from safeglasses.model.loading import checked_device_map
from safeglasses.model.vlm import VLM, Chat, load
from safeglasses.model.weights import check_finite, fingerprint

NAME = "model.language_model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def copied(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change a checkpoint's tensors on disk; names may differ from those in memory by their wrapper."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def on_disk(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in tensors if "vision" not in name and name.endswith("layers.1.mlp.up_proj.weight"))


def test_loaded_facts(tiny_vlm: VLM, tiny: Path, family: Callable[[str], VLM]) -> None:
    assert (tiny_vlm.source, tiny_vlm.revision) == (str(tiny), None)
    assert tiny_vlm.is_multimodal and not family("llama").is_multimodal
    assert tiny_vlm.context_length == 512
    assert (tiny_vlm.device, tiny_vlm.dtype) == (torch.device("cpu"), torch.float32)
    assert not tiny_vlm.model.training


def test_missing_folder(tmp_path: Path) -> None:
    for source in (tmp_path / "nowhere", str(tmp_path / "nowhere")):
        with pytest.raises(SafeglassesError) as caught:
            load(source)
        assert str(caught.value) == (
            "no such folder\n"
            f"  given:    {tmp_path / 'nowhere'}\n"
            "  expected: a folder with a transformers checkpoint, or a model id of the Hugging Face hub\n"
            f"  do:       check the path (current folder: {Path.cwd()})"
        )


def test_folder_without_config(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(SafeglassesError) as caught:
        load(tmp_path)
    assert str(caught.value) == (
        "the folder holds no model\n"
        f"  given:    {tmp_path} (holds model.gguf)\n"
        "  expected: a transformers checkpoint: config.json, *.safetensors, tokenizer, processor\n"
        "  do:       give the folder that holds config.json, or a model id of the Hugging Face hub"
    )
    with pytest.raises(SafeglassesError, match="the model is a file, not a folder"):
        load(tmp_path / "model.gguf")


def test_hub_while_offline() -> None:
    with pytest.raises(SafeglassesError) as caught:
        load("nobody/nothing", revision="v1")
    assert str(caught.value) == (
        "the model could not be fetched from the hub\n"
        "  given:    nobody/nothing at revision v1\n"
        "  expected: a folder on this machine, a cached model, or a reachable public model id\n"
        "  do:       check the id and the connection (HF_HUB_OFFLINE must not be 1), log in with "
        "`hf auth login` if the model is gated, or give a local folder"
    )


def test_no_chat_template(copied: Path) -> None:
    folder = copied
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(SafeglassesError) as caught:
        load(folder)
    assert str(caught.value) == (
        "the model has no chat template\n"
        f"  given:    {folder}\n"
        "  expected: chat_template.jinja beside config.json: how a conversation becomes a prompt\n"
        "  do:       use the instruction-tuned checkpoint of the model, or save the Jinja template it was "
        "trained with as chat_template.jinja in the folder"
    )
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content[1].text }}{% endfor %}")
    assert load(folder).is_multimodal


def test_weights_that_are_no_numbers(copied: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[on_disk(tensors)][3, 4] = torch.nan
        tensors[on_disk(tensors)][5, 6] = torch.inf

    rewrite(copied, spoil)
    with pytest.raises(SafeglassesError) as caught:
        load(copied)
    assert str(caught.value) == (
        "the model's weights are not all numbers\n"
        f"  given:    2 NaN or infinite value(s) in {NAME} of {copied}\n"
        "  expected: finite weights\n"
        "  do:       get the checkpoint again, or load it in the dtype it was saved in"
    )


def test_missing_weights(copied: Path) -> None:
    rewrite(copied, lambda tensors: tensors.pop(on_disk(tensors)))
    with pytest.raises(SafeglassesError) as caught:
        load(copied)
    assert str(caught.value) == (
        "the checkpoint lacks weights\n"
        f"  given:    1 missing in {copied}: {NAME}\n"
        "  expected: all weights of the model\n"
        "  do:       get the checkpoint again; an adapter folder must be merged into its base first"
    )


def test_missing_processor(copied: Path) -> None:
    (copied / "tokenizer.json").unlink()
    (copied / "processor_config.json").unlink()
    with pytest.raises(SafeglassesError, match="processor or tokenizer could not be loaded"):
        load(copied)


@pytest.mark.skipif(is_torchvision_available(), reason="shows what happens without torchvision")
def test_processor_that_needs_torchvision(copied: Path) -> None:
    path = copied / "processor_config.json"
    path.write_text(path.read_text().replace("LlavaProcessor", "PixtralProcessor"))
    with pytest.raises(SafeglassesError) as caught:
        load(copied)
    assert caught.value.what == "the checkpoint's processor needs a library that is not installed"
    assert caught.value.do == "install the library named above (most often: pip install torchvision)"


@pytest.mark.parametrize(
    ("model_type", "text"),
    [
        ("no_such_type", "transformers does not know this type of model"),
        ("clip", "not a vision-language or decoder-only language model"),
        ("t5", "not a vision-language or decoder-only language model"),
    ],
)
def test_other_models(copied: Path, model_type: str, text: str) -> None:
    (copied / "config.json").write_text(
        json.dumps({"model_type": model_type, "is_encoder_decoder": model_type == "t5"})
    )
    with pytest.raises(SafeglassesError, match=text):
        load(copied)


@pytest.mark.parametrize("device_map", ["gpu", "cuda:99", "meta", ""])
def test_wrong_device(tiny: Path, device_map: str) -> None:
    with pytest.raises(SafeglassesError, match="no such device") as caught:
        load(tiny, device_map=device_map)
    assert f"  given:    {device_map!r}\n" in str(caught.value)
    assert "  expected: auto, cpu" in str(caught.value)
    assert str(caught.value).endswith("  do:       leave device_map out to use the CPU")


def test_right_devices() -> None:
    for device_map in (None, "auto", "cpu", torch.device("cpu"), {"": "cpu"}):
        assert checked_device_map(device_map) == device_map


def test_wrong_dtype(tiny: Path) -> None:
    with pytest.raises(SafeglassesError) as caught:
        load(tiny, dtype="int4")
    assert str(caught.value) == (
        "not a dtype for weights\n  given:    'int4'\n  expected: auto, float32, bfloat16, float16"
    )


def test_no_pad_token(copied: Path) -> None:
    path = copied / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["pad_token"]
    path.write_text(json.dumps(settings))
    vlm = load(copied)
    assert vlm.tokenizer.pad_token == "</s>"
    chats = [Chat(families.messages(index), "a dog") for index in range(2)]
    assert vlm.encode(chats).attention_mask.sum(dim=1).tolist() == vlm.lengths(chats)


@pytest.mark.skipif(is_torchvision_available(), reason="there is torchvision: no half is left out")
def test_saving_keeps_the_video_half(tmp_path: Path, family: Callable[[str], VLM]) -> None:
    source, target = (
        Path(shutil.copytree(family("qwen2_vl").source, tmp_path / "source")),
        tmp_path / "target",
    )
    path = source / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "video_processor": {"fps": 2}}))
    (source / "video_preprocessor_config.json").write_text("{}")
    load(source).save_processor(target)
    written = json.loads((target / "processor_config.json").read_text())
    assert written["video_processor"] == {"fps": 2}
    assert written["processor_class"] == "Qwen2VLProcessor"
    assert (target / "video_preprocessor_config.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["llava", "llama"])
def test_saved_processors_load_again(tmp_path: Path, family: Callable[[str], VLM], name: str) -> None:
    vlm = family(name)
    vlm.model.save_pretrained(tmp_path)
    vlm.save_processor(tmp_path)
    chats = [Chat(families.messages(1, pictures=int(vlm.is_multimodal)), "a dog")]
    for key, value in load(tmp_path).encode(chats).inputs.items():
        assert torch.equal(value, vlm.encode(chats).inputs[key])


def test_fingerprint_does_not_depend_on_the_dtype_of_loading(tiny_vlm: VLM, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    half = load(tiny_vlm.source, dtype="bfloat16")
    half.model.save_pretrained(folder)
    half.processor.save_pretrained(folder)
    prints = {load(folder, dtype=dtype).fingerprint() for dtype in ("auto", "float32", "bfloat16", torch.float32)}
    assert prints == {half.fingerprint()} == {tiny_vlm.fingerprint()}
    assert len(half.fingerprint()) == 36 and half.fingerprint().startswith("sg1-")


def test_fingerprint_sees_values_names_and_shapes() -> None:
    def made(change: Callable[[nn.Linear], object] = lambda _layer: None, name: str = "a") -> str:
        layer = nn.Linear(4, 3)
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)
        change(layer)
        return fingerprint(nn.ModuleDict({name: layer}))

    assert made() == made()
    for row in range(3):
        for column in range(4):
            assert made(lambda layer, at=(row, column): layer.weight.data.__setitem__(at, 1.01)) != made()
    assert made(name="b") != made()
    assert made(lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(4, 3)))) != made()


def test_fingerprint_golden() -> None:
    layer = nn.Linear(100, 2)
    layer.weight.data = torch.arange(200.0).reshape(2, 100)
    layer.bias.data = torch.tensor([0.1, -0.1])
    assert fingerprint(layer) == GOLDEN


def test_weights_without_values() -> None:
    layer = nn.Linear(2, 2, device="meta")
    for look in (fingerprint, lambda model: check_finite(model, "here")):
        with pytest.raises(SafeglassesError) as caught:
            look(layer)
        assert str(caught.value) == (
            "the model has no weights\n"
            f"  given:    {'bias' if look is fingerprint else 'weight'} is on the meta device\n"
            "  expected: loaded weights\n"
            "  do:       load the model with safeglasses.load, without offloading to disk"
        )


GOLDEN = "sg1-1440cc78f34b5a33118daebf8db90165"  # worked out by hand, without torch
