"""What the tests of the pipeline need: a CMake project that "compiles" a shell script, and a tester that obeys.

No compiler is looked for or run, so that a build takes a tenth of a second; git, cmake and ninja are real.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from mesh.build.manager import BuildManager
from mesh.build.spec import BuildSpec
from mesh.build.status import Attempt, BuildEvent, Comparison, Outcome, Speed, Stage
from mesh.errors import BuildError
from tests.build_project import commit_all, git, init

CMAKE = """\
cmake_minimum_required(VERSION 3.16)
project(tiny NONE)
option(FANCY "an argument that changes something" OFF)
set(server ${CMAKE_BINARY_DIR}/bin/llama-server)
file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
add_custom_command(OUTPUT ${server} COMMAND sh ${CMAKE_SOURCE_DIR}/compile.sh ${server} VERBATIM)
add_custom_target(build ALL DEPENDS ${server})
"""
#: makes a llama-server that says its version; "$1" is where
GOOD = "printf '#!/bin/sh\\necho version: %s\\n' {version} > $1\nchmod +x $1\n"
BROKEN = "for i in $(seq 60); do echo line $i; done\nexit 3\n"
MODEL = Comparison("tiny model", None, Speed(1000.0, 100.0))


class Project:
    """The repository that is built. Each ``commit`` is another version."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._versions = 0
        init(path)

    def commit(self, compile_script: str | None = None) -> str:
        """Commit a version, by default a good one, and return its hash."""
        self._versions += 1
        (self.path / "CMakeLists.txt").write_text(CMAKE)
        (self.path / "compile.sh").write_text(compile_script or GOOD.format(version=self._versions))
        return commit_all(self.path, f"version {self._versions}")

    def git(self, *args: str) -> str:
        return git(self.path, *args)


def spec_in(directory: Path, project: Project, **changes: object) -> BuildSpec:
    """Return the build of *project* with everything in *directory*, in the places that llamesh's defaults have."""
    spec = BuildSpec(
        name="default",
        enabled=True,
        repo_url=str(project.path),
        repo_path=directory / "llama.cpp",
        build_path=directory / "llama.cpp" / "build",
        binary_path=directory / "llama.cpp" / "bin" / "llama-server",
        ref="master",
    )
    return replace(spec, **changes)  # type: ignore[arg-type]


@dataclass
class FakeTester:
    """Finds what it is told to find, and remembers what it was asked."""

    error: BuildError | None = None
    asked: list[tuple[Path, Path | None]] = field(default_factory=list)
    during: Callable[[], None] = lambda: None

    async def test(
        self,
        binary: Path,
        old: Path | None,
        *,
        spec: BuildSpec,
        say: Callable[[str], None],
        stage: Callable[[Stage, int | None, int | None], None],
    ) -> tuple[tuple[Comparison, ...], tuple[str, ...]]:
        self.asked.append((binary, old))
        self.during()
        say(f"testing {binary.name}")
        stage(Stage.COMPARING, 1, 1)
        if self.error is not None:
            raise self.error
        return (MODEL,), ("a note",)


@dataclass
class Bench:
    """A manager of builds with everything around it."""

    manager: BuildManager
    tester: FakeTester
    installed: list[str]
    in_use: list[Path]
    specs: tuple[BuildSpec, ...]

    async def rebuild(self, name: str | None = None, *, ref: str | None = None, force: bool = False) -> Attempt:
        """Rebuild, and return how it ended."""
        return await self.manager.wait(self.manager.rebuild(name, ref=ref, force=force).id)

    async def install(self, **options: object) -> Path:
        """Rebuild with success, and return the directory that is live now."""
        ended = await self.rebuild(**options)  # type: ignore[arg-type]
        assert ended.outcome is Outcome.INSTALLED, ended
        return live(self.specs[0])


@asynccontextmanager
async def bench(*specs: BuildSpec) -> AsyncIterator[Bench]:
    """Make a manager of *specs*, and close it at the end."""
    tester, installed, in_use = FakeTester(), list[str](), list[Path]()

    def used() -> Collection[Path]:
        return tuple(in_use)

    manager = BuildManager(specs, tester=tester, on_installed=installed.append, in_use=used)
    try:
        yield Bench(manager, tester, installed, in_use, specs)
    finally:
        await manager.close()


def live(spec: BuildSpec) -> Path:
    """Return the directory that binary_path leads into."""
    return Path(os.readlink(spec.binary_path)).parent.parent


def directories(spec: BuildSpec) -> set[str]:
    """Return the names of what lies beside the build, without files."""
    return {path.name for path in spec.build_path.parent.iterdir() if path.is_dir()} - {".git", "bin"}


async def until(events: AsyncIterator[BuildEvent], kind: str, **wanted: object) -> BuildEvent:
    """Return the next event of *kind* whose attempt, or which itself, is as *wanted*."""
    async for event in events:
        state = event.data.get("attempt_state", event.data)
        assert isinstance(state, dict)
        if event.kind == kind and wanted.items() <= state.items():
            return event
    raise AssertionError(f"no {kind} event")


def hanging_at(fifo: Path) -> str:
    """Return a compile script that says its process id through *fifo*, and then never ends."""
    os.mkfifo(fifo)
    return f"echo halfway > $1\necho $$ > {fifo}\nexec sleep 1000\n"


async def pid_from(fifo: Path) -> int:
    return int(await asyncio.to_thread(fifo.read_text))
