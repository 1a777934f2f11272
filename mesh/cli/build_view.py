"""Shows attempts at builds while they go on: bars and the last log lines on a terminal, plain lines elsewhere.

Both on stderr; results are others' business. With ``--json`` only a terminal gets anything.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mesh.cli.output import clock, stderr_console

#: Lines of the log below the bar; fewer where the terminal is small.
_LOG_LINES: Final = 8
_BAR_CELLS: Final = 40
_FRAMES_PER_S: Final = 8
#: Where nothing can be redrawn, so many parts of a stage are told of.
_PLAIN_PARTS: Final = 10

#: What elapsed times are taken by; tests put something else here.
now = time.monotonic

Attempt = Mapping[str, Any]


@dataclass(slots=True)
class _Row:
    """One attempt, as last heard."""

    stage: str
    done: int | None = None
    total: int | None = None
    began: float = field(default_factory=lambda: now())
    told: int = 0  #: parts of the stage that plain lines told of
    took_s: float | None = None  #: when it has ended

    @property
    def count(self) -> str:
        return "" if self.total is None or self.done is None else f"{self.done}/{self.total}"

    def elapsed_s(self) -> float:
        return now() - self.began if self.took_s is None else self.took_s


class BuildView:
    """A context in which attempts are shown. Told from one thread; the terminal is redrawn by another."""

    def __init__(self, *, as_json: bool, console: Console | None = None) -> None:
        self._console = console or stderr_console()
        self._rows: dict[str, _Row] = {}
        self._lines: deque[str] = deque(maxlen=_LOG_LINES)
        self._logged = False  #: whether this stage said something
        self._problem: str | None = None
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(
                console=self._console,
                get_renderable=self._render,
                refresh_per_second=_FRAMES_PER_S,
                transient=True,
            )
        self._plain = self._live is None and not as_json

    def __enter__(self) -> BuildView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._live is not None:
            self._live.stop()

    def tell(self, label: str, attempt: Attempt, *, elapsed_s: float | None = None) -> None:
        """Show where *attempt* is; *elapsed_s* is how long it has been going on, where that is known."""
        row = self._rows.setdefault(label, _Row(""))
        if elapsed_s is not None:
            row.began = now() - max(0.0, elapsed_s)
        stage = str(attempt["stage"])
        if attempt.get("outcome") is not None:
            row.took_s = row.elapsed_s()
            stage = str(attempt["outcome"])
        self.progress(label, stage, attempt.get("done"), attempt.get("total"))

    def progress(self, label: str, stage: str, done: int | None, total: int | None) -> None:
        """Show how far a stage is."""
        row = self._rows.setdefault(label, _Row(""))
        if stage != row.stage:
            row.told, self._logged = 0, False
            self._say(f"{label}: {stage}")
        row.stage, row.done, row.total = stage, done, total
        if done and total and (part := _PLAIN_PARTS * done // total) > row.told:
            row.told = part
            if row.took_s is None and not self._logged:  # the lines of a log count themselves
                self._say(f"{label}: {stage} {row.count}")

    def log(self, line: str) -> None:
        """Show a line of the build's output."""
        self._logged = True
        self._lines.append(line)
        self._say(line)

    def catch_up(self, tail: Sequence[str]) -> None:
        """Show those of the newest lines that are not shown yet: all after where *tail* looks most like what is shown.

        One line does not tell where that is: a compiler says the same more than once.
        """
        shown = list(self._lines)
        start = most = 0
        for end in range(1, len(tail) + 1):
            if (same := _common_end(tail[:end], shown)) and same >= most:
                start, most = end, same
        for line in tail[start:]:
            self.log(line)

    def problem(self, text: str | None) -> None:
        """Say that there is no news, and why; None when there is again."""
        if text is not None and text != self._problem:
            self._say(text)
        self._problem = text

    def _say(self, line: str) -> None:
        if self._plain:
            self._console.print(Text.from_ansi(line), soft_wrap=True)

    def _render(self) -> RenderableType:
        table = Table.grid(padding=(0, 1))
        for width in (None, None, _BAR_CELLS, None, None):
            table.add_column(no_wrap=width is None, max_width=width)  # what may wrap is what gives way: the bar
        for label, row in list(self._rows.items()):
            bar = "" if row.took_s is not None else _bar(row)
            table.add_row(Text(label, style="bold"), row.stage, bar, row.count, clock(row.elapsed_s()))
        room = max(0, self._console.height - len(self._rows) - 3)
        lines = [self._cut(line, "dim") for line in list(self._lines)[-room:]] if room else []
        problem = [] if self._problem is None else [self._cut(self._problem, "yellow")]
        return Group(table, *lines, *problem)

    def _cut(self, line: str, style: str) -> Text:
        """Return *line* with room behind it for the ^C that a terminal echoes: what that breaks is not erased."""
        text = Text.from_ansi(line, style=style, no_wrap=True)
        text.expand_tabs(4)
        text.truncate(max(1, self._console.width - len(" ^C")), overflow="ellipsis")
        return text


def _common_end(one: Sequence[str], other: Sequence[str]) -> int:
    """Return how many lines at their ends are the same."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(reversed(one), reversed(other), strict=False)))


def _bar(row: _Row) -> ProgressBar:
    known = row.total is not None and row.done is not None
    return ProgressBar(total=row.total or 1, completed=row.done or 0, pulse=not known)
