"""Take neurons out of a model, to see whether what it does depends on them."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from safeglasses.data.examples import Example
from safeglasses.errors import SafeglassesError
from safeglasses.find.passes import plan
from safeglasses.find.selection import Selection
from safeglasses.model.experts import Experts
from safeglasses.model.hooks import replaced, tap, tap_routed
from safeglasses.model.routes import Routing
from safeglasses.model.routing import by_module
from safeglasses.model.sites import Side, Site
from safeglasses.model.vlm import VLM

How = Literal["scale", "mean", "resample"]


@dataclass(frozen=True, eq=False)
class StandIns:
    """Activations of some tokens of ordinary examples, which may stand where ablated ones were."""

    values: Mapping[Site, Float[Tensor, "token _neuron"]]
    """Per site, the same tokens at all linear maps, at experts some of those sent there; in the model's dtype, on the
    CPU."""

    @classmethod
    def of(
        cls, vlm: VLM, examples: Sequence[Example], sites: Sequence[Site], *, tokens: int = 256, seed: int = 0
    ) -> "StandIns":
        """Run the model over examples and keep some of their tokens, as many of each example as of any other.

        One of fused experts has the tokens that a router sends it: up to `tokens` of those, the first ones met.

        Args:
            vlm: the model.
            examples: what is ordinary: benign prompts with their responses.
            sites: where to look.
            tokens: how many to keep; a little more, where they do not divide evenly.
            seed: of the choice.

        Raises:
            PartialMatch: a site is missing.
            SafeglassesError: no examples, or none of their tokens met an expert.
        """
        if not examples:
            raise SafeglassesError("no examples to take ordinary activations from", expected="at least one")
        generator = torch.Generator().manual_seed(seed)
        share = -(-tokens // len(examples))
        kept: dict[Site, list[Tensor]] = {site: [] for site in sites}
        linear = [site for site in sites if vlm.anatomy.expert(site) is None]
        fused = by_module(vlm.anatomy, sites)
        for rows in plan(vlm, examples):
            batch = vlm.encode([examples[i].chat() for i in rows]).to(vlm.device)
            real = batch.attention_mask.bool().cpu()
            flat = real.flatten().to(vlm.device)
            chosen = [
                (row, int(places[i]))
                for row, places in enumerate(mask.nonzero()[:, 0] for mask in real)
                for i in torch.randperm(len(places), generator=generator)[:share]
            ]
            where = tuple(torch.tensor(axis) for axis in zip(*chosen, strict=True))
            read: dict[Site, Tensor] = {}  # of maps that are computed several times the last call's

            def keep(
                site: Site, value: Tensor, where: tuple[Tensor, ...] = where, read: dict[Site, Tensor] = read
            ) -> None:
                read[site] = value[tuple(axis.to(value.device) for axis in where)].cpu()

            def sort(experts: Experts, side: Side, routing: Routing, value: Tensor, flat: Tensor = flat) -> None:
                mine = fused[experts.path, side]
                for number, part in routing.slices:
                    if number in mine:
                        room = tokens - sum(map(len, kept[mine[number]]))
                        some = flat[routing.row[part].to(flat.device)].nonzero()[:room, 0]
                        kept[mine[number]].append(value[part][some.to(value.device)].cpu())

            wanted: list[tuple[Experts, Side]] = [(vlm.anatomy.experts[path], side) for path, side in fused]
            with (
                torch.no_grad(),
                tap(vlm.model, vlm.anatomy, linear, keep),
                tap_routed(vlm.model, vlm.anatomy, wanted, sort, tokens=real.numel()),
            ):
                vlm.forward(batch, logits_from=batch.ids.shape[1] - 1)
            for site, values in read.items():
                kept[site].append(values)
        unmet = [str(site) for site, found in kept.items() if not any(map(len, found))]
        if unmet:
            raise SafeglassesError(
                "the router sent no token of the ordinary examples to some experts: nothing can stand in for theirs",
                given=f"{len(unmet)} of {len(kept)} sites: {', '.join(unmet[:3])}",
                expected="a token for every expert with a neuron in the set",
                do="give more ordinary examples, or ablate to zero, which needs none: --how zero",
            )
        return cls({site: torch.cat(found) for site, found in kept.items()})


@dataclass(frozen=True, eq=False)
class Ablation:
    """Neurons that are scaled, held at their ordinary mean, or given the activations of other tokens.

    A `Defence` in form; what it takes away may well be one. Source: the three kinds are those of Wang et al. 2022
    (arXiv 2211.00593, section 2) and Chan et al. 2022 (causal scrubbing: resampling).
    """

    neurons: Selection
    """Which are ablated."""
    how: How = "scale"
    """``scale`` multiplies by `factor`; ``mean`` puts the mean of the stand-ins in their place; ``resample`` the
    activations of one stand-in token, drawn anew for every token, the same for all linear maps."""
    factor: float = 0.0
    """Only for ``scale``: 0 is zero ablation, 1 changes nothing, above 1 amplifies."""
    stand_ins: StandIns | None = None
    """Needed by ``mean`` and ``resample``."""
    seed: int = 0
    """Of the tokens that ``resample`` draws where the caller seeds nothing (`VLM.generate` does)."""

    def __post_init__(self) -> None:
        if not len(self.neurons):
            raise SafeglassesError("nothing to ablate", given="an empty set of neurons", expected="at least one neuron")
        if self.how == "scale":
            return
        known = self.stand_ins.values if self.stand_ins is not None else {}
        missing = [str(site) for site in self._sites if site not in known]
        if missing:
            raise SafeglassesError(
                f"{self.how} ablation needs ordinary activations of every site",
                given=f"none of {', '.join(missing[:3])}",
                do="make them with StandIns.of(vlm, benign examples, sites)",
            )

    @property
    def _sites(self) -> list[Site]:
        return [site for site, mask in self.neurons.masks.items() if mask.any()]

    @property
    def identity(self) -> str:
        """A hash of what it does."""
        digest = hashlib.sha256(f"{self.how} {self.factor!r} {self.seed} {self.neurons.identity}".encode())
        if self.how != "scale" and self.stand_ins is not None:
            for site in self._sites:
                digest.update(self.stand_ins.values[site][:, self.neurons.masks[site]].float().numpy().tobytes())
        return digest.hexdigest()

    @contextmanager
    def worn(self, target: VLM) -> Iterator[None]:
        """Ablate inside the block.

        Raises:
            PartialMatch: a site is missing; nothing is ablated then.
            SafeglassesError: a site has another width.
        """
        masks = {site: self.neurons.masks[site] for site in self._sites}
        for site, mask in masks.items():
            if len(mask) != target.anatomy.width(site):
                raise SafeglassesError(
                    "the neurons do not fit their site",
                    given=f"{len(mask)} at {site}",
                    expected=f"{target.anatomy.width(site)}",
                    do="use neurons found in this model",
                )
        known = self.stand_ins.values if self.stand_ins is not None else {}
        draw = _Draw({site: len(values) for site, values in known.items()})
        visits = {site: self._visit(site, mask, draw) for site, mask in masks.items()}
        with torch.random.fork_rng(devices=[]), replaced(target.model, target.anatomy, visits):
            torch.manual_seed(self.seed)
            yield

    def _visit(self, site: Site, mask: Tensor, draw: "_Draw") -> Callable[[Tensor], Tensor]:
        if self.how == "scale":
            row = torch.where(mask, self.factor, 1.0)
            return lambda value: value * row.to(value.device, value.dtype)
        if self.stand_ins is None:
            raise AssertionError("checked before")
        stand = self.stand_ins.values[site]
        if self.how == "mean":
            mean = stand.float().mean(0)
            return lambda value: torch.where(mask.to(value.device), mean.to(value.device, value.dtype), value)

        def resample(value: Tensor) -> Tensor:
            others = stand[draw.rows(site, value.shape[:-1])].to(value.device, value.dtype)
            return torch.where(mask.to(value.device), others, value)

        return resample


class _Draw:
    """Which stand-in each token gets: one draw for all linear maps of a forward pass, one for every expert."""

    def __init__(self, counts: Mapping[Site, int]) -> None:
        self._counts = counts
        self._seen: set[Site] = set()
        self._rows = torch.empty(0, dtype=torch.int64)

    def rows(self, site: Site, shape: tuple[int, ...]) -> Tensor:
        """Return an index per token; drawn anew when a site comes again."""
        if site.fused:
            return torch.randint(self._counts[site], shape)
        if site in self._seen or not self._seen or self._rows.shape != shape:
            self._seen, self._rows = set(), torch.randint(self._counts[site], shape)
        self._seen.add(site)
        return self._rows
