"""What goes into a model: chats, and batches of them with every token's role known."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from PIL import Image
from torch import Tensor

from safeglasses.errors import SafeglassesError

Message = Mapping[str, Any]
Span = Literal["image", "text", "prompt", "response", "thought", "all"]


@dataclass(frozen=True)
class Chat:
    """One conversation as chat templates take it, and optionally the response that follows."""

    messages: Sequence[Message]
    """``{"role": …, "content": [{"type": "image", "image": PIL image}, {"type": "text", "text": …}]}``;
    a content may also be a plain string. A video is ``{"type": "video", "video": [PIL image, …], "fps": number}``:
    frames of one size, all of which the model is shown; without ``fps`` as many a second as its processor takes."""
    response: str | None = None
    """The assistant's answer to the last message; None: the prompt alone."""

    @property
    def images(self) -> list[Image.Image]:
        """The pictures in the order of the conversation."""
        return [part["image"] for part in self.parts if part["type"] == "image"]

    @property
    def videos(self) -> list[Mapping[str, Any]]:
        """The parts that are videos, in the order of the conversation."""
        return [part for part in self.parts if part["type"] == "video"]

    @property
    def layout(self) -> tuple[int, ...]:
        """Number of pictures, then of the frames of each video: what the chats of one batch have in common."""
        return (len(self.images), *(len(part["video"]) for part in self.videos))

    @property
    def parts(self) -> list[Mapping[str, Any]]:
        """The parts of all messages whose content is no plain string."""
        contents = [message["content"] for message in self.messages if not isinstance(message["content"], str)]
        return [part for content in contents for part in content]


def without_pictures(messages: Sequence[Message]) -> list[Message]:
    """Return the same messages with their texts alone."""
    return [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [part for part in message["content"] if part["type"] == "text"]}
        for message in messages
    ]


@dataclass(frozen=True)
class Batch:
    """Encoded chats. Padding belongs to no span.

    Of an encoder–decoder these are the tokens that the decoder reads: what stands before the response is the start
    token, where the answer is decided on, and the prompt's own tokens are those of `encoder`.
    """

    inputs: dict[str, Tensor]
    """What the model's forward takes (no labels)."""
    prompt_length: Int[Tensor, " sample"]
    """Tokens before the response, picture tokens included, padding not counted."""
    prompt_mask: Bool[Tensor, "sample token"]
    """Tokens before the response, picture tokens included."""
    response_mask: Bool[Tensor, "sample token"]
    """Tokens of the response."""
    image_mask: Bool[Tensor, "sample token"]
    """Tokens of pictures and of videos' frames (the placeholder, where pictures enter by cross-attention)."""
    thought_mask: Bool[Tensor, "sample token"] | None = None
    """Tokens of the response that a thinking model thinks before its answer, marks included. None: there are none."""
    encoder: "Batch | None" = None
    """The same chats as the encoder of an encoder–decoder reads them: prompts alone. None: there is no encoder."""

    @property
    def ids(self) -> Int[Tensor, "sample token"]:
        """The tokens that the spans speak of: those that the decoder reads."""
        return self.inputs["input_ids" if self.encoder is None else "decoder_input_ids"]

    @property
    def attention_mask(self) -> Int[Tensor, "sample token"]:
        """1 for every token, 0 for padding."""
        return self.inputs["attention_mask" if self.encoder is None else "decoder_attention_mask"]

    @property
    def asked(self) -> "Batch":
        """What holds the prompts' own tokens: the encoder's side where there is one."""
        return self if self.encoder is None else self.encoder

    @property
    def n_tokens(self) -> Int[Tensor, " sample"]:
        """All that a model reads of each chat, the encoder included, padding not."""
        own = self.attention_mask.sum(dim=1)
        return own if self.encoder is None else own + self.encoder.n_tokens

    @property
    def last_prompt(self) -> Int[Tensor, " sample"]:
        """Column of the last prompt token."""
        columns = torch.arange(self.prompt_mask.shape[1], device=self.prompt_mask.device)
        return (self.prompt_mask * columns).amax(dim=1)

    def span(self, name: Span) -> Bool[Tensor, "sample token"]:
        """Return a span's tokens; ``text`` is the prompt without its picture tokens, ``all`` is all but padding.

        ``response`` is the answer without the thought before it, which is ``thought``.

        Raises:
            SafeglassesError: pictures or text of a prompt, which the decoder of an encoder–decoder does not read.
        """
        if self.encoder is not None and name in ("image", "text"):
            raise SafeglassesError(
                "the decoder of an encoder–decoder reads nothing of the prompt itself",
                given=f"span {name} at sites of the decoder",
                expected="prompt (the start token, which has seen the whole prompt), response or all",
                do="pool over prompt:last, or look at the encoder's sites",
            )
        if name == "all":
            return self.attention_mask.bool()
        if name == "text":
            return self.prompt_mask & ~self.image_mask
        if name in ("response", "thought"):
            thought = torch.zeros_like(self.response_mask) if self.thought_mask is None else self.thought_mask
            return thought if name == "thought" else self.response_mask & ~thought
        return {"image": self.image_mask, "prompt": self.prompt_mask}[name]

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on a device."""
        return replace(
            self,
            inputs={name: value.to(device) for name, value in self.inputs.items()},
            prompt_length=self.prompt_length.to(device),
            prompt_mask=self.prompt_mask.to(device),
            response_mask=self.response_mask.to(device),
            image_mask=self.image_mask.to(device),
            thought_mask=None if self.thought_mask is None else self.thought_mask.to(device),
            encoder=None if self.encoder is None else self.encoder.to(device),
        )


def batches(keys: Sequence[tuple[Any, ...]], size: int, tokens: int | None = None) -> list[list[int]]:
    """Return indices in batches of at most ``size``: similar keys together, in a fixed order.

    Args:
        keys: per chat (`Chat.layout`, length in tokens, …); a batch never mixes the first entry.
        size: largest number of chats in a batch, at least 1.
        tokens: most tokens in a batch of several chats, padding included.
    """
    out: list[list[int]] = []
    for index in sorted(range(len(keys)), key=lambda i: (*keys[i], i)):
        rows = len(out[-1]) + 1 if out and keys[out[-1][0]][0] == keys[index][0] else 0
        if 1 < rows <= max(size, 1) and (tokens is None or rows * keys[index][1] <= tokens):
            out[-1].append(index)  # lengths rise inside a batch: this chat is the longest
        else:
            out.append([index])
    return out
