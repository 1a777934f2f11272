"""What the commands about keys, token and peers work on: the settings, and the files that these point to."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mesh.cli.configuration import NO_COOKBOOK, load_from
from mesh.cli.failure import CliError
from mesh.config.settings import Settings
from mesh.net.cluster_files import ClusterFiles, cluster_files


@dataclass(frozen=True, slots=True)
class ClusterHere:
    """This node as a member: its settings and its files."""

    settings: Settings
    files: ClusterFiles
    config_path: Path | None


def cluster_here(arguments: argparse.Namespace) -> ClusterHere:
    """Return what the flags of *arguments*, the environment and the files say."""
    loaded = load_from(arguments, cookbook=NO_COOKBOOK)
    return ClusterHere(loaded.settings, cluster_files(loaded.settings.cluster.noise), loaded.config_path)


@contextmanager
def write_errors_explained(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` into a CliError that names the file."""
    try:
        yield
    except OSError as error:
        fix = "Run the command as the user that runs the node." if isinstance(error, PermissionError) else None
        raise CliError(f"cannot write {path}: {error.strerror}", fix=fix) from error
