"""Sampling: when it happens, what it says, and what a reader that fails or hangs does to it.

Time is real here, because the reader's thread is; but no test waits for a period to pass, except the one about pace.
"""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from mesh.core.devices import Devices, Gpu
from mesh.engine import telemetry
from mesh.engine.telemetry import Sample, Telemetry
from mesh.host.devices import TelemetryError
from mesh.tasks import spawn

NEVER_S = 3600.0
GPU = Gpu(kind="gpu0", uuid="GPU-0", name="Fake", total_mib=1000, used_mib=0, processes={})
OTHER = replace(GPU, kind="gpu1", uuid="GPU-1", index=1)
BOTH = Devices("nvml", (GPU, OTHER), 64000, 60000)
NO_GPU = Devices("none", (), 64000, 60000)


class Machine:
    """A reader that answers what the test says; it can be held in the middle of a read."""

    def __init__(self, devices: Devices = NO_GPU) -> None:
        self.devices = devices
        self.error: BaseException | None = None
        self.reads = 0
        self.concurrent = 0
        self.most_concurrent = 0
        self.begun = threading.Semaphore(0)
        self.open = threading.Event()
        self.open.set()
        self.thread: threading.Thread | None = None

    def read(self) -> Devices:
        self.thread = threading.current_thread()
        self.concurrent += 1
        self.most_concurrent = max(self.most_concurrent, self.concurrent)
        self.reads += 1
        error = self.error
        try:
            self.begun.release()
            assert self.open.wait(20)
            if error is not None:
                raise error
            return self.devices
        finally:
            self.concurrent -= 1

    async def wait_for_read(self) -> None:
        assert await asyncio.to_thread(self.begun.acquire, timeout=20)


