"""An engine is replaced while the node serves: who is replaced when, and that nobody notices (trap 93)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest

from mesh.core.lifecycle import State
from mesh.engine.locate import EngineBinary
from mesh.errors import InstanceError
from tests.engine.supervised import World, catalog, engine, profile

pytestmark = pytest.mark.looptime

A, B = profile("a", 4), profile("b", 4)
BIG = profile("big", 8, idle_timeout_s=0.0)


@pytest.fixture(autouse=True)
def no_bugs(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The supervisor logs a bug and goes on; in a test it is a failure."""
    yield
    assert not [r for r in caplog.get_records("call") if "bug" in r.getMessage() or "failed on" in r.getMessage()]


def install(w: World, name: str = "two") -> None:
    """Another engine is in place now, and the node looks."""
    w.launcher.engines[None] = engine(name)
    w.sup.engines_changed()


def runs(w: World) -> list[tuple[str, str | None, bool]]:
    return [(i.key, i.engine_version, i.superseded) for i in w.sup.instances()]


async def served(w: World, *profiles: object) -> None:
    for p in profiles:
        client = w.ask(p)  # type: ignore[arg-type]
        w.launcher[-1].healthy()
        client.done()


async def test_with_room_the_successor_is_ready_before_the_old_one_stops() -> None:
    w = World(A)
    client = w.ask(A)
    w.launcher[0].healthy(slots=2)
    install(w)
    assert w.states == [State.READY, State.SPAWNING]
    assert runs(w) == [("a:default", "one", True), ("a:default", "two", False)]
    meanwhile = w.ask(A)
    assert meanwhile.lease is not None
    assert meanwhile.lease.endpoint is w.launcher[0].endpoint
    w.launcher[1].healthy()
    assert w.states == [State.DRAINING, State.READY]
    after = w.ask(A)
    assert after.lease is not None
    assert after.lease.endpoint is w.launcher[1].endpoint
    client.done()
    assert w.states[0] is State.DRAINING  # the other request is not cut off
    meanwhile.done()
    await asyncio.sleep(0.2)
    assert runs(w) == [("a:default", "two", False)]


async def test_without_room_the_old_one_finishes_and_the_successor_starts_by_itself() -> None:
    w = World(BIG, trusted=True)
    client = w.ask(BIG)
    w.launcher[0].healthy()
    install(w)
    await asyncio.sleep(0.2)  # the new engine is asked whether it accepts the arguments
    assert w.launcher.vetted == [BIG.key]
    assert w.states == [State.DRAINING]
    waits = w.ask(BIG)
    assert waits.waits
    client.done()
    await asyncio.sleep(0.2)
    assert len(w.launcher) == 2
    w.launcher[1].healthy()
    assert waits.lease is not None
    assert runs(w) == [("big:default", "two", False)]
    waits.done()


async def test_the_successor_of_an_idle_one_needs_no_request_and_no_room_in_the_queue() -> None:
    w = World(A, BIG, vram=12, max_total_queue=1)
    await served(w, BIG)
    client = w.ask(A)
    w.launcher[1].healthy()
    waits = w.ask(A)
    install(w)
    await asyncio.sleep(0.3)
    assert [(i.key, i.state) for i in w.sup.instances()] == [(A.key, State.READY), (BIG.key, State.SPAWNING)]
    client.done()
    waits.done()
    w.launcher[2].healthy()
    assert runs(w)[1] == ("big:default", "two", False)
    assert dict(w.sup.queues()) == {}


async def test_the_same_engine_changes_nothing() -> None:
    """Trap 89. Nor does one that is missing for a moment, or cannot be looked at."""
    w = World(A, BIG)
    await served(w, A)
    install(w, "one")
    w.launcher.engines[None] = EngineBinary(("/two/llama-server",), "two", "configured")
    w.sup.engines_changed()
    del w.launcher.engines[None]
    w.sup.engines_changed()
    assert runs(w) == [("a:default", "one", False)]
    assert len(w.launcher) == 1


async def test_a_rollback_keeps_what_runs_the_old_engine_still() -> None:
    w = World(A, B, vram=8)
    await served(w, A, B)
    w.launcher.complaint = "error: invalid argument"
    install(w)
    assert [superseded for _, _, superseded in runs(w)] == [True, True]
    w.launcher.engines[None] = engine("one")
    w.sup.engines_changed()
    assert [superseded for _, _, superseded in runs(w)] == [False, False]
    await asyncio.sleep(5)
    assert w.states == [State.READY, State.READY]


