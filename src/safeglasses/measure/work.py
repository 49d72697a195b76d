"""Answer chats of any shape at once: those with as many pictures together, halved when memory runs out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from safeglasses.errors import SafeglassesError
from safeglasses.measure.likelihood import force
from safeglasses.measure.respond import in_pieces
from safeglasses.model.sampling import Drawn, Reweigh, Settings, TokenScore, draw
from safeglasses.model.vlm import VLM, Chat, batches

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Asked:
    """One answer that is wanted."""

    chat: Chat
    """The prompt."""
    settings: Settings
    """How to draw it."""
    choice: int
    """Which of several answers to the same request, from 0."""

    @property
    def row(self) -> Settings:
        """The settings, with random numbers of its own."""
        return replace(self.settings, draw=f"{self.settings.draw}/{self.choice}")


@dataclass(frozen=True)
class Read:
    """How likely a given answer is."""

    n_prompt: int
    """Tokens of the prompt."""
    scores: tuple[TokenScore, ...]
    """Per token of the answer."""


def answer(vlm: VLM, asked: Sequence[Asked], *, reweigh: Reweigh | None = None) -> list[Drawn | SafeglassesError]:
    """Answer requests; one that cannot be answered gets its error and spoils no other."""

    def run(rows: Sequence[Asked]) -> list[Drawn]:
        return draw(vlm, [a.chat for a in rows], [a.row for a in rows], reweigh=reweigh)

    return _each(asked, lambda one: one.chat, run)


def read(vlm: VLM, chats: Sequence[Chat]) -> list[Read | SafeglassesError]:
    """Score the responses of chats, the end of the turn left out, as perplexity counts it."""
    return _each(chats, lambda chat: chat, lambda rows: _read(vlm, rows))


def _each(
    items: Sequence[T], chat: Callable[[T], Chat], run: Callable[[Sequence[T]], Sequence[R]]
) -> list[R | SafeglassesError]:
    found: dict[int, R | SafeglassesError] = {}
    keys = [(chat(item).layout, _text_length(chat(item))) for item in items]
    for group in batches(keys, len(items)):
        results, _ = in_pieces(group, len(group), lambda rows: _tried([items[i] for i in rows], run))
        found |= dict(zip(group, results, strict=True))
    return [found[i] for i in range(len(items))]


def _tried(items: Sequence[T], run: Callable[[Sequence[T]], Sequence[R]]) -> list[R | SafeglassesError]:
    """Run items together; if one of them is refused, one by one."""
    try:
        return list(run(items))
    except SafeglassesError as error:
        if len(items) == 1:
            return [error]
    return [result for item in items for result in _tried([item], run)]


@torch.no_grad()
def _read(vlm: VLM, chats: Sequence[Chat]) -> list[Read]:
    _need_responses(chats)
    batch = vlm.encode(chats, padding_side="left").to(vlm.device)
    forced = force(vlm, batch)
    ids = batch.ids[batch.response_mask].tolist()
    values = forced.token_log_probs.tolist()
    rows = forced.sample.tolist()
    found: list[list[TokenScore]] = [[] for _ in chats]
    for row, token, value in zip(rows, ids, values, strict=True):
        found[row].append(TokenScore(token, value))
    lengths = [int(n) for n in batch.n_tokens - batch.response_mask.sum(dim=1)]
    return [Read(length, tuple(scores)) for length, scores in zip(lengths, found, strict=True)]


def _need_responses(chats: Sequence[Chat]) -> None:
    if not all(chat.response for chat in chats):
        raise SafeglassesError(
            "no answer whose likelihood could be told",
            given="prompt_logprobs for a chat that ends with the user's message",
            expected="a last message of the assistant, with some text",
        )


def _text_length(chat: Chat) -> int:
    parts = (part for message in chat.messages for part in message["content"])
    return sum(len(part["text"]) for part in parts if part["type"] == "text")