class Samples:
    """What was reported, in order."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Sample] = asyncio.Queue()
        self.error: Exception | None = None

    def __call__(self, sample: Sample) -> None:
        self.queue.put_nowait(sample)
        if self.error is not None:
            raise self.error

    async def next(self) -> Sample:
        async with asyncio.timeout(20):
            return await self.queue.get()


@asynccontextmanager
async def running(
    machine: Machine,
    samples: Samples,
    processes: Callable[[], Mapping[str, int]] = dict,
    *,
    idle_every_s: float = NEVER_S,
    busy_every_s: float = NEVER_S,
    hang_s: float = NEVER_S,
) -> AsyncIterator[Telemetry]:
    subject = Telemetry(
        machine.read, processes, samples, idle_every_s=idle_every_s, busy_every_s=busy_every_s, hang_s=hang_s
    )
    task = spawn(subject.run(), "telemetry")
    try:
        yield subject
    finally:
        task.cancel()
        await asyncio.wait({task})
        subject.close()
        machine.open.set()
        if machine.thread is not None:
            await asyncio.to_thread(machine.thread.join, 20)
            assert not machine.thread.is_alive()
    assert machine.most_concurrent <= 1


async def until(caplog: pytest.LogCaptureFixture, text: str) -> None:
    """Wait for a log line."""
    found = asyncio.Event()

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if text in record.getMessage():
                found.set()

    watch = Watch()
    logging.getLogger("mesh").addHandler(watch)
    try:
        if text not in caplog.text:
            async with asyncio.timeout(20):
                await found.wait()
    finally:
        logging.getLogger("mesh").removeHandler(watch)


@pytest.fixture(autouse=True)
def _all_logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mesh")


@pytest.fixture
def cat() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        yield process


class TestPace:
    async def test_it_samples_at_once_and_off_the_loop(self) -> None:
        """trap 108"""
        machine, samples = Machine(), Samples()
        before = asyncio.get_running_loop().time()
        async with running(machine, samples):
            sample = await samples.next()
        assert sample.devices == NO_GPU
        assert before <= sample.started_at <= asyncio.get_running_loop().time()
        assert machine.thread is not None
        assert machine.thread.daemon
        assert machine.thread is not threading.main_thread()
        assert machine.reads == 1

    async def test_hurry_samples_again_and_many_at_once_only_once(self) -> None:
        machine, samples = Machine(), Samples()
        async with running(machine, samples) as subject:
            await samples.next()
            for _ in range(10):
                subject.hurry()
            asked_at = asyncio.get_running_loop().time()
            assert (await samples.next()).started_at >= asked_at
        assert machine.reads == 2

    async def test_a_sample_under_way_does_not_answer_a_hurry(self) -> None:
        """trap 43: its figures may be from before what the caller wants to see."""
        machine, samples = Machine(), Samples()
        async with running(machine, samples) as subject:
            await machine.wait_for_read()
            await samples.next()
            machine.open.clear()
            subject.hurry()
            await machine.wait_for_read()
            asked_at = asyncio.get_running_loop().time()
            subject.hurry()
            machine.open.set()
            assert (await samples.next()).started_at < asked_at
            assert (await samples.next()).started_at >= asked_at

    async def test_busy_samples_at_once_and_then_often(self) -> None:
        machine, samples = Machine(), Samples()
        async with running(machine, samples, busy_every_s=0.05) as subject:
            await samples.next()
            subject.set_busy(True)
            first, second, third = [await samples.next() for _ in range(3)]
            assert second.started_at - first.started_at >= 0.049
            assert third.started_at - second.started_at >= 0.049
            subject.set_busy(True)
            subject.set_busy(False)
            reads = machine.reads
            subject.hurry()
            await samples.next()
        assert machine.reads <= reads + 2

    async def test_busy_ends_a_long_pause(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(telemetry, "MIN_GAP_S", 0)
        subject = Telemetry(Machine().read, dict, Samples(), idle_every_s=NEVER_S)
        pause = spawn(subject._pause(0.0), "pause")
        for _ in range(5):
            await asyncio.sleep(0)
        subject.set_busy(True)
        async with asyncio.timeout(5):
            await pause

    @pytest.mark.looptime
    async def test_a_slow_read_slows_the_pace(self) -> None:
        """Reading the page tables of a huge process is work; a tenth of the time is the most it takes."""
        loop = asyncio.get_running_loop()
        subject = Telemetry(Machine().read, dict, Samples(), idle_every_s=0.5)
        for took_s, paused_s in ((0.01, 0.49), (0.2, 1.8), (60.0, telemetry.SLOW_S / telemetry.MAX_SHARE - 1)):
            before = loop.time()
            await subject._pause(took_s)
            assert loop.time() - before == pytest.approx(paused_s, abs=0.01)
        subject.hurry()
        before = loop.time()
        await subject._pause(0.2)
        assert loop.time() - before == pytest.approx(0.2, abs=0.01)


class TestTrouble:
    async def test_a_failed_read_reports_nothing_and_is_logged_once(self, caplog: pytest.LogCaptureFixture) -> None:
        """traps 12, 44"""
        machine, samples = Machine(BOTH), Samples()
        async with running(machine, samples) as subject:
            await samples.next()
            machine.error = TelemetryError("no /proc")
            for _ in range(3):
                await machine.wait_for_read()
                subject.hurry()
            await machine.wait_for_read()
            machine.error = None
            subject.hurry()
            await samples.next()
            await until(caplog, "memory figures are read again")
        assert samples.queue.empty()
        assert caplog.text.count("no new memory figures") == 1
        assert "no /proc" in caplog.text
        assert "Traceback" not in caplog.text

    async def test_whatever_a_driver_raises_ends_nothing(self, caplog: pytest.LogCaptureFixture) -> None:
        """trap 12"""
        machine, samples = Machine(), Samples()
        machine.error = RuntimeError("a bug")
        async with running(machine, samples) as subject:
            await until(caplog, "no new memory figures")
            machine.error = None
            subject.hurry()
            assert (await samples.next()).devices == NO_GPU
        assert "Traceback" in caplog.text

    async def test_a_report_that_raises_ends_nothing(self, caplog: pytest.LogCaptureFixture) -> None:
        """trap 12"""
        machine, samples = Machine(), Samples()
        samples.error = ValueError("a bug")
        async with running(machine, samples) as subject:
            for _ in range(3):
                await samples.next()
                subject.hurry()
        assert caplog.text.count("no new memory figures") == 1

    async def test_a_read_that_hangs_is_logged_and_waited_for(self, caplog: pytest.LogCaptureFixture) -> None:
        """trap 44"""
        machine, samples = Machine(), Samples()
        async with running(machine, samples, hang_s=0.01) as subject:
            await samples.next()
            machine.open.clear()
            subject.hurry()
            await until(caplog, "the driver does not answer")
            subject.hurry()
            machine.open.set()
            await samples.next()
            await until(caplog, "memory figures are read again")
            await samples.next()
        assert caplog.text.count("the driver does not answer") == 1

    async def test_a_gpu_that_cannot_be_read_keeps_its_last_good_figures(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        """trap 44"""
        machine, samples = Machine(BOTH), Samples()
        async with running(machine, samples) as subject:
            assert (await samples.next()).stale == frozenset()
            moved = replace(OTHER, used_mib=500)
            machine.devices = replace(BOTH, gpus=(moved,), problems=("GPU 0 is ill",))
            for _ in range(2):
                subject.hurry()
                sample = await samples.next()
                assert sample.devices.gpus == (GPU, moved)
                assert sample.stale == {"gpu0"}
            machine.devices = Devices("nvml", (), 64000, 50000, ("no answer",))
            subject.hurry()
            sample = await samples.next()
            assert sample.devices.gpus == (GPU, moved)
            assert sample.devices.ram_available_mib == 50000
            assert sample.stale == {"gpu0", "gpu1"}
            machine.devices = replace(BOTH, gpus=(OTHER,))  # taken out: no problem, and no GPU
            subject.hurry()
            sample = await samples.next()
            assert (sample.devices.gpus, sample.stale) == ((OTHER,), frozenset())
            await until(caplog, "no longer: no answer")
        assert [line.count("GPU 0 is ill") for line in caplog.messages].count(
            1
        ) == 2  # once when it came, once when it went

    async def test_what_instances_use_of_a_gpu_that_cannot_be_read_is_the_last_good_figure_too(self) -> None:
        """trap 44"""
        mine = replace(GPU, processes={os.getpid(): 700})
        machine, samples = Machine(replace(BOTH, gpus=(mine, OTHER))), Samples()
        async with running(machine, samples, lambda: {"m-1": os.getpid()}) as subject:
            assert (await samples.next()).usage["m-1"].gpu_mib == {"gpu0": 700}
            machine.devices = replace(BOTH, gpus=(OTHER,), problems=("GPU 0 is ill",))
            subject.hurry()
            assert (await samples.next()).usage["m-1"].gpu_mib == {"gpu0": 700}

    async def test_a_process_that_ends_is_not_in_the_next_sample(self, cat: subprocess.Popen[bytes]) -> None:
        machine, samples = Machine(), Samples()
        async with running(machine, samples, lambda: {"m-1": cat.pid, "m-2": os.getpid()}) as subject:
            assert set((await samples.next()).usage) == {"m-1", "m-2"}
            cat.communicate()
            subject.hurry()
            assert set((await samples.next()).usage) == {"m-2"}

    async def test_a_cancelled_run_does_not_wait_for_a_read_that_hangs(self) -> None:
        machine, samples = Machine(), Samples()
        machine.open.clear()
        subject = Telemetry(machine.read, dict, samples)
        task = spawn(subject.run(), "telemetry")
        await machine.wait_for_read()
        task.cancel()
        await asyncio.wait({task}, timeout=5)
        assert task.cancelled()
        subject.close()
        machine.open.set()
        assert machine.thread is not None
        await asyncio.to_thread(machine.thread.join, 20)
        assert samples.queue.empty()


class TestNews:
    @pytest.mark.parametrize(
        ("devices", "text"),
        [
            (NO_GPU, "no GPU found"),
            (BOTH, "GPUs: gpu0 Fake (1000 MiB), gpu1 Fake (1000 MiB)"),
            (replace(BOTH, gpus=(replace(GPU, unified=True),)), "GPUs: gpu0 Fake (uses main memory)"),
            (Devices("amd", (replace(GPU, processes=None),), 1, 1), "what each process uses is not known"),
        ],
    )
    async def test_the_machine_is_described_once(
        self, caplog: pytest.LogCaptureFixture, devices: Devices, text: str
    ) -> None:
        machine, samples = Machine(devices), Samples()
        async with running(machine, samples) as subject:
            for _ in range(3):
                await samples.next()
                subject.hurry()
        assert caplog.text.count(text) == 1
