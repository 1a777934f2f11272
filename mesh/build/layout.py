"""What a build leaves on disk: one directory per commit and set of arguments, and a symlink to the binary in use.

    <parent of build_path>/<base>-<short commit>/bin/llama-server      llamesh's names; <base>.2-… for other arguments
    <parent of build_path>/<base>-<short commit>/mesh-build.json       written last: who finds it may use the build
    <parent of build_path>/<base>-<short commit>/mesh-building.json    there from the first moment until then
    <parent of build_path>/<base>-<short commit>.src                   the sources, only while they are compiled

A node may be killed between any two lines of this file. So a directory counts as finished by its manifest alone, and
before anything in a finished one is removed, its manifest goes. Everything here blocks.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from mesh.build.spec import BuildSpec
from mesh.build.status import BuiltVersion
from mesh.core.build_policy import OnDisk
from mesh.errors import BuildError
from mesh.files import read_file, replace_file

MANIFEST: Final = "mesh-build.json"
MARKER: Final = "mesh-building.json"
BINARY: Final = Path("bin", "llama-server")
SOURCE_SUFFIX: Final = ".src"
#: one of these is in every directory that we, or llamesh, began to build in; the last in llamesh's half-built ones
_EVIDENCE: Final = (MANIFEST, MARKER, BINARY, "CMakeCache.txt")
#: processes that were killed a moment ago may still write a file
_REMOVE_ATTEMPTS = 10
_REMOVE_PAUSE_S = 0.1


class Manifest(msgspec.Struct, frozen=True):
    """What is written down of a build. Unknown keys are ignored: a newer version may have written more."""

    build: str
    commit: str
    ref: str = ""
    build_args: tuple[str, ...] = ()
    build_command_args: tuple[str, ...] = ()
    built_at_wall: float = 0.0
    seconds: float = 0.0
    comparisons: Any = ()  #: for readers; what a comparison looks like may change


@dataclass(frozen=True, slots=True)
class Found:
    """A directory of this build. No manifest: half-built, or llamesh's."""

    path: Path
    short: str
    manifest: Manifest | None
    made_at: float
    has_binary: bool
    marked: bool  #: it was begun by us

    @property
    def binary(self) -> Path:
        return self.path / BINARY

    @property
    def commit(self) -> str:
        return self.manifest.commit if self.manifest else self.short

    @property
    def finished(self) -> bool:
        """Whether it may be used; llamesh's old ones only count for what is kept."""
        return self.has_binary and (self.manifest is not None or not self.marked)

    def on_disk(self, *, held: bool) -> OnDisk:
        return OnDisk(str(self.path), self.made_at, self.finished, held)

    def version(self, *, live: bool, previous: bool) -> BuiltVersion:
        known = self.manifest
        ref, built_at = (known.ref or None, known.built_at_wall) if known else (None, None)
        return BuiltVersion(str(self.path), str(self.binary), self.commit, ref, built_at, live, previous)


@dataclass(frozen=True, slots=True)
class Shelf:
    """All directories of one build at one moment, and which of them is in force."""

    found: tuple[Found, ...]
    sources: tuple[Path, ...]  #: left by a killed node
    target: Path | None  #: the file that ``binary_path`` leads to, wherever that is

    @property
    def live(self) -> Found | None:
        return self.at(self.target) if self.target else None

    def at(self, binary: Path) -> Found | None:
        """Return the directory that *binary* is of."""
        real = os.path.realpath(binary)
        return next((each for each in self.found if os.path.realpath(each.binary) == real), None)

    def usable(self, commit: str, build_args: tuple[str, ...]) -> Found | None:
        """Return the finished build of just that, the live one first."""
        live = self.live
        if live is not None and _is_of(live, commit, build_args):
            return live
        return next((each for each in self.found if each.manifest and _is_of(each, commit, build_args)), None)


def look(spec: BuildSpec) -> Shelf:
    """Return what is there now. Raise ``BuildError`` if the directory cannot be read."""
    pattern = re.compile(rf"{re.escape(spec.build_path.name)}(?:\.\d+)?-(?P<short>[0-9a-f]{{7,64}})")
    found: list[Found] = []
    sources: list[tuple[Path, str]] = []
    for path in _listed(spec.build_path.parent):
        name = path.name.removesuffix(SOURCE_SUFFIX)
        if not (match := pattern.fullmatch(name)) or path.is_symlink() or not path.is_dir():
            continue
        if name != path.name:
            sources.append((path, name))
        elif each := _found(spec, path, match["short"]):
            found.append(each)
    ours = {each.path.name for each in found}
    left = tuple(path for path, name in sources if name in ours or _is_worktree_or_empty(path))
    return Shelf(tuple(found), left, target_of(spec))


def target_of(spec: BuildSpec) -> Path | None:
    """Return the executable that ``binary_path`` leads to; None if it leads nowhere."""
    target = Path(os.path.realpath(spec.binary_path))
    return target if is_executable(target) else None


