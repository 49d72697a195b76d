"""Dynamic activation patching: a model answers with some neurons' activations taken from another, token by token."""

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from safeglasses.defend.defence import Defence
from safeglasses.errors import SafeglassesError
from safeglasses.find.selection import Selection
from safeglasses.model.hooks import replaced, tap
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM


@dataclass(frozen=True, eq=False)
class Patch:
    """The untouched model with the activations that some neurons have in a defended one on the same tokens.

    Before every forward pass the defended model reads the same tokens, with a key-value cache of its own; what the
    neurons are there is put into the untouched model. What that restores of the defence is what these neurons carry.

    Source: Chen et al. 2024 (arXiv 2406.14144, section 3.2), who patch a base model from its aligned one.
    """

    source: Defence
    """What the defended model wears."""
    neurons: Selection
    """Whose activations are taken over."""

    def __post_init__(self) -> None:
        if not len(self.neurons):
            raise SafeglassesError("nothing to patch", given="an empty set of neurons", expected="at least one neuron")

    @property
    def identity(self) -> str:
        """A hash of what it does."""
        return hashlib.sha256(f"patch {self.source.identity} {self.neurons.identity}".encode()).hexdigest()

    @contextmanager
    def worn(self, target: VLM) -> Iterator[None]:
        """Patch inside the block.

        Raises:
            PartialMatch: a site is missing; nothing is patched then.
            SafeglassesError: what the source's `worn` refuses.
        """
        masks = {site: mask for site, mask in self.neurons.masks.items() if mask.any()}
        fused = next((site for site in masks if target.anatomy.expert(site) is not None), None)
        if fused is not None:
            raise SafeglassesError(
                "neurons of fused experts cannot be patched: in the defended model other tokens may be sent to them",
                given=str(fused),
                expected="neurons of linear maps",
                do="leave the tuned model out, or choose neurons of linear maps",
            )
        target.anatomy.require(*(site.path for site in masks))
        twin = _Twin(target, self.source, masks)
        with self.source.worn(target):
            pass  # refuses now what it would refuse at the first token
        handle = target.model.register_forward_pre_hook(twin.before, with_kwargs=True)
        try:
            with replaced(target.model, target.anatomy, {site: twin.visit(site) for site in masks}):
                yield
        finally:
            handle.remove()


class _Twin:
    """Runs the defended model ahead of the untouched one, and remembers what its neurons were."""

    def __init__(self, vlm: VLM, source: Defence, masks: dict[Site, Tensor]) -> None:
        self._vlm, self._source, self._masks = vlm, source, masks
        self._found: dict[Site, list[Tensor]] = {}  # in the order of calls: some maps are computed several times
        self._cache: Any = None
        self._ahead = False

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the defended model on what the untouched one is about to read."""
        if self._ahead:
            return
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() == 0:
            self._cache = copy.deepcopy(cache)  # a new answer begins
        own = kwargs if cache is None else {**kwargs, "past_key_values": self._cache}
        self._ahead, self._found = True, {}
        try:
            with torch.no_grad(), self._source.worn(self._vlm), tap(module, self._vlm.anatomy, self._masks, self._keep):
                module(*args, **own)
        finally:
            self._ahead = False

    def visit(self, site: Site) -> Callable[[Tensor], Tensor]:
        """Put the remembered activations of a site in the place of the untouched model's."""
        mask = self._masks[site]

        def patched(value: Tensor) -> Tensor:
            if self._ahead:
                return value
            return torch.where(mask.to(value.device), self._found[site].pop(0), value)

        return patched

    def _keep(self, site: Site, value: Tensor) -> None:
        self._found.setdefault(site, []).append(value)
