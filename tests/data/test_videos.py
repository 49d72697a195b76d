"""Videos in rows: read, written, hashed, split, shown as frames."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from safeglasses.data.examples import Example, Picture, Text, Turn, Video, read_examples, write_examples
from safeglasses.data.splits import groups_of
from safeglasses.errors import BadRow
from safeglasses.report.interpret import cross, thumbnails, with_pictures_of

_SKIP = "leave bad rows out with --skip-bad (in Python: skip_bad=True)"


def png(shade: int, size: tuple[int, int] = (6, 4)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


PNGS = [png(shade) for shade in range(10)]


def film(*shades: int, fps: float | None = None) -> Video:
    return Video(tuple(Picture(data=PNGS[shade]) for shade in shades), fps)


def example(*content: Text | Picture | Video, name: str = "a", **more: Any) -> Example:
    return Example(name, (Turn("user", content),), **more)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for shade in (1, 2, 3):
        (tmp_path / f"{shade}.png").write_bytes(png(shade))
    (tmp_path / "wide.png").write_bytes(png(1, (9, 4)))
    return tmp_path


def read(folder: Path, *parts: object, **columns: object) -> Example:
    content = [*parts, {"type": "text", "text": "what happens?"}]
    row = {"messages": [{"role": "user", "content": content}], **columns}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return read_examples(folder / "rows.jsonl")[0]


def test_frames_by_path_in_the_part_or_in_columns(folder: Path) -> None:
    frames = ["1.png", {"path": "2.png"}, "1.png"]
    part = {"type": "video"}
    row = read(folder, {**part, "video": frames, "fps": 2})
    assert row.messages[0].content[0] == film(1, 2, 1, fps=2.0)
    assert (row.layout, row.n_images, row.n_frames) == ((0, 3), 0, 3)
    assert read(folder, part, video=frames).media == (film(1, 2, 1),)
    assert read(folder, part, {**part, "fps": 0.5}, videos=[frames, ["3.png"]]).media == (
        film(1, 2, 1),
        film(3, fps=0.5),
    )
    mixed = read(folder, {"type": "image"}, part, {"type": "image", "path": "3.png"}, image="2.png", videos=[frames])
    assert mixed.media == (Picture(data=png(2)), film(1, 2, 1), Picture(data=png(3)))
    assert mixed.layout == (2, 3)
    assert [picture.key for picture in mixed.pictures] == [Picture(data=png(n)).key for n in (2, 1, 2, 1, 3)]


def test_parquet_holds_frames_as_bytes(tmp_path: Path) -> None:
    frames = [{"bytes": png(shade), "path": None} for shade in (1, 2)]
    content = [
        {"type": "video", "video": frames, "fps": 2.0, "text": None},
        {"type": "text", "video": None, "fps": None, "text": "what happens?"},
    ]
    rows = [{"messages": [{"role": "user", "content": content}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert read_examples(tmp_path / "rows.parquet")[0].media == (film(1, 2, fps=2.0),)


@pytest.mark.parametrize(
    ("part", "columns", "what", "given", "expected"),
    [
        (
            {"video": "clip.mp4"},
            {},
            "a video that is no list of frames",
            "'clip.mp4'",
            '{"type": "video", "video": ["frames/1.png", "frames/2.png", …], "fps": 2}',
        ),
        ({"path": "clip.mp4"}, {}, "a video that is no list of frames", "'clip.mp4'", None),
        ({"video": []}, {}, "a video that is no list of frames", "[]", None),
        ({}, {}, "a video part without a video", "{'type': 'video'}", None),
        ({}, {"videos": [["1.png"], ["2.png"]]}, "videos of the row that no message shows", "1 in 'videos'", None),
        ({"video": ["1.png"], "fps": 0}, {}, 'the "fps" of a video is no rate', "0", None),
        ({"video": ["1.png"], "fps": "2"}, {}, 'the "fps" of a video is no rate', "'2'", None),
        ({"video": ["1.png"], "fps": True}, {}, 'the "fps" of a video is no rate', "True", None),
        ({"video": ["1.png", "http://x/2.png"]}, {}, "a picture on the network", "'http://x/2.png'", None),
        (
            {"video": ["1.png", "wide.png"]},
            {},
            "the frames of a video differ in size",
            "6 × 4 and 9 × 4",
            "one size for all frames of a video",
        ),
        ({"video": ["1.png", "gone.png"]}, {}, "the picture is missing", None, None),
    ],
)
def test_bad_videos(
    folder: Path,
    part: dict[str, object],
    columns: dict[str, object],
    what: str,
    given: str | None,
    expected: str | None,
) -> None:
    with pytest.raises(BadRow) as error:
        read(folder, {"type": "video", **part}, **columns)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{folder / 'rows.jsonl'}:1: {what}"
    assert given is None or lines[1] == f"  given:    {given}"
    assert expected is None or lines[2] == f"  expected: {expected}"
    if what == "a video that is no list of frames":
        ways = "write its frames as pictures first, e.g. ffmpeg -i clip.mp4 -vf fps=2 frames/%04d.png"
        assert lines[3] == f"  do:       {ways}, or {_SKIP}"


SHADE = st.integers(0, 3)
FILM = st.tuples(st.lists(SHADE, min_size=1, max_size=3), st.sampled_from([None, 0.5, 2.0]))
PARTS = st.lists(st.one_of(FILM, SHADE), min_size=1, max_size=3)


def media(parts: list[Any]) -> list[Picture | Video]:
    """Return a picture for a shade, a video for shades and a rate."""
    return [Picture(data=PNGS[part]) if isinstance(part, int) else film(*part[0], fps=part[1]) for part in parts]


@given(PARTS, PARTS)
def test_prompt_keys_and_splits_see_frames_order_and_rate(one: list[Any], two: list[Any]) -> None:
    a, b = example(*media(one), Text("x")), example(*media(two), Text("x"), name="b")
    assert (a.prompt_key == b.prompt_key) == (one == two)
    shared = {picture.key for picture in a.pictures} & {picture.key for picture in b.pictures}
    first, second = groups_of([a, b])
    assert (first == second) == bool(shared)
    assert a.layout == a.chat().layout


def test_reading_undoes_writing(tmp_path: Path) -> None:
    rows = [example(film(1, 2, fps=2.0), Text("x"), film(3), split="test"), example(film(2, 1), Text("x"), name="b")]
    write_examples(tmp_path / "rows.jsonl", rows)
    again = read_examples(tmp_path / "rows.jsonl")
    assert [row.messages for row in again] == [row.messages for row in rows]
    assert len(list((tmp_path / "images").iterdir())) == 3


def test_a_chat_holds_decoded_frames() -> None:
    chat = example(film(1, 2, fps=2.0), Picture(data=png(3)), Text("x")).chat()
    video, picture, text = chat.messages[0]["content"]
    assert (video["type"], video["fps"], picture["type"], text["type"]) == ("video", 2.0, "image", "text")
    assert [frame.getpixel((0, 0)) for frame in video["video"]] == [(1, 0, 0), (2, 0, 0)]
    assert "fps" not in example(film(1)).chat().messages[0]["content"][0]
    assert chat.layout == (1, 2)


def test_reports_show_the_first_the_middle_and_the_last_frame() -> None:
    def shades(*content: Any) -> list[int]:
        found = [Image.open(io.BytesIO(data)).getpixel((0, 0)) for data in thumbnails(example(*content))]
        return [pixel[0] for pixel in found if isinstance(pixel, tuple)]

    assert shades(film(1, 2, 3, 4, 5), Picture(data=png(9))) == [1, 3, 5, 9]
    assert shades(film(1, 2)) == [1, 2]
    assert shades(film(7)) == [7]


def test_videos_are_exchanged_with_videos_of_as_many_frames() -> None:
    one = example(film(1, 2), Text("x"), label="toxic", response="r")
    other = replace(example(film(3, 4), Text("y"), name="b", response="s"), label="non-toxic")
    assert cross([one, other]) == [(one, other)]
    assert cross([one, replace(other, messages=example(film(3, 4, 5), Text("y")).messages)]) == []
    assert with_pictures_of(one, other).messages[0].content == (film(3, 4), Text("x"))
