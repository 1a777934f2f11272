"""Two nodes that share a build directory, and a node that is killed while it builds."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mesh.build.lock import BuildLock, holder
from mesh.build.spec import BuildSpec
from mesh.build.state import lock_path
from mesh.errors import BuildBusyError, BuildError
from mesh.tasks import spawn
from tests.build.project import Project, bench, directories, hanging_at, live, pid_from, spec_in
from tests.host.deaths import wait_for_death

ROOT = Path(__file__).resolve().parents[2]
#: a node that builds what is in argv[2], with everything in argv[1]
NODE = """\
import asyncio, sys
from pathlib import Path
from tests.build.project import Project, bench, spec_in

async def main():
    project = Project.__new__(Project)
    project.path = Path(sys.argv[2])
    async with bench(spec_in(Path(sys.argv[1]), project)) as b:
        await b.rebuild()

asyncio.run(main())
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "upstream")


@contextmanager
def other_node(spec: BuildSpec, project: Project) -> Iterator[subprocess.Popen[bytes]]:
    """Let another process build the same."""
    argv = [sys.executable, "-c", NODE, str(spec.repo_path.parent), str(project.path)]
    with subprocess.Popen(argv, cwd=ROOT) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_lock_is_held_once_and_let_go(tmp_path: Path) -> None:
    path = tmp_path / "new" / "build.lock"
    lock = BuildLock.take(path)
    assert lock is not None
    assert BuildLock.take(path) is None
    assert holder(path).startswith("process ")
    lock.release()
    lock.release()
    again = BuildLock.take(path)
    assert again is not None
    again.release()
    assert path.exists()


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BuildError, match=r"cannot lock .* let this user write there"):
        BuildLock.take(tmp_path / "file" / "build.lock")


async def test_the_second_process_is_told_that_the_first_one_builds(tmp_path: Path, project: Project) -> None:
    project.commit(hanging_at(tmp_path / "fifo"))
    spec = spec_in(tmp_path, project)
    with other_node(spec, project) as other:
        pid = await pid_from(tmp_path / "fifo")
        async with bench(spec) as b:
            with pytest.raises(BuildBusyError, match=f"build default is busy: process {other.pid} is at work in"):
                b.manager.rebuild(None)
            with pytest.raises(BuildBusyError):
                await b.manager.rollback("default")
            assert b.manager.summary().last_build_error is None
        other.kill()
        await asyncio.to_thread(wait_for_death, pid)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_a_node_that_is_killed_while_it_builds(tmp_path: Path, project: Project, how: signal.Signals) -> None:
    """What it compiled with dies with it, what runs is untouched, and the next one builds as if nothing had been."""
    project.commit()
    spec = spec_in(tmp_path, project)
    async with bench(spec) as b:
        good = await b.install()
        bad = project.commit(hanging_at(tmp_path / "fifo"))
        with other_node(spec, project) as other:
            pid = await pid_from(tmp_path / "fifo")
            other.send_signal(how)
            await asyncio.to_thread(other.wait)
        await asyncio.to_thread(wait_for_death, pid)
        assert live(spec) == good
        half = f"build-{bad[:7]}"
        assert directories(spec) == {good.name, half, f"{half}.src"}
        lock = BuildLock.take(lock_path(spec))
        assert lock is not None
        lock.release()
        (tmp_path / "fifo").unlink()
        project.commit()
        newest = await b.install()
        assert directories(spec) == {good.name, newest.name}
        assert project.git("status", "--short") == ""


async def test_a_mount_that_hangs_stops_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And whoever stops waiting for it does not hold the lock when it comes after all."""
    path, hung, over = tmp_path / "build.lock", threading.Event(), threading.Event()
    take = BuildLock.take

    def slow(path: Path) -> BuildLock | None:
        assert hung.wait(20)
        try:
            return take(path)
        finally:
            over.set()

    monkeypatch.setattr(BuildLock, "take", slow)
    waiting = spawn(BuildLock.wait(path), "wait")
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    hung.set()
    await asyncio.to_thread(over.wait, 20)
    monkeypatch.setattr(BuildLock, "take", take)
    async with asyncio.timeout(20):
        (await BuildLock.wait(path)).release()
