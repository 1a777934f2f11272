"""From sources to ``bin/llama-server``: cmake twice, in a directory of its own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Final

from mesh.build.command import Command, CommandError, HangsError, Surroundings, run
from mesh.build.layout import BINARY, is_executable
from mesh.build.spec import BuildSpec
from mesh.build.status import Stage
from mesh.build.threads import settled
from mesh.core.build_progress import Progress, advance, parse
from mesh.errors import BuildError
from mesh.host.memory import ram_available_mib

#: what a step says of itself: the stage, and how many of its steps are done (None: not known)
StageReport = Callable[[Stage, int | None, int | None], None]

_INSTALL = "install cmake (apt-get install cmake ninja-build), or pip install 'llama-mesh[build]'"
#: not ninja's "FAILED: …", which only names the file
_ERROR = re.compile(r"\berror\b", re.IGNORECASE)
#: what cmake says, and what helps
_LACKS = {
    "unable to find a build program": _INSTALL,
    "CMAKE_CXX_COMPILER not set": "install a C++ compiler (apt-get install g++)",
    "No CMAKE_CXX_COMPILER could be found": "install a C++ compiler (apt-get install g++)",
    "CUDA Toolkit not found": "install the CUDA toolkit, or take -DGGML_CUDA=ON out of llama_cpp.build_args",
    "No CMAKE_CUDA_COMPILER could be found": "put nvcc of the CUDA toolkit on PATH, or build without -DGGML_CUDA=ON",
}
#: Without a line for so long, it hangs, and the lock and the other builds wait for it. A single file of CUDA kernels
#: takes many minutes without one on a slow machine, and ninja tells of nothing before it is done.
MAX_SILENCE_S: Final = 3600.0
#: what a compiler takes on llama.cpp's larger files
_JOB_MIB: Final = 1536
#: so little is left after a failure: it was the failure
_FULL_BYTES = 16 * 1024**2
_HANGS = (
    "it hangs: the last lines of its log say at what (a download, a compiler, a disk); mend that, and rebuild. "
    "What runs is untouched"
)
_NO_MEMORY = "the system ran out of memory; compile less at once: build_command_args: [-j, '2']"
_NO_SPACE, _NO_QUOTA = "No space left on device", "Disk quota exceeded"
#: where compilers look for their temporary directory, before /tmp
_TEMPORARY = ("TMPDIR", "TMP", "TEMP")


class CompileError(BuildError):
    """The sources do not compile: trying that commit again without a change is of no use."""


async def build(
    spec: BuildSpec,
    source: Path,
    directory: Path,
    around: Surroundings,
    say: Callable[[str], None],
    stage: StageReport,
) -> None:
    """Configure and compile *source* in *directory*, so that ``bin/llama-server`` is there.

    Raise ``CompileError`` if it does not compile, ``BuildError`` for anything that may be better next time.
    """
    environ = around.environ()
    env = _environment(environ, await settled(ram_available_mib))
    if (cmake := shutil.which("cmake", path=env["PATH"])) is None:
        raise BuildError(f"there is no cmake; {_INSTALL}")
    generator = _generator(spec.build_args, environ, env["PATH"])
    cmd = _Cmake(cmake, directory, env, around, say, stage)
    try:
        await cmd.run(Stage.CONFIGURING, "-S", str(source), "-B", str(directory), *generator, *spec.build_args)
    except CommandError as error:
        raise _retold(error, BuildError, _said(error.log_tail) + _advice(error.log_tail)) from error
    try:
        await cmd.run(Stage.COMPILING, "--build", str(directory), "--config", "Release", *spec.build_command_args)
    except CommandError as error:
        if _was_killed(error):
            raise _retold(error, BuildError, f"; {_NO_MEMORY}") from error
        raise _retold(error, CompileError, _said(error.log_tail)) from error
    if not is_executable(directory / BINARY):
        targets = any(arg in ("-t", "--target") or arg.startswith("--target=") for arg in spec.build_command_args)
        check = "build_command_args: it chooses a --target" if targets else "build_args"
        raise CompileError(f"the build succeeded, but made no {BINARY}; check {check}")


def full_disk(directory: Path, environ: Mapping[str, str], log_tail: Sequence[str] = ()) -> Path | None:
    """Return where there was no space for what failed: *directory*, the temporary one, or None: it was not that.

    What was half written is often removed again before we look, so that both have room now; then the log may name the
    file, and else it was the one with less.
    """
    if (here := _free(directory)) < _FULL_BYTES:
        return directory
    temporary = Path(next((environ[name] for name in _TEMPORARY if environ.get(name)), "/tmp"))
    lines = [line for line in log_tail if _NO_SPACE in line or _NO_QUOTA in line]
    if any(str(directory) in line for line in lines):
        return directory
    if any(str(temporary) in line for line in lines):
        return temporary
    if any(_NO_SPACE in line for line in lines):
        return temporary if _free(temporary) < here else directory
    return directory if lines else None  # a quota does not show in what is free


def _free(path: Path) -> float:
    """Return how many bytes are free where *path* is, or will be; infinity if nobody says."""
    there = next((each for each in (path, *path.parents) if each.exists()), path)
    try:
        return shutil.disk_usage(there).free
    except OSError:
        return inf


def _said(log_tail: Sequence[str]) -> str:
    """Return the first error that is still in the log; cmake writes where, and what on the next line."""
    lines = [line.strip() for line in log_tail if line.strip()]
    at = next((i for i, line in enumerate(lines) if _ERROR.search(line)), None)
    if at is None:
        return ""
    return "; " + " ".join(lines[at : at + 2] if lines[at].endswith(":") else lines[at : at + 1])


def _advice(log_tail: Sequence[str]) -> str:
    """Return what helps where the machine lacks something; cmake names the rest itself."""
    text = "\n".join(log_tail)
    return next((f"; {advice}" for known, advice in _LACKS.items() if known in text), "")


def _was_killed(error: CommandError) -> bool:
    """Whether a compiler was killed: with another model loaded, or with none, it might have had the memory."""
    killed = error.exit_status in (-signal.SIGKILL, 128 + signal.SIGKILL)
    return killed or any("Killed signal terminated program" in line for line in error.log_tail)


@dataclass(frozen=True, slots=True)
class _Cmake:
    program: str
    directory: Path
    env: Mapping[str, str]
    around: Surroundings
    say: Callable[[str], None]
    stage: StageReport

    async def run(self, at: Stage, *args: str) -> None:
        """Run cmake with *args* as the stage *at*, and report its steps."""
        self.stage(at, None, None)
        shown: Progress | None = None

        def hear(line: str) -> None:
            nonlocal shown
            self.say(line)
            if (progress := parse(line)) is not None and (now := advance(shown, progress)) != shown:
                shown = now
                self.stage(at, now.done, now.total)

        command = Command((self.program, *args), cwd=self.directory, extra_env=self.env, max_silence_s=MAX_SILENCE_S)
        try:
            await run(command, self.around, hear)
        except HangsError as error:
            raise _retold(error, BuildError, f"; {_HANGS}") from error


def _retold(error: BuildError, kind: type[BuildError], more: str) -> BuildError:
    return kind(f"{error.message}{more}", exit_status=error.exit_status, log_tail=error.log_tail)


def _environment(environ: Mapping[str, str], available_mib: int) -> dict[str, str]:
    """Return what cmake and ninja get beside the usual; they compile as much at once as fits into memory now."""
    at_once = min(os.cpu_count() or 1, max(1, available_mib // _JOB_MIB))
    beside_us = Path(sys.executable).parent  # where pip puts the cmake and ninja of PyPI
    return {
        "PATH": os.pathsep.join((environ.get("PATH") or os.defpath, str(beside_us))),
        "NINJA_STATUS": "[%f/%t] ",
        "CLICOLOR_FORCE": "0",
        "CMAKE_BUILD_PARALLEL_LEVEL": environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(at_once),
    }


def _generator(build_args: Sequence[str], environ: Mapping[str, str], path: str) -> tuple[str, ...]:
    """Return the arguments that choose Ninja: it is faster than make and counts its steps."""
    chosen = any(arg.startswith(("-G", "--preset")) for arg in build_args) or "CMAKE_GENERATOR" in environ
    return () if chosen or shutil.which("ninja", path=path) is None else ("-G", "Ninja")
