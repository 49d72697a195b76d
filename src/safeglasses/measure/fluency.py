"""What a defence does to ordinary answers: likelihood of reference responses, shift of the first token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safeglasses.data.examples import Example
from safeglasses.defend.defence import Defence, wearing
from safeglasses.measure.metrics import kl_divergence, response_nll
from safeglasses.measure.respond import in_pieces, resolve_batch_size
from safeglasses.model.vlm import VLM, batches

_BASE_BYTES = 2**28  # base logits kept at once while the glasses are put on


@dataclass(frozen=True)
class Fluency:
    """Teacher-forced figures of one benign row."""

    nll: float
    """Summed negative log-likelihood of its reference response, nats."""
    tokens: int
    """Tokens of that response."""
    kl: float | None
    """KL(base ‖ worn) of the first answer token, nats; None when nothing is worn."""


def fluency(
    vlm: VLM, examples: Sequence[Example], defence: Defence | None, *, batch_size: int | str = "auto"
) -> list[Fluency]:
    """Score the reference responses of benign rows, with and without what is worn.

    Raises:
        SafeglassesError: the model computes NaN, or one row alone exceeds the memory.
    """
    found: dict[int, Fluency] = {}
    keys = list(zip((e.layout for e in examples), vlm.lengths([e.chat() for e in examples]), strict=True))
    size = resolve_batch_size(vlm, batch_size)
    for group in _groups(vlm, batches(keys, size)):
        base: dict[int, Tensor] = {}
        for rows in group if defence is not None else ():
            scores, size = in_pieces(rows, size, lambda piece: _scores(vlm, [examples[i] for i in piece]))
            base |= {row: first for row, (_, _, first) in zip(rows, scores, strict=True)}
        with wearing(vlm, defence):
            for rows in group:
                scores, size = in_pieces(rows, size, lambda piece: _scores(vlm, [examples[i] for i in piece]))
                for row, (nll, tokens, first) in zip(rows, scores, strict=True):
                    kl = kl_divergence(base[row][None], first[None]).item() if defence is not None else None
                    found[row] = Fluency(nll, tokens, kl)
    return [found[i] for i in range(len(examples))]


def _groups(vlm: VLM, plan: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """Gather batches so that glasses go on and off rarely, yet few base logits are held."""
    per_row = vlm.model.config.get_text_config(decoder=True).vocab_size * 4
    group: list[list[int]] = []
    for rows in plan:
        if group and sum(map(len, group)) * per_row > _BASE_BYTES:
            yield group
            group = []
        group.append(rows)
    if group:
        yield group


@torch.no_grad()
def _scores(vlm: VLM, examples: Sequence[Example]) -> list[tuple[float, int, Tensor]]:
    """Negative log-likelihood and length of each response, and the logits of its first token."""
    batch = vlm.encode([e.chat() for e in examples]).to(vlm.device)
    start = int(batch.last_prompt.min())
    logits = vlm.forward(batch, logits_from=start)
    nll = response_nll(logits, batch.ids, batch.response_mask).tolist()
    tokens = batch.response_mask.sum(1).tolist()
    firsts = logits[torch.arange(len(examples)), batch.last_prompt - start].cpu()
    return list(zip(nll, tokens, firsts, strict=True))
