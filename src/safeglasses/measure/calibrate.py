"""Calibrate glasses: the strengths of the experts, found by gradient.

The model's parameters never change, and its expertise (AUROC) still decides which neurons are turned down and in
what proportion; the gradient only sets how strongly, per group or per expert. Between rounds the model answers
prompts itself, and its own toxic answers join the contrasts: teacher-forced pairs alone leave sampled harm high.

Source: the factor rule is AurA's, 1 − Gini (Suau et al. 2024, eq. 4), as SGM weighs its experts by AUROC
(arXiv 2512.15052). Calibrating the strengths by gradient is ours.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from safeglasses.data.examples import Example
from safeglasses.defend.recipes import CalibratedRule
from safeglasses.measure.contrasts import Contrast
from safeglasses.measure.items import question_of
from safeglasses.measure.judges import Judge
from safeglasses.measure.likelihood import Forced, force
from safeglasses.measure.respond import Decoding, respond
from safeglasses.measure.verdicts import verdicts_of
from safeglasses.model.hooks import scaled
from safeglasses.model.vlm import VLM, Batch, batches


@dataclass(frozen=True)
class Effort:
    """How long one trial calibrates. Counts, not seconds, so that a rerun gives the same glasses."""

    rounds: int = 2
    """Rounds of sampling the model's own toxic answers."""
    steps: int = 60
    """Gradient steps per round."""
    prompts: int = 512
    """Prompts that the model answers at the start of each round."""
    batch: int = 32
    """Contrasts, and benign prompts, per step."""


@dataclass(frozen=True)
class Objective:
    """The weights of the loss; `beta` is searched, the others are fixed."""

    beta: float = 150.0
    """Weight of KL(base ‖ worn) on benign prompts."""
    margin: float = 5.0
    """Nats by which a benign answer should beat a toxic one."""
    odds: float = 0.3
    """Weight of the log-odds term."""
    learning_rate: float = 0.3
    """Adam's step in units of strength."""
    start: float = 0.1
    """Every strength before the first step."""


@contextmanager
def frozen(vlm: VLM) -> Iterator[None]:
    """No parameter takes part in gradients inside; their flags are put back after."""
    flags = {name: p.requires_grad for name, p in vlm.model.named_parameters()}
    vlm.model.requires_grad_(False)
    try:
        yield
    finally:
        for name, p in vlm.model.named_parameters():
            p.requires_grad_(flags[name])


class Keep:
    """Benign prompts with the base model's distribution along their reference responses."""

    def __init__(self, vlm: VLM, examples: Sequence[Example], size: int) -> None:
        chats = [e.chat() for e in examples]
        order = batches([(e.layout, n) for e, n in zip(examples, vlm.lengths(chats), strict=True)], size)
        self.batches = [vlm.encode([chats[i] for i in rows], padding_side="left", end_of_turn=True) for rows in order]
        with torch.no_grad():
            self.base: list[Forced] = [force(vlm, b.to(vlm.device)) for b in self.batches]

    def kl(self, vlm: VLM, index: int) -> Float[Tensor, ""]:
        """KL(base ‖ worn) of one batch, nats per token."""
        index %= len(self.batches)
        return force(vlm, self.batches[index].to(vlm.device)).kl_from(self.base[index])


def _encode(vlm: VLM, contrasts: Sequence[Contrast], size: int) -> list[Batch]:
    """Encode contrasts as batches whose first half is toxic and whose second half is benign."""
    toxic = [replace(c.prompt, response=c.toxic).chat() for c in contrasts]
    benign = [replace(c.prompt, response=c.benign).chat() for c in contrasts]
    keys = [(c.prompt.layout, n) for c, n in zip(contrasts, vlm.lengths(toxic), strict=True)]
    return [
        vlm.encode([toxic[i] for i in rows] + [benign[i] for i in rows], padding_side="left", end_of_turn=True)
        for rows in batches(keys, size)
    ]


def own_toxic(
    vlm: VLM,
    prompts: Sequence[Example],
    judge: Judge,
    *,
    seed: int,
    max_new_tokens: int,
    asked: Callable[[Example], Example] = lambda example: example,
) -> list[Contrast]:
    """Let the model answer by sampling; each toxic answer is contrasted with the prompt's reference response.

    What the model reads is ``asked(prompt)``; judges see the prompt itself, and so does the contrast.
    """
    decoding = Decoding("sampled", temperature=1.0, max_new_tokens=max_new_tokens, seed=seed)
    responses = respond(vlm, [asked(prompt) for prompt in prompts], decoding=decoding)
    verdicts = verdicts_of(judge, [r.text for r in responses], [question_of(prompt) for prompt in prompts])
    return [
        Contrast(prompt, response.text, prompt.response)
        for prompt, response, verdict in zip(prompts, responses, verdicts, strict=True)
        if verdict.harmful and prompt.response
    ]


def run_round(
    vlm: VLM,
    rule: CalibratedRule,
    strengths: Float[Tensor, "*group"],
    contrasts: Sequence[Contrast],
    keep: Keep,
    *,
    objective: Objective,
    effort: Effort,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[Float[Tensor, "*group"], float, float]:
    """Take `effort.steps` Adam steps on the strengths; return them with the mean loss and KL at the end.

    loss = odds · softplus(log p(toxic) − log p(benign) + margin) + beta · KL(base ‖ worn), projected on
    strengths ≥ 0 after every step. Adam and its cosine schedule start afresh each round, so that a round depends on
    its inputs alone.
    """
    generator = torch.Generator().manual_seed(seed)
    encoded = _encode(vlm, contrasts, effort.batch)
    value = strengths.clone().to(vlm.device).requires_grad_(True)
    optimiser = torch.optim.Adam([value], lr=objective.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, effort.steps)
    order: list[int] = []
    tail: list[tuple[float, float]] = []
    for step in range(effort.steps):
        if not order:
            order = torch.randperm(len(encoded), generator=generator).tolist()
        batch = encoded[order.pop()].to(vlm.device)
        half = len(batch.prompt_length) // 2
        with scaled(vlm.model, vlm.anatomy, rule.factors(value)):
            totals = force(vlm, batch).totals
            toxic, benign = totals[:half], totals[half:]
            odds = softplus(toxic - benign + objective.margin).mean()
            kl = keep.kl(vlm, int(torch.randint(len(keep.batches), (1,), generator=generator)))
        loss = objective.odds * odds + objective.beta * kl
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            value.clamp_(min=0)
        if step >= effort.steps * 3 // 4:
            tail.append((loss.item(), kl.item()))
        on_step()
    if not all(math.isfinite(x) for pair in tail for x in pair):
        raise FloatingPointError("calibration diverged: loss is not finite")
    mean_loss, mean_kl = (sum(x) / len(tail) for x in zip(*tail, strict=True))
    return value.detach().cpu(), mean_loss, mean_kl
