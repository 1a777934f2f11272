"""The new engine cannot load a model whose old instance made room for it: who waits gets the engine before."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from mesh.config.profile import Profile
from mesh.core.exits import Cause
from mesh.core.lifecycle import State
from mesh.core.replacing import speaks_against
from mesh.engine.runner import Stalled
from mesh.errors import InstanceError, UnknownModelError
from tests.engine.supervised import Client, World, catalog, engine, profile
from tests.engine.test_replacement import BIG, A, install, no_bugs, runs, served

pytestmark = pytest.mark.looptime

__all__ = ["no_bugs"]  # a fixture


class Owner:
    """Who puts engines in force: says *answer*, and remembers what was asked."""

    def __init__(self, w: World, answer: bool = True) -> None:
        self.answer = answer
        self.asked: list[tuple[str, str]] = []
        self.failed: list[tuple[str, bool]] = []
        w.sup.go_back = self

    def __call__(self, profile: Profile, engine: str, reason: str, *, in_force: bool) -> bool:
        self.asked.append((profile.key, reason))
        self.failed.append((engine, in_force))
        return self.answer


async def loading(*profiles: Profile, answer: bool = True, vram: int = 10) -> tuple[World, Owner, Client]:
    """Return a world in which the first's old instance made room and its successor loads, while a client waits."""
    first = profiles[0]
    w = World(*profiles, vram=vram)
    owner = Owner(w, answer)
    await served(w, first)
    install(w)
    await asyncio.sleep(0.3)
    assert [(i.state, i.engine_version) for i in w.sup.instances()] == [(State.SPAWNING, "two")]
    return w, owner, w.ask(first)


@pytest.mark.parametrize(
    ("engine", "before", "cause", "answer"),
    [
        ("two", "one", Cause.OTHER, True),
        ("two", "one", Cause.USAGE, True),
        ("two", "one", Cause.MEMORY, False),  # it may lack that with any engine
        ("two", "one", Cause.PORT, False),
        ("one", "one", Cause.OTHER, False),
        ("two", None, Cause.OTHER, False),
        ("two", "", Cause.OTHER, False),  # not known
        ("", "one", Cause.OTHER, False),
    ],
)
def test_when_a_failed_load_speaks_against_its_engine(
    engine: str, before: str | None, cause: Cause, answer: bool
) -> None:
    assert speaks_against(engine, before, cause) is answer


@pytest.mark.parametrize("stalled", [False, True])
async def test_who_waits_is_served_by_the_engine_before(stalled: bool) -> None:
    w, owner, waits = await loading(BIG)
    if stalled:
        w.launcher[1].report(Stalled("no progress for 60 s", silent=True))
    else:
        w.launcher[1].exit(1, "cannot load")
    late = w.ask(BIG)
    await asyncio.sleep(5)
    assert owner.asked == [(BIG.key, "no progress for 60 s" if stalled else "cannot load")]
    assert (waits.waits, late.waits, len(w.launcher)) == (True, True, 2)  # and the bad engine is not tried again
    assert owner.failed == [(engine("two").identity, True)]
    assert w.sup.failures()[BIG.key].retry_in_s > 0  # other nodes are not told that it can be had here
    install(w, "one")
    assert runs(w) == [(BIG.key, "one", False)]
    assert dict(w.sup.failures()) == {}
    assert w.sup._trust.passed(BIG)
    w.launcher[2].healthy(slots=2)
    assert waits.lease is not None
    assert late.lease is not None


async def test_a_model_that_nobody_waits_for_is_loaded_again_as_well() -> None:
    pinned = replace(BIG, pinned=True)
    w, owner, client = await loading(pinned)
    assert client.ticket is not None
    client.ticket.cancel()
    w.launcher[1].exit(1, "cannot load")
    await asyncio.sleep(5)
    assert (len(owner.asked), len(w.launcher), dict(w.sup.queues())) == (1, 2, {})
    install(w, "one")
    w.launcher[2].healthy()
    assert runs(w) == [(pinned.key, "one", False)]


async def test_without_a_way_back_it_is_a_failure_like_any_other() -> None:
    w, owner, waits = await loading(BIG, answer=False)
    w.launcher[1].exit(1, "cannot load")
    assert len(owner.asked) == 1
    assert isinstance(waits.error, InstanceError)
    w.ask(BIG)
    w.launcher[2].exit(1, "cannot load")
    assert len(owner.asked) == 1  # nothing made room for that one


async def test_when_the_way_back_is_blocked_who_waits_is_told_what_failed() -> None:
    w, _, waits = await loading(BIG)
    w.launcher[1].exit(1, "cannot load", "the last line")
    w.sup.no_way_back(BIG.key)
    assert isinstance(waits.error, InstanceError)
    assert "the last line" in waits.error.message
    again = w.ask(BIG)  # the next request tries, as after any failure
    assert len(w.launcher) == 3
    w.sup.no_way_back(BIG.key)  # it is over: this says nothing
    assert again.waits


async def test_a_deadline_holds_and_its_client_is_told_what_failed() -> None:
    w, _, waits = await loading(BIG)
    soon = w.ask(BIG, wait_s=3)
    w.launcher[1].exit(1, "cannot load")
    await asyncio.sleep(4)
    assert waits.waits
    assert soon.error is not None
    assert "cannot load" in soon.error.message


