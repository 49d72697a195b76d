"""Turn chats into batches through a checkpoint's own chat template; count tokens without running a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from safeglasses.errors import SafeglassesError
from safeglasses.model.chat import Batch, Chat, without_pictures
from safeglasses.model.checks import check_chats, check_parts, check_system_turns, check_told_apart
from safeglasses.model.pictures import picture_mask
from safeglasses.model.processors import Processor, tokenizer_of
from safeglasses.model.thought import opened, thought_tokens
from safeglasses.model.videos import size_of, video_options, with_stand_ins

Side = Literal["right", "left"]
TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
"""Inputs that say what kind of token each is; 0 is text. Ernie routes by the last."""
CROSSING = ("cross_attention_mask", "image_attention_mask")
"""Which pictures each token sees, where they come in by cross-attention: Mllama's and Idefics's name for it."""
_PER_TOKEN = ("input_ids", "attention_mask", *TYPES, *CROSSING)


@dataclass(frozen=True)
class Encoder:
    """A processor (or, for text-only models, a tokenizer) and what the model says about its tokens."""

    processor: Processor
    """Renders, tokenises and prepares pictures."""
    picture_ids: frozenset[int]
    """Ids of the tokens that stand for a picture; empty: `picture_mask` finds them otherwise."""
    accepted: frozenset[str]
    """Names of the parameters of the model's forward."""
    dtype: torch.dtype
    """What pictures are cast to."""
    flat_positions: bool
    """The model takes ``position_ids`` of shape (sample, token)."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a generated answer."""
    start_ids: tuple[int, ...] = ()
    """What the decoder of an encoder–decoder reads before the response; nothing where there is no encoder."""
    answer_type: int = 0
    """The ``token_type_ids`` of an answer's tokens; in the other inputs of types they are 0, text."""
    needs_picture: bool = False
    """The model's forward does without none."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, alone or inside the processor."""
        return tokenizer_of(self.processor)

    def encode(self, chats: Sequence[Chat], padding_side: Side, *, end_of_turn: bool = False) -> Batch:
        """Encode chats as one batch; see `VLM.encode`."""
        check_chats(chats, self.processor, needs_picture=self.needs_picture)
        asked = [_conversation(chat, self.processor) for chat in chats]
        if told := [i for i, chat in enumerate(chats) if any(m["role"] == "system" for m in chat.messages)]:
            check_system_turns([chats[i] for i in told], self._apply([asked[i] for i in told], tokenize=False))
        prompts = self._tokenised(asked, video_options(chats, self.processor))
        ending = [self.end_of_turn] if end_of_turn else []
        responses = [ids + ending if (ids := self.response_ids(chat)) else ids for chat in chats]
        kept = {
            name: value
            for name, value in prompts.items()
            if isinstance(value, Tensor)
            and name != "labels"  # PaliGemma's processor makes them, for training
            and (name in self.accepted or not name.endswith("type_ids"))
        }
        kept = {  # one number a video is no pixel: Qwen2.5-VL's seconds between frames are exact
            name: value.to(self.dtype) if value.is_floating_point() and value.ndim > 1 else value
            for name, value in kept.items()
        }
        mask = kept["attention_mask"].bool()
        is_image = self._is_image(prompts, chats)
        check_told_apart(chats, kept, kept["input_ids"][is_image])
        if self.start_ids:
            return self._of_both(kept, mask, is_image, responses, self._thoughts(chats, responses))
        pad: Any = self.tokenizer.pad_token_id or 0
        fills = {"attention_mask": 1, "token_type_ids": self.answer_type}
        inputs = {
            name: _joined(name, value, mask, responses, padding_side, pad, fills.get(name, 0))
            if name in _PER_TOKEN
            else value
            for name, value in kept.items()
        }
        attention = inputs["attention_mask"]
        if padding_side == "left" and self.flat_positions:
            inputs["position_ids"] = (attention.cumsum(dim=1) - 1).clamp(min=0)
        order = attention.cumsum(dim=1)  # 1 for the first token of a row
        prompt_length = mask.sum(dim=1)
        prompt_mask = attention.bool() & (order <= prompt_length[:, None])
        thoughts = self._thoughts(chats, responses)
        before_answer = order <= (prompt_length + torch.tensor(thoughts))[:, None]
        return Batch(
            inputs=inputs,
            prompt_length=prompt_length,
            prompt_mask=prompt_mask,
            response_mask=attention.bool() & ~prompt_mask,
            image_mask=_joined("image_mask", is_image, mask, responses, padding_side, pad, 0),
            thought_mask=attention.bool() & ~prompt_mask & before_answer if any(thoughts) else None,
        )

    def to_generate(self, batch: Batch) -> dict[str, Tensor]:
        """Return what ``generate`` takes: without positions, and without a mask of the decoder, both its own."""
        return {n: value for n, value in batch.inputs.items() if n not in ("position_ids", "decoder_attention_mask")}

    def _of_both(
        self,
        kept: dict[str, Tensor],
        mask: Tensor,
        is_image: Tensor,
        responses: Sequence[list[int]],
        thoughts: Sequence[int],
    ) -> Batch:
        """Give the prompt to the encoder, and the response to the decoder behind its start."""
        none = torch.zeros_like(mask)
        prompts = Batch(
            inputs={name: kept[name] for name in ("input_ids", "attention_mask")},
            prompt_length=mask.sum(dim=1),
            prompt_mask=mask,
            response_mask=none,
            image_mask=is_image,
        )
        pad: Any = self.tokenizer.pad_token_id or 0
        rows = [torch.tensor([*self.start_ids, *response]) for response in responses]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        column, before = torch.arange(ids.shape[1])[None], len(self.start_ids)
        real = column < torch.tensor([[len(row)] for row in rows])
        return Batch(
            inputs={**kept, "decoder_input_ids": ids, "decoder_attention_mask": real.long()},
            prompt_length=torch.full((len(rows),), before),
            prompt_mask=(column < before).expand_as(ids).clone(),
            response_mask=real & (column >= before),
            image_mask=torch.zeros_like(real),
            thought_mask=real & (column >= before) & (column < before + torch.tensor(thoughts)[:, None])
            if any(thoughts)
            else None,
            encoder=prompts,
        )

    @cached_property
    def opened(self) -> str:
        """The mark of a thought with which the template's generation prompt ends; nothing elsewhere."""
        asked = [_conversation(Chat([{"role": "user", "content": "a"}]), self.processor)]
        try:
            return opened(self._apply(asked, tokenize=False)[0])
        except SafeglassesError:  # a template that takes no plain question opens no thought either
            return ""

    def _thoughts(self, chats: Sequence[Chat], responses: Sequence[list[int]]) -> list[int]:
        return [
            thought_tokens(self.tokenizer, chat.response or "", ids) for chat, ids in zip(chats, responses, strict=True)
        ]

    def _is_image(self, prompts: Any, chats: Sequence[Chat]) -> Tensor:
        if not any(chat.images or chat.videos for chat in chats):
            return torch.zeros_like(prompts["attention_mask"], dtype=torch.bool)

        def bare() -> Sequence[list[int]]:
            unseen = [_conversation(Chat(without_pictures(chat.messages)), self.processor) for chat in chats]
            made = self._tokenised(unseen)
            return [row[keep.bool()].tolist() for row, keep in zip(*map(made.get, _PER_TOKEN[:2]), strict=True)]

        return picture_mask(prompts, self.picture_ids, bare)

    def lengths(self, chats: Sequence[Chat]) -> list[int]:
        """Return token counts; see `VLM.lengths`."""
        check_parts(chats, self.processor)
        extra: dict[tuple[tuple[int | float, ...], ...], int] = {}
        out: list[int] = []
        if not chats:
            return out
        texts = self._apply([_conversation(chat, self.processor) for chat in chats], tokenize=False)
        check_system_turns(chats, texts)
        plain = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        for chat, ids in zip(chats, plain, strict=True):
            sizes = (*(image.size for image in chat.images), *(size_of(video) for video in chat.videos))
            if sizes not in extra:
                prompt = self.encode([Chat(with_stand_ins(chat.messages))], "right")
                extra[sizes] = int(prompt.n_tokens[0]) - len(ids)
            out.append(len(ids) + extra[sizes] + len(self.response_ids(chat)))
        return out

    @cached_property
    def end_of_turn(self) -> int:
        """Id of the token that ends the assistant's turn: the stop token that the chat template writes.

        Raises:
            SafeglassesError: the checkpoint names no stop token.
        """
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        chats = [_conversation(Chat(probe), self.processor)]
        written = self.tokenizer(self._apply(chats, tokenize=False)[0], add_special_tokens=False)["input_ids"]
        found = [token for token in written if token in self.stop_ids]
        if found or self.stop_ids:
            return found[-1] if found else self.stop_ids[0]
        raise SafeglassesError(
            "the checkpoint names no token that ends a turn",
            given="no eos_token_id in generation_config.json and none in the tokenizer",
            do="set eos_token_id in the checkpoint's generation_config.json",
        )

    def response_ids(self, chat: Chat) -> list[int]:
        """Return the tokens of a chat's response."""
        if not chat.response:
            return []
        ids = list(self.tokenizer(chat.response, add_special_tokens=False)["input_ids"])
        if self.picture_ids.intersection(ids):  # an answer that spells a picture's placeholder is text all the same
            options: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": True}
            ids = list(self.tokenizer(chat.response, **options)["input_ids"])
        return ids

    def _tokenised(self, conversations: list[list[dict[str, Any]]], videos: Mapping[str, Any] | None = None) -> Any:
        made = self._apply(conversations, tokenize=True, videos=videos)
        if len(made["input_ids"]) == len(conversations):
            return made
        alone = [self._apply([one], tokenize=True, videos=videos) for one in conversations]  # Idefics's processor takes
        return {  # several texts without pictures for parts of one
            name: torch.nn.utils.rnn.pad_sequence([one[name][0] for one in alone], batch_first=True)
            if name in _PER_TOKEN
            else torch.cat([one[name] for one in alone])
            for name in alone[0]
        }

    def _apply(
        self, conversations: list[list[dict[str, Any]]], *, tokenize: bool, videos: Mapping[str, Any] | None = None
    ) -> Any:
        options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": tokenize}
        padding = {"padding": True, "padding_side": "right"}
        if tokenize:
            options |= {"return_dict": True, "return_tensors": "pt"}
            flat = isinstance(self.processor, PreTrainedTokenizerBase)
            options |= padding if flat else {"processor_kwargs": {**padding, **(videos or {})}}
        try:
            return self.processor.apply_chat_template(conversations, **options)
        except (ValueError, TemplateError) as error:
            raise SafeglassesError(
                "the model's chat template or processor refuses a chat",
                given=str(error).strip().splitlines()[0],
                expected="roles in an order that the template knows, and no picture placeholder in the texts"
                + ("; with some models as many frames of every video in a chat" if videos else ""),
                do="mend the messages: drop system turns, join turns of one role, remove <image> etc.",
            ) from error


