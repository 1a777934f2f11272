"""`llama-mesh drain` and `undrain`: take a node out of rotation, and let it work again."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.markup import escape

from mesh.cli import everywhere, node
from mesh.cli.failure import CliError
from mesh.cli.nodes import Entry, status_of
from mesh.cli.output import print_json, stderr_console

_POLL_S = 1.0
#: So many looks in a row may fail before waiting is given up: the node that is asked may be busy, or restarted.
_MISSED = 5
#: Ages of records are told in tenths of a second.
_ROUNDING_S = 0.1
#: Between two looks; tests put something else here.
pause = time.sleep


def drain(arguments: argparse.Namespace) -> int:
    """Tell a node to take no new work; with --wait return when what it had is done."""
    found = node.find(arguments)
    began = time.monotonic()
    body = {**_node(arguments), "unload": arguments.unload}
    answer = dict(everywhere.post(found, "/admin/drain", body))
    told = _told(arguments, answer)
    if not arguments.json:
        _print(answer, _drained)
    if arguments.wait and (left := {name for name, said in told.items() if said.get("active")}):
        _wait(found, left, began)
    if arguments.wait and not arguments.json:
        print("no requests are left")
    if arguments.json:
        print_json({**answer, "seconds": round(time.monotonic() - began, 3)} if arguments.wait else answer)
    return everywhere.status(answer)


def undrain(arguments: argparse.Namespace) -> int:
    """Let a node take work again."""
    answer = everywhere.post(node.find(arguments), "/admin/undrain", _node(arguments))
    if arguments.json:
        print_json(answer)
    else:
        _print(answer, lambda said: str(said["message"]))
    return everywhere.status(answer)


def _node(arguments: argparse.Namespace) -> dict[str, str]:
    return {} if arguments.node is None else {"node": arguments.node}


def _told(arguments: argparse.Namespace, answer: Mapping[str, Any]) -> Mapping[str | None, Mapping[str, Any]]:
    """Return the answers by node; None is the one that was asked."""
    if "nodes" in answer:
        return dict(answer["nodes"])
    return {arguments.node: answer}


def _print(answer: Mapping[str, Any], outcome: Callable[[Mapping[str, Any]], str]) -> None:
    if "nodes" in answer:
        everywhere.print_each(answer, outcome)
    else:
        print(outcome(answer))


def _drained(said: Mapping[str, Any]) -> str:
    count = said.get("unloaded") or 0
    stopped = f"; {count} {'instance stops' if count == 1 else 'instances stop'}" if count else ""
    return f"{said['message']}{stopped}"


# --- waiting


def _wait(found: node.Node, names: set[str | None], began: float) -> None:
    """Return when none of *names* has a request left. Raise ``CliError`` if one can not be waited for any more."""
    left = set(names)
    missed = 0
    with _Progress() as progress:
        while left:
            try:
                entries: Mapping[str, Entry] = found.get("/cluster/nodes")["nodes"]
                missed = 0
            except CliError:
                missed += 1
                if missed >= _MISSED:
                    raise
            else:
                counts = {name: _left(entries, name, time.monotonic() - began) for name in left}
                left = {name for name, count in counts.items() if count != 0}
                progress.tell(entries, counts)
            if left:
                pause(_POLL_S)


def _left(entries: Mapping[str, Entry], name: str | None, elapsed_s: float) -> int | None:
    """Return how many requests the node has, None if its record is from before it was drained."""
    entry = next((e for n, e in entries.items() if n == name or (name is None and e.get("self"))), None)
    if entry is None or status_of(entry) == "dead":
        raise CliError(f"{name or 'the node'} is gone; it had requests when it was last heard of")
    age_s = entry.get("record_age_s")  # this node's own entry has none: it is as of now
    if age_s is not None and age_s > elapsed_s + _ROUNDING_S:
        return None
    if not entry.get("draining"):
        raise CliError(f"{name or 'the node'} is not drained any more: somebody let it work again")
    return int(entry.get("current_requests") or 0)


class _Progress:
    """A line on stderr: redrawn on a terminal, elsewhere printed when it changes."""

    def __init__(self) -> None:
        self._console = stderr_console()
        self._status = self._console.status("waiting for requests to end …")
        self._last = ""

    def __enter__(self) -> _Progress:
        self._status.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._status.stop()

    def tell(self, entries: Mapping[str, Entry], counts: Mapping[str | None, int | None]) -> None:
        parts = []
        for name, count in sorted(counts.items(), key=lambda item: item[0] or ""):
            shown = name or next((n for n, e in entries.items() if e.get("self")), "this node")
            if count is None:
                parts.append(f"{shown}: not heard of yet")
            elif count:
                parts.append(f"{shown}: {count} {'request is' if count == 1 else 'requests are'} left")
        line = ", ".join(parts)
        if line and line != self._last:
            self._last = line
            if self._console.is_terminal:
                self._status.update(escape(line))
            else:
                self._console.print(line, markup=False)
