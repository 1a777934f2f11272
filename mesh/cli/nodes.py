"""`llama-mesh nodes`: the nodes of the mesh as one of them sees them, once or as a live table."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from typing import Any, NoReturn

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from mesh.cli import node
from mesh.cli.failure import OK, CliError
from mesh.cli.output import duration, fitted_table, print_json, stdout_console

_COLUMNS = [
    "NODE", "STATUS", "ADDRESS", "VERSION", "MODELS", "REQUESTS", "QUEUED", "MEMORY", "RTT", "CIRCUIT", "AGE"
]  # fmt: skip
_RIGHT = frozenset({"MODELS", "REQUESTS", "QUEUED", "RTT", "AGE"})
_OPTIONAL = ["VERSION", "CIRCUIT", "AGE", "RTT", "ADDRESS", "MEMORY", "MODELS", "QUEUED", "REQUESTS"]
#: Between two looks; tests put something else here.
pause = time.sleep

Entry = Mapping[str, Any]


def nodes(arguments: argparse.Namespace) -> int:
    """Show GET /cluster/nodes; with --watch until Ctrl-C, which is the normal end then."""
    found = node.find(arguments)
    answer = found.get("/cluster/nodes")  # a wrong address or key ends the command, watching or not
    if arguments.watch is None:
        if arguments.json:
            print_json(answer)
        else:
            console = stdout_console()
            console.print(_view(console, answer), soft_wrap=False)
        return OK
    try:
        if arguments.json:
            _stream(found, answer, arguments.watch)
        else:
            _watch(found, answer, arguments.watch)
    except KeyboardInterrupt:
        return OK


def _stream(found: node.Node, answer: Any, interval_s: float) -> NoReturn:
    """Print one line of JSON for each look, for ever."""
    while True:
        print(json.dumps(answer, ensure_ascii=False), flush=True)
        pause(interval_s)
        try:
            answer = found.get("/cluster/nodes")
        except CliError as error:
            answer = {"error": {"message": error.message, "fix": error.fix}}


def _watch(found: node.Node, answer: Any, interval_s: float) -> NoReturn:
    """Redraw the table for ever. A node that does not answer for a moment is told of below what it said last."""
    console = stdout_console()
    if not console.is_terminal:  # nothing can be redrawn there
        while True:
            console.print(_view(console, answer), soft_wrap=False)
            pause(interval_s)
            answer, problem = _look(found, answer)
            console.print(problem or "")
    with Live(_view(console, answer), console=console, auto_refresh=False) as live:
        while True:
            pause(interval_s)
            answer, problem = _look(found, answer)
            view = _view(console, answer)
            live.update(view if problem is None else Group(view, problem), refresh=True)


def _look(found: node.Node, before: Any) -> tuple[Any, Text | None]:
    """Return what the node says now; if it does not answer, what it said before, and why it is that."""
    try:
        return found.get("/cluster/nodes"), None
    except CliError as error:
        return before, Text(f"\nthis is what it said before: {error.message}", style="yellow")


def _view(console: Console, answer: Mapping[str, Any]) -> RenderableType:
    entries = in_order(answer["nodes"])
    rows = [_row(name, entry) for name, entry in entries]
    dim = [i for i, (_, entry) in enumerate(entries) if entry.get("status") == "dead"]
    table = fitted_table(console, _COLUMNS, rows, right=_RIGHT, optional=_OPTIONAL, dim=dim)
    rejected = [f"{name}: {entry['rejected']}" for name, entry in entries if entry.get("rejected")]
    return Group(table, *(Text(f"\n{line}", style="yellow") for line in rejected)) if rejected else table


def in_order(entries: Mapping[str, Entry]) -> list[tuple[str, Entry]]:
    """Return the nodes by name, the one that was asked first."""
    return sorted(entries.items(), key=lambda item: (not item[1].get("self"), item[0]))


def _row(name: str, entry: Entry) -> list[str]:
    rtt_ms = entry.get("rtt_ms")
    return [
        f"{name} (this)" if entry.get("self") else name,
        status_of(entry),
        entry.get("address") or "-",
        entry.get("version") or "-",
        f"{len(entry.get('loaded_models') or ())}/{len(entry.get('supported_models') or ())}",
        str(entry.get("current_requests") or 0),
        str(entry.get("queue_length") or 0),
        _memory(entry),
        "-" if rtt_ms is None else f"{rtt_ms:.3g} ms" if rtt_ms < 1000 else f"{rtt_ms:.0f} ms",
        (entry.get("circuit") or "-").replace("_", "-"),
        duration(entry.get("record_age_s")),
    ]


def status_of(entry: Entry) -> str:
    """Return the word that matters most: whether it can be asked, then whether it may."""
    if entry.get("status") == "dead":
        return "dead"
    if entry.get("rejected"):
        return "rejected"
    if entry.get("draining"):
        return "draining"
    if entry.get("status", "alive") != "alive":
        return str(entry["status"])
    return "alive" if entry.get("ready", True) else "not ready"


def _memory(entry: Entry) -> str:
    """Return what is used of each kind that is limited or used; nodes of one machine share its limit, not its use."""
    kinds = [(kind, entry.get(f"llamesh_{name}_mb") or 0, entry.get(f"max_{name}_mb"))
             for kind, name in (("vram", "vram"), ("ram", "sysmem"))]  # fmt: skip
    shown = [
        f"{kind} {used:,} MiB" if limit is None else f"{kind} {used:,}/{limit:,} MiB"
        for kind, used, limit in kinds
        if used or limit
    ]
    return ", ".join(shown) or "-"
