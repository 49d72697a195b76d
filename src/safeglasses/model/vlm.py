"""A loaded model with everything around it: encode chats, run them, generate, say who it is."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from safeglasses.errors import SafeglassesError
from safeglasses.model import loading, processors, weights
from safeglasses.model.anatomy import Anatomy, anatomy
from safeglasses.model.chat import Batch, Chat, Message, Span, batches
from safeglasses.model.encode import Encoder, Side
from safeglasses.model.pictures import picture_ids
from safeglasses.model.processors import Processor
from safeglasses.model.thought import written

__all__ = ["VLM", "Batch", "Chat", "Message", "Span", "batches", "load"]


@dataclass(frozen=True)
class VLM:
    """A vision-language model (or a text-only one) in evaluation mode, with its processor and anatomy."""

    model: PreTrainedModel
    """The whole model."""
    processor: Processor
    """Its processor; a tokenizer for text-only models."""
    anatomy: Anatomy
    """Where the decoder's linear maps are."""
    source: str
    """The folder or hub id it was loaded from."""
    revision: str | None = None
    """The hub revision asked for."""

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.model.dtype

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, alone or inside the processor."""
        return processors.tokenizer_of(self.processor)

    @property
    def is_multimodal(self) -> bool:
        """Whether it takes pictures."""
        return not isinstance(self.processor, PreTrainedTokenizerBase)

    @property
    def context_length(self) -> int | None:
        """Longest sequence in tokens, as far as config and tokenizer say."""
        positions = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        limits = [limit for limit in (positions, self.tokenizer.model_max_length) if limit and limit < 10**9]
        return min(limits) if limits else None

    @cached_property
    def encoder(self) -> Encoder:
        """What turns chats into batches."""
        accepted = loading.forward_parameters(self.model)
        text = self.model.config.get_text_config(decoder=True)
        rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
        return Encoder(
            processor=self.processor,
            picture_ids=picture_ids(self.model.config, self.processor),
            accepted=accepted,
            dtype=self.dtype,
            flat_positions="position_ids" in accepted and "mrope_section" not in rope,
            stop_ids=self.stop_ids,
            start_ids=self.start_ids,
            answer_type=loading.answer_type(self.model),
            needs_picture=loading.needs_picture(self.model),
        )

    @property
    def start_ids(self) -> tuple[int, ...]:
        """What the decoder of an encoder–decoder reads before an answer; nothing elsewhere.

        The token that starts it and, where the checkpoint's generation config forces one (BART, Florence-2), the first
        one behind it: neither is the model's own choice.
        """
        if self.anatomy.encoder_path is None:
            return ()
        given: Any = self.model.generation_config
        config: Any = self.model.config
        places = (given, config, config.get_text_config(decoder=True))
        named = (getattr(place, "decoder_start_token_id", None) for place in places)
        begins: Any = self.tokenizer.bos_token_id
        start: int | None = next((token for token in named if isinstance(token, int)), begins)
        if start is None:
            raise SafeglassesError(
                "the checkpoint names no token that starts the decoder",
                given=f"{self.source}: no decoder_start_token_id in generation_config.json, no bos_token",
                do="set decoder_start_token_id in the checkpoint's generation_config.json",
            )
        forced = getattr(given, "forced_bos_token_id", None)
        return (start, forced) if isinstance(forced, int) else (start,)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a generated answer, as the checkpoint says."""
        eos: Any = getattr(self.model.generation_config, "eos_token_id", None)
        if eos is None:
            eos = self.tokenizer.eos_token_id
        if eos is None:
            return ()
        return (eos,) if isinstance(eos, int) else tuple(eos)

    def encode(self, chats: Sequence[Chat], *, padding_side: Side = "right", end_of_turn: bool = False) -> Batch:
        """Encode chats as one batch, on the CPU.

        Each prompt goes through the checkpoint's chat template with the generation prompt added; the
        response's tokens follow, as they would follow in generation. With an encoder–decoder the prompt goes to the
        encoder and the response to the decoder, and both are padded on the right, whatever was asked for: generation
        begins at the decoder's start.

        Args:
            chats: at least one; all with the same number of pictures.
            padding_side: ``left`` also supplies position ids where the model takes plain ones.
            end_of_turn: let the token that ends the turn follow each response, as part of it.

        Raises:
            SafeglassesError: no chats, pictures for a text-only model, or unequal numbers of pictures.
        """
        return self.encoder.encode(chats, padding_side, end_of_turn=end_of_turn)

    def lengths(self, chats: Sequence[Chat]) -> list[int]:
        """Return the tokens of prompt and response, pictures included, without running the model.

        Text is tokenised without pictures; what pictures add is measured once per distinct combination of
        sizes. The end of turn that `encode` can add is not counted.
        """
        return self.encoder.lengths(chats)

    def forward(self, batch: Batch, *, logits_from: int | None = None) -> Float[Tensor, "sample token vocab"]:
        """Return the logits of the columns from ``logits_from`` on; gradient mode is the caller's choice.

        Raises:
            SafeglassesError: ``logits_from`` lies outside the batch.
        """
        width = batch.ids.shape[1]
        start = logits_from or 0
        if not 0 <= start < width:
            raise SafeglassesError(
                "no such column",
                given=f"logits_from={logits_from}",
                expected=f"0 … {width - 1}, or None for all",
            )
        inputs = batch.to(self.device).inputs
        if "logits_to_keep" in self.encoder.accepted:
            return self.model(**inputs, use_cache=False, logits_to_keep=width - start).logits
        return self.model(**inputs, use_cache=False).logits[:, start:]

    def generate(self, chats: Sequence[Chat], *, max_new_tokens: int, temperature: float, seed: int) -> list[str]:
        """Return what the model writes, special tokens left out, stripped. Responses in the chats are not read.

        A thinking model's thought stands before the answer, in its marks, the first of which may be the template's;
        `thought.parted` parts them.

        Of the checkpoint's generation config only the special tokens count: no top-k, no top-p, no penalties.

        Args:
            chats: at least one; all with the same number of pictures.
            max_new_tokens: at most so many tokens per answer.
            temperature: 0 for greedy decoding.
            seed: makes sampling reproducible; the global random state is left as it was.
        """
        batch = self.encode([Chat(chat.messages) for chat in chats], padding_side="left").to(self.device)
        inputs = self.encoder.to_generate(batch)
        generate: Any = self.model.generate
        theirs = self.model.generation_config
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        ours = GenerationConfig(
            **sampling,
            num_beams=1,
            use_cache=True,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(self.stop_ids) or None,
            pad_token_id=self.tokenizer.pad_token_id,
            bos_token_id=self.tokenizer.bos_token_id,
            decoder_start_token_id=next(iter(self.start_ids), None),
        )
        self.model.generation_config = ours  # else generate() fills what we leave open from the checkpoint's
        try:
            with torch.no_grad(), _seeded(self.device, seed):
                tokens = generate(**inputs, generation_config=ours)
        finally:
            self.model.generation_config = theirs
        answers = tokens[:, batch.ids.shape[1] :]
        return [(self.encoder.opened + written(self.tokenizer, row)).strip() for row in answers.tolist()]

    def fingerprint(self) -> str:
        """Return who the weights are, whatever dtype they were loaded in; see `weights.fingerprint`."""
        return weights.fingerprint(self.model)

    def save_processor(self, folder: Path) -> None:
        """Write the processor's files into a folder; see `processors.save_processor`."""
        processors.save_processor(self.processor, self.source, self.revision, folder)

    def check(self) -> None:
        """Check that all weights are numbers.

        Raises:
            SafeglassesError: NaN, infinite or unloaded weights, with the tensor's name.
        """
        weights.check_finite(self.model, self.source)


def load(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    revision: str | None = None,
) -> VLM:
    """Load a model and its processor through the Auto classes; safetensors only, no code from checkpoints.

    Args:
        source: a folder, or a model id of the Hugging Face hub.
        dtype: ``auto`` (as saved), ``float32``, ``bfloat16``, ``float16`` or a torch dtype.
        device_map: None for the CPU, ``auto``, a device such as ``cuda:0``, or a map as accelerate takes it.
        revision: branch, tag or commit on the hub.

    Raises:
        SafeglassesError: nothing there, unreachable, incomplete, no chat template, weights not numbers.
    """
    device_map = loading.checked_device_map(device_map)
    dtype = loading.checked_dtype(dtype)
    where = loading.find_source(source)
    config = loading.load_config(where, revision)
    processor = processors.load_processor(where, config, revision)
    model = loading.load_model(where, config, dtype=dtype, device_map=device_map, revision=revision)
    vlm = VLM(model, processor, anatomy(model), where, revision)
    vlm.check()
    return vlm


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the generators of the CPU and of the device's kind, and put them back afterwards."""
    kinds: list[Any] = [] if device.type != "cuda" else list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=kinds):
        torch.default_generator.manual_seed(seed)
        for index in kinds:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield
