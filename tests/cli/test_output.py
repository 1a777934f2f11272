"""Tables and numbers as people read them."""

from __future__ import annotations

import pytest

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
