"""Going back, holding and pruning, on real directories."""

from __future__ import annotations

import asyncio
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from mesh.build import install, layout, state
from mesh.build.layout import Manifest
from mesh.build.spec import BuildSpec
from mesh.build.state import State
from mesh.build.status import Outcome
from mesh.core.build_policy import Hold, Installed
from mesh.errors import BuildBusyError, BuildError, DrainingError, UnknownBuildError
from mesh.tasks import spawn
from tests.build.project import Project, bench, directories, hanging_at, live, pid_from, spec_in, until
from tests.host.deaths import wait_for_death


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "upstream")


@pytest.fixture
def spec(tmp_path: Path, project: Project) -> BuildSpec:
    return spec_in(tmp_path, project)


def _made(spec: BuildSpec, short: str, *, made_at: float = 1.0, name: str = "default", base: str = "build") -> Path:
    """Lay out a finished build, and return its directory."""
    directory = spec.build_path.with_name(f"{base}-{short}")
    manifest = Manifest(name, short.ljust(40, "0"), built_at_wall=made_at)
    layout.begin(directory, manifest)
    (directory / "bin").mkdir()
    binary = directory / layout.BINARY
    binary.write_text("#!/bin/sh\necho version: 1\n")
    binary.chmod(0o755)
    layout.finish(directory, manifest)
    return directory


def _install(spec: BuildSpec, directory: Path) -> None:
    install.put_in_force(spec, Installed(str(directory / layout.BINARY), directory.name[-7:].ljust(40, "0")))


async def test_back_and_held_until_somebody_wants_it(spec: BuildSpec, project: Project) -> None:
    first_commit = project.commit()
    async with bench(spec) as b:
        first = await b.install()
        second_commit = project.commit()
        second = await b.install()
        events = b.manager.subscribe()
        assert [version.previous for version in b.manager.statuses()[0].versions] == [False, True]
        version = await b.manager.rollback("default")
        assert (version.commit, version.directory, version.live) == (first_commit, str(first), True)
        assert live(spec) == first
        assert (await until(events, "rolled_back")).data["build"] == "default"
        assert b.installed == ["default"] * 3
        status = b.manager.statuses()[0]
        assert (status.live_commit, status.held) == (first_commit, {second_commit: "rolled back"})
        with pytest.raises(UnknownBuildError, match="nothing to go back to: no other version was installed before"):
            await b.manager.rollback("default")
        b.manager.start()
        started = await until(events, "started")
        assert (await b.manager.wait(int(str(started.data["attempt"])))).outcome is Outcome.SKIPPED
        assert live(spec) == first
        assert await b.install() == second
        assert b.manager.statuses()[0].held == {}


async def test_back_over_what_is_gone_or_does_not_run(spec: BuildSpec) -> None:
    oldest, broken, gone, newest = (_made(spec, f"{digit}000000") for digit in "1234")
    for directory in (oldest, broken, gone, newest):
        _install(spec, directory)
    (broken / layout.BINARY).write_text("#!/bin/sh\nexit 127\n")
    layout.remove_build(gone)
    async with bench(spec) as b:
        assert (await b.manager.rollback("default")).directory == str(oldest)
        (oldest / "bin").rename(oldest / "moved")
        with pytest.raises(UnknownBuildError):
            await b.manager.rollback("default")


async def test_nothing_to_go_back_to_says_what_was_tried(spec: BuildSpec) -> None:
    first, second = _made(spec, "1000000"), _made(spec, "2000000")
    _install(spec, first)
    _install(spec, second)
    layout.remove_build(first)
    async with bench(spec) as b:
        with pytest.raises(UnknownBuildError, match=f"{first}/bin/llama-server: it is gone"):
            await b.manager.rollback("default")
    assert live(spec) == second
    assert state.load(spec).held == {}


async def test_a_link_of_the_operators_is_gone_back_to(spec: BuildSpec, tmp_path: Path) -> None:
    theirs = tmp_path / "opt" / "llama-server"
    theirs.parent.mkdir()
    theirs.write_text("#!/bin/sh\n")
    theirs.chmod(0o755)
    spec.binary_path.parent.mkdir(parents=True)
    spec.binary_path.symlink_to(theirs)
    _install(spec, _made(spec, "1000000"))
    async with bench(spec) as b:
        version = await b.manager.rollback("default")
    assert (version.binary, version.commit) == (str(theirs), "")
    assert spec.binary_path.readlink() == theirs


