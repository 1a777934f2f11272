"""What the supervisor does with what it is told of memory: telemetry, footprints, loads that ran out of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest

from mesh.core.exits import Cause
from mesh.core.footprint import Footprint, Source
from mesh.core.lifecycle import State
from mesh.core.placement import Need
from mesh.engine.memory_report import Fit
from mesh.engine.telemetry import Usage
from mesh.engine.trust import DOUBTED_AFTER
from mesh.errors import EngineMissingError, InstanceError, QueueTimeoutError, TooLargeError
from tests.engine.sampled import Figures, gpu, machine, on_one_gpu, sample, used
from tests.engine.supervised import World, profile

pytestmark = pytest.mark.looptime

A, B, C = profile("a", 8), profile("b", 8), profile("c", 2)


@pytest.fixture(autouse=True)
def no_bugs(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The supervisor logs a bug and goes on; in a test it is a failure."""
    yield
    assert not [r for r in caplog.get_records("call") if "bug" in r.getMessage() or "failed on" in r.getMessage()]


async def test_nobody_is_evicted_for_arguments_that_are_not_accepted() -> None:
    """A bad argument evicts nobody and fails fast, at the first attempt too."""
    w = World(A, B, trusted=False)
    w.launcher.complaint = "error: invalid argument: --bogus"
    first = w.ask(A)
    w.launcher[0].healthy()
    first.done()
    asked = w.ask(B)
    await asyncio.sleep(1)
    assert w.launcher.vetted == ["b:default"]
    assert isinstance(asked.error, InstanceError)
    assert "--bogus" in asked.error.message
    assert w.states == [State.READY]
    assert len(w.launcher) == 1


async def test_arguments_are_looked_over_once_and_only_if_others_have_to_go() -> None:
    w = World(A, B, C, trusted=False)
    w.ask(C)
    assert w.launcher.vetted == []
    w.launcher[0].healthy()
    w.ask(A)
    assert w.launcher.vetted == []  # it fits beside C
    w.launcher[1].healthy()
    b = w.ask(B)
    await asyncio.sleep(0.05)
    assert w.launcher.vetted == ["b:default"]
    w.ask(B)
    assert b.waits
    await asyncio.sleep(16)
    assert w.launcher.vetted == ["b:default"]


async def test_a_file_that_is_broken_is_told_before_anybody_goes() -> None:
    figures = Figures({"b:default": Footprint(Need(split_mib=8), Source.COOKBOOK, problem="/b.gguf is truncated")})
    w = World(A, B, trusted=False, footprints=figures)
    w.ask(A).ticket.cancel()  # type: ignore[union-attr]
    a = w.ask(A)
    w.launcher[0].healthy()
    a.done()
    b = w.ask(B)
    await asyncio.sleep(1)
    assert isinstance(b.error, InstanceError)
    assert "/b.gguf is truncated" in b.error.message
    assert (w.states, w.launcher.vetted) == ([State.READY], [])


async def test_a_load_that_runs_out_of_memory_gets_what_idles_and_one_more_try() -> None:
    """Trap 46."""
    w = World(C, B, vram=10)
    idle = w.ask(C)
    w.launcher[0].healthy()
    idle.done()
    b = w.ask(B)
    assert len(w.launcher) == 2  # the ledger says that both fit
    w.launcher[1].exit(1, "cudaMalloc failed: out of memory", cause=Cause.MEMORY)
    assert b.waits
    assert w.launcher[0].signals == ["term"]
    await asyncio.sleep(0.2)
    assert len(w.launcher) == 3
    w.launcher[2].healthy()
    assert b.lease is not None
    assert w.sup.failures() == {}


