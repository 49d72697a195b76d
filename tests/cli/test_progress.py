"""Progress: bars where there is a terminal, lines where there is none, nothing in libraries."""

import io
import re

import pytest
from rich.console import Console
from rich.progress import Progress as Bars

from safeglasses.cli.progress import Lines, Live, shown
from safeglasses.progress import Progress, Quiet


def work(progress: Progress) -> None:
    progress.say("the plan [not markup]")
    with progress.stage("capture", 3) as advance:
        for done in (1, 2, 3):
            advance(done, 3)
    with progress.stage("load"):
        pass


def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    work(Quiet())
    assert capsys.readouterr() == ("", "")


def test_lines_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with shown() as progress:
        assert isinstance(progress, Lines)
        work(progress)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"the plan \[not markup\]\ncapture: \d+\.\d s\nload: \d+\.\d s\n", err)


def test_a_long_stage_says_how_long_it_will_take(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0

    def clock() -> float:
        return now

    with Lines(clock).stage("calibrate") as advance:
        for done in range(1, 11):
            now += 8.0
            advance(done, 10)
    assert capsys.readouterr().err == (
        "calibrate: 3 of 10, about 56 s left\n"
        "calibrate: 6 of 10, about 32 s left\n"
        "calibrate: 9 of 10, about 8 s left\n"
        "calibrate: 80.0 s\n"
    )


def test_a_failed_stage_is_not_announced_as_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), Lines().stage("divide"):
        raise ZeroDivisionError
    assert capsys.readouterr().err == ""


def test_live_bars() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100)
    with Bars(console=console) as bars:
        work(Live(bars))
        assert [(task.description, task.completed, task.total) for task in bars.tasks] == [
            ("capture", 3, 3),
            ("load", 1, 1),
        ]
        assert all(task.finished for task in bars.tasks)
    assert "the plan [not markup]" in file.getvalue()


def test_live_bar_of_a_failed_stage_stays_where_it_was() -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    with Bars(console=console) as bars:
        with pytest.raises(ZeroDivisionError), Live(bars).stage("divide", 5) as advance:
            advance(2, 5)
            raise ZeroDivisionError
        (task,) = bars.tasks
        assert (task.completed, task.finished) == (2, False)
        assert task.stop_time is not None
