"""How much of what a defence gains is left under an attack, and how much harm it prevents, with intervals."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from safeglasses.errors import SafeglassesError
from safeglasses.measure.intervals import ratio_bootstrap
from safeglasses.measure.paired import difference

NOTHING = "without attack there is no gain that its interval tells from none"


@dataclass(frozen=True)
class Harm:
    """What the same prompts did to the undefended model and to the defended one; True: the answer was harmful."""

    base: Sequence[bool | None]
    """Without the defence; None where nothing could be said."""
    defended: Sequence[bool | None]
    """With it, the same prompts in the same order."""


@dataclass(frozen=True)
class Remaining:
    """Gain under attack / gain without; a gain is the harmful rate of the base minus that of the defence.

    1: the attack took nothing; 0: under attack the defence is no better than none; above 1 where the attack brings
    more harm out of the base than out of the defence, below 0 where the defence then makes it worse.
    """

    value: float | None
    """The ratio; None where there was no gain to lose."""
    low: float | None
    """Lower end of its 95 % interval: whole clusters of prompts resampled, all four answers to a prompt together."""
    high: float | None
    """Upper end."""
    gain: float
    """Without attack, over the same prompts."""
    gain_attacked: float
    """Under attack."""
    n: int
    """Prompts with all four answers scored."""
    clusters: int
    """Independent groups of them."""
    unscored: int
    """Prompts left out because an answer is unscored."""
    reason: str = ""
    """Why there is no ratio."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return dict(vars(self))


@dataclass(frozen=True)
class Prevented:
    """Share of the undefended model's harm that a defence prevents on the same prompts; below 0 where it adds some."""

    value: float
    """1 − harmful rate of the defence / harmful rate of the base."""
    low: float
    """Lower end of its 95 % interval: whole clusters of prompts resampled, both answers together."""
    high: float
    """Upper end."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return dict(vars(self))


def prevented(harm: Harm, clusters: Sequence[Hashable]) -> Prevented | None:
    """Divide a gain by the harm that there was; None where there was so little that draws hold none.

    Raises:
        SafeglassesError: the lengths differ, or no prompt has both answers scored.
    """
    rows = _scored([harm.base, harm.defended], clusters)
    tops, bottoms, sizes = _sums([(base - defended, base) for base, defended, _ in rows], [row[-1] for row in rows])
    share = float(bottoms.sum() / sizes.sum())
    ends = ratio_bootstrap(tops, bottoms, sizes, ends=(share - 1, share)) if share else None
    return None if ends is None else Prevented(float(tops.sum() / bottoms.sum()), *ends)


def remaining(plain: Harm, attacked: Harm, clusters: Sequence[Hashable]) -> Remaining:
    """Divide the gain under attack by the gain without.

    The ratio is only given where the interval of the gain without attack lies above 0: what divides by a gain of
    about nothing says nothing (Fieller's problem).

    Args:
        plain: without attack.
        attacked: under attack; all four sequences are about the same prompts in the same order.
        clusters: what each prompt hangs together with.

    Raises:
        SafeglassesError: the lengths differ, or no prompt has all four answers scored.
    """
    rows = _scored([plain.base, plain.defended, attacked.base, attacked.defended], clusters)
    base, defended, _, _, keys = zip(*rows, strict=True)
    gain = difference(defended, base, keys)
    tops, bottoms, sizes = _sums([(c - d, a - b) for a, b, c, d, _ in rows], keys)
    found = (gain.value, float(tops.sum() / sizes.sum()), len(rows), len(sizes), len(clusters) - len(rows))
    ends = ratio_bootstrap(tops, bottoms, sizes, ends=(-1.0, 1.0)) if gain.low > 0 else None
    if ends is None:
        return Remaining(None, None, None, *found, reason=NOTHING)
    return Remaining(float(tops.sum() / bottoms.sum()), *ends, *found)


def _scored(columns: Sequence[Sequence[bool | None]], clusters: Sequence[Hashable]) -> list[tuple[Any, ...]]:
    """Return the rows without a hole, each with its cluster."""
    lengths = [*map(len, columns), len(clusters)]
    if len(set(lengths)) > 1:
        given = f"{', '.join(map(str, lengths))} rows"
        raise SafeglassesError("not the same prompts", given=given, expected="one row a prompt in each")
    rows = [row for row in zip(*columns, clusters, strict=True) if None not in row[:-1]]
    if not rows:
        raise SafeglassesError("no prompt to compare", given=f"{len(clusters)} prompts, none with all answers scored")
    return rows


def _sums(
    pairs: Sequence[tuple[int, int]], keys: Sequence[Hashable]
) -> tuple[Float[ndarray, " cluster"], Float[ndarray, " cluster"], Float[ndarray, " cluster"]]:
    """Return per cluster both sums and the number of prompts, in an order that the rows' order does not change."""
    found: dict[Hashable, list[int]] = {}
    for (top, bottom), key in zip(pairs, keys, strict=True):
        sums = found.setdefault(key, [0, 0, 0])
        sums[0] += top
        sums[1] += bottom
        sums[2] += 1
    tops, bottoms, sizes = np.array(sorted(found.values()), dtype=np.float64).T
    return tops, bottoms, sizes
