"""The anatomy of every type that transformers registers, from configs alone: no weights, no downloads."""

import tomllib
from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from safeglasses.errors import SafeglassesError
from safeglasses.model.anatomy import Anatomy, anatomy


@dataclass(frozen=True)
class Entry:
    """One type: its model without weights, and where its parts are."""

    model_type: str
    """As in ``config.json``."""
    class_name: str
    """The model's class; empty if it does not build."""
    model: PreTrainedModel | None
    """On the meta device."""
    anatomy: Anatomy | None
    """Where its parts are; None if they were not located."""
    note: str
    """Why the default config was not enough; empty if it was."""
    reason: str
    """Why there is no model, or no anatomy."""


def picture_types() -> tuple[str, ...]:
    """Return the types that transformers registers as image-text-to-text, sorted."""
    return tuple(sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES))


def is_type(name: str) -> bool:
    """Tell whether transformers registers a type of this name that writes text."""
    return name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES or name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def config_of(model_type: str) -> tuple[PreTrainedConfig, str]:
    """Return a type's default config, or our own where that builds no model, and why."""
    own = _own_configs().get(model_type, {})
    config = CONFIG_MAPPING[model_type](**deepcopy(own.get("config", {})))
    for name, values in own.get("replace", {}).items():
        given = dict(values)
        vars(config)[name] = CONFIG_MAPPING[given.pop("model_type")](**given)  # setattr() would check the class
    return config, own.get("why", "")


def on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model of a config without weights.

    Raises:
        SafeglassesError: transformers registers no model that writes text for it.
    """
    found = _class_of(config)
    if found is None:
        raise SafeglassesError(
            "not a model that writes text",
            given=f"config of type {config.model_type!r}",
            expected="a type that transformers registers for image-text-to-text or causal language modelling",
        )
    with torch.device("meta"), init.meta_device_safe_creation_ops(), init.no_init_weights():
        return found(deepcopy(config)).eval()


def entry(model_type: str) -> Entry:
    """Build one type's model and locate its parts.

    Raises:
        SafeglassesError: transformers registers no such type.
    """
    if not is_type(model_type):
        raise SafeglassesError(
            "no such type of model",
            given=repr(model_type),
            expected=f"one of {len(picture_types())} types with pictures, such as {picture_types()[0]}, or of the "
            "text-only types of the installed transformers",
        )
    config, note = config_of(model_type)
    model = on_meta(config)
    try:
        return Entry(model_type, type(model).__name__, model, anatomy(model), note, "")
    except SafeglassesError as error:
        return Entry(model_type, type(model).__name__, model, None, note, f"{error.what}: {error.given}")


def picture_tokens(config: PreTrainedConfig) -> str:
    """Say how the tokens that stand for pictures are told from others, as far as a config tells."""
    known = config.to_dict()
    for name in ("image_token_id", "image_token_index"):
        if isinstance(getattr(config, name, None), int):
            return f"`input_ids == config.{name}`"
        if name in known:
            return f"`input_ids == config.{name}`, which has no default"
    if config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return "no pictures"
    return "no picture token in the config"


def _class_of(config: PreTrainedConfig) -> Any:
    for known in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        with suppress(KeyError):  # not `in`: of types that share a config it knows the first only
            found = known[type(config)]
            return found[0] if isinstance(found, tuple) else found
    return None


@cache
def _own_configs() -> Mapping[str, Any]:
    return tomllib.loads(files("safeglasses.model").joinpath("architectures.toml").read_text(encoding="utf-8"))
