"""Every field of a row that cannot be right is told with file, row and the way out."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from PIL import Image

from safeglasses.data.examples import read_examples
from safeglasses.errors import BadRow

WAY_OUT = "mend the row, or leave bad rows out with --skip-bad (in Python: skip_bad=True)"
ASK = [{"role": "user", "content": "hi"}]


def show(*parts: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]


def lines(path: Path, rows: Iterable[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (6, 4)).save(tmp_path / "images" / "red.png")
    return tmp_path


BAD_ROWS = [
    (
        {"label": "toxic"},
        'no "messages"',
        "the fields label",
        '"messages": [{"role": "user", "content": "…"}]',
    ),
    ({}, 'no "messages"', "the fields none", '"messages": [{"role": "user", "content": "…"}]'),
    (
        {"messages": "hi"},
        '"messages" is not a list',
        "'hi'",
        '"messages": [{"role": "user", "content": "…"}]',
    ),
    ({"messages": []}, 'empty "messages"', "[]", "some text or a picture"),
    (
        {"messages": [{"role": "user", "content": " \n"}]},
        'empty "messages"',
        "[{'role': 'user', 'content': ' \\n'}]",
        "some text or a picture",
    ),
    (
        {"messages": ["hi"]},
        "a message is not a table",
        "'hi'",
        '"messages": [{"role": "user", "content": "…"}]',
    ),
    (
        {"messages": [{"role": "human", "content": "hi"}]},
        'unknown "role" of a message',
        "'human'",
        '"system", "user", "assistant"',
    ),
    (
        {"messages": [{"role": "user", "content": []}]},
        'a message without "content"',
        "{'role': 'user', 'content': []}",
        "a string, or a list of texts, pictures and videos",
    ),
    (
        {"messages": [*ASK, {"role": "assistant", "content": "no"}]},
        "the last message is not the user's",
        "role 'assistant'",
        'the prompt in "messages", the answer to it in "response"',
    ),
    (
        {"messages": show({"type": "image_url", "image_url": {"url": "a.png"}})},
        "unknown part of a message",
        "{'type': 'image_url', 'image_url': {'url': 'a.png'}}",
        '{"type": "text", "text": "…"}, {"type": "image", "path": "…"} or {"type": "video", "video": ["frames/1.png", '
        '"frames/2.png", …], "fps": 2}',
    ),
    (
        {"messages": show({"type": "text", "text": None})},
        'a text part without "text"',
        "{'type': 'text', 'text': None}",
        '{"type": "text", "text": "…"}',
    ),
    (
        {"messages": show({"type": "image"})},
        "an image part without a picture",
        "{'type': 'image'}",
        '{"type": "image", "path": "…"}',
    ),
    (
        {"messages": show({"type": "image", "path": ""})},
        "a picture that is no path",
        "''",
        "a local path, like images/1.png",
    ),
    (
        {"messages": show({"type": "image", "bytes": "iVBORw0KGgo="})},
        "a picture's bytes as text",
        "12 characters",
        "a path, or Parquet, which holds bytes",
    ),
    (
        {"messages": ASK, "image": "images/red.png"},
        "pictures of the row that no message shows",
        "1 in 'image'",
        'a part {"type": "image"} in the "content" where each belongs',
    ),
    (
        {"messages": ASK, "label": "harmful"},
        'unknown "label"',
        "'harmful'",
        '"toxic", "non-toxic", or no such field',
    ),
    ({"messages": ASK, "label": 1}, 'unknown "label"', "1", '"toxic", "non-toxic", or no such field'),
    (
        {"messages": ASK, "split": "train"},
        'unknown "split"',
        "'train'",
        '"find", "calibrate", "test", or no such field',
    ),
    (
        {"messages": ASK, "condition": "hard"},
        'unknown "condition"',
        "'hard'",
        '"standard", "adversarial", or no such field',
    ),
    ({"messages": ASK, "response": ["x"]}, '"response" is not text', "['x']", "a string, or no such field"),
    ({"messages": ASK, "id": True}, '"id" is not text', "True", "a string, or no such field"),
    (
        {"messages": ASK, "slots": {"n": 2}},
        '"slots" is not a table of words',
        "{'n': 2}",
        'a table of words, like {"name": "cat", "colour": "red"}',
    ),
    (
        {"messages": ASK, "slots": "cat"},
        '"slots" is not a table of words',
        "'cat'",
        'a table of words, like {"name": "cat", "colour": "red"}',
    ),
    (
        {"messages": ASK, "id": "a"},
        "an id for the second time",
        "'a', first in {path}:1",
        "one id for each row, or none at all",
    ),
]


@pytest.mark.parametrize(("row", "what", "given", "expected"), BAD_ROWS)
def test_bad_row(folder: Path, row: dict[str, object], what: str, given: str, expected: str) -> None:
    path = lines(folder / "data.jsonl", [{"id": "a", "messages": ASK}, row])
    with pytest.raises(BadRow) as error:
        read_examples(path)
    given = given.replace("{path}", str(path))
    text = f"{path}:2: {what}\n  given:    {given}\n  expected: {expected}\n  do:       {WAY_OUT}"
    assert str(error.value) == text
    kept = read_examples(path, skip_bad=True)
    assert (kept.skipped, [row.id for row in kept]) == ((text,), ["a"])


@pytest.mark.parametrize(
    "url",
    ["https://example.com/a.png", "http://a/b", "file:///a.png", "s3://a/b", "data:image/png;base64,iVBO"],
)
@pytest.mark.parametrize("field", ["path", "image", "url"])
def test_pictures_on_the_network_are_refused(folder: Path, field: str, url: str) -> None:
    path = lines(folder / "data.jsonl", [{"messages": show({"type": "image", field: url})}])
    with pytest.raises(BadRow) as error:
        read_examples(path)
    assert str(error.value) == (
        f"{path}:1: a picture on the network\n"
        f"  given:    '{url}'\n"
        "  expected: a local file, which stays what it was\n"
        "  do:       download it and give its path, "
        "or leave bad rows out with --skip-bad (in Python: skip_bad=True)"
    )
