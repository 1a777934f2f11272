"""`llama-mesh logs`: what a model's llama-server prints."""

from __future__ import annotations

import argparse
import json

from mesh.cli import node
from mesh.cli.failure import OK, CliError


def logs(arguments: argparse.Namespace) -> int:
    """Print the kept lines, and with --follow the new ones until Ctrl-C, which is the normal end here."""
    params = {"model": arguments.model, "follow": "true" if arguments.follow else "false"}
    try:
        with node.find(arguments).stream("GET", "/admin/logs", params=params) as response:
            for line in response.iter_lines():
                print(json.dumps({"line": line}, ensure_ascii=False) if arguments.json else line, flush=True)
    except KeyboardInterrupt:
        return OK
    if arguments.follow:
        raise CliError("the node ended the log: it is shutting down", fix="Run the command again when it is back.")
    return OK