async def test_the_second_time_it_fails_fast_with_the_log() -> None:
    """Trap 46."""
    w = World(C, B, vram=10)
    idle = w.ask(C)
    w.launcher[0].healthy()
    idle.done()
    b = w.ask(B)
    w.launcher[1].exit(1, "out of memory", "log line", cause=Cause.MEMORY)
    await asyncio.sleep(0.2)
    w.launcher[2].exit(1, "out of memory", "log line", cause=Cause.MEMORY)
    assert isinstance(b.error, InstanceError)
    assert "log line" in b.error.message
    assert len(w.launcher) == 3


async def test_with_nobody_to_evict_it_fails_at_once() -> None:
    w = World(B)
    b = w.ask(B)
    w.launcher[0].exit(1, "out of memory", cause=Cause.MEMORY)
    assert isinstance(b.error, InstanceError)
    assert len(w.launcher) == 1


async def test_a_usage_error_evicts_nobody_and_is_not_tried_again() -> None:
    w = World(C, B, vram=10)
    idle = w.ask(C)
    w.launcher[0].healthy()
    idle.done()
    b = w.ask(B)
    w.launcher[1].exit(1, "invalid argument", cause=Cause.USAGE)
    assert isinstance(b.error, InstanceError)
    assert w.launcher[0].signals == []


async def test_a_foreign_process_is_counted_and_waited_for() -> None:
    """Trap 42: 8 fit in 10, but not while somebody else has 5; the request waits and says for whom."""
    w = on_one_gpu(A)
    sample(w, machine(gpu(0, 10, used_mib=5)))
    late, patient = w.ask(A, 1.0), w.ask(A)
    await asyncio.sleep(1.1)
    assert isinstance(late.error, QueueTimeoutError)
    assert "other programs (gpu0 3 MiB)" not in late.error.message
    assert "other programs (gpu0 5 MiB)" in late.error.message
    assert late.error.details is not None
    assert late.error.details["need_mib"] == {"vram": 8}
    assert late.error.details["foreign_mib"] == {"gpu0": 5}
    sample(w, machine(gpu(0, 10, used_mib=1)))
    assert len(w.launcher) == 1
    w.launcher[0].healthy()
    assert patient.lease is not None


async def test_what_is_larger_than_the_gpu_is_refused_at_once_with_numbers() -> None:
    """Trap 49."""
    w = on_one_gpu(A, gpu_mib=7)
    a = w.ask(A)
    assert isinstance(a.error, TooLargeError)
    assert "vram 8 MiB" in a.error.message
    assert "gpu0 7 MiB" in a.error.message
    assert a.error.details is not None
    assert a.error.details["capacity_mib"] == {"gpu0": 7}


async def test_one_that_uses_more_than_it_was_given_is_charged_what_it_uses() -> None:
    """While it loads, too: the larger of live, learned and estimate."""
    w = on_one_gpu(C, gpu_mib=100)
    w.ask(C)
    assert used(w) == {"gpu0": 2, "vram": 2}
    id_c = w.sup.instances()[0].id
    await asyncio.sleep(1)
    sample(w, machine(gpu(0, 100, used_mib=1)), **{id_c: Usage(7, {"gpu0": 1}, 7)})
    assert used(w) == {"gpu0": 2, "ram": 7, "vram": 2}
    sample(w, machine(gpu(0, 100, used_mib=30)), **{id_c: Usage(7, {"gpu0": 30}, 7)})
    assert used(w) == {"gpu0": 30, "ram": 7, "vram": 30}
    assert w.sup.memory_report().foreign.mib == {}


async def test_only_what_has_served_is_learned_from() -> None:
    figures = Figures()
    w = on_one_gpu(C, gpu_mib=1000, figures=figures)
    c = w.ask(C)
    w.launcher[0].healthy()
    id_c = w.sup.instances()[0].id
    usage = {id_c: Usage(70, {"gpu0": 3}, 60)}
    await asyncio.sleep(1)
    sample(w, machine(gpu(0, 1000, used_mib=3)), **usage)
    assert figures.learned == []
    c.done()
    sample(w, machine(gpu(0, 1000, used_mib=3)), **usage)
    sample(w, machine(gpu(0, 1000, used_mib=3)), **usage)
    now = ("c:default", 70, {"gpu0": 3}, False)
    assert figures.learned == [("c:default", 70, {"gpu0": 3}, True), now, now]
    assert w.metrics.hash(C.args_hash).peak_sysmem_mb == 70


