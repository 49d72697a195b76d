"""A guard model run by transformers: chats become prompts by its own template, greedily answered or weighed yes/no."""

from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from safeglasses.errors import SafeglassesError
from safeglasses.measure.guard_formats import Family
from safeglasses.model.loading import find_source, load_config, load_model
from safeglasses.model.processors import load_processor

_SPELLINGS = {True: ("yes", "Yes", "YES", " yes", " Yes"), False: ("no", "No", "NO", " no", " No")}


class GuardModel:
    """The model and its tokenizer; implements `safeglasses.measure.guards.Reader`."""

    source: str
    """Folder or hub id."""

    def __init__(self, source: str, *, device: str | None = None, revision: str | None = None) -> None:
        """Load from a folder or hub id.

        Raises:
            SafeglassesError: it cannot be found, is no decoder, lacks weights or a chat template.
        """
        self.source = find_source(source)
        config = load_config(self.source, revision)
        processor: Any = load_processor(self.source, config, revision)
        self._tokenizer: Any = processor if isinstance(processor, PreTrainedTokenizerBase) else processor.tokenizer
        self._template = processor.chat_template
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model: Any = load_model(self.source, config, dtype="auto", device_map=None, revision=revision)
        self._model = model.to(self._device)
        self._specials = sorted(map(str, self._tokenizer.added_tokens_encoder), key=len, reverse=True)

    @torch.no_grad()
    def replies(self, chats: Sequence[Any], texts: Sequence[str], family: Family) -> list[str]:
        """Answer each chat greedily.

        Raises:
            SafeglassesError: the chat template refuses a chat, or leaves the text out.
        """
        inputs = self._encoded(chats, texts, family)
        made = self._model.generate(
            **inputs, max_new_tokens=family.max_new_tokens, do_sample=False, pad_token_id=self._tokenizer.pad_token_id
        )
        return self._tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    @torch.no_grad()
    def chances(self, chats: Sequence[Any], texts: Sequence[str], family: Family) -> list[float]:
        """Return P(yes) / (P(yes) + P(no)) of each chat's next token, from the likeliest spelling of either.

        Raises:
            SafeglassesError: the chat template refuses a chat, or leaves the text out; or the vocabulary has no yes.
        """
        yes, no = (self._spelled(answer) for answer in (True, False))
        logits = self._model(**self._encoded(chats, texts, family)).logits[:, -1].double().cpu()
        best = torch.stack([logits[:, yes].amax(-1), logits[:, no].amax(-1)], -1)
        return best.softmax(-1)[:, 0].masked_fill(~best.isfinite().all(-1), float("nan")).tolist()

    def _spelled(self, answer: bool) -> list[int]:
        encoded = [self._tokenizer.encode(text, add_special_tokens=False) for text in _SPELLINGS[answer]]
        found = sorted({ids[0] for ids in encoded if len(ids) == 1 and ids[0] != self._tokenizer.unk_token_id})
        if not found:
            raise SafeglassesError(
                "the guard cannot say yes or no in one token",
                given=self.source,
                expected="a vocabulary with " + ", ".join(_SPELLINGS[answer]),
                do="name the right family: guard:ID?family=NAME",
            )
        return found

    def _encoded(self, chats: Sequence[Any], texts: Sequence[str], family: Family) -> dict[str, Any]:
        prompts = [self._rendered(chat, text, family) for chat, text in zip(chats, texts, strict=True)]
        encoded = self._tokenizer(
            prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        )
        return {name: encoded[name].to(self._device) for name in ("input_ids", "attention_mask")}

    def _rendered(self, chat: Any, text: str, family: Family) -> str:
        """Render a chat; both ways of writing a message's content are tried, since templates take one of them."""
        shown = self._defused(text)
        if isinstance(chat, str):
            head, _, rest = chat.rpartition(text.strip())
            return (self._tokenizer.bos_token or "") + head + shown.strip() + rest
        reason = ""
        for parts in (False, True):
            messages = [{**m, "content": self._content(m["content"], parts=parts)} for m in chat]
            try:
                rendered = self._tokenizer.apply_chat_template(
                    messages,
                    chat_template=self._template,
                    tokenize=False,
                    add_generation_prompt=family.generation_prompt,
                    **dict(family.template),
                )
            except (TemplateError, TypeError) as error:
                reason = f": {str(error).splitlines()[0] if str(error) else type(error).__name__}"
                continue
            if shown.strip() in rendered:
                return rendered
        raise SafeglassesError(
            "the guard's chat template does not show it the answer",
            given=f"{self.source}, asked as {family.name}{reason}",
            expected="a template that takes a user's and an assistant's message",
            do="name the right family: guard:ID?family=NAME",
        )

    def _content(self, text: str, *, parts: bool) -> Any:
        defused = self._defused(text)
        return [{"type": "text", "text": defused}] if parts else defused

    def _defused(self, text: str) -> str:
        """Break up control tokens: an answer must not be able to end its turn and speak as the guard."""
        for token in self._specials:
            if len(token) > 1:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text
