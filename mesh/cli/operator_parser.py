"""The arguments of the commands that show and steer the nodes of a mesh, and their help."""

from __future__ import annotations

import argparse

from mesh.cli import drain, nodes, route
from mesh.cli.arguments import Commands, Parser, add_command, add_node, positive, seconds

#: More often would load the node with nothing but answering.
_SHORTEST_WATCH_S = 0.1
_WATCH_S = 2.0

_NODES = """\
examples:
  llama-mesh nodes                      every node that this one knows, and what it does
  llama-mesh nodes --watch              a live table, redrawn every 2 s; Ctrl-C ends
  llama-mesh nodes --watch 0.5
  llama-mesh nodes --json | jq -r '.nodes[] | select(.ready) | .node_id'
  llama-mesh nodes --watch --json       a line of JSON every 2 s

STATUS   alive, or: suspect (not heard of for a while), dead (gone, its models are not asked for), draining (takes no
         new work), rejected (its version, by cluster.version_mismatch_action), not ready (no engine or no models)
MODELS   those that are loaded, of those that it has
RTT      the mean round trip over its link; CIRCUIT is open while requests to it fail
AGE      of what is known of it

All of it is as the node that is asked sees it: another one may reach others.
"""

_ROUTE = """\
examples:
  llama-mesh route qwen3                             who would serve it now, and why
  llama-mesh route qwen3 --prompt-tokens 30000       a long prompt: the cost of a fast GPU changes
  llama-mesh route qwen3 --max-tokens 1              as good as no answer: what counts is who has it loaded
  llama-mesh route qwen3 --json | jq -r '.candidates[0].node'

The columns are the parts of the cost, in seconds: waiting for a place, loading the model, reading the prompt, writing
the answer, the network, and what others lose by it. The cheapest node comes first; those that cannot be asked are
last, and say why. Costs that are as good as equal take turns. Nothing is counted or started.
"""

_DRAIN = """\
examples:
  llama-mesh drain                      the node that is asked takes no new work; what it has is served
  llama-mesh drain gpu2                 another one
  llama-mesh drain gpu2 --unload        and its models are unloaded as their requests end
  llama-mesh drain gpu2 --wait && ssh gpu2 sudo reboot
  llama-mesh drain '*'                  all of them

New work goes to other nodes, or gets 503 where there are none. 'llama-mesh undrain' ends it, and so does a restart.
"""

_UNDRAIN = """\
examples:
  llama-mesh undrain
  llama-mesh undrain gpu2
  llama-mesh undrain '*'                all of them
"""


def add_commands(commands: Commands) -> None:
    """Add all of them."""
    _add_nodes(commands)
    _add_route(commands)
    _add_drain(commands)


def add_target(command: Parser, what: str = "the model") -> None:
    """Add the flags that say on which node of the mesh something is done with *what*."""
    target = command.add_mutually_exclusive_group()
    target.add_argument("--node", metavar="NODE", help="on this node of the mesh (default: the one that is asked)")
    target.add_argument("--everywhere", action="store_true", help=f"on every node of the mesh that has {what}")


def _add_nodes(commands: Commands) -> None:
    command = add_command(commands, "nodes", "show the nodes of the mesh, as one of them sees them", _NODES)
    command.add_argument(
        "--watch",
        nargs="?",
        type=_watch_seconds,
        const=_WATCH_S,
        metavar="SECONDS",
        help=f"show it again every so often (default: {_WATCH_S:.0f} s), until Ctrl-C",
    )
    add_node(command)
    command.set_defaults(command=nodes.nodes)


def _add_route(commands: Commands) -> None:
    command = add_command(commands, "route", "say which node would serve a model now, and why", _ROUTE)
    command.add_argument("model", metavar="MODEL", help="a name from 'llama-mesh models'")
    command.add_argument("--prompt-tokens", type=positive, metavar="N", help="length of the prompt (default: 1000)")
    command.add_argument("--max-tokens", type=positive, metavar="N", help="limit of the answer (default: none)")
    add_node(command)
    command.set_defaults(command=route.route)


def _add_drain(commands: Commands) -> None:
    command = add_command(commands, "drain", "take a node out of rotation", _DRAIN)
    _add_node_name(command)
    command.add_argument("--unload", action="store_true", help="unload its models too")
    command.add_argument("--wait", action="store_true", help="return when no requests are left there")
    add_node(command)
    command.set_defaults(command=drain.drain)
    command = add_command(commands, "undrain", "let a drained node take work again", _UNDRAIN)
    _add_node_name(command)
    add_node(command)
    command.set_defaults(command=drain.undrain)


def _add_node_name(command: Parser) -> None:
    command.add_argument("node", nargs="?", metavar="NODE", help="its node_id (default: the node that is asked)")


def _watch_seconds(text: str) -> float:
    number = seconds(text)
    if number < _SHORTEST_WATCH_S:
        raise argparse.ArgumentTypeError(f"'{text}' is too often; at least {_SHORTEST_WATCH_S} s")
    return number
