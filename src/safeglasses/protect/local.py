"""A local model as what answers: in batches, wearing what a stack wears, by contrast where a prompt says so."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from safeglasses.data.records import chat_messages
from safeglasses.defend.defence import Defence
from safeglasses.errors import SafeglassesError
from safeglasses.measure import work
from safeglasses.measure.respond import Decoding
from safeglasses.model.chat import Chat
from safeglasses.model.sampling import Settings
from safeglasses.model.vlm import VLM
from safeglasses.protect.steps import Ask, Contrast, Failure, Prompt, Reply, Said


@runtime_checkable
class Answerer(Protocol):
    """Something that answers chats: a local model, a server, a script."""

    @property
    def identity(self) -> str:
        """Who answers: equal for those whose answers are equal."""
        ...

    def answer(self, asks: Sequence[Ask], decoding: Decoding) -> Sequence[Reply]:
        """Answer all, in order; what cannot be answered is a `Failure` and spoils no other."""
        ...


class LocalAnswerer:
    """A `VLM`, with defences on."""

    def __init__(self, vlm: VLM, worn: Sequence[Defence] = ()) -> None:
        """Take a model and what it wears; nothing is put on before it is asked."""
        self.vlm, self._worn = vlm, tuple(worn)

    @property
    def identity(self) -> str:
        """The model's fingerprint and what is worn."""
        return "+".join([self.vlm.fingerprint(), *(defence.identity for defence in self._worn)])

    def answer(self, asks: Sequence[Ask], decoding: Decoding) -> list[Reply]:
        """Answer all; those that are drawn alike go together."""
        found: dict[int, Reply] = {}
        groups: dict[Contrast | None, list[int]] = {}
        for index, one in enumerate(asks):
            groups.setdefault(one.prompt.contrast, []).append(index)
        for contrast, rows in groups.items():
            found |= zip(rows, self._together([asks[i] for i in rows], decoding, contrast), strict=True)
        return [found[i] for i in range(len(asks))]

    def _together(self, asks: Sequence[Ask], decoding: Decoding, contrast: Contrast | None) -> list[Reply]:
        rows = [_asked(one, decoding) for one in asks]
        start = time.perf_counter()
        with ExitStack() as on:
            if contrast is None:
                for defence in self._worn:
                    on.enter_context(defence.worn(self.vlm))
                drawn = work.answer(self.vlm, rows)
            else:
                _refuse_encoder(self.vlm)
                bare = contrast
                drawn = work.answer(self.vlm, rows, reweigh=lambda i: _Contrasted(self.vlm, self._worn, bare, i))
        seconds = (time.perf_counter() - start) / len(asks)
        return [
            Failure(f"{one.what}: {one.given}", seconds)
            if isinstance(one, SafeglassesError)
            else Said(one.text, one.n_tokens, one.n_prompt, seconds, cut=not one.ended and one.limit == "model_length")
            for one in drawn
        ]


def _refuse_encoder(vlm: VLM) -> None:
    if vlm.anatomy.encoder_path is not None:
        raise SafeglassesError(
            "decoding by contrast needs a model without an encoder",
            given=f"{vlm.source}, an encoder–decoder: what is worn would also change what its encoder says",
            expected="a decoder-only model",
            do="leave the contrast out of the stack",
        )


def memory_per_token(vlm: VLM) -> int:
    """Bytes that the model's cache holds for one token, by its config: keys and values of all layers."""
    config: Any = vlm.model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * vlm.dtype.itemsize


def _asked(one: Ask, decoding: Decoding) -> work.Asked:
    prompt = one.prompt
    settings = Settings(
        max_tokens=one.max_new_tokens or decoding.max_new_tokens,
        temperature=decoding.temperature if prompt.temperature is None else prompt.temperature,
        draw=f"{decoding.seed}/{prompt.id}{prompt.draw}",
        prefix=prompt.prefix,
    )
    return work.Asked(chat_of(prompt), settings, 0)


def chat_of(prompt: Prompt) -> Chat:
    """Return what a model reads, pictures decoded."""
    return Chat(chat_messages(prompt.turns))


class _Contrasted(LogitsProcessor):
    """Moves a batch's first distributions away from the bare model's, towards and beyond the worn one's.

    The worn model reads the prompt once and then each drawn token, with a cache of its own: what it wears is put on
    for that forward pass alone, because generation itself goes on with the bare model.
    """

    def __init__(self, vlm: VLM, worn: Sequence[Defence], contrast: Contrast, inputs: Mapping[str, Tensor]) -> None:
        self._vlm, self._worn, self._contrast = vlm, worn, contrast
        self._width = inputs["input_ids"].shape[1]
        self._kept: dict[str, Any] = {name: value for name, value in inputs.items() if name != "input_ids"}
        self._kept["use_cache"] = True
        if "position_ids" not in inputs:
            model: Any = vlm.model
            self._kept["position_ids"] = model._prepare_position_ids_for_generation(inputs["input_ids"], self._kept)

    @torch.no_grad()
    def __call__(
        self, input_ids: Int[Tensor, "row token"], scores: Float[Tensor, "row vocab"]
    ) -> Float[Tensor, "row vocab"]:
        more = input_ids.shape[1] - self._width
        if more >= self._contrast.tokens:
            return scores
        # The steps of `generate` itself: they know each family's positions, masks, and pictures.
        model: Any = self._vlm.model
        length = 1 if more else None
        inputs = model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=length, is_first_iteration=not more, **self._kept
        )
        with ExitStack() as on:
            for defence in self._worn:
                on.enter_context(defence.worn(self._vlm))
            output = model(**inputs, return_dict=True)
        self._kept = model._update_model_kwargs_for_generation(output, self._kept, is_encoder_decoder=False)
        return contrasted(scores, output.logits[:, -1], self._contrast)


def contrasted(
    bare: Float[Tensor, "row vocab"], worn: Float[Tensor, "row vocab"], contrast: Contrast
) -> Float[Tensor, "row vocab"]:
    """Return log p with p = p_bare + α (p_worn − p_bare), cut off at 0, over tokens that both hold likely.

    These are the smallest sets of likeliest tokens of both whose intersection has as many members as asked for.
    Source: Xu et al. 2024, "SafeDecoding" (arXiv 2402.08983), equations 1 and 2.
    """
    p, q = bare.float().softmax(-1), worn.float().softmax(-1)
    wanted = min(contrast.candidates, p.shape[-1])
    # a token is in both sets of the k likeliest from k = the larger of its two ranks on
    later = torch.maximum(_ranks(p), _ranks(q))
    depth = later.sort(dim=-1).values[:, wanted - 1 : wanted]
    mixed = (p + contrast.alpha * (q - p)).clamp(min=0)
    kept = torch.where(later <= depth, mixed, 0.0)
    kept = torch.where(kept.sum(-1, keepdim=True) > 0, kept, q)  # every candidate cut off: the worn model decides
    return kept.log().to(bare.dtype)


def _ranks(p: Float[Tensor, "row vocab"]) -> Int[Tensor, "row vocab"]:
    return p.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
