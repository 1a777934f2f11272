"""The memory of a node: bars on a terminal, plain numbers in a pipe."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mesh.cli import bars
from mesh.cli.bars import bar, charged, print_memory


def figures(capacity: int | None, used: int, foreign: int = 0) -> dict[str, Any]:
    free = None if capacity is None else max(0, capacity - foreign - used)
    return {"capacity_mib": capacity, "used_mib": used, "foreign_mib": foreign, "free_mib": free}


def test_plain_numbers_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    memory = {
        "gpu10": figures(24000, 0),
        "vram": figures(40000, 13000, 1000),
        "gpu2": figures(24000, 13000, 1000),
        "ram": figures(None, 512),
        "other": figures(None, 0),  # neither limited nor used: nothing to say
    }
    print_memory(memory, instances=(3, 100))
    assert capsys.readouterr().out.splitlines() == [
        "",
        "budget",
        "  ram        512 MiB used, not limited",
        "  vram       13,000 used, 1,000 foreign, 26,000 free of 40,000 MiB",
        "  gpu2       13,000 used, 1,000 foreign, 10,000 free of 24,000 MiB",
        "  gpu10      0 used, 24,000 free of 24,000 MiB",
        "  instances  3 of 100",
    ]


def test_nothing_to_say(capsys: pytest.CaptureFixture[str]) -> None:
    print_memory({"ram": figures(None, 0)})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("width", "cells"), [(120, 30), (80, 10)])
def test_bars_on_a_terminal(width: int, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    written = _terminal(monkeypatch, width)
    print_memory({"gpu0": figures(30000, 15000, 5000)})
    line = written.getvalue().splitlines()[2]
    drawn = line.split()[1]
    assert len(drawn) == cells
    assert drawn.count("█") == cells // 2
    assert drawn.rstrip("░").rstrip("▒") == "█" * (cells // 2)
    assert line.endswith("15,000 used, 5,000 foreign, 10,000 free of 30,000 MiB")
    assert len(line) <= width


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 2 * 10**6), st.integers(1, 60))
def test_a_bar_is_never_longer_and_shows_nobody_who_is_not_there(total: int, used: int, free: int, cells: int) -> None:
    free = min(free, max(0, total - used))
    drawn = bar(total, used, free, cells, plain=True).plain
    assert len(drawn) == cells
    assert drawn == "".join(sorted(drawn, key="#x.".index))
    if used and total:
        assert drawn[0] == "#"
    if not used:
        assert "#" not in drawn
    if total - used - free <= 0:
        assert "x" not in drawn


def test_charged_names_gpus_or_their_sum() -> None:
    assert charged({"ram": 512, "vram": 20480, "gpu10": 480, "gpu2": 20000}) == (
        "ram 512 MiB, gpu2 20,000 MiB, gpu10 480 MiB"
    )
    assert charged({"ram": 512, "vram": 20480, "instances": 1}) == "ram 512 MiB, vram 20,480 MiB"
    assert charged({"vram": 0}) == "-"


def _terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> io.StringIO:
    written = io.StringIO()
    console = Console(file=written, width=width, force_terminal=True, color_system=None, highlight=False)
    monkeypatch.setattr(bars, "stdout_console", lambda: console)
    return written
