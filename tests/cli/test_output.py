"""Tables and numbers as people read them."""

from __future__ import annotations

import pytest
from rich.console import Console

from mesh.cli import output
from mesh.cli.output import duration, print_table


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0, "0s"), (59.9, "59s"), (60, "1m"), (3599, "59m"), (7200, "2h"), (200_000, "2d")],
)
def test_duration(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_a_table_in_a_pipe_is_never_cut_and_cells_are_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 300
    print_table(["A", "B"], [[long, "[bold]not markup[/]"], ["y", "1"]], right=frozenset({"B"}))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"{long}  [bold]not markup[/]"
    assert lines[2].endswith(" 1")


ROW = ["org/a-model-with-a-name:profile", "ready (old)", "4242", "20,480 MiB"]


@pytest.mark.parametrize(
    ("width", "columns"),
    [(80, 4), (62, 4), (61, 3), (56, 3), (55, 2), (44, 2)],
)
def test_a_narrow_terminal_keeps_what_matters(
    width: int, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _terminal(monkeypatch, width)
    print_table(["MODEL", "STATE", "PID", "MEMORY"], [ROW], optional=["PID", "MEMORY"])
    line = capsys.readouterr().out.splitlines()[1]
    kept = [ROW[i] for i in ((0, 1, 2, 3), (0, 1, 3), (0, 1))[4 - columns]]
    assert line.split("  ") == kept


def test_a_very_narrow_terminal_wraps_the_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _terminal(monkeypatch, 30)
    print_table(["MODEL", "STATE", "PID", "MEMORY"], [ROW], optional=["PID", "MEMORY"])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert "".join(line[:17].strip() for line in lines) == ROW[0]
    assert "ready (old)" in lines[0]


def _terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    console = Console(width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(output, "stdout_console", lambda: console)