async def test_nobody_is_refused_for_the_back_off_of_earlier_failures() -> None:
    w, _, waits = await loading(BIG)
    w.sup._failures.record(BIG.key, "crash", "an hour ago", (), 0.0)
    w.launcher[1].exit(1, "cannot load")
    assert w.sup.failures()[BIG.key].retry_in_s > 0
    late = w.ask(BIG)
    install(w, "one")
    w.launcher[2].healthy(slots=2)
    assert waits.lease is not None
    assert late.lease is not None


async def test_what_fails_with_the_engine_before_too_has_just_failed() -> None:
    w, owner, waits = await loading(BIG)
    w.launcher[1].exit(1, "cannot load")
    install(w, "one")
    w.launcher[2].exit(1, "the disk is broken")
    assert len(owner.asked) == 1
    assert waits.error is not None
    assert "the disk is broken" in waits.error.message


async def test_memory_that_ran_out_says_nothing_against_an_engine() -> None:
    w, owner, waits = await loading(BIG)
    w.launcher[1].exit(1, "out of memory", cause=Cause.MEMORY)
    assert owner.asked == []
    assert isinstance(waits.error, InstanceError)


async def test_where_both_fit_the_old_one_serves_on_and_nothing_is_asked() -> None:
    w = World(A)
    owner = Owner(w)
    await served(w, A)
    install(w)
    w.launcher[1].exit(1, "cannot load")
    assert runs(w)[0] == (A.key, "one", True)
    assert owner.asked == []


async def test_another_engine_that_was_installed_meanwhile_is_tried() -> None:
    w, owner, waits = await loading(BIG)
    w.launcher[1].exit(1, "cannot load")
    install(w, "three")
    assert runs(w) == [(BIG.key, "three", False)]
    w.launcher[2].exit(1, "nor can I")
    assert len(owner.asked) == 2  # it is the owner who knows where this ends
    assert waits.waits
    assert not w.sup._trust.doubtful(BIG)  # neither failed twice


async def test_an_install_of_another_build_ends_nothing() -> None:
    w, _, waits = await loading(BIG)
    w.launcher[1].exit(1, "cannot load")
    w.sup.engines_changed("cuda")
    await asyncio.sleep(1)
    assert (waits.waits, len(w.launcher)) == (True, 2)


@pytest.mark.parametrize("attended", [True, False])
async def test_its_room_is_kept_meanwhile_and_others_are_served_beside_it(attended: bool) -> None:
    small, large = profile("s", 2), profile("l", 8)
    w, _, waits = await loading(replace(BIG, pinned=True), small, large, vram=12)
    w.launcher[1].exit(1, "cannot load")
    if not attended:
        assert waits.ticket is not None
        waits.ticket.cancel()
    beside, instead = w.ask(small), w.ask(large)
    w.launcher[2].healthy()
    assert beside.lease is not None
    assert (instead.waits, len(w.launcher)) == (True, 3)
    install(w, "one")
    assert ("big:default", "one", False) in runs(w)


async def test_a_failure_of_something_else_is_not_laid_to_the_engine() -> None:
    """Another program answers on its port; or its profile was edited while the old instance drained."""
    w, owner, waits = await loading(BIG)
    w.launcher[1].report(Stalled("port 1 is answered by another server"))
    assert owner.asked == []
    assert isinstance(waits.error, InstanceError)
    w = World(BIG, vram=10)
    owner = Owner(w)
    running = w.ask(BIG)
    w.launcher[0].healthy()
    install(w)
    await asyncio.sleep(0.3)
    edited = replace(BIG, args=("--mmproj", "/no/such/file"))
    w.sup.apply_catalog(catalog(edited))
    waits = w.ask(edited)
    running.done()
    await asyncio.sleep(0.3)
    w.launcher[1].exit(1, "cannot load")
    assert owner.asked == []
    assert isinstance(waits.error, InstanceError)


async def test_it_is_known_that_another_engine_is_in_force_by_now() -> None:
    w, owner, _ = await loading(BIG)
    w.launcher.engines[None] = engine("three")
    w.launcher[1].exit(1, "cannot load")
    assert owner.failed == [(engine("two").identity, False)]


async def test_a_profile_that_vanishes_or_is_unloaded_is_not_brought_back() -> None:
    w, _, waits = await loading(BIG)
    w.launcher[1].exit(1, "cannot load")
    w.sup.apply_catalog(catalog(A))
    assert isinstance(waits.error, UnknownModelError)
    w, _, waits = await loading(BIG)
    w.launcher[1].exit(1, "cannot load")
    assert waits.ticket is not None
    waits.ticket.cancel()
    w.sup.unload(BIG.key)
    install(w, "one")
    await asyncio.sleep(1)
    assert (len(w.launcher), w.sup._queues.total) == (2, 0)


async def test_a_node_that_stops_goes_nowhere() -> None:
    w, owner, waits = await loading(BIG)
    w.sup.begin_drain()
    w.launcher[1].exit(1, "cannot load")
    assert owner.asked == []
    assert isinstance(waits.error, InstanceError)
