"""Pairs that cannot teach are refused before any model runs; prompts are found in pairs."""

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from PIL import Image

from safeglasses.data.examples import Example, Examples, Picture, Text, Turn, check_pairs, prompts_of
from safeglasses.errors import SafeglassesError
from safeglasses.model.chat import Chat
from safeglasses.model.vlm import VLM


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (200, 0, 0)).save(file, "PNG")
    return file.getvalue()


PICTURE = Picture(data=png())


def ask(name: str, prompt: str, response: str | None, label: str | None, **more: object) -> Example:
    content = (PICTURE, Text(prompt))
    return Example(id=name, messages=(Turn("user", content),), response=response, label=label, **more)


def test_prompts_of_pairs() -> None:
    pairs = [
        ask("0", "a", "bad", "toxic", split="test"),
        ask("1", "a", "fine", "non-toxic", split="calibrate"),
        ask("2", "a", "good", "non-toxic", split="test"),
        ask("3", "b", "bad", "toxic"),
        ask("4", "c", "fine", "non-toxic", split="test"),
    ]
    assert list(prompts_of(pairs)) == [
        ask("1", "a", "fine", "toxic", split="calibrate"),
        ask("3", "b", None, "toxic"),
        ask("4", "c", "fine", "non-toxic", split="test"),
    ]


@dataclass(frozen=True)
class Ruler:
    """Counts characters and pixels where a model would count tokens."""

    context_length: int | None = 100

    def lengths(self, chats: Sequence[Chat]) -> list[int]:
        texts = [part.get("text", "") for chat in chats for message in chat.messages for part in message["content"]]
        assert len(texts) == 2 * len(chats)
        return [
            len(texts[2 * index + 1]) + len(chat.response or "") + chat.images[0].width
            for index, chat in enumerate(chats)
        ]


def pairs_of(n: int, *, toxic: str = "ask", other: str = "ask", split: str = "find") -> list[Example]:
    return [
        ask(f"{split}{index}{label}", f"{prompt} {index}", "answer", label, split=split)
        for index in range(n)
        for label, prompt in (("toxic", toxic), ("non-toxic", other))
    ]


def refusal(rows: list[Example], ruler: Ruler | None = None, **more: int) -> str:
    with pytest.raises(SafeglassesError) as error:
        check_pairs(Examples(tuple(rows)), ruler or Ruler(), **more)
    return str(error.value)


def test_good_pairs_pass(caplog: pytest.LogCaptureFixture) -> None:
    rows = Examples(tuple(pairs_of(20, toxic="roast", other="describe")))
    with caplog.at_level(logging.WARNING):
        check_pairs(rows, Ruler())
        check_pairs(rows, Ruler(None))
    assert caplog.messages == []


def test_a_model_is_a_ruler(tiny_vlm: VLM) -> None:
    check_pairs(Examples(tuple(pairs_of(2))), tiny_vlm, minimum=2)
    limit = tiny_vlm.context_length
    assert limit is not None
    rows = [*pairs_of(2), replace(pairs_of(1)[0], id="long", response="word " * limit)]
    with pytest.raises(SafeglassesError, match="rows longer than the model's context") as error:
        check_pairs(Examples(tuple(rows)), tiny_vlm, minimum=2)
    assert error.value.given.startswith("long (")


def test_pairs_without_labels_or_responses() -> None:
    rows = pairs_of(20)
    unlabelled = [replace(row, label=None) for row in rows[:7]]
    assert refusal(unlabelled + rows[7:]) == (
        "rows without a label\n"
        "  given:    find0toxic, find0non-toxic, find1toxic, find1non-toxic, find2toxic and 2 more\n"
        '  expected: "label": "toxic" or "non-toxic"\n'
        "  do:       complete or remove these rows"
    )
    empty = [replace(rows[0], response=None), replace(rows[1], response=" \n")]
    assert refusal(empty + rows[2:]) == (
        "rows without a response\n"
        "  given:    find0toxic, find0non-toxic\n"
        '  expected: some text in "response"\n'
        "  do:       complete or remove these rows"
    )


def test_pairs_of_too_few_or_one_class() -> None:
    ending = (
        "  expected: at least 20 toxic and 20 non-toxic rows in find\n"
        '  do:       add rows, or put more of them into find with "split": "find"'
    )
    assert refusal(pairs_of(19) + pairs_of(3, split="test")) == (
        "too few rows in the find split\n"
        "  given:    find: 19 toxic, 19 non-toxic; test: 3 toxic, 3 non-toxic\n" + ending
    )
    toxic = [row for row in pairs_of(30) if row.is_toxic]
    assert refusal(toxic) == ("no non-toxic rows in the find split\n  given:    find: 30 toxic, 0 non-toxic\n" + ending)
    other = [row for row in pairs_of(30) if not row.is_toxic]
    assert refusal(other) == "no toxic rows in the find split\n  given:    find: 0 toxic, 30 non-toxic\n" + ending
    assert refusal([]) == "no toxic rows in the find split\n  given:    no rows\n" + ending
    check_pairs(Examples(tuple(pairs_of(2))), Ruler(), minimum=2)


def test_rows_too_long_for_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_: Picture) -> Image.Image:
        raise AssertionError("lengths need no pixels")

    monkeypatch.setattr(Picture, "open", never)
    rows = pairs_of(20)
    rows[3] = replace(rows[3], response="x" * 1_500)
    rows += [replace(rows[0], id="last", split="test", response="x" * 100)]
    assert refusal(rows) == (
        "rows longer than the model's context\n"
        "  given:    find1non-toxic (1,511 tokens), last (111 tokens)\n"
        "  expected: at most 100 tokens, prompt, pictures and response together\n"
        "  do:       shorten or remove these rows"
    )


@pytest.mark.parametrize(("extra", "told"), [([], True), ([ask("x", "ask 0", "again", "toxic")], False)])
def test_classes_that_share_their_prompts_are_told(
    extra: list[Example], told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        check_pairs(Examples(tuple(pairs_of(20) + extra)), Ruler())
    warning = (
        "toxic and non-toxic rows share their prompts: nothing measured on the prompt can differ, and "
        "prompt:* evidence will be empty"
    )
    assert caplog.messages == ([warning] if told else [])
