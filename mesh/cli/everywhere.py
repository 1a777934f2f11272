"""What the commands share that do something on another node, or on every one."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from rich.text import Text

from mesh.cli.failure import FAILED, OK, CliError
from mesh.cli.node import ANSWER_TIMEOUT_S, Node
from mesh.cli.output import stdout_console

#: What the admin routes take for every node of the mesh.
ALL_NODES = "*"

#: What a node says that does not have the model or the build.
NOT_THERE = frozenset({"model_not_found", "build_not_found"})

Answer = Mapping[str, Any]


def target(arguments: argparse.Namespace) -> dict[str, str]:
    """Return what the flags --node and --everywhere add to the body of a request."""
    if arguments.everywhere:
        return {"node": ALL_NODES}
    return {} if arguments.node is None else {"node": arguments.node}


def post(found: Node, path: str, body: dict[str, Any], *, timeout_s: float | None = ANSWER_TIMEOUT_S) -> Answer:
    """Return the answer; of every node, also if some of them refused."""
    try:
        answer: Answer = found.post(path, body, timeout_s=timeout_s)
        return answer
    except CliError as error:
        if isinstance(error.answer, dict) and isinstance(error.answer.get("nodes"), dict):
            return error.answer
        raise


def status(answer: Answer) -> int:
    """Return the exit status that *answer* calls for."""
    return FAILED if answer.get("status") == "error" else OK


def print_each(answer: Answer, outcome: Callable[[Answer], str]) -> None:
    """Print a line for each node: *outcome* of its answer, or why it has none."""
    nodes: Mapping[str, Answer] = answer["nodes"]
    console = stdout_console()
    width = max((len(name) for name in nodes), default=0)
    nobody = all(said.get("status") == "error" for said in nodes.values())
    for name, said in nodes.items():
        line = Text(f"{name.ljust(width)}  ")
        if said.get("status") != "error":
            line.append(outcome(said))
        elif said.get("type") in NOT_THERE and not nobody:  # nothing to do there
            line.append("does not have it", style="dim")
        else:
            line.append(str(said.get("message")), style="red")
        console.print(line)
