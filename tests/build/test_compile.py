"""What cmake gets, and what is said of it when it hangs, makes no server, or finds no space."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from mesh.build import compile as compiling
from mesh.build import state
from mesh.build.compile import _environment, full_disk
from mesh.build.manager import BuildManager
from mesh.build.status import Attempt, Outcome, Stage
from mesh.core.build_policy import Hold
from tests.build.project import Project, bench, directories, hanging_at, pid_from, spec_in, until
from tests.host.deaths import wait_for_death

GIB = 1024**3


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "upstream")


async def _by_itself(manager: BuildManager) -> Attempt:
    """Let the attempt at boot happen, and return it."""
    events = manager.subscribe()
    manager.start()
    started = await until(events, "started")
    return await manager.wait(int(str(started.data["attempt"])))


# -- what hangs


async def test_a_compiler_that_hangs_is_ended_and_lets_the_lock_go(
    tmp_path: Path, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "MAX_SILENCE_S", 2.0)
    project.commit(hanging_at(tmp_path / "fifo"))
    spec = spec_in(tmp_path, project)
    async with bench(spec) as b:
        attempt = b.manager.rebuild(None)
        pid = await pid_from(tmp_path / "fifo")
        async with asyncio.timeout(60):
            ended = await b.manager.wait(attempt.id)
        wait_for_death(pid)
        assert (ended.outcome, ended.stage) == (Outcome.FAILED, Stage.COMPILING)
        assert "said nothing for 2 s; it hangs: the last lines of its log say at what" in str(ended.error)
        assert b.manager.statuses()[0].held == {}, "another time it may not"
        assert directories(spec) == set()
        project.commit()
        await b.install()


async def test_a_download_that_hangs_while_cmake_configures(
    tmp_path: Path, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "MAX_SILENCE_S", 2.0)
    (project.path / "download.cmake").write_text("execute_process(COMMAND sleep 1000)")
    project.commit()
    hangs = ("-DCMAKE_PROJECT_INCLUDE=download.cmake",)
    async with bench(spec_in(tmp_path, project, build_args=hangs)) as b:
        async with asyncio.timeout(60):
            ended = await b.rebuild()
        assert (ended.outcome, ended.stage) == (Outcome.FAILED, Stage.CONFIGURING)
        assert "said nothing for 2 s; it hangs" in str(ended.error)


# -- how much at once


def test_as_much_at_once_as_fits_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    levels = [_environment({}, mib)["CMAKE_BUILD_PARALLEL_LEVEL"] for mib in (0, 1000, 5 * 1536 + 1, 10**6)]
    assert levels == ["1", "1", "5", "8"]
    chosen = _environment({"CMAKE_BUILD_PARALLEL_LEVEL": "30"}, 1000)
    assert chosen["CMAKE_BUILD_PARALLEL_LEVEL"] == "30"


async def test_the_memory_is_that_of_this_moment(
    tmp_path: Path, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CMAKE_BUILD_PARALLEL_LEVEL", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr(compiling, "ram_available_mib", lambda: 7 * 1536)
    project.commit("echo at once: $CMAKE_BUILD_PARALLEL_LEVEL\nexit 1\n")
    async with bench(spec_in(tmp_path, project)) as b:
        assert "at once: 7" in (await b.rebuild()).log_tail


# -- which arguments were at fault


@pytest.mark.parametrize(
    ("args", "key"),
    [
        ((), "check build_args"),
        (("-v",), "check build_args"),
        (("--target", "build"), "check build_command_args: it chooses a --target"),
        (("-t", "build"), "check build_command_args: it chooses a --target"),
    ],
)
async def test_a_build_without_a_server_names_the_key(
    tmp_path: Path, project: Project, args: tuple[str, ...], key: str
) -> None:
    project.commit("touch $1\n")
    async with bench(spec_in(tmp_path, project, build_command_args=args)) as b:
        assert str((await b.rebuild()).error).endswith(f"made no bin/llama-server; {key}")


async def test_corrected_build_command_args_lift_what_is_held(tmp_path: Path, project: Project) -> None:
    commit = project.commit()
    wrong = spec_in(tmp_path, project, build_command_args=("--target", "nothing"))
    async with bench(wrong) as b:
        assert (await b.rebuild()).outcome is Outcome.FAILED
        assert list(b.manager.statuses()[0].held) == [commit]
        assert state.load(wrong).held[commit].build_command_args == ("--target", "nothing")
    async with bench(wrong) as b:
        assert (await _by_itself(b.manager)).outcome is Outcome.SKIPPED
    async with bench(replace(wrong, build_command_args=())) as b:
        assert (await _by_itself(b.manager)).outcome is Outcome.INSTALLED


async def test_what_was_held_before_there_were_command_args_stays_held(tmp_path: Path, project: Project) -> None:
    commit = project.commit()
    spec = spec_in(tmp_path, project, build_command_args=("-j", "2"))
    spec.build_path.parent.mkdir(parents=True)
    old = {"version": 1, "history": [], "held": {commit: {"reason": "too slow", "build_args": []}}}
    state.state_path(spec).write_text(json.dumps(old))
    assert state.load(spec).held == {commit: Hold("too slow", ())}
    async with bench(spec) as b:
        assert (await _by_itself(b.manager)).outcome is Outcome.SKIPPED


# -- where there was no space

ENDS = "No space left on device"


@pytest.mark.parametrize(
    ("free", "environ", "line", "full"),
    [
        ({"/b": 0.0, "/tmp": 9.0}, {}, "", "/b"),
        ({"/b": 0.0, "/tmp": 9.0}, {}, f"error writing to /tmp/x.s: {ENDS}", "/b"),
        ({"/b": 9.0, "/tmp": 9.0}, {}, "error: expected a semicolon", None),
        ({"/b": 9.0, "/tmp": 9.0}, {}, f"error writing to /tmp/x.s: {ENDS}", "/tmp"),
        ({"/b": 1.0, "/t": 9.0}, {"TMPDIR": "/t"}, f"error writing to /t/x.s: {ENDS}", "/t"),
        ({"/b": 9.0, "/t": 1.0}, {"TMPDIR": "/t"}, f"error writing to /b/x.o: {ENDS}", "/b"),
        ({"/b": 9.0, "/t": 1.0}, {"TMPDIR": "/t"}, f"ld: final link failed: {ENDS}", "/t"),
        ({"/b": 1.0, "/t": 9.0}, {"TMPDIR": "", "TEMP": "/t"}, f"ld: final link failed: {ENDS}", "/b"),
        ({"/b": 9.0, "/tmp": 1.0}, {}, "ld: Disk quota exceeded", "/b"),
        ({"/b": 9.0, "/tmp": 1.0}, {}, "/tmp/x.s: Disk quota exceeded", "/tmp"),
    ],
)
def test_where_there_was_no_space(
    monkeypatch: pytest.MonkeyPatch,
    free: dict[str, float],
    environ: dict[str, str],
    line: str,
    full: str | None,
) -> None:
    monkeypatch.setattr(compiling, "_free", lambda path: free[str(path)] * GIB)
    assert full_disk(Path("/b"), environ, ("before", line)) == (Path(full) if full else None)
