"""Thinking models: the span `response` is the answer, the thought has a span of its own, and judges see the answer."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import families
from find.conftest import example_of
from safeglasses.measure.respond import Decoding, respond
from safeglasses.model.sampling import Settings, draw
from safeglasses.model.thought import MARKS, answer_at, opened, parted, written
from safeglasses.model.vlm import VLM, Chat, load

PLAIN = st.text(st.characters(exclude_characters="<>[]|◁▷"), min_size=1)
ANSWER = PLAIN.filter(str.strip).map(str.strip)


@given(ANSWER)
def test_a_plain_answer_is_an_answer(text: str) -> None:
    assert answer_at(text) == 0
    assert parted(text) == ("", text)


@given(st.sampled_from(MARKS), PLAIN, ANSWER, st.booleans())
def test_what_stands_behind_the_mark_is_the_answer(
    marks: tuple[str, str], thought: str, text: str, begun: bool
) -> None:
    whole = marks[0] * begun + thought + marks[1] + "\n\n" + text
    found, answer = parted(whole)
    assert answer == text
    assert found == (marks[0] * begun + thought + marks[1]).strip()


@pytest.mark.parametrize("mark", MARKS)
def test_a_thought_that_never_ends_has_no_answer(mark: tuple[str, str]) -> None:
    assert parted(mark[0] + " a red dog") == (mark[0] + " a red dog", "")
    assert opened("<|assistant|>" + mark[0] + "\n") == mark[0]
    assert opened("<|assistant|>") == ""


@pytest.mark.parametrize(
    "said",
    [  # as the models write it, every mark a special token; what is no mark is left out
        "<think>\nhm</think>\n\na red dog<|end|>",
        "<mm:think>hm</mm:think>a red dog",
        "[THINK]hm[/THINK]a red dog",
        "◁think▷hm◁/think▷a red dog",
        "<|START_THINKING|>hm<|END_THINKING|><|START_RESPONSE|>a red dog<|END_RESPONSE|>",
        "<|inner_prefix|>hm<|inner_suffix|>a red dog",
        "<|channel>thought\nhm<channel|>a red dog<turn|>",
        "<|content_thinking|>hm<|end_message|><|message_model|><|content_text|>a red dog<|end_message|>",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>a red dog<|return|>",
    ],
)
def test_what_models_write_with_special_tokens(family: Callable[[str], VLM], said: str) -> None:
    tokenizer = copy.deepcopy(family("llama").tokenizer)
    marks = re.findall(r"<[^<>\s]+>|\[/?THINK\]|◁/?think▷", said)
    tokenizer.add_special_tokens({"additional_special_tokens": sorted({*marks} - {*tokenizer.all_special_tokens})})
    ids = tokenizer(said, add_special_tokens=False)["input_ids"]
    thought, answer = parted(written(tokenizer, ids))
    assert answer == "a red dog"
    assert "hm" in thought
    cut = tokenizer(said[: said.index("hm") + 2], add_special_tokens=False)["input_ids"]
    assert parted(written(tokenizer, cut))[1] == "", "a thought that never ended"


@pytest.fixture(params=["special tokens", "plain text"])
def thinking(request: pytest.FixtureRequest, tmp_path: Path) -> VLM:
    """A tiny model whose template opens a thought; its marks are tokens of their own, or spelled out."""
    vlm = load(families.build("llama", tmp_path / "llama"))
    if request.param == "special tokens":
        vlm.tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
        vlm.model.resize_token_embeddings(len(vlm.tokenizer))
    template: Any = vlm.processor.chat_template
    vlm.processor.chat_template = template.replace("<|assistant|>{% endif %}", "<|assistant|><think>\n{% endif %}")
    return vlm


def spans(vlm: VLM, response: str, **options: Any) -> dict[str, str]:
    chats = [Chat(families.messages(1, pictures=0), text) for text in (response, "you")]
    batch = vlm.encode(chats, **options)
    ids = batch.ids[0]
    names: Any = ("thought", "response", "prompt", "all")
    return {name: str(vlm.tokenizer.decode(ids[batch.span(name)[0]])) for name in names}


@pytest.mark.parametrize("side", ["right", "left"])
def test_spans(thinking: VLM, side: Any) -> None:
    found = spans(thinking, "a dog?</think>\n\na red dog", padding_side=side)
    assert found["thought"] == "a dog?</think>\n\n"
    assert found["response"] == "a red dog"
    assert found["prompt"].endswith("<|assistant|><think>\n")
    assert found["all"] == found["prompt"] + found["thought"] + found["response"]
    assert spans(thinking, "a red dog")["response"] == "a red dog", "a response without a mark is all answer"
    assert spans(thinking, "<think>a dog")["response"] == ""


def test_without_a_thought_there_is_no_mask(family: Callable[[str], VLM]) -> None:
    batch = family("llama").encode([Chat(families.messages(1, pictures=0), "a red dog")])
    assert batch.thought_mask is None
    assert not batch.span("thought").any()
    assert family("llama").encoder.opened == ""


def test_the_encoder_decoder_has_the_span_as_well(family: Callable[[str], VLM]) -> None:
    vlm = family("t5gemma2")
    batch = vlm.encode([Chat(families.messages(1), "<think>a</think>you"), Chat(families.messages(1), "you")])
    said = [str(vlm.tokenizer.decode(batch.ids[row][batch.span("response")[row]])) for row in (0, 1)]
    assert said == ["you", "you"]
    assert str(vlm.tokenizer.decode(batch.ids[0][batch.span("thought")[0]])) == "<think>a</think>"


def test_answers_are_judged_and_thoughts_are_kept(thinking: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the marks are to the tokenizer, they come back, the template's own first."""
    said = thinking.tokenizer("a dog?</think>\n\na red dog</s>", add_special_tokens=False)["input_ids"]
    assert written(thinking.tokenizer, said) == "a dog?</think>\n\na red dog"

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.cat([input_ids, torch.tensor(said).expand(len(input_ids), -1)], dim=1)

    monkeypatch.setattr(thinking.model, "generate", generate)
    chat = Chat(families.messages(1, pictures=0))
    whole = "<think>a dog?</think>\n\na red dog"
    assert thinking.generate([chat], max_new_tokens=20, temperature=0.0, seed=0) == [whole]
    (found,) = respond(thinking, [example_of(0, pictures=0)], decoding=Decoding("greedy", 0.0, 20))
    assert (found.thought, found.text) == ("<think>a dog?</think>", "a red dog")
    (drawn,) = draw(thinking, [chat], [Settings(20)])
    assert (drawn.thought, drawn.text) == ("<think>a dog?</think>", "a red dog")
    del said[3:]  # cut off while it was thinking
    (cut,) = respond(thinking, [example_of(0, pictures=0)], decoding=Decoding("greedy", 0.0, 3))
    assert cut.text == ""
    assert cut.thought.startswith("<think>a")
