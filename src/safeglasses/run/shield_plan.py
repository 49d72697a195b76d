"""What a run of `shield` does, beside its data, and at which neurons; refused before long work."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch

from safeglasses.find.contrasting import Tokens, feed_forward_sites
from safeglasses.find.selection import Selection
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM
from safeglasses.progress import Progress
from safeglasses.tune.config import TuneConfig
from safeglasses.tune.counting import count
from safeglasses.tune.layers import carried_by_peft

ShieldMode = Literal["lora", "rows", "freeze", "amplify"]
Transfer = Literal["none", "zero-shot", "matrix"]


@dataclass(frozen=True, kw_only=True)
class ShieldPlan:
    """What a run does, beside its data."""

    mode: ShieldMode = "lora"
    """``lora`` (the paper's), ``rows``, ``freeze`` (SafeNeuron) or ``amplify`` (nothing is trained)."""
    rule: str = "precise-shield"
    """How neurons are found; `safeglasses.find.rules.RULES`."""
    share: float | None = None
    """p of the rule; None: as the rule says."""
    tokens: Tokens = "last"
    """Over which tokens activations are taken."""
    controls: int = 3
    """Random sets of neurons that are tuned in the same way, each from another seed."""
    transfer: Transfer = "zero-shot"
    """``zero-shot``: also tune on English alone (else the first language), its text-dominant requests and all of them;
    ``matrix``: neurons and data of every two cells of English and the last language; ``none``."""
    robustness: bool = True
    """Measure again after pruning, benign fine-tuning and rounding to int8; needs the model twice in memory."""
    tune: TuneConfig = TuneConfig()  # noqa: RUF009  (frozen)
    """Numbers of every training."""


def sites_for(plan: ShieldPlan, vlm: VLM, show: Progress) -> tuple[Site, ...] | None:
    """Return where neurons are looked for if an adapter cannot hold changes of all of them; None: everywhere.

    Raises:
        SafeglassesError: the model cannot be tuned in this way.
    """
    every = feed_forward_sites(vlm)
    if plan.mode == "amplify":
        return None
    carried = carried_by_peft(vlm.model, vlm.anatomy, every)
    one_each = Selection({site: torch.arange(vlm.anatomy.width(site)) == 0 for site in carried})
    count(vlm.model, one_each, mode=plan.mode, config=plan.tune)
    if carried == every:
        return None
    left = left_out(vlm, carried)
    more = f" and {len(left) - 1} more" if len(left) > 1 else ""
    show.say(
        f"neurons of {left[0]}{more} are left out: in a {vlm.model.config.model_type} PEFT takes the maps that make "
        "them for experts"
    )
    return carried


def left_out(vlm: VLM, sites: Collection[Site] | None) -> list[str]:
    """Return the output maps whose neurons are not among those that are looked at, see `sites_for`."""
    return [] if sites is None else [site.path for site in feed_forward_sites(vlm) if site not in set(sites)]
