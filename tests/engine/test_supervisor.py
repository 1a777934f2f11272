"""The supervisor against processes that do what the test says, on a clock that the test owns (looptime)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest

from mesh.core.exits import Cause
from mesh.core.lifecycle import State
from mesh.engine.lease import Lease
from mesh.engine.runner import Stalled
from mesh.errors import (
    CapacityError,
    DrainingError,
    EngineMissingError,
    InstanceError,
    QueueFullError,
    QueueTimeoutError,
    TooLargeError,
    UnknownModelError,
)
from tests.engine.supervised import Client, World, catalog, profile

pytestmark = pytest.mark.looptime


@pytest.fixture(autouse=True)
def no_bugs(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The supervisor logs a bug and goes on; in a test it is a failure."""
    yield
    assert not [r for r in caplog.get_records("call") if "bug" in r.getMessage() or "failed on" in r.getMessage()]


A, B = profile("a", 8), profile("b", 8)


async def test_two_first_requests_start_one_process_and_share_it() -> None:
    """Trap 18."""
    w = World(A)
    first, second = w.ask(A), w.ask(A)
    assert len(w.launcher) == 1
    w.launcher[0].healthy(slots=2)
    assert first.lease is not None
    assert second.lease is not None
    assert first.lease.endpoint is second.lease.endpoint is w.launcher[0].endpoint


async def test_slots_bound_what_is_admitted_and_the_queue_is_first_come_first_served() -> None:
    w = World(A)
    clients = [w.ask(A) for _ in range(3)]
    w.launcher[0].healthy(slots=1)
    assert [c.waits for c in clients] == [False, True, True]
    clients[0].done()
    assert [c.waits for c in clients] == [False, False, True]
    clients[0].done()  # idempotent
    assert clients[2].waits


async def test_a_request_without_a_slot_does_not_wait_for_one() -> None:
    w = World(A)
    busy = w.ask(A)
    w.launcher[0].healthy(slots=1)
    assert busy.lease is not None
    assert w.ask(A, slot=False).lease is not None


@pytest.mark.parametrize(("limit", "expected"), [(0, 5), (2, 2), (None, 3)])
async def test_concurrency_is_the_childs_slots_unless_configured(limit: int | None, expected: int) -> None:
    p = profile("a", max_concurrent=limit)
    w = World(p)
    clients = [w.ask(p) for _ in range(5)]
    w.launcher[0].healthy(slots=3)
    assert sum(not c.waits for c in clients) == expected


async def test_a_second_instance_starts_when_the_first_is_full_and_memory_is_free() -> None:
    p = profile("a", 4, max_instances=2)
    w = World(p)
    clients = [w.ask(p), w.ask(p), w.ask(p)]
    w.launcher[0].healthy(slots=1)
    assert len(w.launcher) == 2
    w.launcher[1].healthy(slots=1)
    assert [c.waits for c in clients] == [False, False, True]
    assert len(w.launcher) == 2


async def test_every_waiter_leaves_at_its_deadline_with_the_reason() -> None:
    w = World(A)
    client = w.ask(A, wait_s=5)
    await asyncio.sleep(5.1)
    assert isinstance(client.error, QueueTimeoutError)
    assert "still loading" in client.error.message
    assert w.metrics.queue_drops_timeout == 1
    assert w.sup.queues() == {}


async def test_a_client_that_left_the_queue_is_gone_and_blocks_nobody() -> None:
    """Traps 2, 38."""
    w = World(A)
    clients = [w.ask(A, wait_s=60) for _ in range(1000)]
    survivor = w.ask(A, wait_s=60)
    for c in clients:
        assert c.ticket is not None
        c.ticket.cancel()
        c.ticket.cancel()
    assert w.sup.queues() == {A.key: 1}
    w.launcher[0].healthy(slots=1)
    assert survivor.lease is not None
    assert all(c.waits for c in clients)


async def test_a_full_queue_is_refused_before_anything_else() -> None:
    """Trap 36."""
    p = profile("a", max_queue=2)
    w = World(p)
    clients = [w.ask(p) for _ in range(3)]
    assert isinstance(clients[2].error, QueueFullError)
    assert clients[2].error.retry_after_s
    assert w.metrics.queue_drops_full == 1
    assert w.sup.queues() == {p.key: 2}


