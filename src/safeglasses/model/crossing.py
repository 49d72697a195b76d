"""Cross-attention, told by names and signatures: which maps read other tokens than the decoder's own."""

import inspect
import re

from torch import nn

CROSS = re.compile(r"cross_?att|encoder_?(decoder_?)?att|encdecatt", re.IGNORECASE)
_KEYS = re.compile(r"(k|v|kv|key|value)(_proj)?", re.IGNORECASE)


def is_key(path: str) -> bool:
    """Tell whether a map makes keys or values, by the last part of its path."""
    return _KEYS.fullmatch(path.rpartition(".")[2]) is not None


def merges(decoder: nn.Module, path: str) -> bool:
    """Tell whether a map's attention reads the decoder's tokens and an encoder's at once (T5Gemma 2).

    Its forward cannot be called without the encoder's states; cross-attention of its own also serves as self-attention.
    """
    parameters = inspect.signature(type(decoder.get_submodule(path.rpartition(".")[0])).forward).parameters
    wanted = parameters.get("encoder_hidden_states")
    return wanted is not None and wanted.default is inspect.Parameter.empty
