"""The cookbook's watcher sees every way in which files are replaced, again and again (trap 81)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mesh.config import watch
from mesh.config.watch import watch_cookbook

TIMEOUT_S = 20


class Reader:
    """What a node does on a change: it reads the file. Waits for contents, not for a number of calls."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: str | None = None
        self.calls = 0
        self.failures: list[Exception] = []
        self._called = asyncio.Event()

    async def __call__(self) -> None:
        self.calls += 1
        self.content = self.path.read_text() if self.path.exists() else None
        self._called.set()
        if self.failures:
            raise self.failures.pop()

    async def sees(self, content: str | None) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not self.calls or self.content != content:
                self._called.clear()
                await self._called.wait()


@asynccontextmanager
async def watching(path: Path) -> AsyncIterator[Reader]:
    reader = Reader(path)
    task = asyncio.create_task(watch_cookbook(path, reader))
    await asyncio.sleep(0)  # let it take note of the first state
    try:
        yield reader
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture(autouse=True)
def notifications_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparing by the clock is off, so that a test passes by notifications or not at all."""
    monkeypatch.setattr(watch, "_COMPARE_EVERY_MS", 3_600_000)
    monkeypatch.setattr(watch, "_RETRY_S", 0)


def write(path: Path, content: str) -> None:
    path.write_text(content)


def replace(path: Path, content: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(content)
    temporary.rename(path)


def recreate(path: Path, content: str) -> None:
    path.unlink()
    path.write_text(content)


@pytest.mark.parametrize("save", [write, replace, recreate])
async def test_every_save_is_seen(tmp_path: Path, save: Callable[[Path, str], None]) -> None:
    """Trap 81: in place, by atomic rename, by delete and create; repeatedly."""
    path = tmp_path / "cookbook.yaml"
    path.write_text("0")
    async with watching(path) as reader:
        for round_number in range(1, 5):
            save(path, f"version {round_number}")
            await reader.sees(f"version {round_number}")


async def test_a_kubernetes_swap_is_seen(tmp_path: Path) -> None:
    """Trap 81: cookbook.yaml -> ..data/cookbook.yaml, ..data -> ..v1, and ``..data`` is replaced by a rename."""
    (tmp_path / "..v0").mkdir()
    (tmp_path / "..v0" / "cookbook.yaml").write_text("v0")
    (tmp_path / "..data").symlink_to("..v0")
    path = tmp_path / "cookbook.yaml"
    path.symlink_to("..data/cookbook.yaml")
    async with watching(path) as reader:
        for version in ("v1", "v2", "v3", "v4"):
            (tmp_path / f"..{version}").mkdir()
            (tmp_path / f"..{version}" / "cookbook.yaml").write_text(version)
            (tmp_path / "..data_tmp").symlink_to(f"..{version}")
            (tmp_path / "..data_tmp").rename(tmp_path / "..data")
            await reader.sees(version)


async def test_a_swapped_parent_directory_is_seen(tmp_path: Path) -> None:
    """Trap 81, releases: releases/current -> v0 is exchanged above the directory of the file."""
    for version in ("v0", "v1", "v2"):
        (tmp_path / version / "etc").mkdir(parents=True)
        (tmp_path / version / "etc" / "cookbook.yaml").write_text(version)
    (tmp_path / "releases").mkdir()
    (tmp_path / "releases" / "current").symlink_to("../v0")
    path = tmp_path / "releases" / "current" / "etc" / "cookbook.yaml"
    async with watching(path) as reader:
        for version in ("v1", "v2"):
            (tmp_path / "releases" / "new").symlink_to(f"../{version}")
            (tmp_path / "releases" / "new").rename(tmp_path / "releases" / "current")
            await reader.sees(version)


async def test_a_link_into_another_directory_is_followed(tmp_path: Path) -> None:
    """Trap 81: both the target and the link itself may change."""
    elsewhere = tmp_path / "repository"
    elsewhere.mkdir()
    (elsewhere / "a.yaml").write_text("a0")
    (elsewhere / "b.yaml").write_text("b0")
    (tmp_path / "etc").mkdir()
    path = tmp_path / "etc" / "cookbook.yaml"
    path.symlink_to("../repository/a.yaml")
    async with watching(path) as reader:
        replace(elsewhere / "a.yaml", "a1")
        await reader.sees("a1")
        path.unlink()
        path.symlink_to(elsewhere / "b.yaml")
        await reader.sees("b0")
        write(elsewhere / "b.yaml", "b1")
        await reader.sees("b1")


async def test_a_write_through_a_hard_link_is_seen(tmp_path: Path) -> None:
    """Trap 81, bind mounts: the file changes without an event in the directory that is watched."""
    (tmp_path / "host").mkdir()
    (tmp_path / "container").mkdir()
    origin = tmp_path / "host" / "cookbook.yaml"
    origin.write_text("0")
    path = tmp_path / "container" / "cookbook.yaml"
    os.link(origin, path)
    async with watching(path) as reader:
        for content in ("one", "two", "three"):
            write(origin, content)
            await reader.sees(content)


async def test_a_file_may_come_and_go(tmp_path: Path) -> None:
    path = tmp_path / "later" / "cookbook.yaml"
    async with watching(path) as reader:
        path.parent.mkdir()
        path.write_text("here")
        await reader.sees("here")
        path.unlink()
        await reader.sees(None)
        path.write_text("again")
        await reader.sees("again")


async def test_a_failing_callback_does_not_end_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Trap 12."""
    path = tmp_path / "cookbook.yaml"
    path.write_text("0")
    async with watching(path) as reader:
        reader.failures.append(RuntimeError("boom"))
        write(path, "first")
        await reader.sees("first")
        write(path, "second")
        await reader.sees("second")
    assert "boom" in caplog.text


