"""Find, check and load a checkpoint's config and model; clear errors."""

import inspect
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)
from transformers.utils import ModelOutput

from safeglasses.errors import SafeglassesError

_SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_source(source: str | Path) -> str:
    """Return what transformers should load: an existing checkpoint folder, or a hub id.

    Raises:
        SafeglassesError: a folder that is missing or holds no checkpoint.
    """
    path = Path(source).expanduser()
    text = str(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            held = sorted(child.name for child in path.iterdir())[:5]
            raise SafeglassesError(
                "the folder holds no model",
                given=f"{path} (holds {', '.join(held) or 'nothing'})",
                expected="a transformers checkpoint: config.json, *.safetensors, tokenizer, processor",
                do="give the folder that holds config.json, or a model id of the Hugging Face hub",
            )
        return str(path)
    if isinstance(source, Path) or path.exists() or text.startswith(("/", ".", "~")) or text.count("/") > 1:
        raise SafeglassesError(
            "the model is a file, not a folder" if path.exists() else "no such folder",
            given=str(path),
            expected="a folder with a transformers checkpoint, or a model id of the Hugging Face hub",
            do="check the path" + ("" if path.exists() else f" (current folder: {Path.cwd()})"),
        )
    return text


def load_config(source: str, revision: str | None) -> PreTrainedConfig:
    """Read a checkpoint's config.

    Raises:
        SafeglassesError: unreachable, or of a type that transformers does not know.
    """
    try:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except OSError as error:
        raise SafeglassesError(
            "the model could not be fetched from the hub",
            given=source + (f" at revision {revision}" if revision else ""),
            expected="a folder on this machine, a cached model, or a reachable public model id",
            do="check the id and the connection (HF_HUB_OFFLINE must not be 1), log in with `hf auth login` "
            "if the model is gated, or give a local folder",
        ) from error
    except ValueError as error:
        raise SafeglassesError(
            "transformers does not know this type of model",
            given=f"{source}: {str(error).splitlines()[0]}",
            expected="an architecture of the installed transformers (no code from checkpoints is ever run)",
            do="upgrade transformers, or use a checkpoint converted to a built-in architecture",
        ) from error


def auto_class(source: str, config: PreTrainedConfig) -> Any:
    """Return the Auto class that builds and loads a checkpoint.

    Raises:
        SafeglassesError: no Auto class loads it as a model that reads text (and pictures) and writes text.
    """
    if is_multimodal(config):
        reads = _read_by_encoder(config) if config.is_encoder_decoder else {"input_ids"}
        if "input_ids" not in reads or "bbox" in reads:
            what = "where words lie on a page" if "bbox" in reads else "no text"
            raise SafeglassesError(
                f"an encoder–decoder whose encoder reads {what}",
                given=f"{source} of type {config.model_type!r}",
                expected="a model that takes a chat: an encoder that reads text, and pictures in their places",
                do="use a chat model such as LLaVA, Qwen-VL or Gemma 3",
            )
        return AutoModelForImageTextToText
    if not config.is_encoder_decoder and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    raise _not_a_chat_model(source, config)


def is_multimodal(config: PreTrainedConfig) -> bool:
    """Whether a checkpoint of this config takes pictures."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def load_model(
    source: str, config: PreTrainedConfig, *, dtype: Any, device_map: Any, revision: str | None
) -> PreTrainedModel:
    """Load the weights, safetensors only, all of them.

    Raises:
        SafeglassesError: no Auto class for it, a wrong device or dtype, or weights missing.
    """
    auto = auto_class(source, config)
    model, info = auto.from_pretrained(
        source,
        config=config,
        dtype=checked_dtype(dtype),
        device_map=checked_device_map(device_map),
        revision=revision,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise SafeglassesError(
            "the checkpoint lacks weights",
            given=f"{len(missing)} missing in {source}: " + ", ".join(missing[:3]) + (" …" if len(missing) > 3 else ""),
            expected="all weights of the model",
            do="get the checkpoint again; an adapter folder must be merged into its base first",
        )
    return model.eval()


def checked_device_map(device_map: Any) -> Any:
    """Return a device map that exists on this machine.

    Raises:
        SafeglassesError: the name is no device, or the device is not there.
    """
    if device_map is None or isinstance(device_map, dict) or device_map in _SPREADS:
        return device_map
    try:
        device = torch.device(device_map)
    except RuntimeError as error:
        raise _wrong_device(device_map) from error
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
        "xpu": torch.xpu.is_available(),
    }
    if not there.get(device.type, False):
        raise _wrong_device(device_map)
    return device_map


def checked_dtype(dtype: Any) -> Any:
    """Return ``"auto"`` or a floating-point dtype.

    Raises:
        SafeglassesError: neither.
    """
    if dtype == "auto" or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return dtype
    if isinstance(dtype, str) and dtype in _DTYPES:
        return _DTYPES[dtype]
    raise SafeglassesError("not a dtype for weights", given=repr(dtype), expected=f"auto, {', '.join(_DTYPES)}")


def forward_parameters(model: PreTrainedModel) -> frozenset[str]:
    """Return the names of the parameters of the model's forward."""
    return frozenset(inspect.signature(type(model).forward).parameters)


def needs_picture(model: PreTrainedModel) -> bool:
    """Tell whether the model's forward does without no picture (BLIP-2)."""
    pixels = inspect.signature(type(model).forward).parameters.get("pixel_values")
    return pixels is not None and pixels.default is inspect.Parameter.empty


def answer_type(model: PreTrainedModel) -> int:
    """Return the ``token_type_ids`` of a generated token, as the model's own generation goes on from a prompt.

    0 almost everywhere; 1 where a prompt is read both ways and an answer is not (PaliGemma).
    """
    if "token_type_ids" not in forward_parameters(model):
        return 0
    prompt = {"token_type_ids": torch.zeros(1, 1, dtype=torch.long)}
    go_on: Any = model._update_model_kwargs_for_generation
    further = go_on(ModelOutput(), prompt, is_encoder_decoder=False)
    return int(further["token_type_ids"][0, -1])


def _read_by_encoder(config: PreTrainedConfig) -> set[str]:
    """Return the names of what the encoder of an encoder–decoder takes, by its class."""
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(deepcopy(config))
    return set(inspect.signature(type(model.get_encoder()).forward).parameters)


def _not_a_chat_model(source: str, config: PreTrainedConfig) -> SafeglassesError:
    return SafeglassesError(
        "not a vision-language or decoder-only language model",
        given=f"{source} of type {config.model_type!r}",
        expected="a type that AutoModelForImageTextToText or AutoModelForCausalLM loads; of text alone, without an "
        "encoder",
        do="use a chat model such as LLaVA, Qwen-VL, Gemma 3 or Llama",
    )


def _wrong_device(device_map: Any) -> SafeglassesError:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = ["cpu", *(["cuda"] if count else []), *(f"cuda:{index}" for index in range(count))]
    return SafeglassesError(
        "no such device",
        given=repr(device_map),
        expected=", ".join([*_SPREADS[:1], *here]) + " on this machine",
        do="leave device_map out to use the CPU",
    )
