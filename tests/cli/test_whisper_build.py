"""Making whisper-server: once for the same inputs, whole or not at all, and with advice where it cannot be made."""

from __future__ import annotations

import io
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console

from mesh.cli import whisper_build
from mesh.cli.failure import CliError
from mesh.cli.whisper_build import NotPossibleError
from tests.cli.whisper_packages import COMPILER, SPEECH, FakeCompiler, Packages, pinned, sdist, serve_packages, wheel

Ensure = Callable[..., Path]


@pytest.fixture
def packages() -> Iterator[Packages]:
    with serve_packages() as served:
        served.index_files = {"sources.tar.gz": sdist(), "libraries.whl": wheel()}
        yield served


@pytest.fixture
def compiler(tmp_path: Path) -> FakeCompiler:
    return FakeCompiler(tmp_path / "bin")


@pytest.fixture
def ensure(packages: Packages, compiler: FakeCompiler, tmp_path: Path) -> Ensure:
    def run(script: str = COMPILER, **environ: str) -> Path:
        return whisper_build.ensure_server(
            packages.environ(tmp_path / "cache", **{"PATH": compiler.install(script), **environ}),
            Console(file=io.StringIO()),
            sdist=pinned("pywhispercpp", "sources.tar.gz", packages.index_files["sources.tar.gz"]),
            wheel=pinned("pywhispercpp", "libraries.whl", packages.index_files["libraries.whl"]),
        )

    return run


def test_compiles_three_files_links_them_and_leaves_what_is_needed(
    ensure: Ensure, compiler: FakeCompiler, tmp_path: Path
) -> None:
    server = ensure()
    assert subprocess.run([server], capture_output=True, check=True).stderr == b"usage:\n"
    assert sorted(path.name for path in server.parent.iterdir()) == ["lib", "whisper-server"]
    assert [path.name for path in (server.parent / "lib").iterdir()] == ["libwhisper-1234.so.1"]
    *compiled, linked = compiler.calls
    assert sorted(line.split(" -c ")[1].split()[0] for line in compiled) == [
        "examples/common-whisper.cpp",
        "examples/common.cpp",
        "examples/server/server.cpp",
    ]
    assert linked.count(".o ") == 3
    assert "/lib/libwhisper-1234.so.1 " in linked
    assert "-rpath,$ORIGIN/lib" in linked
    cache = tmp_path / "cache"
    assert sorted(path.name for path in cache.iterdir()) == [".lock", "jfk.wav", server.parent.name]
    assert (cache / "jfk.wav").read_bytes() == SPEECH


def test_the_same_inputs_are_not_built_twice(ensure: Ensure, compiler: FakeCompiler, packages: Packages) -> None:
    first = ensure()
    built, asked = len(compiler.calls), len(packages.requests)
    assert ensure() == first
    assert (len(compiler.calls), len(packages.requests)) == (built, asked)


def test_another_compiler_or_other_sources_are_another_build(ensure: Ensure, packages: Packages) -> None:
    first = ensure()
    second = ensure(COMPILER.replace("12", "13"))
    packages.index_files["libraries.whl"] += b"\n"
    third = ensure()
    assert len({first, second, third}) == 3
    assert first.exists()


def test_two_at_once_build_once(ensure: Ensure, compiler: FakeCompiler) -> None:
    compiler.install()
    with ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(ensure) for _ in range(2))
        assert first.result() == second.result()
    assert len(compiler.calls) == 4


def test_a_failed_compilation_shows_why_and_leaves_no_half_build(
    ensure: Ensure, compiler: FakeCompiler, tmp_path: Path
) -> None:
    broken = COMPILER.replace("while", "echo 'server.cpp:1: no such header' >&2; exit 4; while", 1)
    with pytest.raises(CliError, match=r"-c examples/server/server\.cpp .* ended with 4\n.*no such header") as caught:
        ensure(broken)
    assert "CXX" in (caught.value.fix or "")
    left = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert left == [".lock", "libraries.whl", "sources.tar.gz"]  # the next try need not fetch them
    assert ensure().exists()


def test_a_program_that_does_not_run_here_is_not_kept(ensure: Ensure, tmp_path: Path) -> None:
    with pytest.raises(CliError, match="--help ended with 1\nGLIBC too old"):
        ensure(COMPILER.replace("echo usage: >&2", "echo GLIBC too old >&2; exit 1"))
    assert not list((tmp_path / "cache").glob("whisper-server*"))


def test_what_a_killed_run_left_is_cleared_away(ensure: Ensure, tmp_path: Path) -> None:
    stale = tmp_path / "cache" / "whisper-server.part"
    (stale / "lib").mkdir(parents=True)
    (stale / "lib" / "libold.so").touch()
    assert [path.name for path in (ensure().parent / "lib").iterdir()] == ["libwhisper-1234.so.1"]
    assert not stale.exists()


@pytest.mark.parametrize("environ", [{"PATH": "/nonexistent"}, {"CXX": "no-such-compiler -m64"}])
def test_without_a_compiler_nothing_is_fetched_and_the_way_out_is_named(
    ensure: Ensure, packages: Packages, environ: dict[str, str]
) -> None:
    with pytest.raises(NotPossibleError, match=r"no C\+\+ compiler") as caught:
        ensure(**environ)
    assert "apt-get install g++" in (caught.value.fix or "")
    assert environ.get("CXX", "g++") in caught.value.message
    assert packages.requests == []


def test_cxx_chooses_the_compiler_with_its_options(compiler: FakeCompiler) -> None:
    path = compiler.install()
    found = whisper_build.find_compiler({"CXX": "g++ -m64", "PATH": path})
    assert found.argv == (os.path.join(path, "g++"), "-m64")


@pytest.mark.parametrize(
    "machine", [("Linux", "x86_64", ""), ("Darwin", "arm64", ""), ("Linux", "riscv64", "glibc")], ids="-".join
)
def test_machines_without_prebuilt_parts(machine: tuple[str, str, str]) -> None:
    with pytest.raises(NotPossibleError, match=f"{machine[0]} on {machine[1]}"):
        whisper_build.wheel_for(*machine)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_machines_with_prebuilt_parts(machine: str) -> None:
    assert machine in whisper_build.wheel_for("Linux", machine, "glibc").filename