async def test_instances_that_share_mapped_weights_are_not_learned_from() -> None:
    """Trap 45: each shows only its part of them."""
    figures = Figures()
    twin = replace(C, key="twin:default", id="twin")
    w = on_one_gpu(C, twin, gpu_mib=1000, figures=figures)
    clients = [w.ask(C), w.ask(twin)]
    for runner, client in zip(w.launcher.started, clients, strict=True):
        runner.healthy()
        client.done()
    await asyncio.sleep(1)
    usage = {i.id: Usage(70, {"gpu0": 3}, 60) for i in w.sup.instances()}
    sample(w, machine(gpu(0, 1000, used_mib=6)), **usage)
    assert figures.learned == []


async def test_what_was_learned_is_what_a_running_one_is_charged() -> None:
    figures = Figures()
    w = on_one_gpu(A, C, figures=figures)
    a = w.ask(A)
    w.launcher[0].healthy()
    a.done()
    assert used(w)["gpu0"] == 8
    figures.known["a:default"] = Footprint(Need(split_mib=5), Source.LEARNED)
    sample(w, machine(gpu(0, 10, used_mib=5)))
    assert used(w)["gpu0"] == 5
    assert w.sup.memory_report().holders[0].source is Source.LEARNED


async def test_a_model_whose_size_is_being_looked_up_waits_for_it_and_nobody_else_does() -> None:
    figures = Figures({"a:default": None})
    w = on_one_gpu(A, C, figures=figures)
    a, c = w.ask(A), w.ask(C)
    assert [r.profile.key for r in w.launcher.started] == ["c:default"]
    figures.known["a:default"] = Footprint(Need(split_mib=8), Source.ESTIMATED)
    w.sup.footprints_changed()
    assert [r.profile.key for r in w.launcher.started] == ["c:default", "a:default"]
    assert (a.error, c.error) == (None, None)


async def test_each_instance_is_told_its_gpus_and_their_shares() -> None:
    devices = machine(gpu(0, 10), gpu(1, 6), gpu(2, 6))
    w = World(A, B, C, vram=None, devices=devices)
    for p in (A, C, B):
        w.ask(p)
    told = [([g.kind for g in x.gpus or ()], x.shares_mib) for x in w.launcher.assignments]
    assert told == [(["gpu0"], (8,)), (["gpu0"], (2,)), (["gpu1", "gpu2"], (4, 4))]
    assert used(w) == {"gpu0": 10, "gpu1": 4, "gpu2": 4, "vram": 18}


async def test_what_would_fit_and_what_would_have_to_go_is_told() -> None:
    figures = Figures({"d:default": None})
    big, unknown = profile("big", 20), profile("d")
    w = on_one_gpu(A, B, C, big, unknown, figures=figures)
    a = w.ask(A)
    w.launcher[0].healthy()
    busy = {f.key: (f.fit, f.evict) for f in await w.sup.model_fits()}
    a.done()
    idle = {f.key: (f.fit, f.evict) for f in await w.sup.model_fits()}
    id_a = w.sup.instances()[0].id
    assert busy == {
        "a:default": (Fit.LOADED, ()),
        "b:default": (Fit.WAITS, (id_a,)),
        "c:default": (Fit.NOW, ()),
        "big:default": (Fit.NEVER, ()),
        "d:default": (Fit.UNKNOWN, ()),
    }
    assert idle == {**busy, "b:default": (Fit.AFTER_EVICTION, (id_a,))}


