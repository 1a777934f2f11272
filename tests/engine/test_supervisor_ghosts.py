"""GPU memory of processes that are gone, and what of the machine others use, as the supervisor counts it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest

from mesh.core.devices import Devices, Gpu
from mesh.core.resources import Resources
from mesh.engine.ghosts import LIMIT_S
from mesh.engine.telemetry import Sample, Usage
from mesh.errors import InstanceError
from tests.engine.sampled import Hurried, gpu, machine, old_figures, on_one_gpu, sample
from tests.engine.supervised import World, profile

pytestmark = pytest.mark.looptime

A, B, C = profile("a", 8), profile("b", 8), profile("c", 2)


@pytest.fixture(autouse=True)
def no_bugs(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The supervisor logs a bug and goes on; in a test it is a failure."""
    yield
    assert not [r for r in caplog.get_records("call") if "bug" in r.getMessage() or "failed on" in r.getMessage()]


async def test_after_an_exit_the_next_load_waits_until_the_driver_shows_the_memory_back() -> None:
    """Trap 43."""
    w = on_one_gpu(A, B, gpu_mib=1000)
    big_a, big_b = replace(A, estimate=Resources.of(vram_mib=800)), replace(B, estimate=Resources.of(vram_mib=800))
    w.sup.apply_catalog(type(w.catalog)((big_a, big_b), {p.key: p for p in (big_a, big_b)}))
    first = w.ask(big_a)
    w.launcher[0].healthy()
    id_a = w.sup.instances()[0].id
    await asyncio.sleep(0.1)
    sample(w, machine(gpu(0, 1000, 800, 800)), **{id_a: Usage(10, {"gpu0": 800}, 10)})
    first.done()
    w.ask(big_b)
    await asyncio.sleep(0.2)  # a is gone now
    assert w.states == []
    assert isinstance(w.sup.telemetry, Hurried)
    assert (w.sup.telemetry.hurried, w.sup.telemetry.busy) == (2, True)  # as it first served, and as it left
    assert len(w.launcher) == 1  # its memory is not back
    sample(w, machine(gpu(0, 1000, used_mib=600)))
    assert len(w.launcher) == 1
    old_figures(w, machine(gpu(0, 1000)))  # they prove nothing
    assert len(w.launcher) == 1
    assert w.sup.memory_report().used.mib["gpu0"] == 800
    sample(w, machine(gpu(0, 1000, used_mib=100)))
    assert len(w.launcher) == 2


async def test_memory_that_never_comes_back_is_waited_for_only_so_long() -> None:
    """Trap 43: then it counts as foreign, and what fits beside it starts."""
    w = on_one_gpu(A, C, gpu_mib=1000)
    big = replace(A, estimate=Resources.of(vram_mib=800))
    w.sup.apply_catalog(type(w.catalog)((big, C), {p.key: p for p in (big, C)}))
    first = w.ask(big)
    w.launcher[0].healthy()
    id_a = w.sup.instances()[0].id
    await asyncio.sleep(0.1)
    sample(w, machine(gpu(0, 1000, 800, 800)), **{id_a: Usage(10, {"gpu0": 800}, 10)})
    first.done()
    w.sup.unload(None)
    await asyncio.sleep(0.2)
    sample(w, machine(gpu(0, 1000, used_mib=800)))
    again = w.ask(big)
    await asyncio.sleep(LIMIT_S)
    assert len(w.launcher) == 1
    assert again.waits
    assert w.sup.memory_report().foreign.mib == {"gpu0": 800}
    sample(w, machine(gpu(0, 1000)))
    assert len(w.launcher) == 2


async def test_one_that_the_driver_does_not_see_counts_as_charged_not_as_foreign() -> None:
    """In a container the driver lists processes under pids that nobody here knows."""
    w = on_one_gpu(C, gpu_mib=1000)
    w.ask(C)
    w.launcher[0].healthy()
    id_c = w.sup.instances()[0].id
    await asyncio.sleep(1)
    sample(w, machine(gpu(0, 1000, used_mib=2)), **{id_c: Usage(7, None, 7)})
    assert w.sup.memory_report().foreign.mib == {}


async def test_two_that_leave_between_two_samples_are_both_seen_to_be_gone() -> None:
    """Trap 43: what others used before is known from a time when neither was gone."""
    one, two = profile("one", 300), profile("two", 300)
    w = on_one_gpu(one, two, gpu_mib=1000)
    for p in (one, two):
        w.ask(p)
    for runner in w.launcher.started:
        runner.healthy()
    ids = [i.id for i in w.sup.instances()]
    await asyncio.sleep(1)
    sample(w, machine(gpu(0, 1000, 700, 300, 300)), **{id_: Usage(7, {"gpu0": 300}, 7) for id_ in ids})
    for runner in w.launcher.started:
        runner.exit(-9, "killed")
        await asyncio.sleep(0.1)
    assert w.sup.memory_report().used.mib["gpu0"] == 600
    sample(w, machine(gpu(0, 1000, used_mib=100)))
    assert w.sup.memory_report().used.mib == {}


async def test_a_ghost_leaves_by_the_clock_though_no_sample_comes() -> None:
    """Traps 43, 44: a driver that hangs must not keep memory that nobody uses."""
    big_a, big_b = profile("a", 800), profile("b", 800)
    w = on_one_gpu(big_a, big_b, gpu_mib=1000)
    first = w.ask(big_a)
    w.launcher[0].healthy()
    id_a = w.sup.instances()[0].id
    await asyncio.sleep(0.1)
    sample(w, machine(gpu(0, 1000, 800, 800)), **{id_a: Usage(10, {"gpu0": 800}, 10)})
    first.done()
    b = w.ask(big_b)
    await asyncio.sleep(LIMIT_S - 1)
    assert len(w.launcher) == 1
    await asyncio.sleep(2)
    assert len(w.launcher) == 2
    assert b.waits


