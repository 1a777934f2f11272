"""What somebody asks for by hand: what it may be, and that nothing undoes it by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesh.build import install
from mesh.build.manager import BuildManager
from mesh.build.spec import BuildSpec
from mesh.build.status import Attempt, Outcome
from mesh.core.build_policy import Hold
from mesh.errors import BuildError
from tests.build.project import Project, bench, live, spec_in, until


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project(tmp_path / "upstream")
    project.commit()
    project.git("branch", "stable")
    project.commit()
    return project


@pytest.fixture
def spec(tmp_path: Path, project: Project) -> BuildSpec:
    return spec_in(tmp_path, project)


async def _at_boot(manager: BuildManager) -> Attempt:
    """Let the attempt at boot happen, and return it."""
    events = manager.subscribe()
    manager.start()
    started = await until(events, "started")
    return await manager.wait(int(str(started.data["attempt"])))


async def test_the_next_start_does_not_undo_it(spec: BuildSpec, project: Project) -> None:
    master = project.git("rev-parse", "master")
    async with bench(spec) as b:
        await b.install()
        chosen = await b.rebuild(ref="stable")
        assert chosen.outcome is Outcome.INSTALLED
        assert "chosen by hand instead of master; it stays until master moves on, or 'llama-mesh rebuild'" in str(
            chosen.notes
        )
        directory = live(spec)
        assert b.manager.statuses()[0].held == {master: "replaced by hand"}
    async with bench(spec) as b:
        assert (await _at_boot(b.manager)).outcome is Outcome.SKIPPED
        assert live(spec) == directory
    project.commit()
    async with bench(spec) as b:
        moved_on = await _at_boot(b.manager)
        assert (moved_on.outcome, moved_on.notes) == (Outcome.INSTALLED, ("a note",))


async def test_also_if_the_branch_had_moved_on_before(spec: BuildSpec, project: Project) -> None:
    async with bench(spec) as b:
        await b.install()
        project.commit()
        await b.install(ref="stable")
    async with bench(spec) as b:
        assert (await _at_boot(b.manager)).outcome is Outcome.SKIPPED


async def test_also_if_it_is_what_runs_already(spec: BuildSpec, project: Project) -> None:
    """Whoever asks for the version that runs wants to keep it."""
    project.git("tag", "b1", "master")
    async with bench(spec) as b:
        directory = await b.install()
        moved_on = project.commit()
        chosen = await b.rebuild(ref="b1")
        assert chosen.outcome is Outcome.UNCHANGED
        assert "chosen by hand instead of master; it stays until master moves on" in str(chosen.notes)
        assert b.manager.statuses()[0].held == {moved_on: "replaced by hand"}
        assert (await b.rebuild(ref="b1")).outcome is Outcome.UNCHANGED
    async with bench(spec) as b:
        assert (await _at_boot(b.manager)).outcome is Outcome.SKIPPED
        assert live(spec) == directory
    project.commit()
    async with bench(spec) as b:
        assert (await _at_boot(b.manager)).outcome is Outcome.INSTALLED


async def test_what_runs_and_is_asked_for_is_held_no_more(spec: BuildSpec, project: Project) -> None:
    """As after a rollback that somebody undid by moving the link."""
    master = project.git("rev-parse", "master")
    async with bench(spec) as b:
        await b.install()
        install.hold(spec, master, Hold("rolled back"))
        install.hold(spec, "f" * 40, Hold("too slow"))
        ended = await b.rebuild()
        assert (ended.outcome, ended.notes) == (Outcome.UNCHANGED, ())
        assert b.manager.statuses()[0].held == {"f" * 40: "too slow"}
        install.hold(spec, master, Hold("rolled back"))
    async with bench(spec) as b:
        assert (await _at_boot(b.manager)).outcome is Outcome.UNCHANGED
        assert master in b.manager.statuses()[0].held, "nobody asked for it"


async def test_what_runs_is_asked_for_while_the_branch_is_not_known(
    spec: BuildSpec, project: Project, tmp_path: Path
) -> None:
    master = project.git("rev-parse", "master")
    async with bench(spec) as b:
        await b.install()
        project.path.rename(tmp_path / "gone")
        ended = await b.rebuild(ref=master)
        assert (ended.outcome, b.manager.statuses()[0].held) == (Outcome.UNCHANGED, {})
        assert ended.notes == ("what master means now is not known; the next update may replace what runs",)


async def test_the_first_one_of_all_is_kept_too(spec: BuildSpec) -> None:
    async with bench(spec) as b:
        await b.install(ref="stable")
    async with bench(spec) as b:
        assert (await _at_boot(b.manager)).outcome is Outcome.SKIPPED


async def test_asked_for_again_or_gone_back_to_it_is_held_no_more(spec: BuildSpec, project: Project) -> None:
    stable = project.git("rev-parse", "stable")
    async with bench(spec) as b:
        first = await b.install()
        await b.install(ref="stable")
        assert await b.install() == first
        assert b.manager.statuses()[0].held == {}, "what is configured undoes itself"
        await b.install(ref="stable")
        await b.manager.rollback("default")
        assert b.manager.statuses()[0].held == {stable: "rolled back"}


async def test_another_name_of_the_same_holds_nothing(spec: BuildSpec, project: Project) -> None:
    async with bench(spec) as b:
        await b.install()
        project.commit()
        project.git("branch", "also-master")
        ended = await b.rebuild(ref="also-master")
        assert (ended.outcome, ended.notes) == (Outcome.INSTALLED, ("a note",))
        assert b.manager.statuses()[0].held == {}


async def test_if_the_branch_is_not_known_what_ran_is_held(spec: BuildSpec, project: Project, tmp_path: Path) -> None:
    """The network may break just then; what was asked for is installed all the same."""
    stable, master = (project.git("rev-parse", ref) for ref in ("stable", "master"))
    async with bench(spec) as b:
        await b.install()

        def breaks() -> None:
            project.path.rename(tmp_path / "gone")

        b.tester.during = breaks
        ended = await b.rebuild(ref=stable)
        assert (ended.outcome, ended.commit) == (Outcome.INSTALLED, stable)
        assert b.manager.statuses()[0].held == {master: "replaced by hand"}


async def test_a_swap_that_fails_holds_nothing(
    spec: BuildSpec, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(spec) as b:
        before = await b.install()

        def fails(spec: BuildSpec, target: Path) -> None:
            raise BuildError("cannot put it in place")

        monkeypatch.setattr("mesh.build.layout.swap", fails)
        assert (await b.rebuild(ref="stable")).outcome is Outcome.FAILED
        assert live(spec) == before
        assert b.manager.statuses()[0].held == {}


async def test_a_strangers_commit_is_not_built(spec: BuildSpec, project: Project) -> None:
    """Whoever may ask is an admin, or any local process; on GitHub anybody opens a pull request."""
    project.git("config", "uploadpack.allowAnySHA1InWant", "true")
    async with bench(spec) as b:
        before = await b.install()
        theirs = project.commit()
        project.git("update-ref", "refs/pull/1/head", theirs)
        project.git("reset", "--quiet", "--hard", "HEAD~1")
        for ref in ("refs/pull/1/head", theirs):
            ended = await b.rebuild(ref=ref)
            assert (ended.outcome, ended.commit) == (Outcome.FAILED, None)
        assert live(spec) == before