async def test_the_nodes_queue_limit_counts_all_models() -> None:
    w = World(A, B, vram=20, max_total_queue=1)
    w.ask(A)
    assert isinstance(w.ask(B).error, QueueFullError)
    assert w.metrics.queue_drops_global_limit == 1


async def test_a_failed_start_wakes_every_waiter_with_the_log_and_the_next_request_tries_again() -> None:
    """Traps 19, 24."""
    w = World(A)
    clients = [w.ask(A), w.ask(A)]
    w.launcher[0].exit(1, "exit status 1", "error loading model: no such file")
    for c in clients:
        assert isinstance(c.error, InstanceError)
        assert "no such file" in c.error.message
    assert w.sup.instances() == ()
    retry = w.ask(A)
    w.launcher[1].healthy()
    assert retry.lease is not None


async def test_a_process_that_cannot_even_be_spawned_fails_the_same_way() -> None:
    w = World(A)
    w.launcher.start_error = InstanceError("no such binary")
    assert isinstance(w.ask(A).error, InstanceError)
    w.launcher.start_error, w.launcher.launch_error = None, CapacityError("no ports")
    assert "no ports" in str(w.ask(A).error)
    assert w.sup.instances() == ()
    assert w.metrics.spawn_failures_total == 2


async def test_a_missing_engine_reaches_the_client_as_such() -> None:
    w = World(A)
    w.launcher.start_error = EngineMissingError("no llama-server found")
    for _ in range(3):
        error = w.ask(A).error
        assert isinstance(error, EngineMissingError)
        assert (error.type, error.source) == ("engine_missing", "mesh")
        assert error.message.startswith("'a' failed to start: no llama-server found")
    assert w.sup.instances() == ()
    await asyncio.sleep(2.01)
    w.launcher.start_error = None
    again = w.ask(A)
    w.launcher.started[-1].healthy()
    assert again.lease is not None
    assert w.sup.failures() == {}


async def test_a_child_that_refused_what_it_was_given_names_it() -> None:
    """The child's own reason comes first; what ended for another reason gets no such advice."""
    w = World(A, B)
    refused, killed = w.ask(A), w.ask(B)
    w.launcher[0].exit(1, "failed to open /a.gguf", "the log")
    assert str(refused.error).startswith(
        "'a' failed to start: failed to open /a.gguf; if it stays like this, "
        "correct the model (/a.gguf) or the arguments of 'a' in the cookbook; last log lines:"
    )
    w.launcher[1].exit(-9, "killed by SIGKILL")
    assert "correct" not in str(killed.error)


async def test_a_crash_loop_backs_off_and_recovers() -> None:
    """Trap 25."""
    w = World(A)
    for n in range(3):
        w.ask(A)
        w.launcher[n].exit(1, "boom")
        await asyncio.sleep(2.01 if n == 1 else 0)
    spawned = len(w.launcher)
    refused = w.ask(A)
    assert isinstance(refused.error, InstanceError)
    assert refused.error.retry_after_s == 2
    assert len(w.launcher) == spawned
    await asyncio.sleep(2.01)
    again = w.ask(A)
    w.launcher[spawned].healthy()
    assert again.lease is not None


async def test_a_stuck_load_is_ended_and_reported_as_a_load_failure() -> None:
    """Trap 22, 29."""
    w = World(A)
    client = w.ask(A)
    w.launcher[0].report(Stalled("silent for 60 s"))
    assert "silent for 60 s" in str(client.error)
    assert w.launcher[0].signals == ["term"]
    assert w.states == [State.STOPPING]
    await asyncio.sleep(0.2)
    assert w.sup.instances() == ()
    assert w.sup.failures()[A.key].kind == "load"


async def test_crash_unload_and_load_failure_are_told_apart() -> None:
    """Trap 29."""
    w = World(A)
    w.ask(A)
    w.launcher[0].healthy()
    w.launcher[0].exit(-11, "killed by SIGSEGV")
    assert w.sup.failures()[A.key].kind == "crash"
    assert w.metrics.crashes_total == 1
    client = w.ask(A)
    w.launcher[1].healthy()
    client.done()
    assert w.sup.unload(A.key) == 1
    await asyncio.sleep(0.2)
    assert w.metrics.crashes_total == 1
    assert w.sup.instances() == ()


