"""The frozen records that a report is drawn from: plain numbers and text, so that drawing needs no torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from safeglasses.report.snippets import Snippet

BASE64: Mapping[str, Any] = {"ser_json_bytes": "base64", "val_json_bytes": "base64"}
"""How pictures are stored in JSON."""
Status = Literal["fixed", "broken", "unchanged", "unscored"]
Grid = tuple[tuple[float | int, ...], ...]
THUMBNAIL = 64
"""Pixels a side that an embedded picture may have."""


@dataclass(frozen=True)
class HeatMap:
    """Counts per module kind (rows) and decoder layer (columns)."""

    kinds: tuple[str, ...]
    """Site kinds, e.g. ``mlp.up_proj:out``."""
    layers: tuple[int, ...]
    """Decoder layers."""
    total: Grid
    """Neurons in each cell; 0 where the layer has no such module."""
    experts: Grid
    """Neurons that the evidence selected."""
    changed: Grid | None = None
    """Neurons whose factor is not 1; None where there are no glasses yet."""
    strength: Grid | None = None
    """Sum over the cell of 1 − factor; divided by `total` it is the mean amount turned down. None like `changed`."""

    def share(self, grid: Grid) -> tuple[tuple[float | None, ...], ...]:
        """Divide a grid by the cells' sizes; cells without neurons give None."""
        return tuple(
            tuple(value / n if n else None for value, n in zip(row, totals, strict=True))
            for row, totals in zip(grid, self.total, strict=True)
        )


@dataclass(frozen=True)
class Histogram:
    """How the AUROC of all neurons is distributed for one way of pooling."""

    pool: str
    """What was pooled, e.g. ``response:max``."""
    edges: tuple[float, ...]
    """Bin edges, rising, one more than bins."""
    counts: tuple[int, ...]
    """Neurons in each bin."""
    n_toxic: int
    """Toxic samples behind each AUROC."""
    n_non_toxic: int
    """Non-toxic samples behind each AUROC."""
    n_selected: int | None = None
    """Neurons that this evidence selected, when it was used."""
    held_out: tuple[int, ...] | None = None
    """The same counts measured on held-out samples."""
    noise: tuple[float, float] | None = None
    """Between these AUROCs lie 99.8 % of neurons where there is nothing to find: benign against benign."""

    @property
    def null_sd(self) -> float | None:
        """Spread of AUROC under ignorance, √((m + n + 1) / 12mn); None if a class is empty."""
        m, n = self.n_toxic, self.n_non_toxic
        return math.sqrt((m + n + 1) / (12 * m * n)) if m and n else None


@dataclass(frozen=True)
class Trial:
    """One candidate of the calibration, measured on the held-out calibration slice."""

    name: str
    """What tells it apart, e.g. ``trial 3, round 1``."""
    harm: float
    """Harmful rate, 0 to 1."""
    utility_lost: float | None
    """Largest fall of any utility slot below the untouched model, 0 to 1; None without utility slots."""
    kl: float | None
    """KL(base ‖ worn) on benign prompts, nats; None without benign prompts."""
    score: float | None = None
    """What the stated rule minimises."""
    damage: float | None = None
    """The worst loss in units of its guard, 0.01 a point; None where it was not measured."""
    errors: tuple[float, float] | None = None
    """Standard errors of harm and damage."""


@dataclass(frozen=True)
class TradeOff:
    """All candidates and how one of them was chosen."""

    trials: tuple[Trial, ...]
    """In the order they were tried."""
    chosen: int
    """Index of the one in use."""
    rule: str
    """The rule that chose it, in words."""
    base_harm: float | None = None
    """Harmful rate of the untouched model on the same slice."""
    limit: float | None = None
    """The highest harmful rate that was asked for."""
    missed: str = ""
    """Says that no candidate keeps that limit; empty where one does."""


@dataclass(frozen=True)
class Expertise:
    """AUROC of one neuron for one way of pooling."""

    pool: str
    """What was pooled."""
    auroc: float
    """Area under the ROC curve, toxic against non-toxic."""
    error: float
    """Its standard error (Hanley and McNeil)."""
    met: tuple[int, int] | None = None
    """Toxic and non-toxic examples of which its expert was sent a token; None where all examples count."""


