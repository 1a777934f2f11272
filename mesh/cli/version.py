"""`llama-mesh version`: ours, and the engine's that a node started here would run."""

from __future__ import annotations

import argparse
import platform

from mesh import __version__
from mesh.cli.configuration import NO_COOKBOOK, load_from
from mesh.cli.engine import engine_summary
from mesh.cli.failure import OK
from mesh.cli.output import print_json
from mesh.config.diagnostics import ConfigErrors


def version(arguments: argparse.Namespace) -> int:
    """Print the versions. A broken configuration is no reason to fail: people ask for this when things are broken."""
    try:
        engine = engine_summary(load_from(arguments, cookbook=NO_COOKBOOK))
    except ConfigErrors as errors:
        engine = {"found": False, "reason": str(errors)}
    if arguments.json:
        print_json({"llama_mesh": __version__, "python": platform.python_version(), "engine": engine})
        return OK
    print(f"llama-mesh    {__version__} (Python {platform.python_version()})")
    if engine["found"]:
        print(f"llama-server  {engine['version'] or 'unknown'} ({engine['source']})")
    else:
        print(f"llama-server  not found: {engine['reason']}")
    return OK