async def test_one_that_waits_keeps_its_turn_while_its_size_is_looked_up_again() -> None:
    """Else a competitor's every look at its file would give the incumbent its requests back, for ever (trap 35)."""
    figures = Figures()
    w = on_one_gpu(A, B, figures=figures)
    served = w.ask(A)
    w.launcher[0].healthy()
    await asyncio.sleep(A.min_tenure_s)
    backlog, b = w.ask(A), w.ask(B)
    figures.stale.add("b:default")
    served.done()
    assert backlog.waits  # A is held for B
    await asyncio.sleep(0.2)
    sample(w, machine(gpu(0, 10)))
    assert w.states == []
    assert (len(w.launcher), b.waits) == (1, True)  # not on an old figure
    figures.stale.clear()
    w.sup.footprints_changed()
    assert w.launcher[1].profile.key == "b:default"


async def test_a_retry_is_only_for_those_who_waited_for_it() -> None:
    """Trap 46: who comes an hour later starts afresh, and evicts nobody where there is room."""
    w = World(C, B, vram=10)
    idle = w.ask(C)
    w.launcher[0].healthy()
    idle.done()
    b = w.ask(B)
    b.ticket.cancel()  # type: ignore[union-attr]
    w.launcher[1].exit(1, "out of memory", cause=Cause.MEMORY)
    assert w.launcher[0].signals == []
    w.ask(B)
    assert (w.launcher[0].signals, len(w.launcher)) == ([], 3)


async def test_one_that_cannot_even_be_started_evicts_nobody() -> None:
    w = World(A, B, trusted=False)
    a = w.ask(A)
    w.launcher[0].healthy()
    a.done()
    w.launcher.vet_error = EngineMissingError("no llama-server found")
    b = w.ask(B)
    await asyncio.sleep(1)
    assert isinstance(b.error, EngineMissingError)
    assert w.states == [State.READY]


async def test_a_model_that_never_loads_does_not_evict_others_again_and_again() -> None:
    w = World(A, B, trusted=False)
    for _ in range(4):
        a = w.ask(A)
        await asyncio.sleep(1)
        if a.lease is None:
            w.launcher[-1].healthy()
        a.done()
        b = w.ask(B)
        await asyncio.sleep(1)
        if w.launcher[-1].profile.key == "b:default":
            w.launcher[-1].exit(1, "unknown architecture")
        assert isinstance(b.error, InstanceError)
        await asyncio.sleep(70)
    assert w.metrics.evictions_total == DOUBTED_AFTER
    assert "failed to start: 2 times in a row" in str(b.error)


async def test_a_load_that_always_runs_out_of_memory_does_not_evict_others_again_and_again() -> None:
    w = World(C, B, vram=10)
    for _ in range(6):
        idle = w.ask(C)
        await asyncio.sleep(0.2)
        if idle.lease is None:
            w.launcher[-1].healthy()
        idle.done()
        b = w.ask(B)
        while b.waits:
            if w.launcher[-1].profile.key == "b:default":
                w.launcher[-1].exit(1, "out of memory", cause=Cause.MEMORY)
            await asyncio.sleep(0.2)
        await asyncio.sleep(70)
    assert w.metrics.evictions_total == DOUBTED_AFTER


async def test_one_that_was_first_used_late_is_learned_from_as_it_was_when_it_became_ready() -> None:
    figures = Figures()
    w = on_one_gpu(C, gpu_mib=1000, figures=figures)
    c = w.ask(C)
    w.launcher[0].healthy()
    id_c = w.sup.instances()[0].id
    await asyncio.sleep(1)
    sample(w, machine(gpu(0, 1000)), **{id_c: Usage(70, {}, 60)})
    await asyncio.sleep(60)
    c.done()
    sample(w, machine(gpu(0, 1000)), **{id_c: Usage(90, {}, 80)})
    assert [(ram, first) for _, ram, _, first in figures.learned] == [(70, True), (90, False)]
