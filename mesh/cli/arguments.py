"""What the parsers of all commands share: the parser class, the flags that many have, and the types of values."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn, TypeAlias

from mesh.cli.failure import USAGE

#: What ``add_subparsers`` returns; generic for type checkers only.
Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


class Parser(argparse.ArgumentParser):
    """argparse, with a suggestion for a mistyped command and a pointer to --help."""

    def __init__(self, **options: object) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(USAGE, f"error: {message}\nTry '{self.prog} --help'.\n")


def add_command(commands: Commands, name: str, summary: str, epilog: str) -> Parser:
    """Add a command, with the flag that every command has."""
    command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=epilog)
    command.add_argument("--json", action="store_true", help="print JSON instead of text")
    return command


def add_files(command: argparse.ArgumentParser) -> None:
    """Add the flags for all files."""
    _add_files(command, "files", ("config", "cookbook", "secrets"))


def add_settings(command: argparse.ArgumentParser) -> None:
    """Add the flags for the files of a command that needs the settings only."""
    _add_files(command, "files", ("config", "secrets"))


def _add_files(command: argparse.ArgumentParser, title: str, names: tuple[str, ...]) -> None:
    group = command.add_argument_group(title)
    for name in names:
        add_file(group, name)


def add_node(command: argparse.ArgumentParser, *, cookbook: bool = False) -> None:
    """Add the flags that say which node to talk to."""
    group = command.add_argument_group("which node")
    group.add_argument("--url", metavar="URL", help="default: $LLAMESH_URL, else listen_addr of the configuration")
    group.add_argument("--key", metavar="KEY", help="default: $LLAMESH_API_KEY, else the secrets file's first key")
    group.add_argument(
        "--ca", type=Path, metavar="FILE", help="trust this certificate (default: the system's, and ours)"
    )
    for name in ("config", "cookbook", "secrets") if cookbook else ("config", "secrets"):
        add_file(group, name)


def add_file(group: argparse._ArgumentGroup, name: str) -> None:
    """Add the flag for one file."""
    where = f"default: $LLAMESH_{name.upper()}, else ./{name}.yaml, if it exists"
    group.add_argument(f"--{name}", type=Path, metavar="FILE", help=where)


def port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"'{text}' is not a port (0 to 65535)")
    return int(text)


def positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number")
    return int(text)


def seconds(text: str) -> float:
    """Parse a time; the upper end is what a node accepts."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e7:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number of seconds")
    return number