async def test_waiters_of_a_crashed_instance_get_a_new_one() -> None:
    w = World(A)
    first, second = w.ask(A), w.ask(A)
    w.launcher[0].healthy(slots=1)
    w.launcher[0].exit(-9, "killed")
    first.done()
    assert len(w.launcher) == 2
    w.launcher[1].healthy(slots=1)
    assert second.lease is not None


async def test_a_request_that_is_sent_again_keeps_its_place() -> None:
    w = World(A)
    old = w.ask(A)
    w.launcher[0].healthy(slots=1)
    await asyncio.sleep(1)
    later = w.ask(A)
    again = w.ask(A, since=0.5)
    old.done()
    assert again.lease is not None
    assert later.waits


async def test_a_request_while_its_instance_stops_waits_and_starts_a_new_one() -> None:
    """Trap 17."""
    w = World(A)
    w.ask(A)
    w.launcher[0].healthy()
    w.sup.unload(A.key)
    assert w.states == [State.DRAINING]
    client = w.ask(A)
    assert client.waits
    assert len(w.launcher) == 1  # both do not fit


async def test_two_models_that_do_not_fit_together_take_turns() -> None:
    w = World(A, B)
    a = w.ask(A)
    w.launcher[0].healthy(slots=1)
    b = w.ask(B)
    assert b.waits
    assert w.states == [State.READY]
    a.done()
    assert w.states == [State.STOPPING]
    assert len(w.launcher) == 1  # memory is released by the exit alone
    await asyncio.sleep(0.2)
    w.launcher[1].healthy(slots=1)
    assert b.lease is not None
    assert w.sup.budget().used.mib == {"vram": 8}


async def test_a_busy_incumbent_is_drained_after_its_tenure() -> None:
    """Trap 35: constant demand for A, B waits no longer than tenure + drain + load."""
    w = World(A, B)
    running = [w.ask(A)]
    w.launcher[0].healthy(slots=2)
    b = w.ask(B)
    for _ in range(30):
        running.append(w.ask(A))
        running.pop(0).done()
        await asyncio.sleep(0.5)
    await asyncio.sleep(1)
    late = w.ask(A)
    assert late.waits  # held
    for c in running:
        c.done()
    await asyncio.sleep(0.2)
    assert len(w.launcher) == 2
    w.launcher[1].healthy(slots=1)
    assert b.lease is not None
    assert late.waits


async def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    """Trap 49."""
    w = World(profile("huge", 64))
    error = w.ask(w.catalog.profiles[0]).error
    assert isinstance(error, TooLargeError)
    assert "vram 64 MiB" in error.message
    assert "vram 10 MiB" in error.message


async def test_max_instances_zero_is_answered_at_once() -> None:
    p = profile("a", max_instances=0)
    assert isinstance(World(p).ask(p).error, CapacityError)


async def test_an_idle_instance_is_stopped_after_its_timeout_counted_from_the_end_of_the_last_request() -> None:
    """Trap 23."""
    p = profile("a", idle_timeout_s=100)
    w = World(p)
    client = w.ask(p)
    await asyncio.sleep(500)
    assert w.states == [State.SPAWNING]  # no clock runs while it loads
    w.launcher[0].healthy()
    await asyncio.sleep(500)
    assert w.states == [State.READY]  # nor while it works
    client.done()
    await asyncio.sleep(60)
    w.ask(p).done()  # the shortcut must move the clock too
    await asyncio.sleep(99)
    assert w.states == [State.READY]
    await asyncio.sleep(2)
    assert w.states == []


async def test_a_request_that_only_looks_does_not_keep_an_idle_instance() -> None:
    """Nor does it hide the end of the last real request, and it is not cut off."""
    p = profile("a", idle_timeout_s=100)
    w = World(p)
    client = w.ask(p)
    w.launcher[0].healthy()
    look = w.ask(p, look=True)
    await asyncio.sleep(500)
    client.done()  # here the idle time begins
    await asyncio.sleep(50)
    look.done()
    await asyncio.sleep(30)
    w.ask(p, look=True).done()
    assert w.sup.instances()[0].last_used_s_ago == 80
    await asyncio.sleep(19)
    assert w.states == [State.READY]
    last = w.ask(p, look=True)
    await asyncio.sleep(5)
    assert w.states == [State.DRAINING]
    last.done()
    await asyncio.sleep(1)
    assert w.states == []


