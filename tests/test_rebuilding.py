"""What ties a node's builds to its instances."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from mesh.build.status import Attempt, BuildStatus, BuiltVersion, Stage, Trigger
from mesh.config.profile import Engine, Profile
from mesh.engine.locate import file_identity
from mesh.errors import BuildBusyError, MeshError, UnknownModelError
from mesh.rebuilding import Trials, WayBack
from tests.engine.supervised import World, profile
from tests.fakes_builds import OLD, attempt, status, version

USUAL = profile("a")
OTHER = replace(profile("b"), engine_build="vulkan")


@pytest.mark.parametrize(
    ("name", "build", "answer"),
    [
        ("a:default", "default", True),
        ("a:default", "vulkan", False),
        ("b:default", "vulkan", True),
        ("b:default", "default", False),
        ("none", "vulkan", True),  # the trial tells
    ],
)
async def test_which_build_a_profile_runs_with(name: str, build: str, answer: bool) -> None:
    assert Trials(World(USUAL, OTHER).sup).runs_by_default(name, build) is answer


async def test_what_another_engine_runs_is_no_canary() -> None:
    """Else whisper-server would be asked for a completion, and its 404 taken for a failure of the new build."""
    trials = Trials(World(replace(USUAL, engine=Engine.WHISPER)).sup)
    for binary in (None, Path("/new/llama-server")):
        with pytest.raises(UnknownModelError, match="a is run by whisper-server: no canary"):
            async with trials.trial("a:default", binary):
                pass


class Builds:
    """One build whose ``binary_path`` leads to files named after versions, and a way back to "one"."""

    def __init__(self, directory: Path, told: list[str]) -> None:
        self.link, self.told = directory / "llama-server", told
        self.current: Attempt | None = None
        self.attempt_ends = asyncio.Event()
        self.possible = True
        self.refusal: MeshError | None = None
        self.rollbacks: list[tuple[str, str]] = []
        self.cancelled: list[str] = []
        self.looks: list[str] = []
        self.way_back = WayBack(self, told.append, self.looks.append)
        for name in ("one", "two", "three", "four"):
            (directory / name).write_text(name)

    def statuses(self) -> tuple[BuildStatus, ...]:
        return (status(binary_path=str(self.link), current=self.current),)

    def can_roll_back(self, name: str) -> bool:
        return self.possible

    def cancel(self, name: str) -> bool:
        self.cancelled.append(name)
        self.attempt_ends.set()
        return True

    def ask(self, profile: Profile, reason: str, *, engine: str | None = None, in_force: bool = True) -> bool:
        """Ask as the supervisor does; *engine* is what ``binary_path`` leads to, if no other is named."""
        failed = file_identity(self.link.resolve() if engine is None else self.link.with_name(engine))
        return self.way_back.ask(profile, failed, reason, in_force=in_force)

    async def wait(self, attempt_id: int) -> Attempt:
        await self.attempt_ends.wait()
        ended, self.current = self.current, None
        assert ended is not None
        assert ended.id == attempt_id
        return ended

    async def rollback(self, name: str, *, why: str) -> BuiltVersion:
        self.rollbacks.append((name, why))
        if self.refusal is not None:
            raise self.refusal
        self.lead_to("one")
        self.way_back.changed(name)
        return version(OLD, live=True)

    def lead_to(self, what: str) -> None:
        self.link.unlink(missing_ok=True)
        self.link.symlink_to(self.link.with_name(what))

    def install(self, what: str = "two", stage: Stage = Stage.INSTALLING) -> None:
        """As an attempt does it, which then goes on."""
        self.current = attempt(stage=stage)
        self.lead_to(what)
        self.way_back.changed("default")

    def installed(self, what: str = "two") -> None:
        """As ``install``; the attempt is over."""
        self.install(what)
        self.current = None


@pytest.fixture
async def builds(tmp_path: Path) -> Builds:
    return Builds(tmp_path, [])


async def settle(builds: Builds, times: int = 1) -> None:
    """Wait until so many profiles were told how it ended."""
    async with asyncio.timeout(5):
        while len(builds.told) < times:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_the_version_before_is_put_in_force_again(builds: Builds, caplog: pytest.LogCaptureFixture) -> None:
    builds.installed()
    assert builds.ask(USUAL, "GGML_ASSERT failed\nmore of it")
    assert not builds.ask(USUAL, "another one, meanwhile")
    await settle(builds)
    assert builds.rollbacks == [("default", "a did not start with it: GGML_ASSERT failed")]
    assert builds.told == ["a:default"]
    (said,) = (r for r in caplog.records if r.levelno == logging.ERROR)
    assert "the version before is in force again" in said.getMessage()
    assert OLD in str(said.__dict__)


async def test_it_happens_once_for_each_installation(builds: Builds) -> None:
    assert not builds.ask(USUAL, "no")  # installed before this process began
    builds.installed()
    assert builds.ask(USUAL, "no")
    await settle(builds)
    assert not builds.ask(USUAL, "the one before neither")
    builds.installed("three")
    assert builds.ask(USUAL, "no")
    await settle(builds, 2)
    assert len(builds.rollbacks) == 2


async def test_who_is_not_concerned(builds: Builds) -> None:
    builds.installed()
    assert not builds.ask(OTHER, "it runs another build")
    assert not builds.ask(replace(USUAL, engine=Engine.WHISPER), "it is not built here")
    builds.possible = False
    assert not builds.ask(USUAL, "there is nothing before")
    await asyncio.sleep(0)
    assert builds.rollbacks == []


async def test_a_rollback_by_hand_is_no_installation(builds: Builds) -> None:
    """Not even while an attempt waits for the lock that the rollback has."""
    builds.installed()
    builds.install("one", stage=Stage.WAITING)
    assert not builds.ask(USUAL, "no")


async def test_the_attempt_that_goes_on_is_waited_for(builds: Builds) -> None:
    """It may be the very one that installed it: until it ends, nobody has looked at the disk again."""
    builds.possible = False
    builds.install()
    assert builds.ask(USUAL, "no")
    await asyncio.sleep(0.01)
    assert builds.rollbacks == []
    builds.possible = True
    builds.attempt_ends.set()
    await settle(builds)
    assert len(builds.rollbacks) == 1


@pytest.mark.parametrize("trigger", list(Trigger))
async def test_nobody_waits_for_an_hour_of_compiling(builds: Builds, trigger: Trigger) -> None:
    """An attempt that began by itself makes way; what a hand began does not, and the clients are told at once."""
    builds.installed()
    builds.current = attempt(stage=Stage.COMPILING, trigger=trigger)
    assert builds.ask(USUAL, "no") is (trigger is not Trigger.MANUAL)
    if trigger is Trigger.MANUAL:
        assert builds.cancelled == []
        return
    await settle(builds)
    assert builds.cancelled == ["default"]
    assert len(builds.rollbacks) == 1


async def test_what_is_not_in_force_any_more_is_not_undone(builds: Builds) -> None:
    """Two was loading when three was installed, or one put back: that is what is tried next, and nothing is held."""
    builds.installed("three")
    assert builds.ask(USUAL, "no", engine="two", in_force=False)
    await asyncio.sleep(0.01)
    assert (builds.looks, builds.rollbacks, builds.told) == (["default"], [], [])


async def test_what_a_hand_put_in_place_of_it_is_for_a_hand(builds: Builds) -> None:
    builds.installed()
    builds.link.resolve().write_text("recompiled")
    assert not builds.ask(USUAL, "no")


@pytest.mark.parametrize("what", ["nothing before", "by hand", "a newer one", "busy"])
async def test_when_there_is_no_way_back_that_is_told(
    builds: Builds, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    builds.install()
    assert builds.ask(USUAL, "no")
    await asyncio.sleep(0.01)
    match what:
        case "nothing before":
            builds.possible = False
        case "by hand":
            builds.lead_to("four")
        case "a newer one":
            builds.install("three")
        case _:
            builds.refusal = BuildBusyError("another process is at work")
    builds.attempt_ends.set()
    await settle(builds)
    assert [name for name, _ in builds.rollbacks] == (["default"] if what == "busy" else [])
    assert "there is no way back" in caplog.text


async def test_a_node_that_stops_leaves_it(builds: Builds) -> None:
    builds.install()
    assert builds.ask(USUAL, "no")
    builds.way_back.close()
    await settle(builds)
    assert builds.rollbacks == []
