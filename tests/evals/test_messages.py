"""What comes from Inspect: taken as it is, or refused by name."""

import base64
import io
import struct
import zlib
from pathlib import Path

import pytest
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageTool,
    ChatMessageUser,
    ContentAudio,
    ContentImage,
    ContentText,
    GenerateConfig,
)
from inspect_ai.tool import ToolCall
from PIL import Image

from evals.conftest import ask, png
from safeglasses.data.examples import Example, Picture, Text, Turn, Video, write_examples
from safeglasses.errors import BadRow, SafeglassesError
from safeglasses.evals.messages import chat_of, key_of, settings_of
from safeglasses.evals.samples import sample_of, samples
from safeglasses.evals.uris import data_uri, picture_of


def user(*parts) -> ChatMessageUser:
    return ChatMessageUser(content=list(parts))


def test_a_chat_is_what_the_row_says():
    row = ask("1", "what is this", "red", "blue")
    chat = chat_of(sample_of(row).input)
    assert [m["role"] for m in chat.messages] == ["user"]
    assert [p["type"] for p in chat.messages[0]["content"]] == ["image", "image", "text"]
    assert [image.getpixel((0, 0)) for image in chat.images] == [(255, 0, 0), (0, 0, 255)]
    told = [ChatMessageSystem(content="be kind"), user(ContentText(text="a")), ChatMessageAssistant(content="b")]
    chat = chat_of([*told, ChatMessageUser(content="c")])
    assert [(m["role"], m["content"][0]["text"]) for m in chat.messages] == [
        ("system", "be kind"), ("user", "a"), ("assistant", "b"), ("user", "c")
    ]  # fmt: skip
    assert chat_of(told, reference=True).response == "b"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_pictures_travel_as_their_own_bytes(kind):
    file = io.BytesIO()
    Image.new("RGB", (5, 4), "green").save(file, kind)
    uri = data_uri(Picture(data=file.getvalue()))
    assert uri.startswith("data:image/" + {"PPM": "x-portable-anymap"}.get(kind, kind.lower()))
    assert picture_of(uri).read() == file.getvalue()
    assert picture_of(uri).open().size == (5, 4)


def bomb() -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (bomb(), "the picture is too large"),
        (png()[:60], "the picture cannot be decoded"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "the picture cannot be decoded"),
        (b"", "the picture cannot be decoded"),
    ],
)
def test_bad_pictures_are_refused(data, what):
    image = "data:image/png;base64," + base64.b64encode(data).decode()
    with pytest.raises(BadRow, match=what):
        chat_of([user(ContentImage(image=image))])


@pytest.mark.parametrize(
    ("image", "what"),
    [
        ("https://example.org/a.png", "a picture on the network"),
        ("file:///etc/passwd", "a picture on the network"),
        ("data:image/png;base64,???", "not a picture"),
        ("data:image/png,abc", "not a picture"),
        ("data:text/html;base64,YQ==", "not a picture"),
        ("/nowhere/a.png", "the picture is missing"),
    ],
)
def test_what_is_no_picture_is_refused(image, what):
    with pytest.raises(SafeglassesError, match=what):
        chat_of([user(ContentImage(image=image))])


CALL = ChatMessageAssistant(content="", tool_calls=[ToolCall(id="1", function="f", arguments={})])


@pytest.mark.parametrize(
    ("messages", "what", "given"),
    [
        ([], "nothing to answer", "no messages"),
        ([ChatMessageAssistant(content="hi")], "nothing to answer", "the last message is the assistant's"),
        ([CALL, ChatMessageUser(content="a")], "the safeglasses provider calls no tools", "a call of a tool"),
        (
            [ChatMessageTool(content="1"), ChatMessageUser(content="a")],
            "the safeglasses provider calls no tools",
            "a tool's answer",
        ),
        (
            [user(ContentAudio(audio="data:audio/wav;base64,AA==", format="wav"))],
            "content that the safeglasses provider does not take",
            "audio in the user's message",
        ),
    ],
)
def test_chats_that_cannot_be_read_are_refused(messages, what, given):
    with pytest.raises(SafeglassesError) as refused:
        chat_of(messages)
    assert (refused.value.what, refused.value.given) == (what, given)


def test_settings():
    config = GenerateConfig(
        max_tokens=9, temperature=0.5, top_p=0.9, top_k=3, stop_seqs=["x"], seed=4, logprobs=True, top_logprobs=2,
        max_connections=3, system_message="kind", max_retries=1, num_choices=2,
    )  # fmt: skip
    found = settings_of(config, "n")
    assert (found.max_tokens, found.temperature, found.top_p, found.top_k) == (9, 0.5, 0.9, 3)
    assert (found.stop, found.top_logprobs, found.draw) == (("x",), 2, "4/n")
    plain = settings_of(GenerateConfig(), "n")
    assert (plain.max_tokens, plain.temperature, plain.top_logprobs, plain.draw) == (2048, 1.0, None, "0/n")


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (GenerateConfig(frequency_penalty=0.1, best_of=2), "options that the safeglasses provider does not have"),
        (GenerateConfig(logit_bias={1: 2.0}), "options that the safeglasses provider does not have"),
        (GenerateConfig(temperature=-1.0), "settings that make no answer"),
        (GenerateConfig(max_tokens=0), "settings that make no answer"),
        (GenerateConfig(top_p=0.0), "settings that make no answer"),
        (GenerateConfig(stop_seqs=[""]), "settings that make no answer"),
        (GenerateConfig(num_choices=2, temperature=0.0), "several greedy answers are one answer"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(config, what):
    with pytest.raises(SafeglassesError) as refused:
        settings_of(config, "n")
    assert refused.value.what == what


def test_the_key_is_about_what_is_asked():
    row = sample_of(ask("1", "what", "red")).input
    same = sample_of(ask("2", "what", "red")).input
    others = [sample_of(ask("3", *words)).input for words in (("what", "blue"), ("what ", "red"), ("what",))]
    assert key_of(row) == key_of(same)
    assert len({key_of(m) for m in [row, *others]}) == 4


def test_a_video_is_its_frames_in_a_log_and_refused_in_a_task(tmp_path: Path) -> None:
    """A task's model would be shown pictures where the row has a video."""
    pictures = ask("1", "what", "red", "blue").pictures
    row = Example("film", (Turn("user", (Video(pictures), Text("what"))),), label="toxic", split="test")
    (message,) = sample_of(row).input
    assert [part.type for part in message.content] == ["image", "image", "text"]
    write_examples(tmp_path / "rows.jsonl", [row])
    with pytest.raises(SafeglassesError) as caught:
        samples(str(tmp_path / "rows.jsonl"), split="test", keep=lambda _: True, what="prompts")
    assert str(caught.value) == (
        "videos do not go through Inspect here\n"
        "  given:    1 row(s) with videos, the first 'film'\n"
        "  expected: rows of text and pictures: its messages hold whole files of videos, and ours hold frames\n"
        "  do:       measure them with safeglasses measure --log-dir, or give the frames as pictures"
    )
