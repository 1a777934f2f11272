"""A place in an instance for a canary: of the usual engine, or of a binary that is to be tried."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mesh.config.profile import Profile
from mesh.core.lifecycle import State
from mesh.engine.instances import ActiveLease
from mesh.engine.trial import ASK_EVERY_S, LONGEST_WAIT_S, DisplacedError, while_not
from mesh.errors import DrainingError, InstanceError, QueueTimeoutError
from tests.engine.supervised import World, catalog, engine, profile

pytestmark = pytest.mark.looptime

A, B = profile("a", 4, max_wait_s=None), profile("b", 8, max_wait_s=7.0)
NEW = Path("/new/llama-server")


@pytest.fixture(autouse=True)
def no_bugs(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The supervisor logs a bug and goes on; in a test it is a failure."""
    yield
    assert not [r for r in caplog.get_records("call") if "bug" in r.getMessage() or "failed on" in r.getMessage()]


def world(*profiles: Profile, vram: int = 10) -> World:
    w = World(*profiles, vram=vram)
    w.launcher.engines[str(NEW)] = engine("new")
    return w


class Trial:
    """A trial in a task of its own, that lasts until ``over`` is set."""

    def __init__(self, w: World, p: Profile, binary: Path | None) -> None:
        self.over = asyncio.Event()
        self.lease: ActiveLease | None = None
        self._trial = w.sup.trial(p, binary)
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with self._trial as self.lease:
            await self.over.wait()


@asynccontextmanager
async def loaded(w: World, p: Profile, binary: Path | None) -> AsyncIterator[Trial]:
    trial = Trial(w, p, binary)
    await asyncio.sleep(0.2)
    w.launcher[-1].healthy()
    await asyncio.sleep(0)
    yield trial
    trial.over.set()
    await asyncio.wait([trial.task])


def left(w: World) -> tuple[list[State], dict[str, int], list[str]]:
    return w.states, dict(w.sup.queues()), list(w.sup.failures())


NOTHING: tuple[list[State], dict[str, int], list[str]] = ([], {}, [])


async def test_the_usual_engine_is_used_like_by_any_request_and_stays() -> None:
    w = world(A)
    async with loaded(w, A, None) as trial:
        assert trial.lease is not None
        assert trial.lease.endpoint is w.launcher[0].endpoint
        assert w.ask(A).waits  # it takes a slot
    (info,) = w.sup.instances()
    assert (info.key, info.state, info.active) == (A.key, State.READY, 1)  # the next one


async def test_a_binary_is_tried_under_a_name_that_nobody_can_ask_for_and_is_gone_then() -> None:
    w = world(A)
    async with loaded(w, A, NEW) as trial:
        assert trial.lease is not None
        hidden = trial.lease.endpoint.profile
        assert (hidden.key, hidden.id, hidden.engine_path) == ("a:default#canary", "a (canary)", str(NEW))
        assert hidden not in w.sup.catalog.profiles
        (info,) = w.sup.instances()
        assert (info.engine_version, info.active, info.superseded) == ("new", 1, False)
        w.sup.apply_catalog(catalog(A, B))  # a reload changes nothing for it
        w.launcher.engines[None] = w.launcher.engines[str(NEW)] = engine("another")  # whatever is built meanwhile
        w.sup.engines_changed()
        assert [(i.state, i.superseded) for i in w.sup.instances()] == [(State.READY, False)]
    assert left(w) == NOTHING
    assert w.sup.profile("a:default#canary") is None


async def test_it_waits_for_room_like_others_and_idle_ones_go_for_it() -> None:
    w = world(A, B)
    client = w.ask(B)
    w.launcher[0].healthy()
    trial = Trial(w, A, NEW)
    await asyncio.sleep(1)
    assert len(w.launcher) == 1  # "b" is busy
    client.done()
    await asyncio.sleep(0.5)
    assert [i.key for i in w.sup.instances()] == ["a:default#canary"]
    w.launcher[1].healthy()
    trial.over.set()
    await trial.task
    assert left(w) == NOTHING


async def test_without_room_it_ends_at_its_deadline() -> None:
    w = world(A, B)
    w.ask(A)
    w.launcher[0].healthy()
    loop = asyncio.get_running_loop()
    begun = loop.time()
    with pytest.raises(QueueTimeoutError, match="b \\(canary\\)"):
        async with w.sup.trial(B, NEW):
            pass
    assert loop.time() - begun == LONGEST_WAIT_S  # a load may take longer than requests may wait
    with pytest.raises(QueueTimeoutError):
        async with w.sup.trial(B, None):
            pass
    assert loop.time() - begun == LONGEST_WAIT_S + 7.0
    assert w.sup.profile("b:default#canary") is None


async def test_a_binary_that_does_not_load_the_model_is_told_with_the_reason() -> None:
    w = world(A)
    trial = Trial(w, A, NEW)
    await asyncio.sleep(0.2)
    w.launcher[0].exit(-4, "illegal instruction")
    with pytest.raises(InstanceError, match="illegal instruction"):
        await trial.task
    assert left(w) == NOTHING
    assert w.ask(A).error is None  # the profile itself did not fail


