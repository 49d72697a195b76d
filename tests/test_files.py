"""Files are whole or not there, and say why when they cannot be."""

import hashlib
import json
import os
import stat
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safeglasses.errors import SafeglassesError
from safeglasses.files import (
    atomic_folder,
    atomic_write_bytes,
    atomic_write_text,
    read_json,
    sha256_file,
    write_json,
)

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3)
    ),
    max_leaves=10,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def text_of(error: pytest.ExceptionInfo[SafeglassesError]) -> str:
    return str(error.value)


def test_text_is_written_byte_for_byte_and_parents_are_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    atomic_write_text(path, "é\r\nz\u2028\n")
    assert path.read_bytes() == "é\r\nz\u2028\n".encode()
    atomic_write_bytes(path, b"\x00second")
    assert path.read_bytes() == b"\x00second"
    assert names(path.parent) == ["a.txt"]


def test_files_get_the_permissions_that_open_would_give(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "atomic", "")
    (tmp_path / "ordinary").write_text("")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("atomic", "ordinary")}
    assert len(modes) == 1


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    atomic_write_text(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SafeglassesError) as error:
        atomic_write_text(path, "new")
    assert text_of(error) == (
        "could not write a file\n"
        f"  given:    {path} (No space left on device)\n"
        "  expected: a folder that may be written to, with space left"
    )
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_file_in_the_place_of_the_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SafeglassesError, match="could not write a file"):
        atomic_write_text(tmp_path / "file" / "a.txt", "")
    with (
        pytest.raises(SafeglassesError, match="could not make a folder"),
        atomic_folder(tmp_path / "file" / "a"),
    ):
        pass


def test_folder_appears_only_when_the_block_has_ended(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("1")
        assert folder.parent == target.parent
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert names(target.parent) == ["out"]


def test_folder_of_a_failed_block_is_removed_and_the_old_one_stays(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("")
    with pytest.raises(KeyboardInterrupt), atomic_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["out"]
    assert names(target) == ["old"]


def test_existing_folder_is_refused_unless_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("")
    with pytest.raises(SafeglassesError) as error, atomic_folder(target):
        pytest.fail("the block must not start")
    assert text_of(error) == (
        "the output is already there\n"
        f"  given:    {target}\n"
        "  expected: a new folder, so that no earlier result is lost\n"
        "  do:       choose another name, or replace it with --overwrite (in Python: overwrite=True)"
    )
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("")
    assert names(target) == ["new"]
    assert names(tmp_path) == ["out"]


def test_folder_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(SafeglassesError, match="already there"), atomic_folder(target):
        target.mkdir()
        (target / "of another run").write_text("")
    assert names(tmp_path) == ["out"]
    assert names(target) == ["of another run"]


def test_overwriting_what_holds_the_working_directory_or_a_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "file").write_text("kept")
    monkeypatch.chdir(tmp_path / "below")
    for target in (tmp_path, tmp_path / "file"):
        with pytest.raises(SafeglassesError) as error, atomic_folder(target, overwrite=True):
            pytest.fail("the block must not start")
        assert text_of(error) == (
            "refused to replace the output\n"
            f"  given:    {target}\n"
            "  expected: an ordinary folder that holds neither the working directory nor the home directory\n"
            "  do:       choose another name"
        )
    assert (tmp_path / "file").read_text() == "kept"


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_folder(tmp_path / "link", overwrite=True) as folder:
        (folder / "new").write_text("")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "real") == ["new"]


def test_sha256_is_hashlibs(tmp_path: Path) -> None:
    for data in (b"", bytes(range(256)) * 4096):
        (tmp_path / "a").write_bytes(data)
        assert sha256_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()


@given(JSON)
@settings(max_examples=25, deadline=None)
def test_json_comes_back_as_it_was(value: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "a.json", value)
        assert read_json(Path(folder) / "a.json") == value


def test_json_bytes_are_fixed(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"z": [1, 0.5], "a": "é\u2028", "n": None})
    expected = '{\n  "z": [\n    1,\n    0.5\n  ],\n  "a": "é\u2028",\n  "n": null\n}\n'
    assert (tmp_path / "a.json").read_bytes() == expected.encode()


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (float("nan"), "$ is nan"),
        ({"rows": [{"kl": float("inf")}]}, "$.rows[0].kl is inf"),
        ({"a": (1.0, -float("inf"))}, "$.a[1] is -inf"),
    ],
)
def test_json_refuses_what_it_cannot_hold(tmp_path: Path, value: object, place: str) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(SafeglassesError) as error:
        write_json(path, value)
    assert text_of(error) == (
        f"a number that JSON cannot hold\n  given:    {place} for {path}\n  expected: finite numbers, or null for none"
    )
    assert not path.exists()


def test_reading_what_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(SafeglassesError) as error:
        read_json(path)
    assert text_of(error) == f"could not read a file\n  given:    {path} (No such file or directory)"
    path.write_text('{"a": 1')
    with pytest.raises(SafeglassesError) as error:
        read_json(path)
    assert text_of(error) == (
        "the file is not JSON\n"
        f"  given:    {path}: Expecting ',' delimiter: line 1 column 8 (char 7)\n"
        "  do:       write it again, or restore it from a copy"
    )
    path.write_text('{"a": NaN}')
    with pytest.raises(SafeglassesError, match="NaN is no JSON number"):
        read_json(path)
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": 1}).encode())
    assert read_json(path) == {"a": 1}
