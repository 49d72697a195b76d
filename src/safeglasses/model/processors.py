"""Load and keep a checkpoint's processor or tokenizer, with or without the libraries that its video half needs."""

import inspect
import logging
import shutil
from pathlib import Path
from types import FunctionType
from typing import Any

from transformers import AutoProcessor, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.processing_utils import ProcessorMixin
from transformers.utils import cached_file, is_torchvision_available

from safeglasses.errors import SafeglassesError
from safeglasses.files import read_json, write_json
from safeglasses.model.loading import is_multimodal

_log = logging.getLogger(__name__)

VIDEO = "video_processor"
"""The part of a processor that prepares videos."""
Processor = ProcessorMixin | PreTrainedTokenizerBase


def load_processor(source: str, config: PreTrainedConfig, revision: str | None) -> Processor:
    """Load the processor of a vision-language model, or the tokenizer of a text-only one.

    Raises:
        SafeglassesError: files missing, or no chat template.
    """
    auto: Any = _processor_class(config) if is_multimodal(config) else AutoTokenizer
    try:
        processor: Any = auto.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (ImportError, AttributeError) as error:
        if isinstance(error, AttributeError) and not issubclass(auto, ProcessorMixin):
            raise  # a class without its video half may read that
        raise SafeglassesError(
            "the checkpoint's processor needs a library that is not installed",
            given=f"{source}: {str(error).strip().splitlines()[0]}",
            expected="the library that transformers demands for this processor",
            do="install the library named above (most often: pip install torchvision)",
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


def without_video_half(processor: Processor) -> bool:
    """Say whether a processor's class has a part for videos that this processor was loaded without."""
    classes = [kind for kind in type(processor).__mro__ if issubclass(kind, ProcessorMixin)]
    return any(VIDEO in kind.get_attributes() for kind in classes) and getattr(processor, VIDEO, None) is None


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


def without_video(known: Any) -> Any:
    """Return a processor class without its video half, which needs torchvision; the class itself if it has none.

    Raises:
        ImportError: the class as a whole needs torchvision.
    """
    every = known.get_attributes()
    parts = [part for part in every if part != VIDEO]
    if len(parts) == len(every):
        return known

    def handed_on(self: Any, *args: Any, **options: Any) -> None:
        options.pop(VIDEO, None)
        kept = (arg for arg, part in zip(args, every, strict=False) if part != VIDEO)
        ProcessorMixin.__init__(self, *kept, **options)

    base = type(ProcessorMixin.__name__, (ProcessorMixin,), {"__init__": handed_on})  # what the class's super() finds
    members = {
        "get_attributes": classmethod(lambda _cls: list(parts)),
        "__init__": _with_default(known.__init__, VIDEO),
        "save_pretrained": ProcessorMixin.save_pretrained,  # one of their own may save files of the video half
    }
    return type(known.__name__, (known, base), members)


def _with_default(function: Any, name: str) -> Any:
    """Return a function whose parameter, the last without a default if it has none, defaults to None.

    A wrapper would not do: transformers reads the code of a processor's ``__init__`` to know what is its own.
    """
    needed = [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    if name not in needed:
        return function
    copied = FunctionType(function.__code__, function.__globals__, function.__name__, None, function.__closure__)
    copied.__defaults__ = (None, *(function.__defaults__ or ()))
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


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
    """Return the class to load a processor with; without torchvision, one without its video half."""
    if is_torchvision_available() or type(config) not in PROCESSOR_MAPPING:
        return AutoProcessor
    known: Any = PROCESSOR_MAPPING[type(config)]
    try:
        found = without_video(known)
    except ImportError:  # a stand-in for a class that needs torchvision as a whole
        return AutoProcessor
    if found is known:
        return AutoProcessor
    _log.info("torchvision is not installed: loading %s without its video half", known.__name__)
    return found
