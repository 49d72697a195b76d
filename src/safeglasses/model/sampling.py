"""Answers to a batch of chats in which every row has its own settings and its own random numbers.

A row's answer depends on the row alone: not on what else is in the batch, nor on the order of batches. So a run that
was killed and retried gives what one run would have given.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from safeglasses.errors import SafeglassesError
from safeglasses.model.thought import parted, written
from safeglasses.model.vlm import VLM, Chat

Reweigh = Callable[[Mapping[str, Tensor]], LogitsProcessor]
"""From a batch's inputs to what changes its logits, before a token is drawn from them."""


@dataclass(frozen=True)
class Settings:
    """How one answer is drawn."""

    max_tokens: int
    """Longest answer."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens that has this probability."""
    top_k: int = 0
    """Sample from the likeliest k tokens; 0 from all."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are no part of it."""
    top_logprobs: int | None = None
    """How many alternatives to tell per token; None: no log-probabilities at all."""
    draw: str = ""
    """Names the random numbers: rows of one name and of the same settings draw the same."""
    prefix: str = ""
    """How the answer begins, whatever the model would say; it is part of the answer's text."""


@dataclass(frozen=True)
class TokenScore:
    """One token of an answer."""

    id: int
    """The token."""
    logprob: float
    """Its log-probability under the model, before temperature; nats."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens there and their log-probabilities."""


@dataclass(frozen=True)
class Drawn:
    """One answer."""

    text: str
    """Without special tokens and stop texts, stripped; with the prefix that was given."""
    n_prompt: int
    """Tokens of the prompt, pictures and prefix included."""
    n_tokens: int
    """Tokens generated, that which ended the answer included."""
    ended: bool
    """Whether it ended by itself or by a stop text, rather than by its length."""
    limit: Literal["max_tokens", "model_length"] = "max_tokens"
    """What its length was limited by."""
    scores: tuple[TokenScore, ...] = ()
    """Per token, where they were asked for."""
    thought: str = ""
    """What a thinking model wrote before its answer, in its marks; no part of the text."""


def draw(vlm: VLM, chats: Sequence[Chat], rows: Sequence[Settings], *, reweigh: Reweigh | None = None) -> list[Drawn]:
    """Answer chats, all with the same number of pictures, each by its own settings.

    Greedy answers are those of `VLM.generate`.

    Args:
        vlm: the model.
        chats: the prompts; their responses are not read.
        rows: how each is answered.
        reweigh: makes what changes the logits of this batch, before temperature and truncation.

    Raises:
        SafeglassesError: no chats, unequal numbers of pictures, a chat that the template refuses, or one that
            leaves no room for an answer.
    """
    begun = [Chat(chat.messages, row.prefix or None) for chat, row in zip(chats, rows, strict=True)]
    batch = vlm.encode(begun, padding_side="left").to(vlm.device)
    if batch.encoder is not None and not batch.attention_mask.all():  # decoders with an encoder are padded on the right
        return _by_width(vlm, chats, rows, batch.attention_mask.sum(dim=1).tolist(), reweigh)
    lengths = [int(n) for n in batch.n_tokens]
    room = [
        _room(vlm, *sizes)
        for sizes in zip(batch.attention_mask.sum(dim=1).tolist(), batch.asked.n_tokens.tolist(), rows, strict=True)
    ]
    inputs = vlm.encoder.to_generate(batch)
    width = batch.ids.shape[1]
    choose = _Choose(rows, vlm.stop_ids)
    stop = _Stop(vlm, rows, room, width)
    config = GenerationConfig(
        do_sample=False,  # `choose` has drawn already
        num_beams=1,
        use_cache=True,
        max_new_tokens=max(room),
        eos_token_id=list(vlm.stop_ids) or None,
        pad_token_id=vlm.tokenizer.pad_token_id,
        bos_token_id=vlm.tokenizer.bos_token_id,
        decoder_start_token_id=next(iter(vlm.start_ids), None),
    )
    theirs = vlm.model.generation_config
    vlm.model.generation_config = config  # else generate() fills what we leave open from the checkpoint's
    generate: Any = vlm.model.generate
    try:
        with torch.no_grad():
            tokens = generate(
                **inputs,
                generation_config=config,
                logits_processor=LogitsProcessorList([choose] if reweigh is None else [reweigh(batch.inputs), choose]),
                stopping_criteria=StoppingCriteriaList([stop]),
            )
    finally:
        vlm.model.generation_config = theirs
    answers = tokens[:, width:].tolist()
    return [
        _drawn(vlm, answer, row, (length, limit), choose.scores(index))
        for index, (answer, row, length, limit) in enumerate(zip(answers, rows, lengths, room, strict=True))
    ]


def _by_width(
    vlm: VLM, chats: Sequence[Chat], rows: Sequence[Settings], widths: Sequence[int], reweigh: Reweigh | None
) -> list[Drawn]:
    """Answer the rows whose answers begin in the same column together."""
    found: dict[int, Drawn] = {}
    for width in sorted(set(widths)):
        some = [i for i, own in enumerate(widths) if own == width]
        found |= dict(
            zip(some, draw(vlm, [chats[i] for i in some], [rows[i] for i in some], reweigh=reweigh), strict=True)
        )
    return [found[i] for i in range(len(rows))]


