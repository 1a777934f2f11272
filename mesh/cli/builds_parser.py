"""The arguments of the commands that build llama.cpp anew, and their help."""

from __future__ import annotations

from mesh.cli import builds
from mesh.cli.arguments import Commands, add_command, add_node
from mesh.cli.operator_parser import add_target

_REBUILD = """\
examples:
  llama-mesh rebuild                       fetch, compile, test and install the newest llama.cpp, and watch it
  llama-mesh rebuild cuda                  the one that 'builds:' of config.yaml calls cuda
  llama-mesh rebuild --branch b6123        another branch, tag or commit, until llama_cpp.branch moves on
  llama-mesh rebuild --force               also if that commit runs already
  llama-mesh rebuild --cancel              stop the one in progress
  llama-mesh rebuild --everywhere          on every node of the mesh, side by side
  llama-mesh rebuild --json | jq -r '.outcome, .commit'

The node serves all the while. A new llama-server must load a tiny model, answer, stream and stop, and be about as
fast as the one before (max_slowdown); else it is not installed. Once it is, instances are replaced one by one as
their requests end. If a rebuild is in progress already, that one is watched; with --force, or if it builds something
else than --branch says, that is an error. Ctrl-C ends the watching only.

--branch takes what is on a branch or tag of repo_url, on this node only; llama_cpp.branch may name anything else, too.

exit status: 0 installed, or that commit runs already; 1 failed, rejected or cancelled; 130 Ctrl-C, the build goes on
"""

_ROLLBACK = """\
examples:
  llama-mesh rollback                      back to what ran before the last rebuild
  llama-mesh rollback cuda --node gpu2     of another build, on another node of the mesh
  llama-mesh rollback --everywhere

The version that is left is not installed again by itself, only by 'llama-mesh rebuild'.
"""

_BUILDS = """\
examples:
  llama-mesh builds                        every llama-server that was built, and which one is live
  llama-mesh builds --everywhere           of every node of the mesh
  llama-mesh builds --json | jq -r '.builds[] | {name, live_commit}'

STATE   live (new instances run it), previous ('llama-mesh rollback' goes back to it), held (it was rejected, rolled
        back or replaced by hand: only 'llama-mesh rebuild' tries it again)
"""


def add_commands(commands: Commands) -> None:
    """Add all of them."""
    _add_rebuild(commands)
    command = add_command(commands, "rollback", "go back to the llama-server before the last rebuild", _ROLLBACK)
    command.add_argument("name", nargs="?", metavar="NAME", help="a key of 'builds:' (default: llama_cpp)")
    add_target(command, "that build")
    add_node(command)
    command.set_defaults(command=builds.rollback)
    command = add_command(commands, "builds", "list the llama-servers that a node has built", _BUILDS)
    add_target(command, "builds")
    add_node(command)
    command.set_defaults(command=builds.builds)


def _add_rebuild(commands: Commands) -> None:
    command = add_command(commands, "rebuild", "build llama.cpp anew, test it and put it to work", _REBUILD)
    command.add_argument("name", nargs="?", metavar="NAME", help="a key of 'builds:' (default: llama_cpp)")
    command.add_argument("--branch", metavar="REF", help="a branch, tag or commit instead of the configured one")
    command.add_argument("--force", action="store_true", help="build it also if nothing changed")
    how = command.add_mutually_exclusive_group()
    how.add_argument("--no-wait", action="store_true", help="return as soon as it has started")
    how.add_argument("--cancel", action="store_true", help="stop the one that is in progress")
    add_target(command, "that build")
    add_node(command)
    command.set_defaults(command=builds.rebuild)
