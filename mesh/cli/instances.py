"""`llama-mesh prewarm` and `unload`: load and stop models on a running node, on another one of its mesh, or on all."""

from __future__ import annotations

import argparse
import time
from typing import Any

from rich.markup import escape

from mesh.cli import everywhere, node
from mesh.cli.output import print_json, stderr_console, stdout_console


def prewarm(arguments: argparse.Namespace) -> int:
    """Load a model; by default return when it can answer."""
    wait = not arguments.no_wait
    body = {"model": arguments.model, "wait": wait, "timeout_s": arguments.timeout, **everywhere.target(arguments)}
    started_at = time.monotonic()
    with stderr_console().status(f"loading {escape(arguments.model)} …"):
        # The node keeps the time; ours only has to outlast it.
        found = node.find(arguments)
        answer = everywhere.post(found, "/admin/prewarm", body, timeout_s=arguments.timeout + 15)
    seconds = time.monotonic() - started_at
    outcome = f"ready after {seconds:.1f} s" if wait else "loading"
    if arguments.json:
        print_json({**answer, "seconds": round(seconds, 3)})
    elif "nodes" in answer:
        everywhere.print_each(answer, lambda said: "ready" if wait else "loading")
    else:
        where = f" on {escape(answer['node'])}" if answer.get("node") else ""
        stdout_console().print(f"[bold]{escape(arguments.model)}[/] {outcome}{where}")
    return everywhere.status(answer)


def unload(arguments: argparse.Namespace) -> int:
    """Tell a model's instances to finish their requests and stop."""
    body: dict[str, Any] = {"all": True} if arguments.all else {"model": arguments.model}
    answer = everywhere.post(node.find(arguments), "/admin/unload", {**body, **everywhere.target(arguments)})
    if arguments.json:
        print_json(answer)
    elif "nodes" in answer:
        everywhere.print_each(answer, lambda said: _stopping(said.get("unloaded")))
    else:
        where = f" on {answer['node']}" if answer.get("node") else ""
        what = "all models" if arguments.all else arguments.model
        print(f"{what}{where}: {_stopping(answer.get('unloaded'))}")
    return everywhere.status(answer)


def _stopping(count: int | None) -> str:
    match count:
        case None:
            return "unloading"
        case 0:
            return "nothing was loaded"
        case _:
            return f"{count} {'instance stops' if count == 1 else 'instances stop'} after running requests"