def _room(vlm: VLM, begun: int, prompt: int, row: Settings) -> int:
    """Return how long an answer may be.

    Args:
        vlm: the model.
        begun: tokens that the decoder has read.
        prompt: tokens that hold the prompt: the same, or the encoder's.
        row: what is asked for.

    Raises:
        SafeglassesError: there is no room.
    """
    limit = vlm.context_length
    if limit is None or (begun + row.max_tokens <= limit and prompt <= limit):
        return row.max_tokens
    if begun < limit and prompt <= limit:
        return limit - begun
    raise SafeglassesError(
        "the prompt fills the model's context: there is no room for an answer",
        given=f"{prompt:,} tokens, pictures included",
        expected=f"fewer than {limit:,}",
        do="shorten the prompt, or show fewer or smaller pictures",
    )


def _drawn(vlm: VLM, tokens: list[int], row: Settings, sizes: tuple[int, int], scores: Sequence[TokenScore]) -> Drawn:
    """Cut a row off where it ended: behind it there is only padding."""
    length, limit = sizes
    last = next((i for i, token in enumerate(tokens[:limit]) if token in vlm.stop_ids), None)
    count = len(tokens[:limit]) if last is None else last + 1
    text, ended = _text(vlm, tokens[:count]), last is not None
    if row.stop and (at := _first(text, row.stop)) is not None:
        count = next(n for n in range(1, count + 1) if _first(_text(vlm, tokens[:n]), row.stop) is not None)
        text, ended = text[:at], True
    elif row.prefix:  # decoded together: a first word alone would lose the space before it
        text = _text(vlm, vlm.encoder.response_ids(Chat((), row.prefix)) + tokens[:count])
    kind = "max_tokens" if limit == row.max_tokens else "model_length"
    thought, answer = parted(vlm.encoder.opened + text)
    return Drawn(answer.strip(), length, count, ended, kind, tuple(scores[:count]), thought)


def _text(vlm: VLM, tokens: Sequence[int]) -> str:
    return written(vlm.tokenizer, tokens)


def _first(text: str, stops: Sequence[str]) -> int | None:
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)


class _Choose(LogitsProcessor):
    """Leaves one token possible in every sampled row, and notes log-probabilities where they are wanted."""

    def __init__(self, rows: Sequence[Settings], stop_ids: Sequence[int]) -> None:
        self._rows = rows
        self._generators = {i: _generator(row) for i, row in enumerate(rows) if row.temperature > 0}
        self._told = [i for i, row in enumerate(rows) if row.top_logprobs is not None]
        self._scores: dict[int, list[TokenScore]] = {i: [] for i in self._told}

    def scores(self, row: int) -> Sequence[TokenScore]:
        """Return what was noted of a row."""
        return self._scores.get(row, ())

    def __call__(
        self, input_ids: Int[Tensor, "row token"], scores: Float[Tensor, "row vocab"]
    ) -> Float[Tensor, "row vocab"]:
        chosen = {i: self._sampled(i, scores[i]) for i in self._generators}
        for i in self._told:
            self._scores[i].append(_told(scores[i], chosen.get(i), self._rows[i].top_logprobs or 0))
        for i, token in chosen.items():
            scores[i] = -torch.inf
            scores[i, token] = 0.0
        return scores

    def _sampled(self, index: int, logits: Float[Tensor, " vocab"]) -> int:
        """Draw by the inverse of the distribution function: one random number a token, whatever the vocabulary."""
        row = self._rows[index]
        probabilities = truncated((logits.float() / row.temperature).softmax(-1), row.top_p, row.top_k)
        cumulative = probabilities.cpu().double().cumsum(-1)
        u = torch.rand((), generator=self._generators[index]).double()  # float32: u < 1 stays so after the product
        return int((cumulative <= u * cumulative[-1]).sum())


def truncated(probabilities: Float[Tensor, " vocab"], top_p: float, top_k: int) -> Float[Tensor, " vocab"]:
    """Set all but the likeliest tokens to 0; the rest is not normalised.

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1 (top-p).
    """
    if top_p >= 1 and not top_k:
        return probabilities
    values, order = probabilities.sort(descending=True, stable=True)
    if top_k:
        values[top_k:] = 0
    if top_p < 1:  # at 1, rounding would drop the least likely
        values[values.cumsum(-1) - values >= top_p * values.sum()] = 0
    return torch.zeros_like(probabilities).scatter(0, order, values)


def _told(logits: Float[Tensor, " vocab"], chosen: int | None, count: int) -> TokenScore:
    log_probs = logits.float().log_softmax(-1)
    token = int(logits.argmax()) if chosen is None else chosen
    values, ids = log_probs.topk(min(count, len(log_probs)))
    return TokenScore(token, float(log_probs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def _generator(row: Settings) -> torch.Generator:
    seed = int.from_bytes(hashlib.sha256(row.draw.encode("utf-8", "surrogatepass")).digest()[:8]) >> 1
    return torch.Generator().manual_seed(seed)


class _Stop(StoppingCriteria):
    """Ends each row at its own length and at its own stop texts."""

    def __init__(self, vlm: VLM, rows: Sequence[Settings], room: Sequence[int], width: int) -> None:
        self._vlm, self._rows, self._width = vlm, rows, width
        self._room = torch.tensor(room)

    def __call__(self, input_ids: Int[Tensor, "row token"], scores: Any, **kwargs: Any) -> Any:
        done = self._room <= input_ids.shape[1] - self._width
        for i, row in enumerate(self._rows):
            if row.stop and not done[i]:
                done[i] = _first(_text(self._vlm, input_ids[i, self._width :].tolist()), row.stop) is not None
        return done.to(input_ids.device)
