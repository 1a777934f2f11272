"""A real whisper-server, made in seconds: libraries out of a PyPI wheel, and the program itself compiled.

pywhispercpp (MIT) has both. Its wheel brings libwhisper and ggml, prebuilt for any machine of its kind (x86-64: with
AVX2); its source distribution brings whisper.cpp, of which three files are compiled. That needs a C++ compiler and
nothing else: no CMake, no GitHub.

What is made stands in one directory of the cache, named by all that went into it. The directory gets its name when it
is complete, so that whoever sees it may use it.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from mesh.cli.cache import ROOM_FIX, cache_dir, fetch, locked
from mesh.cli.failure import CliError
from mesh.cli.package_index import Index, PinnedFile

VERSION = "1.8.5"
SDIST = PinnedFile(
    project="pywhispercpp",
    filename="pywhispercpp-1.5.1.tar.gz",
    sha256="5df897e5dd9d9f16804fc937bd85b9f5880a0b29a55f8843585e0e03d76195e5",
    size_bytes=9_756_087,
)
#: by machine; the part of a wheel that is used has nothing to do with the version of Python that the wheel is for
WHEELS = {
    "x86_64": PinnedFile(
        project="pywhispercpp",
        filename="pywhispercpp-1.5.1-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
        sha256="a70839d9a1f569e1e5424f27ed01a32133d658beae4cd1459eb39de1e0483bba",
        size_bytes=4_673_602,
    ),
    "aarch64": PinnedFile(
        project="pywhispercpp",
        filename="pywhispercpp-1.5.1-cp311-cp311-manylinux_2_27_aarch64.manylinux_2_28_aarch64.whl",
        sha256="3fd5ce38397f27e1173423f82f14089da2f61a45b2f1fb307a943765f5c56b3e",
        size_bytes=4_179_573,
    ),
}
PROGRAM = "whisper-server"
SPEECH = "samples/jfk.wav"
UNITS = ("server/server.cpp", "common-whisper.cpp", "common.cpp")
#: -O2 takes 30 s of CPU time instead of 18, and the work is done in the libraries
FLAGS = ("-std=c++17", "-O1", "-Iinclude", "-Iggml/include", "-Iexamples")
_LINK_FLAGS = ("-pthread", "-Wl,-rpath,$ORIGIN/lib")
_SOURCES = "pywhispercpp-1.5.1/whisper.cpp/"
_WANTED = re.compile(r"examples/(server/)?[^/]+\.(c|cpp|h|hpp)|(ggml/)?include/[^/]+\.h|" + re.escape(SPEECH))
_LIBRARIES = "pywhispercpp.libs/"
_COMMAND_LIMIT_S = 600


class NotPossibleError(CliError):
    """This machine cannot make whisper-server. Nothing is broken: what needs the server can be left out."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler, and the line in which it says what it is."""

    argv: tuple[str, ...]
    version: str


def ensure_server(
    environ: Mapping[str, str], console: Console, *, sdist: PinnedFile = SDIST, wheel: PinnedFile | None = None
) -> Path:
    """Return the path of whisper-server, making it first if the cache has none of these sources and this compiler."""
    wheel = wheel or wheel_for(platform.system(), platform.machine(), platform.libc_ver()[0])
    compiler = find_compiler(environ)
    directory = cache_dir(environ)
    home = directory / f"{PROGRAM}-{VERSION}-{_key(sdist, wheel, compiler)}"
    with locked(directory, console):
        if not (home / PROGRAM).is_file():
            _make(home, environ, console, compiler, sdist, wheel)
    return home / PROGRAM


def wheel_for(system: str, machine: str, libc: str) -> PinnedFile:
    """Return the wheel with libraries for such a machine; raise ``NotPossibleError`` if there is none."""
    if system == "Linux" and libc == "glibc" and (wheel := WHEELS.get(machine)):
        return wheel
    raise NotPossibleError(
        f"there are no prebuilt parts of {PROGRAM} for {system} on {machine}" + (f" with {libc}" if libc else ""),
        fix="Build whisper.cpp yourself and name its whisper-server in config.yaml.",
    )