async def test_killed_between_the_swap_and_its_record(spec: BuildSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way back is known before the swap; and what was put in force is, by the link itself."""
    first, second, third = (_made(spec, f"{digit}000000") for digit in "123")
    layout.swap(spec, first / layout.BINARY)  # by hand, or by llamesh
    swap = layout.swap

    def killed(spec: BuildSpec, target: Path) -> None:
        swap(spec, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(layout, "swap", killed)
    with pytest.raises(KeyboardInterrupt):
        _install(spec, second)
    assert live(spec) == second
    monkeypatch.setattr(layout, "swap", swap)
    async with bench(spec) as b:
        assert (await b.manager.rollback(None)).directory == str(first)
        _install(spec, second)
        _install(spec, third)
        assert (await b.manager.rollback(None)).directory == str(second)


async def test_a_swap_that_fails_on_the_way_back_holds_nothing(
    spec: BuildSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs goes on, so nothing is to be said against it."""
    first, second = _made(spec, "1000000"), _made(spec, "2000000")
    _install(spec, first)
    _install(spec, second)

    def fails(spec: BuildSpec, target: Path) -> None:
        raise BuildError("cannot put it in place")

    before = state.load(spec)
    monkeypatch.setattr(layout, "swap", fails)
    async with bench(spec) as b:
        with pytest.raises(BuildError, match="cannot put it in place"):
            await b.manager.rollback(None)
    assert live(spec) == second
    assert state.load(spec) == before == State(before.history, {})


async def test_why_somebody_went_back_is_what_holds(spec: BuildSpec) -> None:
    first, second = _made(spec, "1000000"), _made(spec, "2000000")
    _install(spec, first)
    _install(spec, second)
    async with bench(spec) as b:
        await b.manager.rollback(why="models do not start with it")
        assert b.manager.statuses()[0].held == {"2000000".ljust(40, "0"): "models do not start with it"}


async def test_whether_there_is_anything_to_go_back_to(spec: BuildSpec, tmp_path: Path) -> None:
    """Of what a node put in force, and only of that."""

    async def can() -> bool:
        async with bench(spec) as b:
            await b.manager._refresh_all()
            return b.manager.can_roll_back()

    first, second, third = (_made(spec, f"{digit}000000") for digit in "123")
    assert not await can(), "nothing is live"
    _install(spec, first)
    assert not await can(), "it is the first"
    _install(spec, second)
    assert await can()
    layout.swap(spec, third / layout.BINARY)
    assert not await can(), "a hand put it there"
    _install(spec, third)
    assert await can()
    layout.remove_build(first)
    layout.remove_build(second)
    assert not await can(), "they are gone"


async def test_whether_it_can_be_known_as_soon_as_an_attempt_has_ended(spec: BuildSpec, project: Project) -> None:
    project.commit()
    async with bench(spec) as b:
        await b.install()
        assert not b.manager.can_roll_back("default")
        project.commit()
        await b.install()
        assert b.manager.can_roll_back("default")
        await b.manager.rollback()
        assert not b.manager.can_roll_back("default")
        with pytest.raises(UnknownBuildError):
            b.manager.can_roll_back("cdua")


async def test_closing_does_not_wait_for_an_old_one_that_hangs(spec: BuildSpec, tmp_path: Path) -> None:
    first, second = _made(spec, "1000000"), _made(spec, "2000000")
    _install(spec, first)
    _install(spec, second)
    os.mkfifo(fifo := tmp_path / "fifo")
    (first / layout.BINARY).write_text(f"#!/bin/sh\necho $$ > {fifo}\nexec sleep 1000\n")
    async with bench(spec) as b:
        going_back = spawn(b.manager.rollback(None), "roll back")
        pid = await pid_from(fifo)
        async with asyncio.timeout(20):  # of the 30 s that the old one may take
            await b.manager.close()
        wait_for_death(pid)
        with pytest.raises(DrainingError, match="nothing was rolled back"):
            await going_back
    assert live(spec) == second
    assert state.load(spec).held == {}


async def test_closing_waits_for_one_that_is_decided(spec: BuildSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = _made(spec, "1000000"), _made(spec, "2000000")
    _install(spec, first)
    _install(spec, second)
    swap, closing = layout.swap, threading.Event()
    reached = asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(spec: BuildSpec, target: Path) -> None:
        loop.call_soon_threadsafe(reached.set)
        assert closing.wait(20)
        swap(spec, target)

    monkeypatch.setattr(layout, "swap", slow)
    async with bench(spec) as b:
        going_back = spawn(b.manager.rollback(None), "roll back")
        await reached.wait()
        close = spawn(b.manager.close(), "close")
        await asyncio.sleep(0)
        closing.set()
        await close
        assert (await going_back).directory == str(first)
        assert b.installed == ["default"]
    assert live(spec) == first


async def test_no_rollback_during_a_build(spec: BuildSpec, project: Project, tmp_path: Path) -> None:
    project.commit(hanging_at(tmp_path / "fifo"))
    async with bench(spec) as b:
        b.manager.rebuild(None)
        await pid_from(tmp_path / "fifo")
        with pytest.raises(BuildBusyError, match="rebuild --cancel"):
            await b.manager.rollback("default")


def test_prune_keeps_what_is_live_in_use_foreign_or_gone_back_to(spec: BuildSpec, tmp_path: Path) -> None:
    """Trap 88, with keep_builds: 0 and 1."""
    used, old, previous, current = (_made(spec, f"{d}000000", made_at=float(d)) for d in "1234")
    _install(spec, previous)
    _install(spec, current)
    half = spec.build_path.with_name("build-5000000")
    layout.begin(half, Manifest("default", "5"))
    (llameshs := spec.build_path.with_name("build-5000001")).mkdir()
    (llameshs / "CMakeCache.txt").touch()
    foreign = [
        _made(spec, "6000000", name="x.2", base="build.2"),
        _made(spec, "7000000", name="cuda", base="build-cuda"),
        *(spec.build_path.with_name(name) for name in ("build", "build-debug", "build-0", "building-1234567", "src")),
    ]
    for directory in foreign[2:]:
        directory.mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    spec.build_path.with_name("build-8000000").symlink_to(elsewhere)
    spec.build_path.with_name("build-9000000").write_text("a file")
    assert install.prune(replace(spec, keep_builds=1), [used / layout.BINARY, Path("/usr/bin/env")]) == ()
    assert {d.exists() for d in (used, previous, current, elsewhere, *foreign)} == {True}
    assert not old.exists()
    assert not half.exists()
    assert not llameshs.exists()
    assert install.prune(replace(spec, keep_builds=0), []) == ()
    assert current.exists()
    assert not previous.exists()
    assert not used.exists()
    assert {d.exists() for d in foreign} == {True}
    assert spec.build_path.with_name("build-8000000").is_symlink()


def test_prune_leaves_what_only_has_our_name(spec: BuildSpec) -> None:
    _install(spec, _made(spec, "1000000"))
    theirs = [spec.build_path.with_name(name) for name in ("build-20240607", "build-20240608.src")]
    for directory in theirs:
        directory.mkdir()
        (directory / "precious").touch()
    assert install.prune(replace(spec, keep_builds=0), []) == ()
    assert [(directory / "precious").exists() for directory in theirs] == [True, True]


def test_rejected_ones_go_before_good_ones_and_even_if_nothing_is_live(spec: BuildSpec) -> None:
    good, rejected, newer = (_made(spec, f"{d}000000", made_at=float(d)) for d in "123")
    for directory in (rejected, newer):
        install.hold(spec, directory.name[-7:].ljust(40, "0"), Hold("too slow", ()))
    assert install.prune(replace(spec, keep_builds=1), []) == ("old builds stay: binary_path leads to none of them",)
    assert [directory.exists() for directory in (good, rejected, newer)] == [True, False, True]
    _install(spec, _made(spec, "4000000", made_at=0.0))
    assert install.prune(replace(spec, keep_builds=1), []) == ()
    assert [directory.exists() for directory in (good, newer)] == [True, False]


def test_rejected_is_what_was_rejected_with_whatever_command_args(spec: BuildSpec) -> None:
    """They do not go to another directory, so it may have been compiled with others than it was tested under."""
    good, rejected = (_made(spec, f"{d}000000", made_at=float(d)) for d in "12")
    install.hold(spec, rejected.name[-7:].ljust(40, "0"), Hold("too slow", (), ("-j", "2")))
    _install(spec, _made(spec, "3000000", made_at=0.0))
    assert install.prune(replace(spec, keep_builds=1), []) == ()
    assert [directory.exists() for directory in (good, rejected)] == [True, False]


def test_prune_does_nothing_if_it_cannot_tell_what_is_live(spec: BuildSpec) -> None:
    directory = _made(spec, "1000000")
    assert install.prune(replace(spec, keep_builds=0), []) != ()
    assert directory.exists()


async def test_after_an_installation_old_builds_and_sources_go(spec: BuildSpec, project: Project) -> None:
    _made(spec, "1000000", made_at=1.0)
    kept = _made(spec, "2000000", made_at=2.0)
    source = spec.build_path.with_name("build-3000000.src")
    source.mkdir()
    project.commit()
    async with bench(replace(spec, keep_builds=1)) as b:
        installed = await b.install()
    assert directories(spec) == {kept.name, installed.name}


def test_removal_begins_with_the_manifest(spec: BuildSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle of it, what is left must not pass for a finished build."""
    directory = _made(spec, "1000000")
    (directory / "lib").mkdir()
    seen: list[bool] = []

    def killed(path: Path) -> None:
        seen.append(layout.look(spec).usable("1000000".ljust(40, "0"), ()) is not None)
        raise KeyboardInterrupt

    monkeypatch.setattr(layout, "remove_tree", killed)
    with pytest.raises(KeyboardInterrupt):
        layout.remove_build(directory)
    assert seen == [False]
    assert (directory / layout.BINARY).exists()
    assert not layout.look(spec).found[0].finished


def test_a_hold_survives_a_restart_and_a_damaged_file_is_an_empty_one(spec: BuildSpec) -> None:
    spec.build_path.parent.mkdir(parents=True)
    install.hold(spec, "abc", Hold("too slow", ("-DX=1",)))
    assert state.load(spec).held == {"abc": Hold("too slow", ("-DX=1",))}
    state.state_path(spec).write_text('{"held": 3')
    assert state.load(spec) == State()
