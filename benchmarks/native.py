"""Compiles the benchmark's C programs once per version of their source. Never installs a compiler."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

SOURCES = Path(__file__).parent / "native"
FLAGS = ("-O2", "-std=gnu11", "-Wall", "-Wextra")


class BenchmarkError(Exception):
    """The benchmark cannot go on; the text says why and what to do."""


def cache_directory() -> Path:
    """Where the project keeps what it can make again: ``$LLAMA_MESH_CACHE``, else ``~/.cache/llama-mesh``."""
    configured = os.environ.get("LLAMA_MESH_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "llama-mesh"


def compiled(name: str) -> Path:
    """Return the executable of ``native/<name>.c``, compiling it if this source has not been compiled before."""
    source = SOURCES / f"{name}.c"
    digest = hashlib.sha256(source.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:16]
    target = cache_directory() / "benchmarks" / f"{name}-{digest}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        _compile(source, target)
    return target


def _compile(source: Path, target: Path) -> None:
    # renamed into place, so that two runs at once never see half a file
    unfinished = target.with_suffix(f".{os.getpid()}")
    command = [_compiler(), *FLAGS, "-x", "c", "-o", str(unfinished), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if result.returncode != 0:
        raise BenchmarkError(f"{source.name} does not compile (the benchmark needs Linux):\n{result.stderr}")
    unfinished.replace(target)


def _compiler() -> str:
    for name in (os.environ.get("CC"), "cc", "gcc", "clang", "g++"):
        if name and (found := shutil.which(name)):
            return found
    raise BenchmarkError("no C compiler found (cc, gcc, clang); on Debian: apt-get install gcc")
