"""Addresses of neurons: a `Site` is one side of one map of the language decoder, or of one expert among fused ones."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from safeglasses.errors import SafeglassesError

Side = Literal["in", "out", "gate", "up"]
SIDES: tuple[Side, ...] = get_args(Side)
_TEXT = re.compile(r"(?P<path>/?[A-Za-z_]\w*(?:\.\w+)*):(?P<side>in|out|gate|up)")
_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.)")
_EXPERT = re.compile(r"(?:^|\.)(?P<list>\w*experts?\w*)\.(?P<number>\d+)(?=\.|$)", re.IGNORECASE)


@dataclass(frozen=True, order=True)
class Site:
    """One side of one linear map, or of one expert of a fused-experts module, addressed relative to the decoder.

    Relative addresses outlive the nesting of wrappers: the same text names the same neurons whether the
    decoder stands alone or inside a vision-language model.

    A linear map has ``in`` and ``out``. One of fused experts, ``layers.3.mlp.experts.17``, is a whole feed-forward
    block in slices of larger tensors: ``in`` is what its down projection reads (its neurons), ``out`` what that
    writes before the routing weight, ``gate`` and ``up`` what the two halves of its first map write before the
    activation. They are what ``down_proj:in``, ``down_proj:out``, ``gate_proj:out`` and ``up_proj:out`` would be.

    Maps beyond the decoder's layers (vision tower, projector, encoder) are addressed by their path in the whole model,
    behind a slash: ``/model.multi_modal_projector.linear_1:out``.

    Sites sort as text; `Anatomy.sites` gives the model's own order.
    """

    path: str
    """Module path below the decoder, e.g. ``layers.12.mlp.down_proj`` or ``layers.12.mlp.experts.17``; behind a slash
    below the model."""
    side: Side
    """``in``: the vector the map reads; ``out``: the vector it writes (bias included); ``gate``, ``up``: see above."""

    def __str__(self) -> str:
        return f"{self.path}:{self.side}"

    @classmethod
    def parse(cls, text: str) -> "Site":
        """Read ``layers.12.mlp.down_proj:in`` or ``layers.12.mlp.experts.17:up``.

        Raises:
            SafeglassesError: the text is no site.
        """
        match = _TEXT.fullmatch(text)
        if match is None:
            raise SafeglassesError(
                "not a site address",
                given=repr(text),
                expected="PATH:in or PATH:out, e.g. layers.0.mlp.up_proj:out; of fused experts also "
                "layers.0.mlp.experts.17:gate and :up; beyond the decoder /model.vision_tower.layers.0.mlp.fc1:out",
            )
        return cls(match["path"], next(side for side in SIDES if side == match["side"]))

    @property
    def outside(self) -> bool:
        """Whether the map lies beyond the decoder's layers."""
        return self.path.startswith("/")

    @property
    def layer(self) -> int:
        """Index of the layer, the decoder's or that of another list (-1 outside any layer)."""
        match = _LAYER.search(self.path)
        return int(match[1]) if match else -1

    @property
    def expert(self) -> int | None:
        """Number of the expert the site belongs to, fused or a module of its own; None outside experts."""
        match = _EXPERT.search(self._inside_layer())
        return int(match["number"]) if match else None

    @property
    def fused(self) -> bool:
        """Whether the address is of one of fused experts, not of a map inside an expert that is a module."""
        inner = self._inside_layer()
        match = _EXPERT.search(inner)
        return match is not None and match.end() == len(inner)

    @property
    def kind(self) -> str:
        """The address without its layer and expert: ``mlp.down_proj:in``; one row of the report's heat map.

        Beyond the decoder what stands before the layer is kept: ``/model.vision_tower.layers.mlp.fc1:out``.
        """
        match = _LAYER.search(self.path)
        before = self.path[: match.start() + 1] if self.outside and match else ""
        return f"{before}{_EXPERT.sub(_without_number, self._inside_layer(), count=1)}:{self.side}"

    @property
    def halves(self) -> tuple[Side, Side] | None:
        """What the two halves of a gate-and-up map's output are called, in their order; None elsewhere.

        The name tells the order: ``gate_up_proj``. `Anatomy.halves` also looks at widths.
        """
        leaf = self.path.rpartition(".")[2]
        gate, up = leaf.find("gate"), leaf.find("up")
        if self.side != "out" or min(gate, up) < 0:
            return None
        return ("gate", "up") if gate < up else ("up", "gate")

    def neuron(self, index: int) -> str:
        """Text form of one neuron: ``layers.12.mlp.down_proj:in#4077``; for people there is `address`."""
        return f"{self}#{index}"

    def address(self, index: int, width: int) -> str:
        """Text form of one neuron, in a gate-and-up map by half: ``layers.0.mlp.gate_up_proj:up#3``.

        Args:
            index: of the neuron.
            width: neurons of the site.
        """
        if self.halves is None or width % 2:
            return self.neuron(index)
        return f"{self.path}:{self.halves[2 * index >= width]}#{index % (width // 2)}"

    def _inside_layer(self) -> str:
        match = _LAYER.search(self.path)
        return self.path[match.end() + 1 :] if match else self.path


def _without_number(match: re.Match[str]) -> str:
    return match[0].removesuffix("." + match["number"])
