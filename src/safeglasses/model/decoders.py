"""Find the language decoder inside a model, and its list of layers."""

from typing import Any

from torch import nn

from safeglasses.errors import SafeglassesError
from safeglasses.model.blocks import ATTENTION

# The only lines by type: where a model's own get_decoder() does not lead to the language decoder.
_DECODERS = {
    "pi0": "model.vlm.language_model",  # get_decoder() returns the pair of language model and action expert
}


def find_decoder(model: nn.Module) -> tuple[nn.Module, str]:
    """Return the decoder and its path: what ``get_decoder()`` says, or the table's line.

    Raises:
        SafeglassesError: there is none, or it is not one of the model's own modules.
    """
    config: Any = getattr(model, "config", None)
    named = _DECODERS.get(getattr(config, "model_type", ""))
    if named is not None:
        return model.get_submodule(named), named
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) and config is not None else None
    path = next((name for name, child in model.named_modules() if child is decoder), None)
    if not isinstance(decoder, nn.Module) or path is None:
        raise SafeglassesError(
            "no language decoder found",
            given=type(model).__name__,
            expected="a transformers model whose get_decoder() returns one of its own modules",
            do="load the model with safeglasses.load, or pass the whole model, not a part of it",
        )
    return decoder, path


def find_encoder(model: nn.Module) -> str | None:
    """Return the path of an encoder–decoder's encoder, which reads the prompt; None: the model has none.

    Raises:
        SafeglassesError: it has one that is not one of its own modules.
    """
    config: Any = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return None
    get_encoder: Any = getattr(model, "get_encoder", None)
    encoder = get_encoder() if callable(get_encoder) else None
    path = next((name for name, child in model.named_modules() if child is encoder), None)
    if not path:
        raise SafeglassesError(
            "no encoder found",
            given=f"{type(model).__name__}, an encoder–decoder",
            expected="a transformers model whose get_encoder() returns one of its own modules",
            do="load the model with safeglasses.load, or pass the whole model, not a part of it",
        )
    return path


def by_table(model_type: str) -> bool:
    """Tell whether a type's decoder stands in the table, and does not follow from structure."""
    return model_type in _DECODERS


def find_layers(model: nn.Module, decoder: nn.Module) -> tuple[str, int, int]:
    """Return the path of the decoder's list of layers, their number, and the width of the residual stream.

    The list is the outermost as long as the text config's ``num_hidden_layers``. Where an encoder lies in the
    decoder's module as well (BART), it is looked for in the module's own decoder. Where the config counts the
    encoder's layers only, the one list of layers with attention is taken.

    Raises:
        SafeglassesError: there is no such list.
    """
    config: Any = model.config
    own = getattr(decoder, "config", None)
    text = config.get_text_config(decoder=True)
    if not isinstance(getattr(text, "hidden_size", None), int) and own is not None:
        text = own
    n_layers, hidden_size = getattr(text, "num_hidden_layers", None), getattr(text, "hidden_size", None)
    prefix, root = _inner(decoder)
    lists = [
        (f"{prefix}.{path}" if prefix else path, child)
        for path, child in root.named_modules()
        if isinstance(child, nn.ModuleList) and len(child)
    ]
    fitting = sorted((found for found in lists if len(found[1]) == n_layers), key=lambda found: found[0].count("."))
    attending = [found for found in _outermost(lists) if all(_attends(layer) for layer in found[1])]
    if not isinstance(hidden_size, int) or not (fitting or len(attending) == 1):
        raise SafeglassesError(
            "the decoder's layers were not found",
            given=f"{type(decoder).__name__} with num_hidden_layers={n_layers}, hidden_size={hidden_size}",
            expected="one ModuleList as long as the text config's num_hidden_layers",
            do="use a decoder-only transformer whose layers are separate modules",
        )
    path, layers = fitting[0] if fitting else attending[0]
    return path, len(layers), hidden_size


def other_layers(decoder: nn.Module, layers_path: str) -> dict[str, int]:
    """Return the lengths of the outermost lists of modules with attention that are not the decoder's layers."""
    lists = [
        (path, child) for path, child in decoder.named_modules() if isinstance(child, nn.ModuleList) and len(child)
    ]
    return {
        path: len(layers)
        for path, layers in _outermost(lists)
        if path != layers_path and all(_attends(layer) for layer in layers)
    }


def _inner(decoder: nn.Module) -> tuple[str, nn.Module]:
    get_decoder = getattr(decoder, "get_decoder", None)
    inner = get_decoder() if callable(get_decoder) else decoder
    path = next((name for name, child in decoder.named_modules() if child is inner), None)
    return ("", decoder) if path is None or not isinstance(inner, nn.Module) else (path, inner)


def _outermost(lists: list[tuple[str, nn.ModuleList]]) -> list[tuple[str, nn.ModuleList]]:
    return [found for found in lists if not any(found[0].startswith(f"{other}.") for other, _ in lists)]


def _attends(layer: nn.Module) -> bool:
    return any(
        ATTENTION.search(name) or ATTENTION.search(type(child).__name__) for name, child in layer.named_modules()
    )
