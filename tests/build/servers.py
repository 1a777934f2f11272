"""Things that pass for a freshly built llama-server: the embedded engine, the fake one with faults, and broken ones."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mesh.engine import embedded
from tests import fake_llama_server

_VERSION = 'if [ "$1" = --version ]; then echo "version: 1 (fake)"; exit 0; fi\n'


def script(path: Path, text: str) -> Path:
    """Write an executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)
    return path


def real(path: Path, args: str = "") -> Path:
    """The embedded engine as a binary, whose own *args* win."""
    return script(path, f'exec {sys.executable} -I -S {embedded.__file__} "$@" {args}\n')


def fake(path: Path, before: str = "", **faults: Any) -> Path:
    """The fake server with *faults*; *before* are shell lines that come first, after ``--version``."""
    switches = " ".join(f"--fake-{name.replace('_', '-')} '{value}'" for name, value in faults.items())
    server = fake_llama_server.__file__
    return script(path, f'{_VERSION}{before}\nexec {sys.executable} -I -S {server} "$@" {switches}\n')
