"""The stand-in for llama.cpp builds as the real one does, and goes wrong as asked."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mesh.models import tiny_model
from tests.build_project import Repository, git, make_repository, small_disk

Done = subprocess.CompletedProcess[str]
Build = Callable[..., Done]


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return make_repository(tmp_path / "llama.cpp")


@pytest.fixture
def build(repository: Repository, tmp_path: Path) -> Build:
    """Configure and compile what is checked out, into *directory*."""

    def run(directory: Path = tmp_path / "build") -> Done:
        _configure(repository.path, directory)
        return _run(_tool("cmake"), "--build", directory, check=False)

    return run


def _tool(name: str) -> str:
    """Return cmake or ninja: the machine's, else the one of the ``dev`` extra."""
    found = shutil.which(name, path=os.pathsep.join((os.environ["PATH"], os.path.dirname(sys.executable))))
    assert found is not None, f"there is no {name}: make setup"
    return found


def _configure(source: Path, build: Path) -> Done:
    """Have ninja build *source* in *build*."""
    return _run(_tool("cmake"), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}", "-S", source, "-B", build)


def _run(*args: str | Path, check: bool = True) -> Done:
    return subprocess.run(args, check=check, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def _server(tmp_path: Path, *args: str) -> Done:
    return _run(tmp_path / "build/bin/llama-server", *args, check=False)


def test_hashes_depend_on_nothing_but_what_was_asked_for(tmp_path: Path) -> None:
    one, two = (make_repository(tmp_path / name) for name in ("one", "two"))
    assert [one.commit(), one.commit(say="x")] == [two.commit(), two.commit(say="x")]
    assert one.head != one.commit(say="x")  # a commit that changes nothing is one all the same


def test_a_healthy_one_tells_its_commit(repository: Repository, build: Build, tmp_path: Path) -> None:
    commit = repository.commit()
    assert "[15/15] Linking C executable bin/llama-server" in build().stdout
    assert _server(tmp_path, "--version").stdout.startswith(f"version: 1 ({commit[:7]})\n")
    assert tiny_model.SENTENCE in (repository.path / "src/server.c").read_text()


def test_it_builds_from_a_worktree_of_a_clone(repository: Repository, tmp_path: Path) -> None:
    commit = repository.commit()
    git(tmp_path, "clone", "--quiet", "--no-checkout", repository.url, "clone")
    git(tmp_path / "clone", "worktree", "add", "--quiet", "--detach", str(tmp_path / "src"), commit)
    _configure(tmp_path / "src", tmp_path / "build")
    _run(_tool("cmake"), "--build", tmp_path / "build")
    assert commit[:7] in _server(tmp_path, "--version").stdout


def test_faults_are_compiled_in(repository: Repository, build: Build, tmp_path: Path) -> None:
    repository.commit(version_code=3)
    build()
    assert _server(tmp_path, "--version").returncode == 3


def test_unknown_behaviour_is_a_mistake(repository: Repository) -> None:
    with pytest.raises(TypeError, match="borken_source"):
        repository.commit(borken_source=True)


def test_a_broken_source_stops_the_compiler(repository: Repository, build: Build) -> None:
    repository.commit(broken_source=True)
    done = build()
    assert done.returncode != 0
    assert "as_asked" in done.stdout


def test_a_configuration_fails_after_much_talk(repository: Repository, tmp_path: Path) -> None:
    repository.commit(configure_fails=True, chatter_lines=100)
    done = _run(
        _tool("cmake"),
        f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
        "-G",
        "Ninja",
        "-S",
        repository.path,
        "-B",
        tmp_path / "build",
        check=False,
    )
    assert done.returncode == 1
    assert "-- chatter 100\n" in done.stdout
    assert "configure fails as asked" in done.stdout


def test_a_missing_library_is_found_out_by_the_loader(repository: Repository, build: Build, tmp_path: Path) -> None:
    repository.commit(missing_library=True)
    assert build().returncode == 0
    done = _server(tmp_path, "--version")
    assert done.returncode == 127
    assert "error while loading shared libraries: libstandin.so" in done.stdout


def test_the_binary_may_have_another_name(repository: Repository, build: Build, tmp_path: Path) -> None:
    repository.commit(output_name="server")
    assert build().returncode == 0
    assert [path.name for path in (tmp_path / "build/bin").iterdir()] == ["server"]


def test_a_step_waits_until_it_may_go_on(repository: Repository, tmp_path: Path) -> None:
    repository.commit(wait_for=tmp_path / "go")
    _configure(repository.path, tmp_path / "build")
    command = [_tool("cmake"), "--build", str(tmp_path / "build")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as compiling:
        waiting = _waiting_pid(tmp_path / "build", compiling)
        assert os.getpgid(waiting) != compiling.pid  # as all of ninja's jobs: killing cmake's group misses it
        assert not (tmp_path / "build/bin/llama-server").exists()
        (tmp_path / "go").touch()
    assert compiling.returncode == 0
    assert (tmp_path / "build/bin/llama-server").exists()


def test_a_step_that_sleeps_ends_with_ninja(repository: Repository, tmp_path: Path) -> None:
    repository.commit(sleep_s=600)
    _configure(repository.path, tmp_path / "build")
    command = [_tool("cmake"), "--build", str(tmp_path / "build")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as compiling:
        sleeping = _waiting_pid(tmp_path / "build", compiling)
        os.killpg(compiling.pid, signal.SIGTERM)
    while _is_alive(sleeping):
        pass


def _waiting_pid(build: Path, compiling: subprocess.Popen[bytes]) -> int:
    file = build / "sleeping.pid"
    while not file.exists():
        assert compiling.poll() is None, "the build ended without its step"
    return int(file.read_text())


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_small_disk_is_filled(repository: Repository, build: Build, tmp_path: Path) -> None:
    repository.commit(fill_mib=64)
    with small_disk(tmp_path / "disk", 4) as disk:
        done = build(disk / "build")
    assert done.returncode != 0
    assert "No space left on device" in done.stdout


def test_a_large_disk_is_not(repository: Repository, build: Build, tmp_path: Path) -> None:
    repository.commit(fill_mib=1)
    assert build().returncode != 0
    assert (tmp_path / "build/filler").stat().st_size == 1 << 20