async def test_what_the_new_engine_refuses_is_not_stopped_for_it() -> None:
    w = World(BIG)
    await served(w, BIG)
    w.launcher.complaint = "error: invalid argument: --old-flag"
    install(w)
    await asyncio.sleep(30)
    assert runs(w) == [("big:default", "one", True)]
    assert "--old-flag" in w.sup.failures()[BIG.key].reason
    again = w.ask(BIG)
    assert again.lease is not None  # it serves
    again.done()


async def test_a_successor_that_fails_leaves_the_old_one_in_service_and_is_tried_again() -> None:
    lasting = replace(A, idle_timeout_s=0.0)
    w = World(lasting)
    await served(w, lasting)
    install(w)
    for n in (1, 2):  # the second at once: the first failure may be bad luck
        w.launcher[n].exit(1, "cannot load")
        assert runs(w)[0] == ("a:default", "one", True)
    client = w.ask(lasting)
    assert client.lease is not None
    client.done()
    await asyncio.sleep(590)  # the back-off of two failures is long over
    assert len(w.launcher) == 3  # each try costs a load, and two in a row were no bad luck
    await asyncio.sleep(20)
    assert len(w.launcher) == 4
    w.launcher[3].healthy()
    await asyncio.sleep(0.2)
    assert runs(w) == [("a:default", "two", False)]


async def test_models_are_replaced_one_after_the_other_and_idle_ones_first() -> None:
    w = World(A, B, vram=8)
    busy = w.ask(A)
    w.launcher[0].healthy()
    await served(w, B)
    install(w)
    await asyncio.sleep(0.3)
    assert [(i.key, i.state) for i in w.sup.instances()] == [(A.key, State.READY), (B.key, State.SPAWNING)]
    w.launcher[2].healthy()
    await asyncio.sleep(0.2)
    assert [(i.key, i.state) for i in w.sup.instances()] == [(A.key, State.DRAINING), (B.key, State.READY)]
    busy.done()
    await asyncio.sleep(0.2)
    w.launcher[3].healthy()
    assert {version for _, version, _ in runs(w)} == {"two"}


async def test_unloading_is_not_undone_by_a_successor() -> None:
    w = World(BIG)
    client = w.ask(BIG)
    w.launcher[0].healthy()
    install(w)
    await asyncio.sleep(0.2)
    assert w.states == [State.DRAINING]
    w.sup.unload(BIG.key)
    client.done()
    await asyncio.sleep(1)
    assert w.states == []
    assert len(w.launcher) == 1


async def test_a_node_that_stops_replaces_nothing_any_more() -> None:
    w = World(A, BIG, vram=16)
    client = w.ask(A)
    w.launcher[0].healthy()
    w.sup.begin_drain()
    install(w)
    assert w.states == [State.READY]
    closing = asyncio.create_task(w.sup.close(5))
    await asyncio.sleep(0)
    client.done()
    await closing
    assert len(w.launcher) == 1


async def test_a_failed_successor_of_one_that_made_room_is_not_waited_for() -> None:
    w = World(BIG)
    await served(w, BIG)
    install(w)
    await asyncio.sleep(0.3)
    w.launcher[1].exit(1, "cannot load")
    await asyncio.sleep(5)
    assert w.states == []
    client = w.ask(BIG)  # the next request tries again
    assert len(w.launcher) == 3
    w.launcher[2].exit(1, "cannot load")
    assert isinstance(client.error, InstanceError)


async def test_what_really_runs_is_told() -> None:
    w = World(A)
    w.launcher.engines[None] = EngineBinary(("/usr/bin/python3", "embedded.py"), "b1", "embedded", "cuda", "x")
    await served(w, A)
    (info,) = w.sup.instances()
    assert (info.engine_version, info.engine_build, info.engine_path) == ("b1", "cuda", "embedded.py")


async def test_another_build_in_the_cookbook_restarts_the_model() -> None:
    w = World(A)
    await served(w, A)
    w.sup.apply_catalog(catalog(replace(A, engine_build="cuda")))
    await asyncio.sleep(0.2)
    assert w.states == []
