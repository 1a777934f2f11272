"""`llama-mesh prewarm` and `unload`: load and stop models on a running node."""

from __future__ import annotations

import argparse
import time
from typing import Any

from rich.markup import escape

from mesh.cli import node
from mesh.cli.failure import OK
from mesh.cli.output import print_json, stderr_console, stdout_console


def prewarm(arguments: argparse.Namespace) -> int:
    """Load a model; by default return when it can answer."""
    wait = not arguments.no_wait
    body = {"model": arguments.model, "wait": wait, "timeout_s": arguments.timeout}
    started_at = time.monotonic()
    with stderr_console().status(f"loading {escape(arguments.model)} …"):
        # The node keeps the time; ours only has to outlast it.
        answer = node.find(arguments).post("/admin/prewarm", body, timeout_s=arguments.timeout + 15)
    seconds = time.monotonic() - started_at
    if arguments.json:
        print_json({**answer, "seconds": round(seconds, 3)})
    else:
        outcome = f"ready after {seconds:.1f} s" if wait else "loading"
        stdout_console().print(f"[bold]{escape(arguments.model)}[/] {outcome}")
    return OK


def unload(arguments: argparse.Namespace) -> int:
    """Tell a model's instances to finish their requests and stop."""
    body: dict[str, Any] = {"all": True} if arguments.all else {"model": arguments.model}
    answer = node.find(arguments).post("/admin/unload", body)
    if arguments.json:
        print_json(answer)
    else:
        print(_outcome("all models" if arguments.all else arguments.model, answer.get("unloaded")))
    return OK


def _outcome(what: str, count: int | None) -> str:
    match count:
        case None:
            return f"{what}: unloading"
        case 0:
            return f"{what}: nothing was loaded"
        case _:
            return f"{what}: {count} {'instance stops' if count == 1 else 'instances stop'} after running requests"
