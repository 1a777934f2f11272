"""How commands speak: results on stdout, everything else on stderr; colours and tables only for people."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


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


def print_table(columns: list[str], rows: list[list[str]], *, right: frozenset[str] = frozenset()) -> None:
    """Print *rows*; cells are plain text. In a pipe the table is as wide as its content, never cut."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console = stdout_console()
    if not console.is_terminal:
        console.width = 10_000
    console.print(table)


def duration(seconds: float | None) -> str:
    """Return *seconds* as people read it: 4s, 3m, 2h, 5d; a dash for None."""
    if seconds is None:
        return "-"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{int(seconds)}s"