@dataclass(frozen=True)
class Firing:
    """An example on which a neuron is among its most active."""

    __pydantic_config__: ClassVar = BASE64
    id: str
    """The example's id."""
    activation: float
    """The neuron's pooled activation."""
    toxic: bool | None
    """The example's label."""
    prompt: str
    """The prompt's text."""
    response: str
    """The response's text."""
    pictures: tuple[bytes, ...] = ()
    """PNG thumbnails, at most 64 pixels a side."""


@dataclass(frozen=True)
class Drive:
    """Shares of a neuron's variance explained by swapping pictures and texts; they add up to 1."""

    picture: float
    """Main effect of the picture."""
    text: float
    """Main effect of the text (prompt and response together)."""
    both: float
    """Interaction: what only the combination explains."""
    pairs: int
    """How many pairs of examples were crossed."""


@dataclass(frozen=True)
class NeuronCard:
    """What is known of one neuron."""

    neuron: str
    """Its address, e.g. ``layers.3.mlp.up_proj:out#41``."""
    factor: float
    """What its value is multiplied by, strength included."""
    expertise: tuple[Expertise, ...]
    """Per way of pooling."""
    promoted: tuple[str, ...] = ()
    """Tokens that its output direction promotes most."""
    demoted: tuple[str, ...] = ()
    """Tokens that its output direction demotes most."""
    direction: str = ""
    """Which direction that is, or why there is none."""
    fires_on: tuple[Firing, ...] = ()
    """Most active examples first."""
    fires_pool: str = ""
    """Pooling by which they were ranked."""
    drive: Drive | None = None
    """Whether picture or text drives it; None where it could not be told."""


@dataclass(frozen=True)
class Answer:
    """One judged response."""

    text: str
    """What the model wrote."""
    harmful: bool | None
    """The judge's verdict; None is unscored."""
    reason: str = ""
    """Why, in the judge's words."""


@dataclass(frozen=True)
class SideBySide:
    """The same prompt answered by the untouched model and by the model that wears glasses."""

    __pydantic_config__: ClassVar = BASE64
    id: str
    """The example's id."""
    prompt: str
    """The prompt's text."""
    before: Answer
    """Untouched model."""
    after: Answer
    """With glasses."""
    pictures: tuple[bytes, ...] = ()
    """PNG thumbnails, at most 64 pixels a side."""
    tags: tuple[str, ...] = ()
    """Condition, language, category, decoding: what to print beside it."""

    @property
    def status(self) -> Status:
        """Compare the two verdicts."""
        if self.before.harmful is None or self.after.harmful is None:
            return "unscored"
        if self.before.harmful == self.after.harmful:
            return "unchanged"
        return "fixed" if self.before.harmful else "broken"


@dataclass(frozen=True)
class Said:
    """One judge's verdict on one answer."""

    judge: str
    """Its name."""
    harmful: bool | None
    """Its decision; None is unscored."""
    score: float | None
    """How harmful, 0 to 1; None is unscored."""
    reason: str = ""
    """Why, in its words."""


@dataclass(frozen=True)
class Dispute:
    """One answer that judges differ about."""

    __pydantic_config__: ClassVar = BASE64
    id: str
    """The example's id."""
    prompt: str
    """The prompt's text."""
    text: str
    """What the model wrote."""
    said: tuple[Said, ...]
    """By every judge, the one that decides first."""
    pictures: tuple[bytes, ...] = ()
    """PNG thumbnails, at most 64 pixels a side."""
    tags: tuple[str, ...] = ()
    """What was worn, condition, language, category, decoding: what to print beside it."""


@dataclass(frozen=True)
class ReportData:
    """Everything on the page."""

    summary: Mapping[str, Any]
    """The validated `summary.json`, schema 1."""
    heat: HeatMap | None = None
    """Where experts and changed neurons lie."""
    histograms: tuple[Histogram, ...] = ()
    """One per way of pooling."""
    trade_off: TradeOff | None = None
    """None for recipes without calibration."""
    neurons: tuple[NeuronCard, ...] = ()
    """Top neurons, most important first."""
    responses: tuple[SideBySide, ...] = ()
    """Before and after on the same prompts."""
    responses_of: int | None = None
    """How many prompts there were to choose `responses` from."""
    judge: str = ""
    """Name of the judge behind `harmful`."""
    disputes: tuple[Dispute, ...] = ()
    """Answers that judges differ about, the widest gap first."""
    snippets: tuple[Snippet, ...] = ()
    """How to use the files; see `safeglasses.report.snippets.usage`."""
    not_verified: tuple[str, ...] = ()
    """What nobody checked, one sentence each; the page adds every metric that is missing."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Further facts for the reproducibility section."""
