"""Shields: a change of weights that is confined to given neurons; worn through hooks, folded, saved as an adapter."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safeglasses.defend.home import FOLDED, Home, check_base, check_widths
from safeglasses.defend.weights import check_foldable
from safeglasses.errors import SafeglassesError
from safeglasses.find.selection import Selection
from safeglasses.model.anatomy import Anatomy, anatomy, module
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM
from safeglasses.tune.change import Change
from safeglasses.tune.config import Mode
from safeglasses.tune.counting import Counts
from safeglasses.tune.folder import Contents, read_folder, write_folder
from safeglasses.tune.routed import check_slices, experts_worn
from safeglasses.tune.stack import stacked


@dataclass(frozen=True, eq=False)
class Shield:
    """What a training changed, which neurons it was confined to, and what it was made from and for.

    >>> with shield.worn(vlm):
    ...     vlm.generate(chats, max_new_tokens=64, temperature=0, seed=0)
    """

    mode: Mode
    """How it was tuned."""
    changes: Mapping[str, Change]
    """What changed, by module relative to the decoder; in fused experts by expert and parameter,
    ``layers.3.mlp.experts.17.gate_up_proj``."""
    neurons: Selection
    """The neurons that were tuned; in ``freeze`` those that were not."""
    base_fingerprint: str
    """Fingerprint of the model that it was made for."""
    counts: Counts
    """How much it moves."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Numbers of the training, JSON-ready."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Losses, what it was made from, and anything else, JSON-ready."""
    home: Home | None = None
    """The base model as files name it."""

    @property
    def identity(self) -> str:
        """SHA-256 of what it does: equal for shields with the same change, to the bit."""
        digest = hashlib.sha256(self.base_fingerprint.encode())
        for path, change in sorted(self.changes.items()):
            for tensor in change.full():
                digest.update(f"{path} {tuple(tensor.shape)} {change.scale!r}".encode())
                digest.update(tensor.double().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def name(self) -> str:
        """What records of folded checkpoints call it."""
        return f"shield ({self.mode})"

    def fitted(self, vlm: VLM) -> "Shield":
        """Check that the shield belongs to a model, and remember how files name it.

        Raises:
            WrongBase: it was made for another model.
            PartialMatch: some module is missing or of another size.
        """
        check_base(vlm, self.base_fingerprint, self.home, "shield")
        self.check_fit(vlm.anatomy)
        return self if self.home is not None else replace(self, home=Home.of(vlm))

    def check_fit(self, parts: Anatomy) -> None:
        """Refuse a model that lacks some of the modules, or has them in other sizes.

        Raises:
            PartialMatch: naming them.
        """
        linear = {path: change for path, change in self.changes.items() if change.part is None}
        widths = {Site(path, "out"): change.out for path, change in linear.items()}
        widths |= {Site(path, "in"): change.into for path, change in linear.items()}
        check_widths(parts, widths, "the shield fits")
        check_slices(parts, self.changes)

    @contextmanager
    def worn(self, target: VLM | nn.Module) -> Iterator[None]:
        """Wear the shield inside the block; after it the model is what it was, bit for bit.

        With glasses worn as well, in whatever order, the shield changes the weights that they scale.

        Args:
            target: a `VLM`, whose fingerprint is checked; or a bare model, whose names and sizes are.

        Raises:
            WrongBase: the model is not the one that it was made for.
            PartialMatch: some module is missing or of another size; nothing is worn then.
        """
        model, parts = (target.model, target.anatomy) if isinstance(target, VLM) else (target, anatomy(target))
        if isinstance(target, VLM):
            check_base(target, self.base_fingerprint, self.home, "shield")
        self.check_fit(parts)
        with ExitStack() as hooks:
            hooks.enter_context(experts_worn(model, parts, self.changes))
            for path, change in self.changes.items():
                if change.part is None:
                    handle = module(model, parts, path).register_forward_hook(_adder(change), prepend=True)
                    hooks.callback(handle.remove)
            yield

    def fold(self, vlm: VLM) -> None:
        """Add the shield to the weights, in place and for good; sums are rounded once.

        The model's config remembers it (``safeglasses_folded``).

        Raises:
            WrongBase: another model, or one that has something made for its base folded in.
            PartialMatch: some module is missing or of another size.
            SafeglassesError: a weight is quantised, shared, or not loaded. The model is as it was then.
        """
        fitted = self.fitted(vlm)
        linear = {path: change for path, change in self.changes.items() if change.part is None}
        fused = stacked(vlm.anatomy, self.changes)
        check_foldable(vlm.model, vlm.anatomy, list(linear), list(fused))
        with torch.no_grad():
            for name, stack in fused.items():
                parameter = vlm.model.get_parameter(name)
                total = parameter.to(torch.float64, copy=True)
                stack.add_to(total, 0)
                parameter.copy_(total.to(parameter.dtype))
            for path, change in linear.items():
                linear = module(vlm.model, vlm.anatomy, path)
                linear.get_parameter("weight").copy_(added(linear, change))
        setattr(vlm.model.config, FOLDED, [*(getattr(vlm.model.config, FOLDED, None) or ()), fitted.folded_record()])

    def folded_record(self) -> dict[str, Any]:
        """Return what a folded model's config says of it."""
        return {
            "kind": "shield",
            "base_fingerprint": self.base_fingerprint,
            "base_source": self.home.source if self.home is not None else None,
            "recipe": self.name,
            "strength": 1.0,
            "n_neurons": len(self.neurons),
        }

    def save(self, folder: str | Path, vlm: VLM | None = None, *, overwrite: bool = False) -> Path:
        """Write the folder that PEFT and `load` read.

        Args:
            folder: where; see `safeglasses.tune.folder` for what is in it.
            vlm: the base model; not needed for a shield that was loaded or just tuned.
            overwrite: replace a folder that is there.

        Raises:
            SafeglassesError: the base model is not known, or the folder exists.
            WrongBase: as in `fitted`.
            PartialMatch: as in `fitted`.
        """
        shield = self if vlm is None else self.fitted(vlm)
        if shield.home is None:
            raise SafeglassesError(
                "the adapter must name the modules of its base model, which this shield does not know",
                do="give the model: shield.save(folder, vlm)",
            )
        contents = Contents(
            mode=shield.mode,
            changes=shield.changes,
            neurons=shield.neurons,
            base_fingerprint=shield.base_fingerprint,
            counts=shield.counts,
            config=shield.config,
            notes=shield.notes,
            home=shield.home,
        )
        return write_folder(Path(folder), contents, vlm, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | Path) -> "Shield":
        """Read a folder that `save` wrote.

        Raises:
            SafeglassesError: no such folder, no shield in it, written by a newer version, or damaged.
            PartialMatch: the adapter is not what the table of neurons and the record say.
        """
        found = read_folder(Path(folder))
        return cls(
            mode=found.mode,
            changes=found.changes,
            neurons=found.neurons,
            base_fingerprint=found.base_fingerprint,
            counts=found.counts,
            config=found.config,
            notes=found.notes,
            home=found.home,
        )


def added(linear: nn.Module, change: Change) -> Tensor:
    """Return a map's weight with a change added: summed in float64, rounded once to the weight's type."""
    from transformers.pytorch_utils import Conv1D

    weight = linear.get_parameter("weight").detach()
    total = weight.to(torch.float64, copy=True)
    change.add_to(total.T if isinstance(linear, Conv1D) else total, 0)
    return total.to(weight.dtype)


def digest_of(neurons: Selection) -> str:
    """Return a SHA-256 of a selection: its sites and their neurons."""
    listed = {str(site): mask.nonzero().flatten().tolist() for site, mask in neurons.masks.items()}
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()


def _adder(change: Change) -> Any:
    cast: dict[torch.device, Change] = {}

    def add(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x: Tensor = args[0]
        if x.device not in cast:
            kind = torch.promote_types(torch.promote_types(change.a.dtype, torch.float32), torch.float32)
            cast[x.device] = change.to(x.device, kind)
        mine = cast[x.device]
        return (output + mine.of(x.to(mine.a.dtype))).to(output.dtype)

    return add
