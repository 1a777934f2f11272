"""Builds by themselves and on request: who may, when it is tried again, and what is shown of it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mesh.build import manager, running
from mesh.build.compile import CompileError
from mesh.build.lane import Lane
from mesh.build.lock import BuildLock
from mesh.build.pipeline import Report, Request, Result, Tools
from mesh.build.rejected import RejectedError
from mesh.build.spec import BuildSpec
from mesh.build.state import lock_path
from mesh.build.status import Outcome, Stage, Trigger
from mesh.errors import BuildBusyError, BuildError, DrainingError, UnknownBuildError
from tests.build.project import BROKEN, Bench, Project, bench, hanging_at, pid_from, spec_in, until

OFFLINE = BuildError("cannot resolve github.com")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "upstream")


class Scripted:
    """In the place of the pipeline: each attempt is the next of *script*, what it begins at is remembered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *script: BuildError | OSError | Outcome) -> None:
        self.script = list(script)
        self.began_at: list[float] = []
        self.requests: list[Request] = []
        self.gates: dict[str, asyncio.Event] = {}
        self.inside: list[str] = []

        async def refresh(lane: Lane) -> None:
            """Look at nothing: threads and a clock that jumps do not go together."""

        async def taken(path: Path) -> BuildLock | None:
            return BuildLock.take(path)

        monkeypatch.setattr(BuildLock, "taken", taken)
        monkeypatch.setattr(running, "Pipeline", self.pipeline)
        monkeypatch.setattr(Lane, "refresh", refresh)

    def pipeline(self, spec: BuildSpec, request: Request, tools: Tools, report: Report) -> Scripted._One:
        self.requests.append(request)
        return self._One(self, spec, report)

    class _One:
        def __init__(self, scripted: Scripted, spec: BuildSpec, report: Report) -> None:
            self.scripted, self.spec, self.report = scripted, spec, report

        async def run(self) -> Result:
            scripted = self.scripted
            scripted.began_at.append(asyncio.get_running_loop().time())
            scripted.inside.append(self.spec.name)
            self.report.stage(Stage.FETCHING, None, None)
            if (gate := scripted.gates.get(self.spec.name)) is not None:
                await gate.wait()
            result = scripted.script.pop(0) if scripted.script else Outcome.UNCHANGED
            if isinstance(result, (BuildError, OSError)):
                raise result
            return Result(result)


def _free(spec: BuildSpec) -> bool:
    lock = BuildLock.take(lock_path(spec))
    if lock is not None:
        lock.release()
    return lock is not None


Begins = Callable[[Bench], list[float]]


