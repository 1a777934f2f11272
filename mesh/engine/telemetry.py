"""Samples of the machine's memory and of what each instance uses of it, taken off the event loop (trap 108).

Owns the pace of sampling, the thread that reads, and the last good figures. Never decides what they mean: each sample
goes to ``report``, on the loop, with the time before its read began, so that whoever waits for memory to return can
tell a sample that is newer than an exit from one that is not (trap 43).

A read that fails, or hangs in the driver, costs nothing but news: the last good figures stay (trap 44). That is why the
thread is our own daemon: the default executor has requests to serve, and would be joined when the process ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

from mesh.core.devices import Devices, Gpu
from mesh.engine.usage import Usage, read_usage
from mesh.host.devices import TelemetryError

__all__ = ["Sample", "Telemetry", "Usage"]

_log = logging.getLogger("mesh.engine.telemetry")

#: while something loads or stops, memory moves within seconds
BUSY_EVERY_S: Final = 0.5
IDLE_EVERY_S: Final = 5.0
#: samples that were asked for come no faster than this
MIN_GAP_S: Final = 0.02
#: reading takes at most this share of the time: reading the pages of a 100 GiB process takes half a second
MAX_SHARE: Final = 0.1
#: a read that takes longer is logged; it cannot be ended, only waited for
HANG_S: Final = 10.0
#: a slow read slows the pace down no more than one of this length would
SLOW_S: Final = 1.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sample:
    """The machine at one moment after ``started_at``."""

    started_at: float  #: loop time before the read began
    devices: Devices
    usage: Mapping[str, Usage] = field(default_factory=dict)  #: by instance id; a process that is gone is not in it
    stale: frozenset[str] = frozenset()  #: the GPUs whose figures are older, because they could not be read


class Telemetry:
    """Takes samples as long as ``run`` runs. All methods are for the loop's thread."""

    def __init__(
        self,
        read: Callable[[], Devices],
        processes: Callable[[], Mapping[str, int]],
        report: Callable[[Sample], None],
        *,
        busy_every_s: float = BUSY_EVERY_S,
        idle_every_s: float = IDLE_EVERY_S,
        hang_s: float = HANG_S,
    ) -> None:
        self._read = read
        self._processes = processes
        self._report = report
        self._busy_every_s, self._idle_every_s, self._hang_s = busy_every_s, idle_every_s, hang_s
        self._busy = False
        self._wanted = asyncio.Event()
        self._reader = _Reader()
        self._last: Devices | None = None
        self._news = _News()

    def hurry(self) -> None:
        """Sample again at once; after the present sample, if one is under way."""
        self._wanted.set()

    def set_busy(self, busy: bool) -> None:
        """Sample often while something loads or stops."""
        if busy and not self._busy:
            self._wanted.set()
        self._busy = busy

    def close(self) -> None:
        """End the thread; one that hangs in the driver ends with this process. Cancel ``run`` first."""
        self._reader.close()

    async def run(self) -> None:
        """Sample until cancelled. A failure is logged once, and once that it is over."""
        loop = asyncio.get_running_loop()
        while True:
            self._wanted.clear()
            started_at = loop.time()
            try:
                await self._sample(started_at)
            except Exception as error:  # whatever a driver comes up with (trap 12)
                self._news.failed(error)
            await self._pause(loop.time() - started_at)

    async def _sample(self, started_at: float) -> None:
        roots = dict(self._processes())
        reading = self._reader.start(lambda: _read(self._read, roots, self._last))
        try:
            await asyncio.wait({reading}, timeout=self._hang_s)
            if not reading.done():
                self._news.hangs(self._hang_s)
            devices, stale, usage = await reading  # never two at once
        finally:
            reading.cancel()
        self._last = devices
        self._report(Sample(started_at, devices, usage, stale))
        self._news.read(devices)

    async def _pause(self, took_s: float) -> None:
        """Wait for the time of the next sample, or until somebody is in a hurry."""
        slow_s = min(took_s, SLOW_S)
        gap_s = max(MIN_GAP_S, slow_s)
        await asyncio.sleep(gap_s)
        every_s = max(self._busy_every_s if self._busy else self._idle_every_s, slow_s / MAX_SHARE)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(every_s - gap_s - slow_s, 0.0)):
                await self._wanted.wait()


def _read(
    read: Callable[[], Devices], roots: Mapping[str, int], last: Devices | None
) -> tuple[Devices, frozenset[str], Mapping[str, Usage]]:
    """Read everything, in the thread."""
    now = read()
    devices = _with_last_good(now, last)
    stale = frozenset(gpu.kind for gpu in devices.gpus) - {gpu.kind for gpu in now.gpus}
    return devices, stale, read_usage(roots, devices)


def _with_last_good(devices: Devices, last: Devices | None) -> Devices:
    """Return *devices* with the GPUs that only could not be read now; one that is gone without a problem is gone."""
    if last is None or not devices.problems:
        return devices
    seen = {gpu.kind for gpu in devices.gpus}
    missing = [gpu for gpu in last.gpus if gpu.kind not in seen]
    gpus = sorted((*devices.gpus, *missing), key=lambda gpu: int(gpu.kind.removeprefix("gpu")))
    return replace(devices, gpus=tuple(gpus), kind=last.kind if missing else devices.kind)


class _Reader:
    """One daemon thread that runs one job after the other."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, job: Callable[[], T]) -> asyncio.Future[T]:
        """Run *job* in the thread. A job that has begun cannot be cancelled; its result is dropped then."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="telemetry", daemon=True)
            self._thread.start()
        future: Future[T] = Future()
        self._jobs.put((future, job))
        return asyncio.wrap_future(future)

    def close(self) -> None:
        self._jobs.put(None)

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            future, job = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as error:
                    future.set_exception(error)


class _News:
    """Logs what changed, once for each change."""

    def __init__(self) -> None:
        self._trouble = False
        self._problems: tuple[str, ...] = ()
        self._machine = ""

    def failed(self, error: Exception) -> None:
        """Nothing was read, or nobody could take the figures."""
        if not self._trouble:
            expected = isinstance(error, TelemetryError)
            _log.warning("no new memory figures, the last ones stay in use: %s", error, exc_info=not expected)
        self._trouble = True

    def hangs(self, seconds: float) -> None:
        """A read has taken that long and goes on."""
        if not self._trouble:
            _log.warning("no memory figures for %g s: the driver does not answer; the last ones stay in use", seconds)
        self._trouble = True

    def read(self, devices: Devices) -> None:
        """A read worked, at least in part."""
        if self._trouble:
            _log.info("memory figures are read again")
        self._trouble = False
        for problem in devices.problems:
            if problem not in self._problems:
                _log.warning("%s", problem)
        for problem in self._problems:
            if problem not in devices.problems:
                _log.info("no longer: %s", problem)
        self._problems = devices.problems
        if (machine := _describe(devices)) != self._machine:
            _log.info("%s", machine)
            self._machine = machine


def _describe(devices: Devices) -> str:
    if not devices.gpus:
        return "no GPU found (looked for the NVIDIA driver and for AMD cards): only main memory is budgeted"
    gpus = ", ".join(f"{gpu.kind} {gpu.name} ({_size(gpu)})" for gpu in devices.gpus)
    return f"GPUs: {gpus}" + ("; what each process uses is not known" if devices.kind == "amd" else "")


def _size(gpu: Gpu) -> str:
    return "uses main memory" if gpu.unified else f"{gpu.total_mib} MiB"
