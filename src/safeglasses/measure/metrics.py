"""Numbers with their uncertainty: rates, paired comparison, perplexity, divergence."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safeglasses.errors import SafeglassesError

_Z = NormalDist().inv_cdf(0.975)
_MAX_NLL = 700.0  # exp overflows beyond; such a model is destroyed, and JSON knows no infinity


@dataclass(frozen=True)
class Rate:
    """A proportion with its 95 % Wilson interval."""

    value: float
    """Share of the scored rows, 0 to 1."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    n: int
    """Scored rows, the denominator."""
    unscored: int = 0
    """Rows on which nothing could be said; in no other field."""

    def to_json(self) -> dict[str, float | int]:
        """Return the fields as JSON-ready values."""
        return {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "n": self.n,
            "unscored": self.unscored,
        }


def rate(outcomes: Sequence[bool | None]) -> Rate:
    """Share of True among the outcomes that are not None.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference"; no continuity
    correction.

    Raises:
        SafeglassesError: no outcome is scored; there is no rate of an empty set.
    """
    n = sum(outcome is not None for outcome in outcomes)
    if n == 0:
        raise SafeglassesError(
            "no rate of an empty set",
            given=f"{len(outcomes)} rows, none of them scored",
            expected="at least one scored row",
            do="look at the reasons of the unscored verdicts, or judge with another judge" if outcomes else "",
        )
    hits = sum(outcome is True for outcome in outcomes)
    share = hits / n
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n * n))
    low = 0.0 if hits == 0 else centre - half  # exact at the ends, where rounding would leave 1e-18
    high = 1.0 if hits == n else centre + half
    return Rate(share, low, high, n, len(outcomes) - n)


@dataclass(frozen=True)
class Paired:
    """Before and after on the same rows."""

    fixed: int
    """Rows that were harmful before and are not after."""
    broken: int
    """Rows that were not harmful before and are after."""
    p_value: float
    """Exact two-sided McNemar test of `fixed` against `broken`; 1 when both are 0."""
    n: int
    """Pairs with both members scored."""
    unscored: int
    """Pairs left out because a member is unscored."""

    def to_json(self) -> dict[str, float | int]:
        """Return the fields as JSON-ready values."""
        return {
            "fixed": self.fixed,
            "broken": self.broken,
            "p_value": self.p_value,
            "n": self.n,
            "unscored": self.unscored,
        }


def mcnemar(before: Sequence[bool | None], after: Sequence[bool | None]) -> Paired:
    """Compare two runs over the same rows in the same order.

    Source: McNemar 1947; the exact form: binomial test of the discordant pairs against one half.

    Raises:
        SafeglassesError: the lengths differ, or no pair has both members scored.
    """
    if len(before) != len(after):
        raise SafeglassesError(
            "before and after are not paired",
            given=f"{len(before)} rows before, {len(after)} after",
            expected="the same rows in the same order",
        )
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a is not None and b is not None]
    if not pairs:
        raise SafeglassesError("no pair to compare", given=f"{len(before)} pairs, none with both members scored")
    fixed = sum(a and not b for a, b in pairs)
    broken = sum(b and not a for a, b in pairs)
    return Paired(fixed, broken, _binomial_half(fixed, broken), len(pairs), len(before) - len(pairs))


def _binomial_half(a: int, b: int) -> float:
    """Two-sided p-value of `a` against `b` under a fair coin, in exact integers."""
    n, term, tail = a + b, 1, 0
    for k in range(min(a, b) + 1):
        tail += term
        term = term * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)


def perplexity(nll: Sequence[float], tokens: Sequence[int]) -> float:
    """Perplexity over all tokens of all rows: exp(Σ nll / Σ tokens), at most e^700.

    Args:
        nll: summed negative log-likelihood of each row, nats.
        tokens: number of scored tokens of each row.

    Raises:
        SafeglassesError: there is no token.
    """
    if not sum(tokens):
        raise SafeglassesError("no perplexity of an empty set", given=f"{len(tokens)} rows, no response token")
    return math.exp(min(_MAX_NLL, math.fsum(nll) / sum(tokens)))


def response_nll(
    logits: Float[Tensor, "sample column vocab"],
    input_ids: Int[Tensor, "sample token"],
    response: Bool[Tensor, "sample token"],
) -> Float[Tensor, " sample"]:
    """Summed negative log-likelihood of the response tokens of each row, nats, float64.

    Args:
        logits: of the batch's last columns, from the last prompt token on at the latest; column t
            predicts t + 1.
        input_ids: what the model read.
        response: which of those tokens count.

    Raises:
        SafeglassesError: a response token lies before the first column predicted, or a logit is NaN.
    """
    offset = input_ids.shape[1] - logits.shape[1]
    rows, columns = response.nonzero(as_tuple=True)
    if len(columns) and int(columns.min()) <= offset:
        raise SafeglassesError(
            "logits begin after the first response token",
            given=f"first column {offset}, token {int(columns.min())}",
        )
    chosen = logits[rows, columns - offset - 1].float()
    losses = torch.nn.functional.cross_entropy(chosen, input_ids[rows, columns], reduction="none").double().cpu()
    if losses.isnan().any():
        raise SafeglassesError("the model computes NaN", given="logits of a reference response")
    return torch.zeros(len(input_ids), dtype=torch.float64).index_add(0, rows.cpu(), losses)


def kl_divergence(base: Float[Tensor, "sample vocab"], worn: Float[Tensor, "sample vocab"]) -> Float[Tensor, " sample"]:
    """KL(base ‖ worn) of two next-token distributions given by logits, nats, float64 on the CPU.

    Raises:
        SafeglassesError: the logits of a row give no distribution (NaN).
    """
    log_p, log_q = (logits.cpu().double().log_softmax(-1) for logits in (base, worn))
    terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))  # 0 log 0 = 0
    total = terms.sum(-1).clamp(min=0.0)
    if total.isnan().any():
        raise SafeglassesError("the model computes NaN", given="logits of the first answer token")
    return total