@pytest.mark.looptime
async def test_at_boot_it_is_tried_seven_times_and_the_lock_is_free_in_between(
    tmp_path: Path, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """trap 91."""
    scripted = Scripted(monkeypatch, *[OFFLINE] * 9)
    spec = spec_in(tmp_path, project)
    async with bench(spec) as b:
        b.manager.start()
        for moment in (5.0, 35.0, 90.0, 200.0, 400.0, 1000.0):
            await asyncio.sleep(moment - asyncio.get_running_loop().time())
            assert _free(spec)
            assert not b.manager.summary().is_building
            assert b.manager.summary().last_build_error == OFFLINE.message
        await asyncio.sleep(10_000.0)
    assert scripted.began_at == pytest.approx([0, 10, 40, 100, 220, 520, 1120])
    assert all(not request.by_hand for request in scripted.requests)


@pytest.mark.looptime
async def test_a_schedule_begins_after_the_boot_and_tries_four_times(
    tmp_path: Path, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted = Scripted(monkeypatch, Outcome.UNCHANGED, *[OFFLINE] * 4, Outcome.UNCHANGED)
    async with bench(spec_in(tmp_path, project, auto_update_interval_s=3600.0)) as b:
        b.manager.start()
        await asyncio.sleep(8000.0)
        assert b.manager.summary().last_build_error is None
    assert scripted.began_at == pytest.approx([0, 3600, 3630, 3750, 4050, 7650])


@pytest.mark.looptime
@pytest.mark.parametrize("verdict", [RejectedError("slow"), CompileError("no"), Outcome.SKIPPED, Outcome.INSTALLED])
async def test_what_will_not_get_better_is_not_tried_again(
    tmp_path: Path, project: Project, monkeypatch: pytest.MonkeyPatch, verdict: BuildError | Outcome
) -> None:
    scripted = Scripted(monkeypatch, verdict)
    async with bench(spec_in(tmp_path, project)) as b:
        b.manager.start()
        await asyncio.sleep(10_000.0)
    assert len(scripted.began_at) == 1


@pytest.mark.looptime
async def test_an_attempt_by_hand_that_installs_ends_the_attempts_at_boot(
    tmp_path: Path, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted = Scripted(monkeypatch, OFFLINE, OFFLINE, Outcome.INSTALLED)
    async with bench(spec_in(tmp_path, project)) as b:
        b.manager.start()
        await asyncio.sleep(15.0)
        by_hand = await b.rebuild()
        assert (by_hand.trigger, by_hand.outcome) == (Trigger.MANUAL, Outcome.INSTALLED)
        await asyncio.sleep(10_000.0)
    assert len(scripted.began_at) == 3
    assert scripted.requests[-1] == Request("master", by_hand=True)


@pytest.mark.looptime
async def test_cancelled_at_boot_means_no_more(
    tmp_path: Path, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted = Scripted(monkeypatch)
    scripted.gates["default"] = asyncio.Event()
    async with bench(spec_in(tmp_path, project)) as b:
        b.manager.start()
        await asyncio.sleep(1.0)
        assert b.manager.cancel("default")
        await asyncio.sleep(10_000.0)
        assert b.manager.summary().last_build_error is not None
    assert len(scripted.began_at) == 1


@pytest.mark.looptime
async def test_two_builds_compile_one_after_the_other(
    tmp_path: Path, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted = Scripted(monkeypatch)
    one = spec_in(tmp_path, project)
    two = replace(one, name="cuda", build_path=tmp_path / "cuda", binary_path=tmp_path / "cuda-server")
    scripted.gates = {"default": asyncio.Event(), "cuda": asyncio.Event()}
    async with bench(one, two) as b:
        first, second = b.manager.rebuild("default"), b.manager.rebuild("cuda")
        await asyncio.sleep(1.0)
        assert scripted.inside == ["default"]
        stages = {status.name: status.current.stage for status in b.manager.statuses() if status.current}
        assert stages == {"default": Stage.FETCHING, "cuda": Stage.WAITING}
        with pytest.raises(BuildBusyError, match="rebuild cuda --cancel"):
            b.manager.rebuild("cuda")
        scripted.gates["default"].set()
        await b.manager.wait(first.id)
        scripted.gates["cuda"].set()
        assert (await b.manager.wait(second.id)).outcome is Outcome.UNCHANGED


@pytest.mark.looptime
async def test_at_boot_another_process_is_waited_for(
    tmp_path: Path, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is kept from building something else meanwhile."""
    scripted = Scripted(monkeypatch)
    one = spec_in(tmp_path, project)
    two = replace(one, name="cuda", build_path=tmp_path / "cuda", binary_path=tmp_path / "cuda-server")
    theirs = BuildLock.take(lock_path(one))
    assert theirs is not None
    async with bench(one, two) as b:
        b.manager.start()
        await asyncio.sleep(100.0)
        assert scripted.inside == ["cuda"]
        theirs.release()
        await asyncio.sleep(10.0)
        assert scripted.inside == ["cuda", "default"]


async def test_names_and_what_is_not_built(tmp_path: Path, project: Project) -> None:
    off = spec_in(tmp_path, project, enabled=False)
    none = replace(off, name="none", repo_url=None)
    async with bench(off, none) as b:
        b.manager.start()
        with pytest.raises(UnknownBuildError, match=r"no build 'cdua'; there are: default, none"):
            b.manager.rebuild("cdua")
        attempt = b.manager.rebuild(None)
        assert (attempt.outcome, attempt.error) == (Outcome.DISABLED, None)
        assert "enabled is false" in attempt.notes[0]
        assert b.manager.summary().last_build_at_wall == attempt.ended_at_wall is not None
        assert b.manager.summary().last_build_error is None
        assert "repo_url is not set" in b.manager.rebuild("none").notes[0]
        assert [status.enabled for status in b.manager.statuses()] == [False, False]
    with pytest.raises(DrainingError):
        await b.manager.rollback("default")


@pytest.mark.looptime
async def test_what_goes_on_is_never_forgotten(
    tmp_path: Path, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of compiling, while somebody asks for another build over and over."""
    scripted = Scripted(monkeypatch)
    scripted.gates["default"] = asyncio.Event()
    monkeypatch.setattr(manager, "_MAX_REMEMBERED", 3)
    one = spec_in(tmp_path, project)
    two = replace(one, name="cuda", build_path=tmp_path / "cuda", binary_path=tmp_path / "cuda-server")
    async with bench(one, two) as b:
        first = b.manager.rebuild(None)
        for _ in range(6):
            last = b.manager.rebuild("cuda")
            b.manager.cancel("cuda")
            await b.manager.wait(last.id)
            await asyncio.sleep(0)
        with pytest.raises(UnknownBuildError):
            await b.manager.wait(first.id + 1)
        assert (await b.manager.wait(last.id)).outcome is Outcome.CANCELLED
        assert b.manager.cancel(None)
        assert (await b.manager.wait(first.id)).outcome is Outcome.CANCELLED


@pytest.mark.looptime
async def test_an_error_of_the_system_is_tried_again(
    tmp_path: Path, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted = Scripted(monkeypatch, OSError(errno.EMFILE, "Too many open files"), Outcome.UNCHANGED)
    async with bench(spec_in(tmp_path, project)) as b:
        b.manager.start()
        await asyncio.sleep(5.0)
        assert "(Too many open files); what ran before runs on" in str(b.manager.summary().last_build_error)
        await asyncio.sleep(10_000.0)
    assert scripted.began_at == pytest.approx([0, 10])


async def test_an_unforeseen_error_ends_the_attempt_and_frees_the_lock(tmp_path: Path, project: Project) -> None:
    project.commit()
    spec = spec_in(tmp_path, project)
    async with bench(spec) as b:
        b.tester.during = lambda: 1 / 0  # type: ignore[assignment]
        ended = await b.rebuild()
        assert ended.outcome is Outcome.FAILED
        assert "internal error: ZeroDivisionError" in str(ended.error)
        assert _free(spec)


async def test_what_follows_an_installation_cannot_undo_it(tmp_path: Path, project: Project) -> None:
    project.commit()
    async with bench(spec_in(tmp_path, project)) as b:
        b.tester.during = lambda: b.in_use.append(None)  # type: ignore[arg-type]
        ended = await b.rebuild()
        assert ended.outcome is Outcome.INSTALLED
        assert "what follows an installation failed" in ended.notes[-1]
        assert b.installed == ["default"]


async def test_events_tell_the_whole_story(tmp_path: Path, project: Project) -> None:
    project.commit()
    url = f"file://{project.path}"  # only then git counts
    async with bench(spec_in(tmp_path, project, repo_url=url)) as b:
        events = b.manager.subscribe()
        await b.rebuild()
        events.close()
        seen = [event async for event in events]
    assert [event.id for event in seen] == list(range(1, len(seen) + 1))
    stages = [event.data["attempt_state"]["stage"] for event in seen if event.kind == "stage"]  # type: ignore[index]
    order = list(Stage)
    assert stages == [str(stage) for stage in order if stage is not Stage.WAITING]
    assert (seen[0].kind, seen[-1].kind) == ("started", "ended")
    assert seen[-1].data["attempt_state"]["outcome"] == "installed"  # type: ignore[index]
    assert seen[-1].data["attempt_state"]["ended_at_wall"] > 0  # type: ignore[index]
    compiled = [event.data for event in seen if event.kind == "progress" and event.data["stage"] == "compiling"]
    assert compiled == [{"build": "default", "attempt": 1, "stage": "compiling", "done": 1, "total": 1}]
    fetched = [event.data for event in seen if event.kind == "progress" and event.data["stage"] == "fetching"]
    assert any(data["done"] == data["total"] for data in fetched), "git's own count"
    lines = [event.data["line"] for event in seen if event.kind == "log"]
    assert not any("objects:" in str(line) for line in lines)
    assert any(str(line).startswith("[1/1] ") for line in lines)
    assert "testing llama-server" in lines


async def test_a_failure_is_told_with_everything(tmp_path: Path, project: Project) -> None:
    project.commit(BROKEN)
    async with bench(spec_in(tmp_path, project)) as b:
        events = b.manager.subscribe()
        attempt = b.manager.rebuild(None)
        state = (await until(events, "ended")).data["attempt_state"]
        assert isinstance(state, dict)
        assert (state["outcome"], len(state["log_tail"])) == ("failed", 40)
        assert state["exit_status"] in (1, 3), "newer ninjas pass the status of the step on"
        status = b.manager.statuses()[0]
        assert status.current is None
        assert status.last == await b.manager.wait(attempt.id)
        assert status.last_error == status.last.error == b.manager.summary().last_build_error
        with pytest.raises(UnknownBuildError):
            await b.manager.wait(99)


async def test_what_is_installing_cannot_be_cancelled(tmp_path: Path, project: Project) -> None:
    project.commit()
    async with bench(spec_in(tmp_path, project)) as b:
        events = b.manager.subscribe()
        attempt = b.manager.rebuild(None)
        await until(events, "stage", stage="installing")
        assert not b.manager.cancel("default")
        await b.manager.close()
        assert (await b.manager.wait(attempt.id)).outcome is Outcome.INSTALLED


async def test_the_log_can_be_seen_by_who_comes_later(tmp_path: Path, project: Project) -> None:
    project.commit(hanging_at(tmp_path / "fifo"))
    async with bench(spec_in(tmp_path, project)) as b:
        b.manager.rebuild(None)
        await pid_from(tmp_path / "fifo")
        current = b.manager.statuses()[0].current
        assert current is not None
        assert any(line.startswith("-- Generating done") for line in current.log_tail)
        assert b.manager.summary().is_building


async def test_a_disk_that_does_not_answer_holds_up_no_shutdown(
    tmp_path: Path, project: Project, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An attempt that a cancellation does not end, as a thread in the kernel would have it."""
    scripted, answers = Scripted(monkeypatch), asyncio.Event()
    monkeypatch.setattr(manager, "CLOSE_LIMIT_S", 0.05)

    async def stuck(self: Scripted._One) -> Result:
        scripted.inside.append("stuck")
        while not answers.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await answers.wait()
        raise OFFLINE

    monkeypatch.setattr(Scripted._One, "run", stuck)
    async with bench(spec_in(tmp_path, project)) as b:
        b.manager.rebuild(None)
        while not scripted.inside:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await b.manager.close()
        assert "builds do not end" in caplog.text
        answers.set()