def choose_directory(spec: BuildSpec, shelf: Shelf, short: str, commit: str, taboo: Collection[Path]) -> Path:
    """Return where *commit* is to be compiled: a name that is free, or one whose content is of no use to anybody.

    *taboo* are directories that are live, in use, or what a rollback goes back to. Others' are never chosen.
    """
    known = {each.path: each for each in shelf.found}
    number = 1
    while True:
        base = spec.build_path.name if number == 1 else f"{spec.build_path.name}.{number}"
        path = spec.build_path.parent / f"{base}-{short}"
        each = known.get(path)
        again = each is not None and (each.manifest is None or _is_of(each, commit, spec.build_args))
        source = path.with_name(path.name + SOURCE_SUFFIX)
        theirs = os.path.lexists(source) and source not in shelf.sources
        if not theirs and (not os.path.lexists(path) or (again and path not in taboo)):
            return path
        number += 1


def begin(path: Path, manifest: Manifest) -> None:
    """Make the directory *path*, empty but for the marker; what was there is removed."""
    remove_build(path)
    path.mkdir(parents=True)
    replace_file(path / MARKER, msgspec.json.encode(manifest))


def finish(path: Path, manifest: Manifest) -> None:
    """Declare *path* finished, once what is in ``bin`` is safely on disk. Also for a later correction."""
    for file in (path / BINARY).parent.iterdir():
        if file.is_file():
            _sync(file)
    replace_file(path / MANIFEST, _json(manifest))
    (path / MARKER).unlink(missing_ok=True)


def remove_build(path: Path) -> None:
    """Remove the build *path*, so that at no moment half of it looks like a whole one."""
    with contextlib.suppress(OSError):
        (path / MANIFEST).replace(path / MARKER)
    if path.is_dir() and not path.is_symlink():
        with contextlib.suppress(OSError):  # the disk may be full, which is why we are here
            (path / MARKER).touch()
        for child in path.iterdir():
            if child.name != MARKER:
                remove_tree(child)
    remove_tree(path)


def remove_tree(path: Path) -> None:
    """Remove *path* and all below it; nothing happens if it is not there."""
    for attempt in range(_REMOVE_ATTEMPTS):
        try:
            if path.is_symlink() or path.is_file():
                path.unlink(missing_ok=True)
            elif path.exists():
                shutil.rmtree(path)
            return
        except FileNotFoundError:
            continue
        except OSError:
            if attempt == _REMOVE_ATTEMPTS - 1:
                raise
            time.sleep(_REMOVE_PAUSE_S)


def check_link(spec: BuildSpec) -> None:
    """Raise ``BuildError`` if there is something else than a symlink at ``binary_path``: it is not ours to replace."""
    link = spec.binary_path
    if os.path.lexists(link) and not link.is_symlink():
        raise BuildError(
            f"binary_path {link} is not a symlink, and builds put one there; "
            f"move that file away, or set enabled: false to run it as it is"
        )


def swap(spec: BuildSpec, target: Path) -> None:
    """Let ``binary_path`` lead to *target*, in one step; whoever starts it meanwhile gets the old one or the new one.

    Raise ``BuildError`` rather than replace anything but a symlink.
    """
    check_link(spec)
    link = spec.binary_path
    scratch = link.with_name(f".{link.name}.tmp.{os.getpid()}")
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(target)
        scratch.replace(link)
    except OSError as error:
        raise BuildError(f"cannot put {link} in place: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def is_executable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def _found(spec: BuildSpec, path: Path, short: str) -> Found | None:
    if not any((path / evidence).exists() for evidence in _EVIDENCE):
        return None  # somebody else's: a date, for one, reads like a hash
    manifest, begun = _read(path / MANIFEST), _read(path / MARKER)
    if (known := manifest or begun) is not None and known.build != spec.name:
        return None  # of another build whose name reads like one of ours
    has_binary = is_executable(path / BINARY)
    try:
        made_at = manifest.built_at_wall if manifest else path.stat().st_mtime
    except OSError:
        return None
    marked = begun is not None or (path / MARKER).exists()
    return Found(path, short, manifest if has_binary else None, made_at, has_binary, marked)


def _is_worktree_or_empty(path: Path) -> bool:
    try:
        return (path / ".git").is_file() or not any(path.iterdir())
    except OSError:
        return False


def _is_of(found: Found, commit: str, build_args: tuple[str, ...]) -> bool:
    if found.manifest is None:  # llamesh's: with which arguments, nobody knows
        return found.finished and commit.startswith(found.short)
    return found.manifest.commit == commit and found.manifest.build_args == build_args


def _read(path: Path) -> Manifest | None:
    try:
        return msgspec.json.decode(read_file(path)[0], type=Manifest)
    except (OSError, msgspec.MsgspecError, ValueError):
        return None


def _listed(directory: Path) -> Iterator[Path]:
    try:
        yield from sorted(directory.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise BuildError(f"cannot read {directory}: {error.strerror}") from error


def _json(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest))


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
