"""A bad row is told with file, number, what was wrong and what to do; nothing is silently left out."""

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from PIL import Image

from safeglasses.data.examples import Examples, Picture, Text, Turn, read_examples
from safeglasses.errors import BadRow, SafeglassesError

WAY_OUT = "mend the row, or leave bad rows out with --skip-bad (in Python: skip_bad=True)"
ASK = [{"role": "user", "content": "hi"}]
KINDS = "a .jsonl or .parquet file, a folder with data.jsonl, metadata.jsonl or *.parquet, or a saved dataset"


def show(*parts: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]


def lines(path: Path, rows: Iterable[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two pictures and a damaged one."""
    (tmp_path / "images").mkdir()
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (6, 4), colour).save(tmp_path / "images" / f"{name}.png")
    content = (tmp_path / "images" / "red.png").read_bytes()
    (tmp_path / "images" / "half.png").write_bytes(content[:-20])
    return tmp_path


def test_every_field_is_read(folder: Path) -> None:
    path = lines(
        folder / "data.jsonl",
        [
            {
                "id": 7,
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    *show({"type": "image", "path": "images/red.png"}),
                ],
                "response": "Red.\u2028Really.",
                "label": "non-toxic",
                "pair_id": 3,
                "category": "colour",
                "language": "en",
                "modality": "image",
                "condition": "adversarial",
                "source": "here",
                "split": "test",
                "slots": {"colour": "red"},
            },
            {"messages": ASK},
        ],
    )
    full, bare = read_examples(path)
    assert (full.id, full.pair_id, full.response, full.label) == ("7", "3", "Red.\u2028Really.", "non-toxic")
    assert (full.category, full.language, full.modality, full.source) == ("colour", "en", "image", "here")
    assert (full.condition, full.split, full.slots) == ("adversarial", "test", {"colour": "red"})
    assert full.messages == (
        Turn("system", (Text("Be brief."),)),
        Turn("user", (Picture(path=folder / "images" / "red.png"), Text("What is it?"))),
    )
    assert (bare.id, bare.messages) == ("data.jsonl:2", (Turn("user", (Text("hi"),)),))
    assert (bare.response, bare.label, bare.pair_id, bare.condition) == (None, None, None, "standard")


def test_missing_and_damaged_pictures(folder: Path) -> None:
    names = ["red.png", "gone.png", "half.png", "blue.png"]
    rows = [{"id": name, "messages": show({"type": "image", "path": f"images/{name}"})} for name in names]
    path = lines(folder / "data.jsonl", rows)
    mend = "mend or replace the picture, or leave bad rows out with --skip-bad (in Python: skip_bad=True)"
    gone = (
        f"{path}:2: the picture is missing\n"
        f"  given:    {folder}/images/gone.png (no such file)\n"
        f"  expected: a local file\n  do:       {mend}"
    )
    half = (
        f"{path}:3: the picture cannot be decoded\n"
        f"  given:    {folder}/images/half.png (OSError)\n"
        f"  expected: an undamaged PNG, JPEG, WEBP, GIF, BMP, TIFF, PPM\n  do:       {mend}"
    )
    with pytest.raises(BadRow, match=re.escape(gone)):
        read_examples(path)
    kept = read_examples(path, skip_bad=True)
    assert kept.skipped == (gone, half)
    assert [row.id for row in kept] == ["red.png", "blue.png"]


def test_absolute_paths_and_paths_above_are_read(folder: Path) -> None:
    (folder / "below").mkdir()
    parts = [{"type": "image", "path": name} for name in ("../images/red.png", f"{folder}/images/red.png")]
    path = lines(folder / "below" / "data.jsonl", [{"messages": show(part)} for part in parts])
    first, second = read_examples(path)
    assert first.pictures == second.pictures == (Picture(path=folder / "images" / "red.png"),)


def test_a_picture_of_many_rows_is_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path | None] = []
    really_open = Picture.open

    def count(picture: Picture) -> Image.Image:
        opened.append(picture.path)
        return really_open(picture)

    monkeypatch.setattr(Picture, "open", count)
    rows = read_examples(
        lines(folder / "data.jsonl", [{"messages": show({"type": "image", "path": "images/red.png"})}] * 20)
    )
    assert opened == [folder / "images" / "red.png"]
    assert len({id(row.pictures[0]) for row in rows}) == 1


def test_a_file_cut_off_within_its_last_row(folder: Path) -> None:
    path = lines(folder / "data.jsonl", [{"id": "a", "messages": ASK}, {"id": "b", "messages": ASK}])
    whole = path.read_bytes()
    path.write_bytes(whole.removesuffix(b"\n"))
    assert [row.id for row in read_examples(path)] == ["a", "b"]
    path.write_bytes(whole[:-10])
    with pytest.raises(BadRow) as error:
        read_examples(path)
    assert str(error.value) == (
        f"{path}:2: the row is not JSON\n"
        f"  given:    {len(whole) // 2 - 10} bytes (Expecting ':' delimiter: line 1 column 52 (char 51))\n"
        "  expected: one whole JSON object on one line; was the file cut off?\n"
        f"  do:       {WAY_OUT}"
    )
    assert [row.id for row in read_examples(path, skip_bad=True)] == ["a"]


@pytest.mark.parametrize(
    ("line", "what", "given", "expected"),
    [
        (b'["a"]', "the row is not an object", "['a']", "{…}"),
        (b'{"id": "\xff"}', "the row is not UTF-8 text", "invalid start byte", "UTF-8"),
        (b'{"id": "\\ud800"}', "the row is not UTF-8 text", "surrogates not allowed", "UTF-8"),
    ],
)
def test_rows_that_are_no_object_or_no_text(tmp_path: Path, line: bytes, what: str, given: str, expected: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(line)
    with pytest.raises(BadRow) as error:
        read_examples(path)
    assert str(error.value) == (f"{path}:1: {what}\n  given:    {given}\n  expected: {expected}\n  do:       {WAY_OUT}")


def test_deep_nesting_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"[" * 200_000)
    with pytest.raises(BadRow, match="the row is not JSON"):
        read_examples(path)


def test_byte_order_mark_blank_lines_and_carriage_returns_are_tolerated(tmp_path: Path) -> None:
    row = json.dumps({"messages": [{"role": "user", "content": "a\u2028b\u0085c"}]}, ensure_ascii=False)
    path = tmp_path / "data.jsonl"
    path.write_bytes(f"\ufeff{row}\r\n\r\n{row}\r\n".encode())
    rows = read_examples(path)
    assert [row.id for row in rows] == ["data.jsonl:1", "data.jsonl:3"]
    assert rows[0].messages == (Turn("user", (Text("a\u2028b\u0085c"),)),)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("gone.jsonl", "no such data"),
        ("data.csv", "data of an unknown kind"),
        ("empty", "no rows in the folder"),
    ],
)
def test_data_that_is_not_there(tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / "data.csv").write_text("id\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SafeglassesError) as error:
        read_examples(tmp_path / name)
    assert str(error.value) == f"{what}\n  given:    {tmp_path / name}\n  expected: {KINDS}"


def test_no_usable_row_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n")
    with pytest.raises(SafeglassesError) as error:
        read_examples(path)
    assert str(error.value) == (f"no usable row\n  given:    {path} (0 bad rows skipped)\n  expected: at least one row")
    path.write_text("{")
    with pytest.raises(SafeglassesError, match=re.escape("(1 bad rows skipped)")):
        read_examples(path, skip_bad=True)


def test_fields_that_are_not_used_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = lines(tmp_path / "data.jsonl", [{"messages": ASK, "lable": "toxic", "zzz": 1}] * 2)
    with caplog.at_level(logging.WARNING):
        read_examples(path)
    assert caplog.messages == [
        "the field 'lable' of the data is not used; is 'label' meant?",
        "the field 'zzz' of the data is not used",
    ]


def test_skipped_rows_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = lines(tmp_path / "data.jsonl", [{"messages": ASK}, {"messages": []}])
    with caplog.at_level(logging.WARNING):
        rows = read_examples(path, skip_bad=True)
    assert caplog.messages == [f"1 bad row(s) skipped, the first: {rows.skipped[0]}"]
    assert isinstance(rows, Examples)
