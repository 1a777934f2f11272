"""Runs one command: parses, calls it, and turns every way it can end into an exit status and a message."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from mesh.cli import parser
from mesh.cli.failure import FAILED, INTERRUPTED, CliError
from mesh.cli.output import print_error
from mesh.errors import MeshError


def run(argv: Sequence[str]) -> int:
    """Run the command that *argv* names and return the exit status. Only argparse's own exits pass through."""
    arguments = parser.parse(argv)
    try:
        status: int = arguments.command(arguments)
        sys.stdout.flush()
        return status
    except CliError as error:
        print_error(error.message, fix=error.fix, as_json=arguments.json)
        return error.exit_code
    except MeshError as error:
        print_error(error.message, as_json=arguments.json)
        return FAILED
    except KeyboardInterrupt:
        print(file=sys.stderr)  # the shell's prompt starts on a line of its own
        return INTERRUPTED
    except BrokenPipeError:  # `llama-mesh ps | head -1`
        _drop_output()
        return FAILED
    except OSError as error:  # a full disk behind `> file`, most likely
        _drop_output()
        print_error(error.strerror or str(error), as_json=arguments.json)
        return FAILED


def _drop_output() -> None:
    """Let what could not be written not be tried again when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
