"""`llama-mesh serve`: loads the configuration and hands it to the node. Does nothing else."""

from __future__ import annotations

import argparse

from mesh.cli.configuration import load_from
from mesh.cli.output import print_warnings, stderr_console
from mesh.config.diagnostics import ConfigErrors
from mesh.config.loader import Loaded

LOG_LEVELS = ("debug", "info", "warning", "error")


def serve(arguments: argparse.Namespace) -> int:
    """Run a node until it is told to stop."""
    try:
        loaded = load_with_flags(arguments)
    except ConfigErrors as errors:
        print_warnings(stderr_console(), map(str, errors.warnings))
        raise
    print_warnings(stderr_console(), map(str, loaded.warnings))
    # Late, so that no other command pays for importing the whole node.
    from mesh.app import run

    return run(loaded)


def load_with_flags(arguments: argparse.Namespace) -> Loaded:
    """Load all files with the flags on top; --host or --port alone keeps the other half of listen_addr."""
    flags = {"host": arguments.host, "port": arguments.port, "logging.level": arguments.log_level}
    return load_from(arguments, overrides={name: value for name, value in flags.items() if value is not None})