async def test_a_process_that_never_was_holds_nothing() -> None:
    w = on_one_gpu(A)
    w.launcher.start_error = InstanceError("cannot be started")
    w.launcher.pid = None
    w.ask(A)
    assert w.sup.memory_report().used.mib == {}


async def test_a_sample_from_around_an_exit_does_not_make_the_dead_ones_memory_foreign() -> None:
    """RAM is read before the processes are: it may show one there and not here."""
    w = World(A, C, vram=None, devices=machine(), ram=60_000)
    telemetry = w.sup.telemetry = Hurried()
    w.ask(C)
    w.launcher[0].healthy()
    began = asyncio.get_running_loop().time()
    await asyncio.sleep(0.1)
    w.launcher[0].exit(-9, "killed")
    assert telemetry.hurried == 1
    w.sup.sampled(Sample(began, replace(machine(), ram_available_mib=20_000), {}))
    assert w.sup.memory_report().foreign.mib == {}
    await asyncio.sleep(0.1)
    sample(w, replace(machine(), ram_available_mib=20_000))
    assert w.sup.memory_report().foreign.mib == {"ram": 40_000}


async def test_an_unseen_load_is_not_counted_as_foreign_too() -> None:
    """AMD, containers: the driver does not list who uses what; what a GPU's use grew by is the load's."""
    w = on_one_gpu(A, gpu_mib=1000)
    sample(w, machine(gpu(0, 1000, used_mib=300)))
    w.ask(A)
    await asyncio.sleep(0.1)
    id_a = w.sup.instances()[0].id
    sample(w, machine(gpu(0, 1000, used_mib=305)), **{id_a: Usage(1, None, 1)})
    assert w.sup.memory_report().foreign.mib == {"gpu0": 300}


async def test_where_the_driver_lists_nobody_memory_is_back_when_the_use_has_fallen_and_stays() -> None:
    """Trap 43, on AMD: charged 800, used 500, beside a desktop of 300."""
    big_a, big_b = profile("a", 800), profile("b", 700)
    w = on_one_gpu(big_a, big_b, gpu_mib=1200)

    def unlisted(used_mib: int) -> Devices:
        return machine(replace(gpu(0, 1200, used_mib), processes=None))

    first = w.ask(big_a)
    w.launcher[0].healthy()
    id_a = w.sup.instances()[0].id
    await asyncio.sleep(0.1)
    sample(w, unlisted(800), **{id_a: Usage(1, None, 1)})
    first.done()
    w.ask(big_b)
    await asyncio.sleep(0.2)
    for used_mib in (800, 800, 500, 500, 300, 300):
        sample(w, unlisted(used_mib))
        assert len(w.launcher) == 1, used_mib
        await asyncio.sleep(0.1)
    await asyncio.sleep(0.5)
    sample(w, unlisted(300))
    assert len(w.launcher) == 2


async def test_hidden_memory_of_a_unified_gpu_is_counted_once() -> None:
    """Trap 48: an APU shows its children's GPU memory nowhere but in what is left of RAM."""
    apu = Gpu("gpu0", "GPU-0", "APU", 0, 0, None, unified=True)
    c = replace(C, estimate=Resources.of(ram_mib=30_000))
    w = World(c, vram=None, devices=machine(apu), ram=60_000)
    w.sup.telemetry = Hurried()
    w.ask(c)
    w.launcher[0].healthy()
    id_c = w.sup.instances()[0].id
    await asyncio.sleep(0.1)
    sample(w, replace(machine(apu), ram_available_mib=33_000), **{id_c: Usage(1_000, {}, 900)})
    assert w.sup.memory_report().foreign.mib == {}


@pytest.mark.parametrize("listed", [{}, {4711_000: 800}])
async def test_in_a_container_a_list_without_our_processes_proves_nothing(listed: dict[int, int | None]) -> None:
    """Trap 43: the driver lists nobody, or only pids of the host."""
    big_a, big_b = profile("a", 800), profile("b", 800)
    w = on_one_gpu(big_a, big_b, gpu_mib=1000)

    def seen(used_mib: int, processes: dict[int, int | None]) -> Devices:
        return machine(replace(gpu(0, 1000, used_mib), processes=processes))

    first = w.ask(big_a)
    w.launcher[0].healthy()
    id_a = w.sup.instances()[0].id
    await asyncio.sleep(0.1)
    sample(w, seen(800, listed), **{id_a: Usage(1, None, 1)})
    first.done()
    w.ask(big_b)
    await asyncio.sleep(0.2)
    for _ in range(10):
        sample(w, seen(800, listed))
        assert len(w.launcher) == 1
        await asyncio.sleep(0.1)
    for _ in range(4):
        sample(w, seen(0, {}))
        assert len(w.launcher) == 1
        await asyncio.sleep(0.1)
    await asyncio.sleep(0.2)
    sample(w, seen(0, {}))
    assert len(w.launcher) == 2


async def test_one_that_dies_before_it_takes_anything_is_not_waited_for() -> None:
    big, small = profile("a", 800), profile("b", 800)
    w = on_one_gpu(big, small, gpu_mib=1000)
    w.ask(big)
    w.launcher[0].exit(1, "bad argument")
    w.ask(small)
    assert len(w.launcher) == 2
