"""One child process as the supervisor sees it: its state, its counts and the leases on it."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from mesh.config.builds import DEFAULT_BUILD
from mesh.config.profile import Profile
from mesh.core.budget import INSTANCES
from mesh.core.lifecycle import State
from mesh.core.resources import Resources
from mesh.core.world import InstanceView
from mesh.engine.assignment import Assignment
from mesh.engine.kinds import kind_of
from mesh.engine.lease import Endpoint
from mesh.engine.locate import EngineBinary
from mesh.engine.runner import Report
from mesh.host.logring import LogRing


class RunnerLike(Protocol):
    """What the supervisor needs of ``mesh.engine.runner.Runner``. Every method but ``busy_slots`` is idempotent."""

    endpoint: Endpoint
    ring: LogRing

    @property
    def pid(self) -> int | None: ...
    @property
    def command(self) -> tuple[str, ...]: ...
    @property
    def engine(self) -> EngineBinary | None: ...
    def start(self) -> None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...
    async def busy_slots(self) -> int | None: ...


class LauncherLike(Protocol):
    def launch(
        self, instance_id: str, profile: Profile, report: Callable[[Report], None], assignment: Assignment
    ) -> RunnerLike: ...
    async def vet(self, profile: Profile) -> str | None: ...
    def engine(self, profile: Profile) -> EngineBinary: ...


@dataclass(slots=True, eq=False)
class ActiveLease:
    """A granted ``Lease``. Ends once, by ``release`` or ``abandon``, whichever comes first."""

    endpoint: Endpoint
    instance: Instance
    needs_slot: bool
    granted_at: float
    on_end: Callable[[ActiveLease, bool], None]
    open: bool = True
    streaming: bool = False  #: when it was abandoned

    def release(self) -> None:
        if self.open:
            self.open = False
            self.on_end(self, False)

    def abandon(self, *, streaming: bool = False) -> None:
        if self.open:
            self.open = False
            self.streaming = streaming
            self.on_end(self, True)


@dataclass(slots=True, eq=False)
class Instance:
    """Owned and written by the supervisor alone."""

    id: str
    profile: Profile
    runner: RunnerLike
    placed: Resources  #: what it was given when it was started, and on which GPUs
    started_at: float
    footprint: Resources = field(default_factory=Resources)  #: what it is charged now
    live: Resources | None = None  #: what it was last seen to use; None = not seen yet
    others_before: Resources = field(default_factory=Resources)  #: what others used of each GPU when it was started
    used_before: Resources = field(default_factory=Resources)  #: and what everybody used
    early_ram_mib: int | None = None  #: of main memory, just after it became ready
    served: bool = False  #: it has ended a request, so its buffers have been used
    warned: bool = False  #: that it uses more than it was given
    learned: bool = False  #: its use was remembered at least once
    launched_as: str | None = None  #: names launch, engine and files as they were when it was started
    state: State = State.SPAWNING
    reported_slots: int | None = None
    limit: float = 1  #: ``slots``, with infinity for "unlimited"; looked at for every request
    leases: set[ActiveLease] = field(default_factory=set)
    looks: set[ActiveLease] = field(default_factory=set)  #: of requests that only look: they do not make it active
    busy: int = 0  #: slots taken: by leases, and by abandoned requests that the child still computes
    abandoned: int = 0  #: of those, the ones whose client is gone
    watching: bool = False  #: a task asks the child how many slots are busy
    ready_since: float = 0.0
    idle_since: float = 0.0
    started_wall: float = 0.0
    ready_wall: float | None = None
    fresh: bool = True
    stale: bool = False
    superseded: bool = False  #: it runs another engine than its profile would be started with now
    gone: asyncio.Event = field(default_factory=asyncio.Event)  #: set once its process was reaped
    story: deque[str] = field(default_factory=lambda: deque(maxlen=20))
    timer: asyncio.TimerHandle | None = None

    def __post_init__(self) -> None:
        self.footprint = self.placed

    def adopt(self, profile: Profile) -> None:
        """Take over a profile whose launch is the same, or the slots that the child reported: limits apply live."""
        self.profile = profile
        self.limit = self.slots or math.inf

    @property
    def in_use(self) -> bool:
        """Whether stopping it now would cut somebody off."""
        return bool(self.leases or self.looks)

    @property
    def slots(self) -> int:
        """Requests at once; 0 = unlimited."""
        if (fixed := kind_of(self.profile).slots) is not None:
            return fixed
        if self.profile.max_concurrent is not None:
            return self.profile.max_concurrent
        return self.reported_slots or 1

    def view(self) -> InstanceView:
        """Return what the scheduler sees. Abandoned requests take a slot, but nobody waits for them: not active."""
        return InstanceView(
            id=self.id,
            key=self.profile.key,
            state=self.state,
            footprint=self.footprint,
            active=len(self.leases),
            busy=self.busy,
            slots=self.slots,
            ready_since=self.ready_since,
            idle_since=self.idle_since,
            fresh=self.fresh,
            stale=self.stale,
            pinned=self.profile.pinned,
            superseded=self.superseded,
        )


def launch_identity(profile: Profile) -> tuple[object, ...]:
    """Return what a running process was started from; if it differs after a reload, the process must be replaced."""
    env = tuple(sorted(profile.env.items()))
    return (profile.engine, profile.engine_build, profile.engine_path, profile.args, profile.convert,
            profile.model_path, profile.hf_repo, profile.hf_file, profile.devices, env)  # fmt: skip


@dataclass(frozen=True, slots=True)
class InstanceInfo:
    """An instance for people: admin endpoints, ``llama-mesh ps``, metrics."""

    id: str
    key: str
    model_id: str
    state: State
    pid: int | None
    port: int
    slots: int
    active: int
    busy: int
    started_at_wall: float
    ready_at_wall: float | None
    last_used_s_ago: float | None
    memory: Resources  #: what it is charged
    live: Resources | None  #: what it was last seen to use
    command: tuple[str, ...]
    stale: bool
    superseded: bool
    engine_version: str | None  #: of what it really runs, whatever is installed by now
    engine_build: str
    engine_path: str  #: with all links resolved; "" until it was started
    hidden: bool = False  #: of a trial: nothing that clients could ask for, nor that is learned from


def describe(instance: Instance, now: float) -> InstanceInfo:
    """Return the public view of *instance*; its command line is redacted by the runner (trap 101)."""
    ready, engine = instance.state in (State.READY, State.DRAINING), instance.runner.engine
    return InstanceInfo(
        id=instance.id,
        key=instance.profile.key,
        model_id=instance.profile.id,
        state=instance.state,
        pid=instance.runner.pid,
        port=instance.runner.endpoint.port,
        slots=instance.slots,
        active=len(instance.leases),
        busy=instance.busy,
        started_at_wall=instance.started_wall,
        ready_at_wall=instance.ready_wall,
        last_used_s_ago=(0.0 if instance.leases else max(0.0, now - instance.idle_since)) if ready else None,
        memory=Resources({k: v for k, v in instance.footprint.mib.items() if k != INSTANCES}),
        live=instance.live,
        command=instance.runner.command,
        stale=instance.stale,
        superseded=instance.superseded,
        engine_version=None if engine is None else engine.version,
        engine_build=(instance.profile.engine_build or DEFAULT_BUILD) if engine is None else engine.build,
        engine_path="" if engine is None else engine.argv[-1],
        hidden=instance.profile.engine_path is not None,
    )