async def test_closing_waits_for_a_request_that_only_looks() -> None:
    w = World(A)
    look = w.ask(A, look=True)
    w.launcher[0].healthy()
    closing = asyncio.ensure_future(w.sup.close(60))
    await asyncio.sleep(1)
    assert not closing.done()
    assert w.launcher[0].signals == []
    look.done()
    await closing


async def test_an_abandoned_request_holds_its_slot_until_the_child_stopped() -> None:
    """Trap 9."""
    w = World(A)
    client = w.ask(A)
    w.launcher[0].healthy(slots=1)
    w.launcher[0].slots_busy = 1
    assert client.lease is not None
    client.lease.abandon()
    client.lease.abandon()
    nxt = w.ask(A)
    await asyncio.sleep(4)
    assert nxt.waits
    w.launcher[0].slots_busy = 0
    await asyncio.sleep(2.5)
    assert nxt.lease is not None
    assert w.sup.instances()[0].busy == 1


@pytest.mark.parametrize(("streaming", "freed_after_s"), [(True, 0.2), (False, 1.2)])
async def test_a_child_is_not_asked_before_it_can_know(streaming: bool, freed_after_s: float) -> None:
    """Trap 8: a look before a quiet second is over keeps llama-server from noticing; a broken stream it notices."""
    w = World(A)
    client = w.ask(A)
    w.launcher[0].healthy(slots=1)
    w.launcher[0].slots_busy = 0
    assert client.lease is not None
    client.lease.abandon(streaming=streaming)
    nxt = w.ask(A)
    await asyncio.sleep(freed_after_s - 0.05)
    assert nxt.waits
    await asyncio.sleep(0.1)
    assert nxt.lease is not None


async def test_an_abandoned_request_of_a_child_that_cannot_be_asked_ends_by_itself() -> None:
    w = World(A)
    client = w.ask(A)
    w.launcher[0].healthy(slots=1)
    w.launcher[0].slots_busy = None
    assert client.lease is not None
    client.lease.abandon()
    nxt = w.ask(A)
    await asyncio.sleep(2.3)
    assert nxt.lease is not None


async def test_nobody_waits_for_abandoned_work_when_the_instance_is_to_stop() -> None:
    w = World(A)
    client = w.ask(A)
    w.launcher[0].healthy(slots=1)
    w.launcher[0].slots_busy = 1
    assert client.lease is not None
    client.lease.abandon()
    w.sup.unload(A.key)
    assert w.states == [State.STOPPING]


async def test_a_deaf_process_is_killed_and_only_then_gives_its_memory_back() -> None:
    w = World(A, B)
    w.ask(A)
    w.launcher[0].healthy()
    w.launcher[0].deaf = True
    for i in list(w.sup._instances.values()):
        for lease in list(i.leases):
            lease.release()
    b = w.ask(B)
    await asyncio.sleep(9.9)
    assert w.launcher[0].signals == ["term"]
    assert len(w.launcher) == 1
    await asyncio.sleep(0.2)
    assert w.launcher[0].signals == ["term", "kill"]
    assert len(w.launcher) == 2
    assert b.waits


async def test_a_reload_drains_what_changed_and_leaves_the_rest_alone() -> None:
    """Traps 82, 83, 86."""
    w = World(profile("a", 3), profile("b", 3))
    a, b = w.catalog.profiles
    busy = [w.ask(a), w.ask(b)]
    for runner in w.launcher.started:
        runner.healthy(slots=1)
    for edit in range(5):
        w.sup.apply_catalog(catalog(replace(a, args=("-m", "/a.gguf", "-c", str(edit))), replace(b, idle_timeout_s=7)))
    assert w.states == [State.DRAINING, State.READY]
    for c in busy:
        c.done()
    await asyncio.sleep(0.2)
    assert [i.key for i in w.sup.instances()] == [b.key]
    assert len(w.launcher) == 2
    await asyncio.sleep(7)
    assert w.sup.instances() == ()  # b got its new timeout live


