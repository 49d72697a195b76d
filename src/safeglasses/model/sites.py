"""Addresses of neurons: a `Site` is one side of one linear map of the language decoder."""

import re
from dataclasses import dataclass
from typing import Literal

from safeglasses.errors import SafeglassesError

Side = Literal["in", "out"]
_TEXT = re.compile(r"(?P<path>[A-Za-z_][\w.]*):(?P<side>in|out)")
_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.)")


@dataclass(frozen=True, order=True)
class Site:
    """The input or output side of one linear map, addressed relative to the decoder.

    Relative addresses outlive the nesting of wrappers: the same text names the same neurons whether the
    decoder stands alone or inside a vision-language model.
    """

    path: str
    """Module path below the decoder, e.g. ``layers.12.mlp.down_proj``."""
    side: Side
    """``in``: the vector the map reads; ``out``: the vector it writes (bias included)."""

    def __str__(self) -> str:
        return f"{self.path}:{self.side}"

    @classmethod
    def parse(cls, text: str) -> "Site":
        """Read ``layers.12.mlp.down_proj:in``.

        Raises:
            SafeglassesError: the text is no site.
        """
        match = _TEXT.fullmatch(text)
        if match is None:
            raise SafeglassesError(
                "not a site address",
                given=repr(text),
                expected="PATH:in or PATH:out, e.g. layers.0.mlp.up_proj:out",
            )
        return cls(match["path"], "in" if match["side"] == "in" else "out")

    @property
    def layer(self) -> int:
        """Index of the decoder layer (-1 outside any layer)."""
        match = _LAYER.search(self.path)
        return int(match[1]) if match else -1

    @property
    def kind(self) -> str:
        """The address without its layer: ``mlp.down_proj:in``; one row of the report's heat map."""
        match = _LAYER.search(self.path)
        return f"{self.path[match.end() + 1 :] if match else self.path}:{self.side}"

    def neuron(self, index: int) -> str:
        """Text form of one neuron: ``layers.12.mlp.down_proj:in#4077``."""
        return f"{self}#{index}"
