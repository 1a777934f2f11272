"""How commands speak: results on stdout, everything else on stderr; colours and tables only for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.table import Table

#: Blank columns between those of a table.
_GAP = 2


def stdout_console() -> Console:
    """Return a console for results. Made per call, so that tests and redirections see the current stream."""
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def stderr_console() -> Console:
    """Return a console for progress and remarks."""
    return Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """Print *value* as one JSON document."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_error(message: str, *, fix: str | None = None, as_json: bool = False) -> None:
    """Say what failed and what to do. With --json the error is a document too, on stderr, so stdout stays clean."""
    if as_json:
        print(json.dumps({"error": {"message": message, "fix": fix}}, ensure_ascii=False), file=sys.stderr)
        return
    console = stderr_console()
    console.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    if fix:
        console.print(f"[bold]fix:[/]   {escape(fix)}", soft_wrap=True)


def print_warnings(console: Console, warnings: Iterable[str]) -> None:
    """Print each of *warnings* as a line of its own."""
    for warning in warnings:
        console.print(f"warning: {warning}", markup=False, style="yellow", soft_wrap=True)


def print_table(
    columns: list[str], rows: list[list[str]], *, right: frozenset[str] = frozenset(), optional: Sequence[str] = ()
) -> None:
    """Print *rows*; cells are plain text. In a pipe the table is as wide as its content, never cut.

    On a terminal that is too narrow *optional* columns are left out, in this order; then the first column wraps.
    """
    console = stdout_console()
    console.print(fitted_table(console, columns, rows, right=right, optional=optional), soft_wrap=False)


def fitted_table(
    console: Console,
    columns: list[str],
    rows: list[list[str]],
    *,
    right: frozenset[str] = frozenset(),
    optional: Sequence[str] = (),
    dim: Collection[int] = (),
) -> Table:
    """Return the table that ``print_table`` prints, for *console* as wide as it is now; the rows of *dim* are faint."""
    if not console.is_terminal:
        console.width = 10_000
    shown = _fitting(columns, rows, console.width, optional)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for i in shown:
        justify: JustifyMethod = "right" if columns[i] in right else "left"
        table.add_column(columns[i], justify=justify, no_wrap=i > 0, overflow="ellipsis" if i else "fold")
    for number, row in enumerate(rows):
        table.add_row(*(escape(row[i]) for i in shown), style="dim" if number in dim else None)
    return table


def _fitting(columns: list[str], rows: list[list[str]], width: int, optional: Sequence[str]) -> list[int]:
    """Return the positions of the columns to show in *width*."""
    cells = {column: max(cell_len(row[i]) for row in [columns, *rows]) for i, column in enumerate(columns)}
    for column in optional:
        if sum(cells.values()) + _GAP * (len(cells) - 1) <= width:
            break
        del cells[column]
    return [i for i, column in enumerate(columns) if column in cells]


def duration(seconds: float | None) -> str:
    """Return *seconds* as people read it: 4s, 3m, 2h, 5d; a dash for None."""
    if seconds is None:
        return "-"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{int(seconds)}s"


def clock(seconds: float) -> str:
    """Return *seconds* as a stopwatch shows them: 0:04, 8:12, 1:02:33."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