async def test_requests_waiting_for_a_removed_model_are_told() -> None:
    w = World(A)
    client = w.ask(A)
    w.sup.apply_catalog(catalog(B))
    assert isinstance(client.error, UnknownModelError)
    assert w.states == [State.STOPPING]


async def test_an_edit_gives_a_failing_profile_a_clean_slate() -> None:
    w = World(A)
    for n in range(2):
        w.ask(A)
        w.launcher[n].exit(1, "bad flag")
    assert w.ask(A).error is not None
    fixed = replace(A, args=("-m", "/right.gguf"))
    w.sup.apply_catalog(catalog(fixed))
    assert w.ask(fixed).waits


async def test_late_and_double_reports_change_nothing() -> None:
    w = World(A)
    w.ask(A)
    runner = w.launcher[0]
    runner.healthy()
    runner.healthy()
    runner.exit(1)
    runner.exit(1)
    runner.healthy()
    runner.report(Stalled("late"))
    assert w.metrics.crashes_total == 1
    assert w.sup.instances() == ()


async def test_prewarm_waits_for_readiness_and_tells_failures() -> None:
    w = World(A)
    task = asyncio.get_running_loop().create_task(w.sup.prewarm(A))
    await asyncio.sleep(0)
    w.launcher[0].healthy()
    info = await task
    assert info is not None
    assert info.state is State.READY
    assert info.active == 0
    w.launcher[0].exit(1)
    assert await w.sup.prewarm(A, wait=False) is None
    assert len(w.launcher) == 2
    task = asyncio.get_running_loop().create_task(w.sup.prewarm(A))
    await asyncio.sleep(0)
    w.launcher[1].exit(1, "no memory")
    with pytest.raises(InstanceError, match="no memory"):
        await task


async def test_closing_serves_what_is_there_refuses_the_new_and_stops_all_at_once() -> None:
    """Trap 16 is the loading one."""
    w = World(profile("a", 1), profile("b", 1), profile("c", 1))
    a, b, c = w.catalog.profiles
    running, queued = w.ask(a), w.ask(a)
    w.launcher[0].healthy(slots=1)
    w.ask(b)
    closing = asyncio.get_running_loop().create_task(w.sup.close(grace_s=30))
    await asyncio.sleep(1)
    assert isinstance(w.ask(c).error, DrainingError)
    running.done()
    assert queued.lease is not None
    queued.done()
    await asyncio.sleep(31)
    await closing
    assert w.sup.instances() == ()
    assert all(r.signals == ["term"] for r in w.launcher.started)


async def test_a_request_let_in_before_the_drain_is_sent_again_after_a_crash() -> None:
    w = World(A)
    running = w.ask(A)
    w.launcher[0].healthy(slots=1)
    await asyncio.sleep(1)
    closing = asyncio.get_running_loop().create_task(w.sup.close(grace_s=30))
    await asyncio.sleep(1)
    again = w.ask(A, since=0.0)
    w.launcher[0].exit(-9, "killed")
    running.done()
    w.launcher[1].healthy(slots=1)
    assert again.lease is not None
    again.done()
    await closing


async def test_after_the_grace_nothing_is_started_for_a_request_that_comes_back() -> None:
    """Its connection was cut by the stop itself: to the data plane that looks like a crash."""
    w = World(A)
    running = w.ask(A)
    w.launcher[0].healthy(slots=1)
    back: list[Client] = []

    def cut() -> None:
        running.done()
        back.append(w.ask(A, since=0.0))

    w.launcher[0].endpoint.closers.append(cut)
    await asyncio.sleep(1)
    await w.sup.close(grace_s=3)
    assert isinstance(back[0].error, DrainingError)
    assert len(w.launcher) == 1


async def test_closing_waits_for_those_who_are_about_to_come() -> None:
    w = World(A)
    w.ask(A).ticket.cancel()  # type: ignore[union-attr]
    w.launcher[0].healthy()
    loop = asyncio.get_running_loop()
    start = loop.time()
    await w.sup.close(grace_s=30, busy=lambda: loop.time() < start + 5)
    assert loop.time() - start == pytest.approx(5.1, abs=0.1)


