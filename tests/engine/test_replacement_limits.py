"""When an engine is not replaced, not yet, or not beside the old one: what nobody asked for costs nobody."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest

from mesh.config.profile import Profile
from mesh.core.devices import Devices
from mesh.core.lifecycle import State
from mesh.core.resources import Resources
from mesh.engine.ledger import CookbookFigures
from mesh.engine.locate import EngineBinary
from mesh.errors import QueueFullError
from tests.engine.supervised import World, engine, profile
from tests.engine.test_replacement import BIG, A, B, install, no_bugs, runs, served

pytestmark = pytest.mark.looptime

__all__ = ["no_bugs"]  # a fixture


async def look(w: World) -> list[bool]:
    """Look in a thread, without waiting for it: the clock would jump to the next timer."""
    looking = asyncio.create_task(w.sup.look_at_engines())
    while not looking.done():  # noqa: ASYNC110
        await asyncio.sleep(0)
    return [superseded for _, _, superseded in runs(w)]


async def test_what_only_stands_in_for_the_configured_engine_replaces_nothing() -> None:
    """Its file is gone for a moment: a start would do with the embedded engine, but nothing is stopped for that."""
    w = World(A)
    await served(w, A)
    w.launcher.engines[None] = replace(engine("wheel"), source="embedded")
    w.sup.engines_changed()
    assert [await look(w), await look(w)] == [[False], [False]]
    w.launcher.engines[None] = replace(engine("wheel"), source="embedded", build="cuda")  # nor if it is no fallback
    w.sup.engines_changed()
    assert [superseded for _, _, superseded in runs(w)] == [True, False]


async def test_what_another_program_replaced_counts_once_it_stays_as_it_is() -> None:
    """It may still be copied."""
    w = World(A)
    await served(w, A)
    assert await look(w) == [False]
    for name in ("half", "two"):
        w.launcher.engines[None] = engine(name)
        assert await look(w) == [False]
    assert (await look(w))[0]
    assert runs(w)[1] == ("a:default", "two", False)


async def test_a_look_that_an_install_overtook_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    w = World(A)
    await served(w, A)
    await look(w)
    old, looked, installed = w.launcher.engine, threading.Event(), threading.Event()

    def slow(profile: Profile) -> EngineBinary:
        found = old(profile)
        looked.set()
        installed.wait(10)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(w.launcher, "engine", slow)
        looking = asyncio.create_task(w.sup.look_at_engines())
        while not looked.is_set():  # no waiting: the clock would jump  # noqa: ASYNC110
            await asyncio.sleep(0)
    install(w)
    installed.set()
    while not looking.done():  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert [superseded for _, _, superseded in runs(w)] == [True, False]


async def test_an_install_concerns_its_own_build_only() -> None:
    cuda = replace(B, engine_build="cuda")
    w = World(A, cuda)
    await served(w, A, cuda)
    w.launcher.engines[None] = engine("two")
    w.sup.engines_changed("cuda")
    assert [(i.key, i.superseded) for i in w.sup.instances()][:2] == [(A.key, False), (cuda.key, True)]


async def test_a_successor_that_nobody_waits_for_gives_way_to_others() -> None:
    """Another program took the room that was made for it."""
    other = profile("o", 2, idle_timeout_s=0.0)
    w = World(other, BIG)
    client = w.ask(other)
    w.launcher[0].healthy(slots=4)
    big = w.ask(BIG)
    w.launcher[1].healthy()
    install(w)
    await asyncio.sleep(0.3)
    w.sup.ledger.foreign = Resources.of(vram_mib=3)
    big.done()
    await asyncio.sleep(1)
    (first, *others) = w.sup.instances()
    assert (first.key, first.state, first.active) == (other.key, State.READY, 1)
    assert BIG.key not in {i.key for i in others}
    assert w.metrics.evictions_total == 0
    assert w.sup._queues.total == 0
    assert w.ask(other).lease is not None  # it was not held
    client.done()


async def test_the_place_of_a_successor_is_no_waiting_request() -> None:
    one = replace(BIG, max_queue=1)
    w = World(one, max_total_queue=1)
    client = w.ask(one)
    w.launcher[0].healthy()
    install(w)
    await asyncio.sleep(0.2)
    assert (w.states, dict(w.sup.queues())) == ([State.DRAINING], {})
    waits = w.ask(one)
    assert waits.waits
    assert dict(w.sup.queues()) == {one.key: 1}
    assert isinstance(w.ask(one).error, QueueFullError)
    client.done()
    await asyncio.sleep(0.2)
    w.launcher[1].healthy()
    assert waits.lease is not None


async def test_nobody_has_a_second_copy_of_what_was_never_measured() -> None:
    w = World(replace(A, estimate=Resources()))
    await served(w, A)
    install(w)
    await asyncio.sleep(0.05)
    assert w.launcher.vetted == [A.key]
    await asyncio.sleep(0.1)
    assert w.states == [State.STOPPING]
    await asyncio.sleep(0.2)
    assert runs(w) == [("a:default", "two", False)]


@pytest.mark.parametrize(("available_mib", "both"), [(50, False), (70, True)])
async def test_where_memory_is_not_limited_a_second_copy_needs_some_that_is_free(
    available_mib: int, both: bool
) -> None:
    big = replace(A, estimate=Resources.of(ram_mib=60))
    w = World(big, vram=None, devices=Devices(ram_total_mib=128, ram_available_mib=available_mib))
    await served(w, big)
    install(w)
    await asyncio.sleep(0.15)
    assert w.states == ([State.READY, State.SPAWNING] if both else [State.STOPPING])


async def test_of_many_each_makes_way_for_one() -> None:
    four = profile("a", 2, idle_timeout_s=0.0, max_instances=4, max_concurrent=1)
    w = World(four)
    clients = []
    for _ in range(4):
        clients.append(w.ask(four))
        w.launcher[-1].healthy()
    install(w)
    w.launcher[-1].healthy()
    assert sorted(w.states) == [State.DRAINING, *[State.READY] * 4]
    for client in clients[1:]:
        client.done()
    assert sum(w.ask(four).lease is not None for _ in range(4)) == 4


async def test_it_is_said_once_that_a_successor_has_no_room(caplog: pytest.LogCaptureFixture) -> None:
    w = World(A, profile("o", 6, idle_timeout_s=0.0))
    await served(w, A, profile("o", 6, idle_timeout_s=0.0))
    w.sup.ledger.foreign = Resources.of(vram_mib=1)
    install(w)
    for _ in range(3):
        w.sup.footprints_changed()
    told = [r.getMessage() for r in caplog.records if "no room for an instance" in r.getMessage()]
    assert len(told) == 2  # of each


async def test_disks_are_looked_at_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a dead file server must not stop the node."""
    w = World(A)
    await served(w, A)
    looked_in: list[int] = []
    here, real = threading.get_ident(), w.launcher.engine

    def seen(profile: Profile) -> EngineBinary:
        looked_in.append(threading.get_ident())
        return real(profile)

    monkeypatch.setattr(w.launcher, "engine", seen)
    await w.sup.look_at_engines()
    assert len(looked_in) == 1
    assert here not in looked_in


class Figures(CookbookFigures):
    """Counts how often what was seen of files was forgotten, and when it was asked for."""

    forgotten = 0

    def forget_looks(self) -> None:
        self.forgotten += 1


async def test_what_was_seen_with_the_old_engine_is_forgotten() -> None:
    figures = Figures()
    w = World(A, footprints=figures)
    await served(w, A)
    for _ in range(3):
        await look(w)
    assert figures.forgotten == 0
    w.launcher.engines[None] = engine("two")
    await look(w)
    await look(w)
    assert figures.forgotten == 1
    install(w, "three")
    assert figures.forgotten == 2


async def test_back_with_the_old_engine_nothing_need_be_looked_over_again() -> None:
    w = World(BIG)
    client = w.ask(BIG)
    w.launcher[0].healthy()
    w.launcher.complaint = "error: invalid argument"
    install(w)
    await asyncio.sleep(0.2)
    assert not w.sup._trust.passed(BIG)
    install(w, "one")
    assert w.sup._trust.passed(BIG)
    client.done()