async def test_a_watch_that_cannot_be_set_up_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 12: no inotify watches left; the file is compared meanwhile."""
    path = tmp_path / "cookbook.yaml"
    path.write_text("0")
    attempted = asyncio.Event()

    def out_of_watches(*_paths: Path, **_options: object) -> AsyncIterator[set[tuple[object, str]]]:
        attempted.set()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(watch, "awatch", out_of_watches)
    async with watching(path) as reader:
        await attempted.wait()
        write(path, "seen all the same")
        await reader.sees("seen all the same")


async def test_without_notifications_it_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Network file systems report nothing: another file is watched here, as if that were so."""
    monkeypatch.setattr(watch, "_COMPARE_EVERY_MS", 50)
    silent = tmp_path / "silent"
    silent.mkdir()
    monkeypatch.setattr(watch, "_watched", lambda _path: [silent])
    path = tmp_path / "cookbook.yaml"
    path.write_text("0")
    async with watching(path) as reader:
        replace(path, "one")
        await reader.sees("one")


async def test_a_change_during_the_callback_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "cookbook.yaml"
    path.write_text("0")
    reader = Reader(path)

    async def edit_meanwhile() -> None:
        await reader()
        if reader.calls == 1:
            replace(path, "written during the reload")

    async with watching_with(path, edit_meanwhile):
        replace(path, "first")
        await reader.sees("written during the reload")


@asynccontextmanager
async def watching_with(path: Path, on_change: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    task = asyncio.create_task(watch_cookbook(path, on_change))
    await asyncio.sleep(0)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_other_files_are_none_of_its_business(tmp_path: Path) -> None:
    path = tmp_path / "cookbook.yaml"
    path.write_text("0")
    async with watching(path) as reader:
        for number in range(3):
            (tmp_path / "node-metrics.json").write_text(str(number))
        write(path, "mine")
        await reader.sees("mine")
    assert reader.calls <= 2  # one save may be two batches


async def test_a_burst_of_saves_is_one_or_few_changes(tmp_path: Path) -> None:
    """Trap 86."""
    path = tmp_path / "cookbook.yaml"
    path.write_text("0")
    async with watching(path) as reader:
        for number in range(50):
            replace(path, str(number))
        await reader.sees("49")
    assert reader.calls <= 3