async def test_an_unforeseen_error_at_the_start_is_a_failed_load(caplog: pytest.LogCaptureFixture) -> None:
    w = World(A)
    w.launcher.start_error = OSError(24, "Too many open files")
    assert "Too many open files" in str(w.ask(A).error)
    assert w.sup.instances() == ()
    w.launcher.start_error = None
    assert w.ask(A).waits
    caplog.clear()


async def test_a_long_load_that_fails_counts_as_a_failure_in_a_row() -> None:
    w = World(A)
    for n in range(2):
        w.ask(A)
        await asyncio.sleep(40)
        w.launcher[n].exit(1, "out of memory at the end")
    assert w.sup.failures()[A.key].count == 2


async def test_a_request_abandoned_after_the_look_began_is_not_freed_by_it() -> None:
    w = World(A)
    first, second = w.ask(A), w.ask(A)
    w.launcher[0].healthy(slots=2)
    asked, answer = asyncio.Event(), asyncio.Event()

    async def slow() -> int:
        asked.set()
        await answer.wait()
        return 0

    w.launcher[0].busy_slots = slow  # type: ignore[method-assign]
    assert first.lease is not None
    assert second.lease is not None
    first.lease.abandon()
    await asked.wait()
    second.lease.abandon()
    answer.set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert w.sup.instances()[0].busy == 1


async def test_closing_does_not_outlast_its_grace() -> None:
    w = World(A)
    stuck, queued = w.ask(A), w.ask(A)
    w.launcher[0].healthy(slots=1)
    start = asyncio.get_running_loop().time()
    await w.sup.close(grace_s=3)
    assert asyncio.get_running_loop().time() - start == pytest.approx(3.1, abs=0.05)
    assert isinstance(queued.error, DrainingError)
    stuck.done()


async def test_closing_does_not_wait_for_a_load_that_nobody_asked_to_be_served_from() -> None:
    """Trap 16: a prewarm, waited for or not, is refused; the loading child is stopped at once."""
    w = World(A)
    assert await w.sup.prewarm(A, wait=False) is None
    waiting = asyncio.get_running_loop().create_task(w.sup.prewarm(A))
    await asyncio.sleep(0)
    start = asyncio.get_running_loop().time()
    await w.sup.close(grace_s=30)
    assert asyncio.get_running_loop().time() - start == pytest.approx(0.1, abs=0.05)
    with pytest.raises(DrainingError):
        await waiting


async def test_a_waiter_that_leaves_in_the_middle_of_its_admission_costs_nothing() -> None:
    """Trap 1: counts are right whatever the waiter does when it is told."""
    w = World(A)

    class Hasty(Client):
        def admitted(self, lease: Lease) -> None:
            lease.release()

    hasty = Hasty()
    w.sup.submit(A, hasty, since=0.0, deadline=None)
    patient = w.ask(A)
    w.launcher[0].healthy(slots=1)
    assert patient.lease is not None
    assert w.sup.instances()[0].active == 1
    patient.done()
    assert w.sup.instances()[0].active == w.sup.instances()[0].busy == 0


async def test_a_port_that_was_taken_meanwhile_is_nobodys_failure() -> None:
    """Between the look at a port and the child's bind lies a whole load of whisper-server."""
    w = World(A)
    client, late = w.ask(A), None
    for number in range(3):
        w.launcher[number].exit(1, "couldn't bind", cause=Cause.PORT)
        late = late or w.ask(A)
    assert (client.waits, len(w.launcher), dict(w.sup.failures())) == (True, 4, {})
    w.launcher[3].healthy(slots=2)
    assert client.lease is not None
    assert late is not None
    assert late.lease is not None


async def test_a_port_that_can_never_be_had_is_a_failure_in_the_end() -> None:
    w = World(A)
    client = w.ask(A)
    for number in range(4):
        assert client.waits
        w.launcher[number].exit(1, "couldn't bind", cause=Cause.PORT)
    assert isinstance(client.error, InstanceError)
    assert "couldn't bind" in client.error.message
    assert len(w.launcher) == 4
    w.ask(A)
    w.launcher[4].exit(1, "couldn't bind", cause=Cause.PORT)
    assert len(w.launcher) == 6  # counted anew
