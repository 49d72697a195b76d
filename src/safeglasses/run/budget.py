"""Turn a time budget into counts, once: counts make a rerun give the same glasses, seconds would not."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from safeglasses.data.examples import Example
from safeglasses.errors import SafeglassesError
from safeglasses.measure.calibrate import Effort
from safeglasses.measure.choosing import SHARES
from safeglasses.measure.likelihood import force
from safeglasses.measure.respond import Decoding, respond
from safeglasses.model.vlm import VLM

_UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Plan:
    """How much calibration a run does."""

    trials: int = 1
    """Discrete choices tried: the first is the default one."""
    effort: Effort = field(default_factory=Effort)
    """Work per trial."""


# From the least that calibrates at all to what a patient user may want; each step is dearer than the one before.
LADDER = (
    Plan(1, Effort(1, 15, 64, 16)),
    Plan(1, Effort(2, 20, 128, 24)),
    Plan(1, Effort(2, 40, 192, 24)),
    Plan(1, Effort(2, 50, 256, 24)),
    Plan(),
    Plan(2, Effort(3, 60, 512, 32)),
    Plan(4, Effort(3, 60, 512, 32)),
    Plan(8, Effort(3, 60, 512, 32)),
    Plan(16, Effort(4, 80, 512, 32)),
)


def parse_budget(text: str) -> float:
    """Read ``90s``, ``5m`` or ``2h`` as seconds.

    Raises:
        SafeglassesError: the text is no duration.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if match is None or float(match[1]) <= 0:
        raise SafeglassesError("not a time budget", given=repr(text), expected="a duration such as 90s, 5m or 2h")
    return float(match[1]) * _UNITS[match[2] or "s"]


def plan_for(vlm: VLM, examples: Sequence[Example], *, seconds: float, max_new_tokens: int, points: int = 0) -> Plan:
    """Measure one step and one batch of answers, and take the largest plan that fits the budget.

    Args:
        vlm: the model.
        examples: what a step and an answer are timed on.
        seconds: the budget.
        max_new_tokens: longest answer.
        points: of a front; 0 for a search by trials.
    """
    sample = list(examples)[:16]
    step = _seconds_per_row(vlm, sample)
    start = time.perf_counter()
    respond(vlm, sample, decoding=Decoding("sampled", 1.0, max_new_tokens, 0))
    answer = (time.perf_counter() - start) / len(sample)
    ladder = [plan for plan in LADDER if plan.trials == 1 or not points]
    affordable = (plan for plan in ladder if cost(plan, step, answer, points) <= seconds)
    return max(affordable, key=LADDER.index, default=LADDER[0])


def cost(plan: Plan, step: float, answer: float, points: int = 0) -> float:
    """Estimate a plan's seconds from those of one teacher-forced row (with gradient) and one sampled answer.

    A step runs a toxic and a benign row per contrast and a row per benign prompt. A round samples its prompts, then
    measures the held-out slice, at most twice as many answers, for every share. In the end the chosen rounds are
    taught once more, without measuring. A front is a trial whose first point has all rounds and every further one a
    single one; points are measured once, and all are taught once more if the last is taken.
    """
    e = plan.effort
    teach, compare = 3 * e.steps * e.batch * step + e.prompts * answer, 2 * len(SHARES) * e.prompts * answer
    if points:
        return 2 * (e.rounds + points - 1) * teach + points * compare / len(SHARES)
    return plan.trials * e.rounds * (teach + compare) + e.rounds * teach


def _seconds_per_row(vlm: VLM, sample: Sequence[Example]) -> float:
    batch = vlm.encode([e.chat() for e in sample if e.layout == sample[0].layout]).to(vlm.device)
    embedding = vlm.model.get_input_embeddings()
    parameters = list(embedding.parameters())
    best = float("inf")
    for _ in range(2):  # the first call warms caches up
        start = time.perf_counter()
        with torch.enable_grad():
            loss = force(vlm, batch).totals.sum()
        torch.autograd.grad(loss, parameters, allow_unused=True)
        best = min(best, time.perf_counter() - start)
    return best / len(batch.prompt_length)
