"""Bars, counts and log lines: on a terminal of any size, in a pipe, and with --json."""

from __future__ import annotations

import io
from dataclasses import asdict
from typing import Any

import pytest
from rich.console import Console

from mesh.build.status import Outcome, Stage
from mesh.cli import build_view
from mesh.cli.build_view import BuildView
from tests.fakes_builds import attempt, ended


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What time it is, in one cell."""
    now = [1000.0]
    monkeypatch.setattr(build_view, "now", lambda: now[0])
    return now


def terminal(width: int = 80, height: int = 24) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None)


def shown(view: BuildView, console: Console) -> list[str]:
    """Return the lines that the next frame would have."""
    with console.capture() as capture:
        console.print(view._render())
    return [line.rstrip() for line in capture.get().splitlines()]


def compiling(done: int | None = None, total: int | None = None, **changes: Any) -> dict[str, Any]:
    return asdict(attempt(stage=Stage.COMPILING, done=done, total=total, **changes))


def test_stage_steps_and_time(clock: list[float]) -> None:
    console = terminal()
    view = BuildView(as_json=False, console=console)
    view.tell("default", compiling(100, 400), elapsed_s=65.0)
    clock[0] += 5
    (line,) = shown(view, console)
    assert line.split()[:2] == ["default", "compiling"]
    assert line.split()[-2:] == ["100/400", "1:10"]
    assert 0 < line.count("━") <= 40
    view.progress("default", "compiling", 200, 400)
    assert shown(view, console)[0].endswith("200/400 1:10")


def test_a_node_whose_clock_is_behind_shows_no_negative_time() -> None:
    console = terminal()
    view = BuildView(as_json=False, console=console)
    view.tell("default", compiling(), elapsed_s=-3.0)
    assert shown(view, console)[0].endswith(" 0:00")


def test_a_stage_without_steps_moves_all_the_same() -> None:
    console = terminal()
    view = BuildView(as_json=False, console=console)
    view.tell("default", asdict(attempt(stage=Stage.TESTING)))
    (line,) = shown(view, console)
    assert "━" in line
    assert "/" not in line


def test_the_last_lines_stand_below_as_many_as_there_is_room_for() -> None:
    for height, kept in ((24, 8), (8, 4), (3, 0)):
        console = terminal(height=height)
        view = BuildView(as_json=False, console=console)
        view.tell("default", compiling())
        for number in range(20):
            view.log(f"line {number}")
        assert shown(view, console)[1:] == [f"line {number}" for number in range(20 - kept, 20)]


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_nothing_is_wider_than_the_terminal_or_takes_a_second_line(width: int) -> None:
    """And what follows it there: the ^C that a terminal echoes."""
    console = terminal(width)
    view = BuildView(as_json=False, console=console)
    view.tell("default", compiling(100, 400))
    view.log("[100/400]\tBuilding \x1b[31mCXX\x1b[0m 日本語 " + "x" * 300)
    view.problem("talking to http://127.0.0.1:8080 failed: " + "y" * 300)
    lines = shown(view, console)
    assert len(lines) == 3
    assert all(len(line) <= width - len(" ^C") for line in lines[1:])
    assert "\x1b" not in "".join(lines)


def test_a_narrow_terminal_takes_it_from_the_bar() -> None:
    console = terminal(40)
    view = BuildView(as_json=False, console=console)
    view.tell("default", compiling(100, 400))
    (line,) = shown(view, console)
    assert line.startswith("default compiling ━")
    assert line.endswith("100/400 0:00")


def test_a_problem_is_shown_until_there_is_news() -> None:
    console = terminal()
    view = BuildView(as_json=False, console=console)
    view.tell("default", compiling())
    view.problem("connection lost; trying again")
    assert shown(view, console)[-1] == "connection lost; trying again"
    view.problem(None)
    assert len(shown(view, console)) == 1


def test_several_nodes_have_a_row_each_and_one_that_has_ended_keeps_its_time(clock: list[float]) -> None:
    console = terminal()
    view = BuildView(as_json=False, console=console)
    view.tell("gpu1", compiling(1, 2))
    view.tell("gpu22", compiling(1, 2))
    clock[0] += 8
    view.tell("gpu22", asdict(ended(Outcome.INSTALLED)))
    clock[0] += 60
    first, second = shown(view, console)
    assert first.split()[-1] == "1:08"
    assert second.split() == ["gpu22", "installed", "0:08"]


def test_the_bar_is_gone_at_the_end() -> None:
    """What stays is what the report says; the cursor is there again."""
    file = io.StringIO()
    with BuildView(as_json=False, console=Console(file=file, force_terminal=True, width=80, height=24)) as view:
        view.tell("default", compiling(100, 400))
        view.log("a line")
    written = file.getvalue()
    assert "compiling" in written
    last_frame = written.rindex("a line")
    assert written[last_frame:].count("\x1b[1A\x1b[2K") == 2
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")


def test_in_a_pipe_there_are_plain_lines() -> None:
    file = io.StringIO()
    with BuildView(as_json=False, console=Console(file=file, width=40)) as view:
        view.tell("default", asdict(attempt()))
        view.log("\x1b[1mCloning\x1b[0m into '[x]' " + "x" * 100)
        view.progress("default", "fetching", 9, 9)
        view.tell("default", compiling(0, 100))
        for done in range(101):
            view.progress("default", "compiling", done, 100)
        view.problem("connection lost")
        view.problem("connection lost")
        view.problem(None)
        view.tell("default", asdict(ended(Outcome.FAILED, done=99, total=100)))
    assert file.getvalue().splitlines() == [
        "default: fetching",
        "Cloning into '[x]' " + "x" * 100,
        "default: compiling",
        *(f"default: compiling {part}0/100" for part in range(1, 11)),
        "connection lost",
        "default: failed",
    ]


def test_catching_up_shows_no_line_twice() -> None:
    file = io.StringIO()
    view = BuildView(as_json=False, console=Console(file=file, width=40))
    view.catch_up(["a", "b"])
    view.log("c")
    view.catch_up(["a", "b", "c", "d"])
    view.catch_up(["d"])
    view.catch_up(["x", "y"])
    view.catch_up([])
    assert file.getvalue().split() == ["a", "b", "c", "d", "x", "y"]


def test_catching_up_where_lines_come_more_than_once() -> None:
    """The last line shown may be in the tail again, as a new one."""
    file = io.StringIO()
    view = BuildView(as_json=False, console=Console(file=file, width=40))
    lines = ["warning:", "a", "warning:", "b", "warning:", "c"]
    for end in range(1, len(lines) + 1):
        view.catch_up(lines[:end])
    view.catch_up([*lines[2:], "d", "c"])
    assert file.getvalue().split() == [*lines, "d", "c"]


def test_with_json_in_a_pipe_there_is_nothing() -> None:
    file = io.StringIO()
    with BuildView(as_json=True, console=Console(file=file, width=40)) as view:
        view.tell("default", compiling(50, 100))
        view.log("line")
        view.problem("lost")
    assert file.getvalue() == ""
