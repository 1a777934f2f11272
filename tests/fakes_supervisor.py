"""A supervisor in a few lines: real views, rings and waiting, no processes. Keeps a record of what it was told."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field

from mesh.api.context import LogRing
from mesh.config.profile import Catalog, Profile
from mesh.core.lifecycle import State
from mesh.core.resources import Resources
from mesh.engine.lease import Ticket, Waiter
from mesh.engine.memory_report import MemoryReport, ModelFit
from mesh.engine.supervisor import ProfileLoad
from mesh.errors import MeshError, QueueTimeoutError


@dataclass(frozen=True, slots=True)
class FakeInstance:
    id: str
    key: str
    model_id: str
    state: State = State.READY
    pid: int | None = 4711
    port: int | None = 40001
    slots: int | None = 4
    active: int = 0
    busy: int = 0
    ready_at_wall: float | None = 1_700_000_100.0
    started_at_wall: float = 1_700_000_090.0
    last_used_s_ago: float | None = 1.5
    memory: Resources = field(default_factory=lambda: Resources.of(ram_mib=512))
    command: tuple[str, ...] = ("llama-server", "-m", "a.gguf")
    stale: bool = False
    engine_version: str | None = "b123"
    engine_build: str = "default"
    engine_path: str = "/opt/llama/llama-server"
    superseded: bool = False
    hidden: bool = False


@dataclass(frozen=True, slots=True)
class FakeBudget:
    capacity: Resources
    used: Resources


@dataclass(frozen=True, slots=True)
class FakeFailure:
    reason: str
    count: int
    retry_in_s: float | None
    log_tail: tuple[str, ...]


class FakeSubscription:
    """Lines as they come, until closed."""

    def __init__(self, ring: FakeRing) -> None:
        self._ring = ring
        self._queue: asyncio.Queue[str | None] = asyncio.Queue()
        self.dropped = 0

    def push(self, line: str) -> None:
        self._queue.put_nowait(line)

    async def __aiter__(self) -> AsyncIterator[str]:
        while (line := await self._queue.get()) is not None:
            yield line

    def close(self) -> None:
        self._ring.subscriptions.discard(self)
        self._queue.put_nowait(None)


class FakeRing:
    """The last lines of one instance, and who is looking."""

    def __init__(self, *lines: str) -> None:
        self._lines = deque(lines, maxlen=1000)
        self.subscriptions: set[FakeSubscription] = set()
        self.subscribed = asyncio.Event()

    def feed(self, line: str) -> None:
        self._lines.append(line)
        for subscription in self.subscriptions:
            subscription.push(line)

    def tail(self, n: int) -> list[str]:
        return list(self._lines)[-n:] if n else []

    def subscribe(self) -> FakeSubscription:
        subscription = FakeSubscription(self)
        self.subscriptions.add(subscription)
        self.subscribed.set()
        return subscription


class FakeSupervisor:
    """Answers from what the test put in; ``prewarm`` waits for ``loaded`` like a real load."""

    def __init__(self, *profiles: Profile) -> None:
        names = {name: p for p in profiles for name in (p.key, p.id.lower(), *(a.lower() for a in p.aliases))}
        self.catalog = Catalog(profiles=profiles, names=names)
        self.views: list[FakeInstance] = []
        self.waiting: dict[str, int] = {}
        self.capacity = Resources()
        self.used = Resources()
        self.report: MemoryReport | None = None  # None: a report of capacity and used, without holders
        self.fits: tuple[ModelFit, ...] = ()
        self.failed: dict[str, FakeFailure] = {}
        self.rings: dict[str, list[tuple[str, LogRing]]] = {}
        self.unloaded: list[str | None] = []
        self.loading: dict[str, int] = {}  # callers of prewarm that wait, per profile
        self.prewarming = asyncio.Event()
        self.loaded = asyncio.Event()
        self.refusal: MeshError | None = None

    def submit(
        self, profile: Profile, waiter: Waiter, *, since: float, deadline: float | None, needs_slot: bool = True
    ) -> Ticket:
        raise AssertionError("the app never asks for an instance to send requests to")

    def instances(self) -> Sequence[FakeInstance]:
        return tuple(self.views)

    def queues(self) -> Mapping[str, int]:
        return self.waiting

    def load(self, key: str) -> ProfileLoad:
        load = ProfileLoad(queued=self.waiting.get(key, 0))
        for view in self.views:
            if view.key == key and not view.stale and view.state is State.READY:
                load.ready += 1
                load.busy += view.busy
                load.slots += view.slots or 0
                load.unlimited = load.unlimited or not view.slots
            elif view.key == key and not view.stale and view.state is State.SPAWNING:
                load.loading += 1
        return load

    def budget(self) -> FakeBudget:
        return FakeBudget(self.capacity, self.used)

    def memory_report(self) -> MemoryReport:
        return self.report or MemoryReport(self.capacity, self.capacity, Resources(), self.used)

    async def model_fits(self) -> Sequence[ModelFit]:
        return self.fits

    def failures(self) -> Mapping[str, FakeFailure]:
        return self.failed

    async def prewarm(self, profile: Profile, *, wait: bool, deadline: float | None) -> FakeInstance | None:
        if self.refusal is not None:
            raise self.refusal
        if not wait:
            return None
        self.loading[profile.key] = self.loading.get(profile.key, 0) + 1
        self.prewarming.set()
        try:
            async with asyncio.timeout_at(deadline):
                await self.loaded.wait()
        except TimeoutError as error:
            raise QueueTimeoutError("Queue timeout") from error
        finally:
            self.loading[profile.key] -= 1
        return FakeInstance("i-1", profile.key, profile.id)

    def unload(self, key: str | None) -> int:
        self.unloaded.append(key)
        return sum(1 for view in self.views if key in (None, view.key))

    def log_ring(self, key: str) -> Sequence[tuple[str, LogRing]]:
        return self.rings.get(key, [])