def _conversation(chat: Chat, processor: Processor) -> list[dict[str, Any]]:
    """Return messages as the template wants them: strings for tokenizers, lists of parts for processors."""
    flat = isinstance(processor, PreTrainedTokenizerBase)
    messages: list[dict[str, Any]] = []
    for message in chat.messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        if flat:
            text = "".join(part["text"] for part in parts if part["type"] == "text")
            messages.append({**message, "content": text})
        else:
            messages.append({**message, "content": parts})
    return messages


def _joined(
    name: str, value: Tensor, mask: Tensor, responses: Sequence[list[int]], side: Side, pad: int, fill: int
) -> Tensor:
    """Put each row's response behind its prompt and pad anew.

    Args:
        name: which input it is.
        value: one entry per prompt token, ``[sample, token, ...]``.
        mask: which of them are prompt tokens, ``[sample, token]``.
        responses: token ids per sample.
        side: where padding goes.
        pad: the id of the padding token.
        fill: what a response's tokens are given.
    """
    rows: list[Tensor] = []
    for row, keep, response in zip(value, mask, responses, strict=True):
        prompt = row[keep]
        if name == "input_ids":
            tail = prompt.new_tensor(response)
        elif name in CROSSING:  # the response sees the pictures that the end of the prompt sees
            tail = prompt[-1:].expand(len(response), *prompt.shape[1:])
        else:
            tail = torch.full_like(prompt[:1], fill).expand(len(response))
        rows.append(torch.cat([prompt, tail]))
    padding = pad if name == "input_ids" else 0
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding, padding_side=side)
