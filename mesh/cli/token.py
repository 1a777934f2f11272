"""`llama-mesh token show` and `new`: the secret that the nodes of a mesh share."""

from __future__ import annotations

import argparse
import os
import sys

from mesh.cli.cluster_files import ClusterHere, cluster_here, write_errors_explained
from mesh.cli.failure import OK, CliError
from mesh.cli.output import print_json, print_warnings, stderr_console
from mesh.files import PRIVATE, create_file, locked, private_directory, replace_file
from mesh.net.token import TOKEN_VARIABLE, FoundToken, Token, find_token, new_token, weakness


def show(arguments: argparse.Namespace) -> int:
    """Print the token, and nothing else, on stdout."""
    here = cluster_here(arguments)
    found = find_token(here.settings.cluster.noise, os.environ)
    if found is None:
        raise CliError(
            f"there is no cluster token: neither {TOKEN_VARIABLE} nor {here.files.token}",
            fix="Make one with 'llama-mesh token new', or bring one along with 'llama-mesh join HOST --token -'.",
        )
    weak = weakness(found.token)
    if arguments.json:
        print_json({"token": _text(found.token), "source": found.source, "warning": weak})
        return OK
    print(_text(found.token))
    print_warnings(stderr_console(), [weak] if weak else [])
    if sys.stdout.isatty():
        print_warnings(stderr_console(), ["this is a secret: whoever has it can join the mesh"])
    stderr_console().print(f"from {_described(found)}", markup=False, style="bright_black", soft_wrap=True)
    return OK


def new(arguments: argparse.Namespace) -> int:
    """Make a token, keep it, print it, and say how it gets to the other boxes."""
    here = cluster_here(arguments)
    token = new_token()
    if not store(here, token, force=arguments.force):
        raise CliError(
            f"there is a token already, in {here.files.token}",
            fix="'llama-mesh token show' prints it. Use --force to replace it; all nodes need the new one then.",
        )
    hidden = bool(os.environ.get(TOKEN_VARIABLE, "").strip())
    if arguments.json:
        print_json({"token": _text(token), "path": str(here.files.token), "hidden_by_environment": hidden})
        return OK
    print(_text(token))
    _say_what_is_next(here)
    if hidden:
        print_warnings(stderr_console(), [f"{TOKEN_VARIABLE} is set and wins over the file"])
    return OK


def store(here: ClusterHere, token: Token, *, force: bool) -> bool:
    """Keep *token* in its file; False if there is one and it is not to be replaced."""
    path, content = here.files.token, bytes(token) + b"\n"
    with write_errors_explained(path):
        private_directory(path.parent)
        if not force:
            return create_file(path, content)
        with locked(path):
            replace_file(path, content, mode=PRIVATE)
        return True


def _say_what_is_next(here: ClusterHere) -> None:
    console = stderr_console()
    console.print(f"kept in {here.files.token}, for this user only", markup=False, soft_wrap=True)
    console.print("On every other box, either of:", markup=False)
    console.print(
        "  llama-mesh join THIS-HOST --token -     asks for it, so that 'ps' shows it to nobody", markup=False
    )
    console.print("  CLUSTER_TOKEN=TOKEN in the environment of 'llama-mesh serve'", markup=False)
    console.print("A node that runs already needs a restart to use it.", markup=False)


def _described(found: FoundToken) -> str:
    return f"{TOKEN_VARIABLE} in the environment" if found.source == TOKEN_VARIABLE else found.source


def _text(token: Token) -> str:
    return bytes(token).decode("utf-8", "surrogateescape")
