from pathlib import Path

import pytest

from safeglasses.errors import SafeglassesError
from safeglasses.run.folder import RunFolder


def test_same_inputs_resume_and_keep_what_is_there(tmp_path: Path) -> None:
    first = RunFolder.open(tmp_path / "run", {"seed": 0})
    assert not first.resumed
    assert first.once("made.json", lambda: 1) == 1
    second = RunFolder.open(tmp_path / "run", {"seed": 0})
    assert second.resumed
    assert second.once("made.json", lambda: pytest.fail("made twice")) == 1


def test_overwrite_deletes_an_earlier_run_only(tmp_path: Path) -> None:
    RunFolder.open(tmp_path / "run", {"seed": 0}).once("made.json", lambda: 1)
    assert not RunFolder.open(tmp_path / "run", {"seed": 1}, overwrite=True).resumed
    assert not (tmp_path / "run/made.json").exists()


def test_seconds_add_up_over_resumed_runs(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path / "run", {})
    with folder.timed("capture"):
        pass
    once = folder.seconds()["capture"]
    with RunFolder.open(tmp_path / "run", {}).timed("capture"):
        pass
    assert folder.seconds()["capture"] >= once


def test_a_run_cut_while_its_folder_was_made_is_refused_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/other.txt").touch()
    with pytest.raises(SafeglassesError) as error:
        RunFolder.open(tmp_path / "run", {})
    assert error.value.do == "choose another --out"
