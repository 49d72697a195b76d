"""Find, check and load a checkpoint: model, processor, clear errors."""

import inspect
import logging
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.processing_utils import ProcessorMixin
from transformers.utils import cached_file, is_torchvision_available

from safeglasses.errors import SafeglassesError
from safeglasses.files import read_json, write_json

_log = logging.getLogger(__name__)
_SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Processor = ProcessorMixin | PreTrainedTokenizerBase


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


def load_processor(source: str, config: PreTrainedConfig, revision: str | None) -> Processor:
    """Load the processor of a vision-language model, or the tokenizer of a text-only one.

    Raises:
        SafeglassesError: files missing, or no chat template.
    """
    auto: Any = _processor_class(config) if is_multimodal(config) else AutoTokenizer
    try:
        processor: Any = auto.from_pretrained(source, revision=revision, trust_remote_code=False)
    except ImportError as error:
        raise SafeglassesError(
            "the checkpoint's processor needs a library that is not installed",
            given=f"{source}: {str(error).strip().splitlines()[0]}",
            expected="torchvision, which transformers demands for some processors",
            do="pip install torchvision",
        ) from error
    except (OSError, ValueError) as error:
        raise SafeglassesError(
            "the checkpoint's processor or tokenizer could not be loaded",
            given=f"{source}: {str(error).splitlines()[0]}",
            expected="tokenizer.json and, for vision-language models, processor_config.json or "
            "preprocessor_config.json beside config.json",
            do="copy these files from the original model",
        ) from error
    tokenizer = tokenizer_of(processor)
    if processor.chat_template is None:
        processor.chat_template = tokenizer.chat_template
    if processor.chat_template is None:
        raise SafeglassesError(
            "the model has no chat template",
            given=source,
            expected="chat_template.jinja beside config.json: how a conversation becomes a prompt",
            do="use the instruction-tuned checkpoint of the model, or save the Jinja template it was trained "
            "with as chat_template.jinja in the folder",
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def tokenizer_of(processor: Processor) -> PreTrainedTokenizerBase:
    """Return the tokenizer, alone or inside a processor."""
    return processor if isinstance(processor, PreTrainedTokenizerBase) else processor.tokenizer


def save_processor(processor: Processor, source: str, revision: str | None, folder: Path) -> None:
    """Write a processor's files, and what the source says about videos even if it was left out at loading.

    Without that part a machine that has torchvision could not load the files.
    """
    processor.save_pretrained(folder)
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        theirs = _kept(source, name, revision)
        if theirs is not None and not (folder / name).exists():
            shutil.copyfile(theirs, folder / name)
    theirs = _kept(source, "processor_config.json", revision)
    ours = folder / "processor_config.json"
    if theirs is not None and ours.exists():
        video = read_json(theirs).get("video_processor")
        written = read_json(ours)
        if video is not None and "video_processor" not in written:
            write_json(ours, {**written, "video_processor": video})


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


def _kept(source: str, name: str, revision: str | None) -> Path | None:
    """Return a file of a checkpoint, if it has it and it is at hand."""
    found = cached_file(
        source,
        name,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _processor_class(config: PreTrainedConfig) -> Any:
    """Return the class to load a processor with.

    transformers demands torchvision for the video half of processors; without torchvision that half is left
    out, since only pictures are used here.
    """
    if is_torchvision_available() or type(config) not in PROCESSOR_MAPPING:
        return AutoProcessor
    known: Any = PROCESSOR_MAPPING[type(config)]
    try:
        parts = [part for part in known.get_attributes() if part != "video_processor"]
    except ImportError:  # a stand-in for a class that needs torchvision as a whole
        return AutoProcessor
    if len(parts) == len(known.get_attributes()):
        return AutoProcessor
    _log.info("torchvision is not installed: loading %s without its video half", known.__name__)
    return type(known.__name__, (known,), {"get_attributes": classmethod(lambda _cls: list(parts))})


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
