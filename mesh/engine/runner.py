"""One instance from its start to its exit: port, process, readiness, stall timer, signals.

Owns the process and tells the supervisor what happens to it, through ``report``, always on the event loop: at most one
``Healthy`` or ``Stalled``, then exactly one ``Exited`` (none if ``start`` raised). Never decides anything: a stalled
instance is only reported, and it lives until the supervisor says ``terminate`` or ``kill``. One exception: an instance
that served and finds another listener on its port is killed at once, and that is its crash.

An instance is ready when GET /health says 200 while the process is alive and /props names our model file; never because
of a log line (trap 94). A foreign server on our port therefore cannot pass for ours (trap 26). An engine that has no
/props, or lets others listen on its port, is the only one that listens there, and stays so (upkeep.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from mesh import tasks
from mesh.config.profile import Profile
from mesh.core.exits import Cause, classify, describe_exit
from mesh.engine import flags
from mesh.engine.assignment import Assignment
from mesh.engine.children import LOOPBACK, files_root, fixed_port
from mesh.engine.kind import UNASSIGNED, Command
from mesh.engine.kinds import kind_of
from mesh.engine.lease import Endpoint
from mesh.engine.locate import EngineBinary, Engines
from mesh.engine.model_file import model_bytes, other_model
from mesh.engine.probe import Prober
from mesh.engine.stall import StallClock, silence_limit_s
from mesh.engine.upkeep import Upkeep, strangers_on
from mesh.engine.vetting import complaint
from mesh.errors import InstanceError
from mesh.host.logring import LogRing
from mesh.host.memory import sample_tree_async
from mesh.host.ports import PortAllocator
from mesh.host.process import Process
from mesh.host.scratch import Leftovers, Scratch
from mesh.host.warden import Warden
from mesh.logs import Log

_log: Final = Log(__name__)

FIRST_PROBE_S: Final = 0.025
SLOWEST_PROBE_S: Final = 0.25
SHORTEST_PAUSE_S: Final = 0.01
#: between two samples of what the process tree does; only taken while there is no output
SAMPLE_EVERY_S: Final = 1.0
#: how often a child that is ready is asked for its properties before it counts as one that has none
PROPERTIES_TRIES: Final = 3
#: lines of the log that a report carries
TAIL_LINES: Final = 40
#: lines of the log that are searched for the cause of an exit
CAUSE_LINES: Final = 200


@dataclass(frozen=True, slots=True)
class Healthy:
    """It can serve. ``slots`` requests at once, if it told; ``info`` is what /props said."""

    slots: int | None
    info: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Stalled:
    """It will not become ready, though it lives. *silent*: for it shows no sign of progress, and no other reason."""

    reason: str
    silent: bool = False


@dataclass(frozen=True, slots=True)
class Exited:
    """The process is reaped and its group is dead. ``returncode`` is negative for a signal."""

    returncode: int | None
    reason: str
    log_tail: tuple[str, ...]
    cause: Cause = Cause.OTHER


Report = Healthy | Stalled | Exited


@dataclass(slots=True)
class Host:
    """What every instance of the node shares."""

    ports: PortAllocator
    find_engine: Callable[[Profile], EngineBinary]
    warden: Warden = field(default_factory=Warden)
    prober: Prober = field(default_factory=Prober)
    scratch: Scratch = field(default_factory=Scratch)
    elsewhere: dict[Path, Scratch] = field(default_factory=dict)  #: where profiles want theirs

    def scratch_for(self, profile: Profile) -> Scratch:
        """Return where an instance of *profile* gets its directory."""
        if (root := files_root(profile)) is None:
            return self.scratch
        if root not in self.elsewhere:
            self.elsewhere[root] = made = Scratch.below(root)
            tasks.spawn(asyncio.to_thread(made.clear), f"clear {root}")
        return self.elsewhere[root]


class Runner:
    """One instance. ``start`` once; the signals are idempotent and harmless after the exit."""

    def __init__(
        self,
        instance_id: str,
        profile: Profile,
        report: Callable[[Report], None],
        *,
        host: Host,
        assignment: Assignment = UNASSIGNED,
    ) -> None:
        self.instance_id = instance_id
        self.profile = profile
        self.assignment = assignment
        #: complete once ``start`` returned; not alive before
        self.endpoint = Endpoint(instance_id, profile, LOOPBACK, 0, alive=False)
        self.ring = LogRing()
        self.command: tuple[str, ...] = ()  #: the argument list, which holds no secrets
        self.engine: EngineBinary | None = None  #: what it runs, once ``start`` returned
        self._report = report
        self._host = host
        self._kind = kind_of(profile)
        self._directory: Path | None = None  #: the instance's own, if its engine needs one
        self._upkeep = Upkeep(instance_id, None)
        self._condemned: str | None = None  #: why it was killed without having been told to stop
        self._process: Process | None = None
        self.endpoint.log_tail, self.endpoint.log_lines = self._log_tail, lambda: self.ring.count
        self._readiness: asyncio.Task[None] | None = None
        self._told_to_stop = False

    @property
    def pid(self) -> int | None:
        """The process's id, also after its end; None if it was never started."""
        return self._process.pid if self._process else None

    @property
    def returncode(self) -> int | None:
        """The exit code once it ended."""
        return self._process.returncode if self._process else None

    def start(self) -> None:
        """Start the process and watch it. Raise a ``MeshError`` if that is impossible; then nothing is left behind."""
        self.engine = self._host.find_engine(self.profile)
        if (refusal := flags.refused_before(self.profile.args, self.engine)) is not None:
            raise InstanceError(refusal)
        fixed = fixed_port(self.profile)
        ports = self._host.ports
        port = ports.reserve(reuses=not self._kind.shares_ports) if fixed is None else ports.reserve_fixed(fixed)
        try:
            command = self._start_process(self.engine, port)
        except Exception:
            self._remove_directory()
            ports.release(port, rest=False)
            raise
        self.command = command.argv
        self.endpoint.host, self.endpoint.port, self.endpoint.api_key = command.host, port, command.api_key
        self.endpoint.alive = True
        assert self._process is not None, "it was just started"
        self._readiness = tasks.spawn(self._become_ready(self._process), f"readiness of {self.instance_id}")

    def _start_process(self, engine: EngineBinary, port: int) -> Command:
        if self._kind.needs_directory:
            self._directory = self._host.scratch_for(self.profile).take(self.instance_id)
            self._upkeep = Upkeep(self.instance_id, Leftovers(self._directory))
            self.endpoint.begin_upload = self._upkeep.begin_upload
        command = self._kind.command(self.profile, engine, port, assignment=self.assignment, directory=self._directory)
        self._process = Process.start(
            command.argv,
            env=command.env,
            cwd=command.cwd,
            on_exit=self._exited,
            ring=self.ring,
            warden=self._host.warden,
        )
        return command

    def _remove_directory(self) -> None:
        if self._directory is not None:
            scratch, directory, self._directory = self._host.scratch_for(self.profile), self._directory, None
            left = scratch.put_away(directory)
            # off the loop: an upload that was being converted is as large as uploads may be
            tasks.spawn(asyncio.to_thread(scratch.give_back, left), f"directory of {self.instance_id}")

    def terminate(self) -> None:
        """Close the connections to it, then ask its group to end.

        In this order: with a request in progress llama-server waits for the client, possibly for ever.
        """
        self._stop(signal.SIGTERM)

    def kill(self) -> None:
        """End its group now."""
        self._stop(signal.SIGKILL)

    async def busy_slots(self) -> int | None:
        """Return how many slots the child computes on, more than there are if it is too busy to say; None if it never
        says."""
        if self._process is None or self._process.returncode is not None or not self._kind.tells_slots:
            return None
        return await self._host.prober.busy_slots(self.endpoint)

    def _log_tail(self, count: int) -> list[str]:
        if self._process is not None:
            self._process.read_now()
        return self.ring.tail(count)

    def _stop(self, number: signal.Signals) -> None:
        if self._process is None or self._process.returncode is not None:
            return
        self._told_to_stop = True
        self._stop_readiness()
        self.endpoint.close()
        self._process.signal_group(number)

    def _stop_readiness(self) -> None:
        if self._readiness is not None:
            self._readiness.cancel()

    def _exited(self, returncode: int) -> None:
        self._stop_readiness()
        self.endpoint.close()
        self._host.ports.release(self.endpoint.port)
        self._remove_directory()
        asked, words = self._told_to_stop, self._kind.last_words(self.ring.tail(CAUSE_LINES))
        tail = tuple(words[-TAIL_LINES:])
        reason = self._condemned or describe_exit(returncode, tail, asked=asked, program=self._kind.program)
        cause = classify(returncode, words, asked=asked or self._condemned is not None)
        self._report(Exited(returncode, reason, tail, cause))

    def _condemn(self, reason: str) -> None:
        """Kill it, and let that count as a crash. What it is at work on meets that, too, and is tried elsewhere."""
        if self._process is not None and not self._told_to_stop and self._condemned is None:
            self._condemned = reason
            self._process.signal_group(signal.SIGKILL)

    # -- readiness

    async def _become_ready(self, process: Process) -> None:
        """Report ``Healthy`` or ``Stalled``, whatever happens: nobody else would; then keep it; cancelled by exit and
        stop."""
        try:
            serves = await self._watch_load(process)
        except Exception as error:
            _log.exception("watching a load failed unexpectedly", instance=self.instance_id)
            self._report(Stalled(f"it cannot be probed: {error!r}"))
            return
        if serves:
            await self._upkeep.keep(self.endpoint.port if self._kind.shares_ports else None, process.pid, self._condemn)

    async def _watch_load(self, process: Process) -> bool:
        if not await self._healthy_in_time(process):
            return False
        port = self.endpoint.port
        if self._kind.shares_ports and len(await asyncio.to_thread(strangers_on, port, process.pid)):
            self._report(Stalled(f"port {port} is used by another program, too"))
            return False
        info: Mapping[str, Any] = {}
        for _ in range(
            PROPERTIES_TRIES if self._kind.tells_properties else 0
        ):  # a child that is busy at once may be slow to tell
            info = info or await self._host.prober.properties(self.endpoint)
        if (impostor := other_model(self.profile, info)) is not None:
            self._report(Stalled(f"port {port} is answered by another server, which serves {impostor}"))
            return False
        slots = info.get("total_slots")
        told = slots if isinstance(slots, int) and slots > 0 else None
        self._report(Healthy(self._kind.slots or told, info))
        return True

    async def _healthy_in_time(self, process: Process) -> bool:
        """Probe until /health says 200; report ``Stalled`` and return False after too long a silence."""
        loop = asyncio.get_running_loop()
        limit_s = silence_limit_s(self.profile.startup_timeout_s, model_bytes(self.profile))
        clock, sample_at, pause_s = StallClock(loop.time(), limit_s), loop.time(), FIRST_PROBE_S
        printed = asyncio.Event()
        process.on_output = printed.set
        while True:
            await _pause(printed, pause_s)
            pause_s = min(pause_s * 1.3, SLOWEST_PROBE_S)
            if await self._host.prober.healthy(self.endpoint):
                return True
            clock.output(process.last_output_at)
            if loop.time() >= sample_at:
                sample_at = loop.time() + min(SAMPLE_EVERY_S, limit_s / 4)
                usage = await sample_tree_async(process.pid)
                clock.sampled(loop.time(), usage)
            if clock.stalled(loop.time()):
                why = f"no sign of progress for {limit_s:.3g} s while loading (startup_timeout_seconds)"
                self._report(Stalled(why, silent=True))
                return False


