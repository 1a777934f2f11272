"""A supervisor whose processes do what the test says, on a clock that the test owns (looptime)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from mesh.config.profile import Catalog, Profile
from mesh.core.budget import BudgetLimits
from mesh.core.devices import Devices
from mesh.core.exits import Cause
from mesh.core.lifecycle import State
from mesh.core.resources import Resources
from mesh.engine.assignment import Assignment
from mesh.engine.lease import Endpoint, Lease, Ticket
from mesh.engine.ledger import Footprints
from mesh.engine.locate import EngineBinary
from mesh.engine.runner import Exited, Healthy, Report
from mesh.engine.supervisor import Limits, Supervisor
from mesh.errors import EngineMissingError, MeshError
from mesh.host.logring import LogRing
from mesh.metrics import Metrics


def profile(name: str, vram_mib: int = 0, **more: object) -> Profile:
    base = Profile(f"{name}:default", name, name, "default", ("-m", f"/{name}.gguf"), model_path=f"/{name}.gguf")
    return replace(base, estimate=Resources.of(vram_mib=vram_mib), **more)  # type: ignore[arg-type]


def catalog(*profiles: Profile) -> Catalog:
    return Catalog(profiles, {p.key: p for p in profiles})


def engine(name: str) -> EngineBinary:
    """A llama-server of that version; another name, another file."""
    return EngineBinary((f"/{name}/llama-server",), name, "configured", identity=name)


@dataclass(eq=False)
class FakeRunner:
    """A process that exits at once when told to, unless it is *deaf*."""

    instance_id: str
    profile: Profile
    report: Callable[[Report], None]
    endpoint: Endpoint
    deaf: bool = False
    signals: list[str] = field(default_factory=list)
    ring: LogRing = field(default_factory=LogRing)
    slots_busy: int | None = 0
    pid: int | None = 4711
    command: tuple[str, ...] = ("llama-server",)
    start_error: Exception | None = None
    engine: EngineBinary | None = None

    def start(self) -> None:
        if self.start_error is not None:
            raise self.start_error

    def healthy(self, slots: int | None = 1) -> None:
        self.report(Healthy(slots, {}))

    def exit(self, code: int = 1, reason: str = "boom", *tail: str, cause: Cause = Cause.OTHER) -> None:
        self.endpoint.close()
        self.report(Exited(code, reason, tail, cause))

    def terminate(self) -> None:
        self.signals.append("term")
        self.endpoint.close()
        if not self.deaf:
            asyncio.get_running_loop().call_later(0.1, self.exit, 0, "asked to stop")

    def kill(self) -> None:
        self.signals.append("kill")
        asyncio.get_running_loop().call_later(0.01, self.exit, -9, "killed")

    async def busy_slots(self) -> int | None:
        return self.slots_busy


@dataclass
class FakeLauncher:
    started: list[FakeRunner] = field(default_factory=list)
    launch_error: MeshError | None = None
    start_error: Exception | None = None
    assignments: list[Assignment] = field(default_factory=list)
    vetted: list[str] = field(default_factory=list)
    complaint: str | None = None
    vet_error: MeshError | None = None
    pid: int | None = 4711
    engines: dict[str | None, EngineBinary] = field(default_factory=lambda: {None: engine("one")})  #: by path

    def engine(self, profile: Profile) -> EngineBinary:
        if (found := self.engines.get(profile.engine_path)) is None:
            raise EngineMissingError("no such engine")
        return found

    async def vet(self, profile: Profile) -> str | None:
        self.vetted.append(profile.key)
        if self.vet_error is not None:
            raise self.vet_error
        await asyncio.sleep(0.1)
        return self.complaint

    def launch(
        self,
        instance_id: str,
        profile: Profile,
        report: Callable[[Report], None],
        assignment: Assignment,
    ) -> FakeRunner:
        if self.launch_error is not None:
            raise self.launch_error
        self.assignments.append(assignment)
        endpoint = Endpoint(instance_id, profile, "127.0.0.1", 1000 + len(self.started))
        self.started.append(
            FakeRunner(
                instance_id, profile, report, endpoint, start_error=self.start_error, pid=self.pid,
                engine=self.engines.get(profile.engine_path),
            )
        )  # fmt: skip
        return self.started[-1]

    def __getitem__(self, n: int) -> FakeRunner:
        return self.started[n]

    def __len__(self) -> int:
        return len(self.started)


@dataclass(eq=False)
class Client:
    """A request: remembers what it was told."""

    lease: Lease | None = None
    error: MeshError | None = None
    ticket: Ticket | None = None
    only_looks: bool = False

    def admitted(self, lease: Lease) -> None:
        assert self.lease is None
        assert self.error is None
        self.lease = lease

    def refused(self, error: MeshError) -> None:
        assert self.lease is None
        assert self.error is None
        self.error = error

    @property
    def waits(self) -> bool:
        return self.lease is None and self.error is None

    def done(self) -> None:
        assert self.lease is not None
        self.lease.release()


class World:
    def __init__(
        self,
        *profiles: Profile,
        vram: int | None = 10,
        ram: int | None = None,
        instances: int = 100,
        trusted: bool = True,
        devices: Devices | None = None,
        footprints: Footprints | None = None,
        **limits: object,
    ) -> None:
        self.launcher = FakeLauncher()
        self.metrics = Metrics("test")
        self.catalog = catalog(*profiles)
        self.sup = Supervisor(
            catalog=self.catalog,
            launcher=self.launcher,
            limits=Limits(BudgetLimits(ram, vram, instances=instances), **limits),  # type: ignore[arg-type]
            metrics=self.metrics,
            devices=devices,
            footprints=footprints,
        )
        for p in profiles if trusted else ():
            self.sup._trust.proven(p)

    def ask(
        self,
        p: Profile,
        wait_s: float | None = None,
        *,
        since: float | None = None,
        slot: bool = True,
        look: bool = False,
    ) -> Client:
        now = asyncio.get_running_loop().time()
        client = Client(only_looks=look)
        deadline = None if wait_s is None else now + wait_s
        client.ticket = self.sup.submit(
            p, client, since=now if since is None else since, deadline=deadline, needs_slot=slot and not look
        )
        return client

    @property
    def states(self) -> list[State]:
        return [i.state for i in self.sup.instances()]