@pytest.mark.parametrize("ready", [False, True])
async def test_when_it_is_cancelled_nothing_is_left(ready: bool) -> None:
    w = world(A)
    trial = Trial(w, A, NEW)
    await asyncio.sleep(0.2)
    if ready:
        w.launcher[0].healthy()
        await asyncio.sleep(0)
    trial.task.cancel()
    await asyncio.wait([trial.task])
    assert trial.task.cancelled()
    assert left(w) == NOTHING
    assert w.sup.profile("a:default#canary") is None


async def test_a_second_cancellation_does_not_leave_the_process_either() -> None:
    """And the next trial waits for its exit."""
    w = world(A)
    trial = Trial(w, A, NEW)
    await asyncio.sleep(0.2)
    w.launcher[0].deaf = True
    trial.task.cancel()
    await asyncio.sleep(0)
    trial.task.cancel()
    await asyncio.wait([trial.task])
    following = Trial(w, A, NEW)
    await asyncio.sleep(1)
    assert w.states == [State.STOPPING]
    await asyncio.sleep(10)  # SIGKILL
    assert (len(w.launcher), w.states) == (2, [State.SPAWNING])
    w.launcher[1].healthy()
    following.over.set()
    await following.task
    assert left(w) == NOTHING


async def test_a_crash_in_the_middle_is_the_callers_to_notice_and_leaves_nothing() -> None:
    w = world(A)
    async with loaded(w, A, NEW) as trial:
        w.launcher[0].exit(-11, "segmentation fault")
        assert trial.lease is not None
        assert not trial.lease.endpoint.alive
    assert left(w) == NOTHING


async def test_a_node_that_stops_does_not_wait_for_a_trial_that_waits() -> None:
    w = world(A, B)
    trial = Trial(w, A, NEW)
    await asyncio.sleep(0)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    await w.sup.close(30)
    with pytest.raises(DrainingError):
        await trial.task
    assert loop.time() - begun < 1
    assert left(w) == NOTHING


async def test_a_request_that_was_cut_off_counts_until_the_child_has_noticed() -> None:
    async def cut_off() -> None:
        async with w.sup.trial(A, None):
            raise ValueError("cut off")

    w = world(A)
    client = w.ask(A)
    w.launcher[0].healthy()
    client.done()
    w.launcher[0].slots_busy = 1
    with pytest.raises(ValueError, match="cut off"):
        await cut_off()
    await asyncio.sleep(3)
    assert [(i.active, i.busy) for i in w.sup.instances()] == [(0, 1)]
    w.launcher[0].slots_busy = 0
    await asyncio.sleep(3)
    assert [(i.active, i.busy) for i in w.sup.instances()] == [(0, 0)]


async def test_it_makes_way_for_requests_whose_model_it_took_the_place_of() -> None:
    """And the next plan starts that again."""
    w = world(B)
    client = w.ask(B)
    w.launcher[0].healthy()
    client.done()
    async with loaded(w, B, NEW) as trial:
        await asyncio.sleep(60)
        assert not trial.task.done()
        waits = w.ask(B, wait_s=60)
        await asyncio.sleep(3)
        with pytest.raises(DisplacedError, match="requests wait"):
            await trial.task
    w.launcher[-1].healthy()
    assert waits.lease is not None
    assert w.sup.profile("b:default#canary") is None


async def test_it_makes_way_while_it_loads_too() -> None:
    w = world(B)
    trial = Trial(w, B, NEW)
    await asyncio.sleep(0.2)
    w.ask(B)
    await asyncio.sleep(3)
    with pytest.raises(DisplacedError):
        await trial.task
    assert [i.key for i in w.sup.instances()] == [B.key]


async def test_it_stays_while_its_model_runs_beside_it() -> None:
    w = world(A)
    async with loaded(w, A, NEW) as trial:
        w.ask(A)
        w.launcher[-1].healthy()
        assert w.ask(A).waits
        await asyncio.sleep(60)
        assert not trial.task.done()


async def test_nobody_is_kept_from_work_for_it() -> None:
    w = world(A, B)
    w.ask(B)
    w.launcher[0].healthy(slots=2)
    trial = Trial(w, A, NEW)
    await asyncio.sleep(100)
    assert w.ask(B).lease is not None
    trial.task.cancel()
    await asyncio.wait([trial.task])


async def test_only_operators_see_it() -> None:
    w = world(A)
    async with loaded(w, A, NEW):
        assert [i.hidden for i in w.sup.instances()] == [True]
        w.ask(A)
        assert [i.hidden for i in w.sup.instances()] == [True, False]
    w = world(B)
    trial = Trial(w, B, NEW)
    await asyncio.sleep(0.05)
    assert dict(w.sup.queues()) == {}
    await asyncio.sleep(0.2)
    w.launcher[0].exit(1, "cannot load")
    assert dict(w.sup.failures()) == {}
    with pytest.raises(InstanceError):
        await trial.task


async def test_who_waits_for_a_moment_ends_nothing() -> None:
    """Before the next plan has started what they wait for."""
    answers = itertools.chain([False, True, False, True, False], itertools.repeat(True))
    loop = asyncio.get_running_loop()
    with pytest.raises(DisplacedError):
        async with while_not(lambda: next(answers)):
            await asyncio.sleep(100)
    assert loop.time() == 7 * ASK_EVERY_S