class Launcher:
    """Makes runners for one node, each with the program of its profile. *scratch*: where they get directories."""

    def __init__(self, engines: Engines, ports: PortAllocator | None = None, scratch: Scratch | None = None) -> None:
        self._engines = engines
        self._host = Host(ports or PortAllocator(), engines.of, scratch=scratch or Scratch())

    def launch(
        self,
        instance_id: str,
        profile: Profile,
        report: Callable[[Report], None],
        assignment: Assignment = UNASSIGNED,
    ) -> Runner:
        """Return a runner; the caller starts it."""
        return Runner(instance_id, profile, report, host=self._host, assignment=assignment)

    async def vet(self, profile: Profile) -> str | None:
        """Return what its engine has against *profile*'s arguments, without loading anything; None if nothing, or
        if it cannot be told. Raise a ``MeshError`` for what makes starting it impossible."""
        return await complaint(profile, self._engines.of(profile), self._host.warden)

    def engine(self, profile: Profile | None = None) -> EngineBinary:
        """Return what the next instance of *profile* would run, or without one the default build's; raise
        ``EngineMissingError`` if there is none."""
        return self._engines.named() if profile is None else self._engines.of(profile)

    @property
    def warden(self) -> Warden:
        """Who ends the processes of this node if it is killed."""
        return self._host.warden

    async def close(self) -> None:
        """Free what the runners shared; to be called when all have exited. A group that is left is killed."""
        await asyncio.to_thread(self._host.warden.close)
        for scratch in (self._host.scratch, *self._host.elsewhere.values()):
            await asyncio.to_thread(scratch.close)


async def _pause(printed: asyncio.Event, seconds: float) -> None:
    """Wait *seconds*, but less if the child prints something: its last line of loading is often "I am ready"."""
    await asyncio.sleep(SHORTEST_PAUSE_S)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds - SHORTEST_PAUSE_S):
            await printed.wait()
    printed.clear()