def find_compiler(environ: Mapping[str, str]) -> Compiler:
    """Return $CXX, else g++, c++ or clang++, whatever works first; raise ``NotPossibleError`` if nothing does."""
    chosen = shlex.split(environ.get("CXX", ""))
    for argv in [chosen] if chosen else [["g++"], ["c++"], ["clang++"]]:
        if program := shutil.which(argv[0], path=environ.get("PATH", os.defpath)):
            argv = [program, *argv[1:]]
            said = _run([*argv, "--version"], Path.cwd())
            if said.returncode == 0 and said.stdout.strip():
                return Compiler(tuple(argv), said.stdout.splitlines()[0])
    raise NotPossibleError(
        f"{PROGRAM} has to be compiled, and there is no C++ compiler"
        + (f": CXX={shlex.join(chosen)} does not work" if chosen else " (looked for g++, c++ and clang++)"),
        fix="Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++. Everything else works without it.",
    )


def _key(sdist: PinnedFile, wheel: PinnedFile, compiler: Compiler) -> str:
    """Digest all that decides what comes out."""
    inputs = [sdist.sha256, wheel.sha256, *compiler.argv, compiler.version, *UNITS, *FLAGS, *_LINK_FLAGS]
    return hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:12]


def _make(
    home: Path,
    environ: Mapping[str, str],
    console: Console,
    compiler: Compiler,
    sdist: PinnedFile,
    wheel: PinnedFile,
) -> None:
    """Fetch, unpack, compile and try out, in a directory beside *home* that gets its name last."""
    directory, index = home.parent, Index(environ)
    sources = fetch(index, sdist, directory, console, "whisper.cpp, sources")
    libraries = fetch(index, wheel, directory, console, "whisper.cpp, libraries")
    staging = directory / f"{PROGRAM}.part"
    _remove(staging)  # of a run that was killed
    try:
        _unpack(sources, libraries, staging)
        with console.status(f"compiling {PROGRAM} (some 10 s) …"):
            _build(compiler, staging)
        (staging / "source" / SPEECH).replace(directory / Path(SPEECH).name)
        _remove(staging / "source")
        _remove(home)
        staging.replace(home)
    except OSError as error:
        raise CliError(f"cannot make {home}: {error.strerror or error}", fix=ROOM_FIX) from error
    finally:
        _remove(staging)
    sources.unlink()
    libraries.unlink()


def _unpack(sdist: Path, wheel: Path, staging: Path) -> None:
    """Lay the wanted sources below ``source``, the libraries into ``lib``."""
    (staging / "lib").mkdir(parents=True)
    with tarfile.open(sdist) as tar:
        for member in tar:
            name = member.name.removeprefix(_SOURCES)
            if name != member.name and _WANTED.fullmatch(name) and (source := tar.extractfile(member)):
                target = staging / "source" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read())
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(_LIBRARIES) and not name.endswith("/"):
                (staging / "lib" / Path(name).name).write_bytes(archive.read(name))


def _build(compiler: Compiler, staging: Path) -> None:
    source = staging / "source"
    objects = [str(staging / "source" / f"{Path(unit).stem}.o") for unit in UNITS]
    commands = [
        [*compiler.argv, *FLAGS, "-c", f"examples/{unit}", "-o", target]
        for unit, target in zip(UNITS, objects, strict=True)
    ]
    with ThreadPoolExecutor(min(len(commands), os.cpu_count() or 1)) as pool:
        for command in [pool.submit(_demand, command, source) for command in commands]:
            command.result()
    libraries = sorted(str(path) for path in (staging / "lib").iterdir())
    _demand([*compiler.argv, *objects, *libraries, *_LINK_FLAGS, "-o", str(staging / PROGRAM)], source)
    _demand([str(staging / PROGRAM), "--help"], staging)


def _demand(command: Sequence[str], directory: Path) -> None:
    """Run *command* in *directory*; raise ``CliError`` with its last words if it fails."""
    result = _run(command, directory)
    if result.returncode:
        words = "\n".join((result.stdout + result.stderr).splitlines()[-10:])
        raise CliError(
            f"{PROGRAM} cannot be made: {shlex.join(command)} ended with {result.returncode}\n{words}".rstrip(),
            fix="Try another compiler with CXX=...; everything else works without it.",
        )


def _run(command: Sequence[str], directory: Path) -> subprocess.CompletedProcess[str]:
    """Run *command*; one that cannot be run, or hangs, has failed."""
    try:
        return subprocess.run(
            command,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_COMMAND_LIMIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def _remove(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
