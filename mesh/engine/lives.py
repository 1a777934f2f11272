"""The instances of a node: their starts, their lives and their ends, and the event loop in small that drives them.

Everything that happens is an event; ``_post`` applies the events that have come in, then ``_settle``s: the dispatcher
asks the scheduler what the picture now calls for, and carries it out. Nothing here awaits, so within one event loop
each event is atomic and needs no lock. Slow work (starting, stopping, probing) is done by a ``Runner`` or a task whose
result comes back as the next event, carrying the instance it was started for; if that instance is gone, the result is
dropped.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from itertools import count

from mesh.config.profile import Catalog, Profile
from mesh.core import lifecycle
from mesh.core.devices import Devices
from mesh.core.exits import Cause
from mesh.core.lifecycle import Effect, Event, State
from mesh.core.placement import gpu_kinds
from mesh.core.resources import RAM, VRAM, Resources
from mesh.core.world import LIVE, Spawn
from mesh.engine import refusals
from mesh.engine.alarm import Alarm
from mesh.engine.failures import FailureBook
from mesh.engine.holders import in_words, warn_of_excess
from mesh.engine.instances import Instance, LauncherLike
from mesh.engine.kinds import kind_of
from mesh.engine.ledger import CookbookFigures, Footprints, Ledger
from mesh.engine.queues import Place, Queues
from mesh.engine.replacement import would_run
from mesh.engine.runner import Exited, Healthy, Report, Stalled
from mesh.engine.successors import Successors, engine_identity
from mesh.engine.surroundings import GoBack, Limits, TelemetryLike
from mesh.engine.telemetry import Sample
from mesh.engine.trust import Trust
from mesh.errors import EngineMissingError, InstanceError, MeshError
from mesh.logs import Log
from mesh.metrics import Metrics
from mesh.tasks import wall_time

log = Log(__name__)


class Lives:
    """The only writer of instances and of the memory ledger. See the module docstring."""

    telemetry: TelemetryLike | None = None  #: set by the node once it runs
    go_back: GoBack | None = None  #: set by whoever puts engines in force

    def __init__(
        self,
        *,
        catalog: Catalog,
        launcher: LauncherLike,
        limits: Limits,
        metrics: Metrics,
        footprints: Footprints | None = None,
        devices: Devices | None = None,
    ) -> None:
        self.catalog = catalog
        self.limits = limits
        self._loop = asyncio.get_running_loop()
        self._launcher = launcher
        self._metrics = metrics
        self._footprints = footprints or CookbookFigures()
        self.ledger = Ledger(limits.budget, self._footprints, self._loop.time, devices)
        self._trust = Trust(launcher, self._footprints, self._loop.time, self._vetted)
        self.first_sample = asyncio.Event()  #: set once telemetry has seen the machine
        self._hidden: dict[str, Profile] = {}  #: profiles of trials, by key, beside the catalog
        self._successors = Successors()
        self._one_trial = asyncio.Lock()
        self._turn_ended: dict[str, float] = {}  #: when a profile last lost an instance to another one
        self._ran_out: dict[str, Resources] = {}  #: where the last load ran out of memory, until the next one is judged
        self._instances: dict[str, Instance] = {}  #: all whose process has not been reaped
        self._ready: dict[str, list[Instance]] = {}  #: all and only READY, not stale instances, by profile key
        self._held: frozenset[str] = frozenset()  #: ids that get no new work, as of the last plan
        self._queues = Queues()
        self._failures = FailureBook(self._loop.time)
        self._alarm = Alarm(self._loop, partial(self._post, lambda: None))
        self._inbox: deque[Callable[[], None]] = deque()
        self._settling = False
        self._closing = False
        self._closing_since = float("inf")
        self._stopped = False  #: the grace is over: nothing is started or queued any more
        self._empty = asyncio.Event()  #: set when, after the stop, no process is left
        self._serial = count(1)

    # -- events --------------------------------------------------------------------------------------------------------

    def _post(self, event: Callable[[], None]) -> None:
        """Apply *event*, and whatever it leads to, then carry out what the plan asks for. Re-entrant calls queue up."""
        self._inbox.append(event)
        if self._settling:
            return
        self._settling = True
        try:
            while self._inbox:
                while self._inbox:
                    self._guard(self._inbox.popleft())
                self._guard(self._settle)
        finally:
            self._settling = False

    def _guard(self, step: Callable[[], None]) -> None:
        """A bug in one event is logged with its story and must not take the others, or the node, with it."""
        try:
            step()
        except Exception:
            log.exception("bug in the supervisor", instances=[i.id + ":" + i.state for i in self._instances.values()])

    def _settle(self) -> None:
        """Bring about what the picture calls for."""
        raise NotImplementedError

    def profile(self, key: str) -> Profile | None:
        """Return the profile with this key, hidden ones included."""
        return self._hidden.get(key) or self.catalog.names.get(key)

    # -- starts --------------------------------------------------------------------------------------------------------

    def _spawn(self, decision: Spawn) -> None:
        key, profile = decision.key, self.profile(decision.key)
        assert profile is not None, "the scheduler was told of it"
        instance_id = f"{key.replace(':', '.').replace('/', '_').replace('#', '.')}-{next(self._serial)}"
        self._metrics.spawns_total += 1
        try:
            assignment = self.ledger.assignment(profile, decision.footprint)
            runner = self._launcher.launch(instance_id, profile, partial(self._report, instance_id), assignment)
        except MeshError as error:
            self._post(partial(self._failed, profile, "load", error.message, (), 0.0))
            return
        now = self._loop.time()
        instance = Instance(instance_id, profile, runner, decision.footprint, now, started_wall=wall_time())
        known = self._footprints.peek(profile)
        instance.others_before, instance.used_before = self.ledger.others, self.ledger.ghosts.used
        instance.launched_as = None if known is None else known.identity or None
        self._instances[instance_id] = instance
        try:
            runner.start()
        except MeshError as error:
            self._post(partial(self._not_started, instance, error))
        except Exception as error:  # a bug, or an error that nobody foresaw: no process will ever report
            log.exception("starting an instance failed unexpectedly", instance=instance_id)
            self._post(partial(self._not_started, instance, InstanceError(f"cannot be started: {error!r}")))
        else:
            port, source = runner.endpoint.port, None if known is None else str(known.source)
            log.info("instance started", instance=instance_id, model=profile.id, pid=runner.pid, port=port,
                     memory=in_words(decision.footprint), source=source)  # fmt: skip

    def _not_started(self, instance: Instance, error: MeshError) -> None:
        """No process came of it."""
        self._step(instance, Event.EXITED)
        self._trust.doubted(instance.profile)
        kind = "engine" if isinstance(error, EngineMissingError) else "load"
        self._failed(instance.profile, kind, error.message, (), 0.0)

    # -- what runners tell ---------------------------------------------------------------------------------------------

    def _report(self, instance_id: str, report: Report) -> None:
        self._post(partial(self._reported, instance_id, report))

    def _reported(self, instance_id: str, report: Report) -> None:
        instance = self._instances.get(instance_id)
        if instance is None:
            return  # it is gone: the report came late, or twice
        match report:
            case Healthy():
                instance.reported_slots = report.slots
                instance.adopt(instance.profile)
                self._step(instance, Event.HEALTHY)
                instance.footprint = self.ledger.charge(instance)
            case Stalled():
                if instance.state is State.SPAWNING:
                    self._step(instance, Event.DEADLINE)
                    end = Exited(None, report.reason, tuple(instance.runner.ring.tail(refusals.QUOTED_LINES)))
                    self._load_failed(instance, end, of_engine=report.silent)
            case Exited():
                self._exited(instance, report)

    def _exited(self, instance: Instance, report: Exited) -> None:
        """Tell the three ends apart (trap 29): load failure, crash, and a stop that was asked for."""
        state, profile = instance.state, instance.profile
        self._step(instance, Event.EXITED)
        lived_s = self._loop.time() - instance.ready_since if instance.ready_wall is not None else 0.0
        if state is State.STOPPING:
            log.info("instance stopped", instance=instance.id, model=profile.id, returncode=report.returncode)
        elif state is State.SPAWNING and self._may_retry(instance, report):
            log.warning("a load ran out of memory; it gets what idles there, and one more try", instance=instance.id,
                        model=profile.id, reason=report.reason)  # fmt: skip
            self._metrics.spawn_failures_total += 1
            self._trust.accepted(profile)  # its arguments were accepted, or it would not have got that far
            self._ran_out[profile.key] = instance.placed
        elif state is State.SPAWNING and report.cause is Cause.PORT and self._failures.lost_port(profile.key):
            log.warning("its port was taken meanwhile; it gets another one", instance=instance.id, model=profile.id)
            self._metrics.spawn_failures_total += 1
        elif state is State.SPAWNING:
            self._load_failed(instance, report)
        else:
            self._metrics.crashes_total += 1
            self._failed(profile, "crash", report.reason, report.log_tail, lived_s)

    def _may_retry(self, instance: Instance, report: Exited) -> bool:
        """Whether a failed load is worth one more try: others idle whose memory it could have had (trap 46)."""
        key = instance.profile.key
        if report.cause is not Cause.MEMORY or key in self._ran_out or key not in self._queues.lines:
            return False
        if any(i.profile.key == key and i.state in LIVE for i in self._instances.values()):
            return False  # the profile is served: nobody has to go for one more of it
        if self._trust.doubtful(instance.profile):
            return False
        kinds = set(gpu_kinds(instance.placed)) or {RAM, VRAM}
        near = (i for i in self._instances.values() if i is not instance and kinds & i.footprint.mib.keys())
        others = (i for i in near if not i.profile.pinned)
        return any(i.state is State.STOPPING or (i.state is State.READY and not i.leases) for i in others)

    def _vetted(self, profile: Profile, complaint: MeshError | None) -> None:
        """The arguments of *profile* were looked over, before anybody was stopped for it."""
        self._post(partial(self._apply_vetting, profile, complaint))

    def _apply_vetting(self, profile: Profile, complaint: MeshError | None) -> None:
        if complaint is not None and self.profile(profile.key) is profile:
            kind = "engine" if isinstance(complaint, EngineMissingError) else "load"
            self._failed(profile, kind, complaint.message, (), 0.0)

    def _load_failed(self, instance: Instance, end: Exited, *, of_engine: bool = True) -> None:
        """Its process ran, and did not get ready; *of_engine*: that may be laid to the engine."""
        profile = instance.profile
        self._trust.doubted(profile)
        wrong = end.returncode in kind_of(profile).usage_statuses and end.cause not in (Cause.MEMORY, Cause.PORT)
        reason = refusals.to_correct(end.reason, profile) if wrong else end.reason
        bad = of_engine and self._successors.speaks_against_engine(instance, end.cause)
        returns = bad and profile.key not in self._ready and self._goes_back(instance, end.reason)
        self._failed(profile, "load", reason, end.log_tail, 0.0, returns=returns)

    def _failed(
        self, profile: Profile, kind: str, reason: str, tail: tuple[str, ...], lived_s: float, *, returns: bool = False
    ) -> None:
        """Remember the failure. After a failed load nobody waits on (trap 19), but for another engine: it *returns*."""
        failure = self._failures.record(profile.key, kind, reason, tail, lived_s)
        self._ran_out.pop(profile.key, None)
        log.error("instance failed", model=profile.id, kind=kind, reason=reason, failures_in_a_row=failure.count,
                  log_tail=list(tail))  # fmt: skip
        if kind != "crash":
            self._metrics.spawn_failures_total += 1
            if profile.key not in self._ready and not returns:
                self._refuse_all(profile.key, refusals.failed(profile.id, failure, self._loop.time()))

    def _goes_back(self, instance: Instance, reason: str) -> bool:
        """Ask for another engine than that of *instance*; return whether its profile will get one."""
        profile, engine, in_force = instance.profile, engine_identity(instance), would_run(self._launcher, instance)
        if self._closing or self.go_back is None or not self.go_back(profile, engine, reason, in_force=in_force):
            return False
        self._successors.begin_return(profile.key)
        return True

    def _refuse_all(self, key: str, error: MeshError) -> None:
        for place in self._queues.pop_all(key):
            self._refuse(place, error)

    def _refuse(self, place: Place, error: MeshError) -> None:
        if place.close():
            try:
                place.waiter.refused(error)
            except Exception:
                log.exception("a waiter failed on refusal", model=place.key)

    # -- lifecycle -----------------------------------------------------------------------------------------------------

    def _step(self, instance: Instance, event: Event) -> None:
        """Move *instance* along its table and carry out the effects."""
        before = instance.state
        instance.state, effects = lifecycle.step(before, event, tuple(instance.story))
        if instance.state is before and not effects:
            return
        instance.story.append(f"{before}+{event}")
        if event is Event.HEALTHY:
            self._became_ready(instance)
        self._index(instance.profile.key)
        for effect in effects:
            self._effect(instance, effect)

    def _became_ready(self, instance: Instance) -> None:
        now, instance.ready_wall = self._loop.time(), wall_time()
        instance.ready_since = instance.idle_since = now
        self._failures.started(instance.profile.key)
        self._trust.proven(instance.profile)
        self._ran_out.pop(instance.profile.key, None)
        load_s = round(now - instance.started_at, 3)
        log.info("instance ready", instance=instance.id, model=instance.profile.id, slots=instance.slots, load_s=load_s)

    def _index(self, key: str) -> None:
        ready = [i for i in self._instances.values() if i.profile.key == key and i.state is State.READY and not i.stale]
        self._ready.pop(key, None)
        if ready:
            self._ready[key] = ready

    def _effect(self, instance: Instance, effect: Effect) -> None:
        match effect:
            case Effect.CHECK_IDLE:
                if not instance.in_use:
                    self._step(instance, Event.IDLE)
            case Effect.TERMINATE:
                instance.runner.terminate()
                deadline = partial(self._step, instance, Event.DEADLINE)
                instance.timer = self._loop.call_later(self.limits.kill_grace_s, self._post, deadline)
            case Effect.KILL:
                log.warning("instance ignored SIGTERM; killing it", instance=instance.id)
                instance.runner.kill()
            case Effect.RELEASE:
                if instance.timer is not None:
                    instance.timer.cancel()
                del self._instances[instance.id]
                instance.gone.set()
                if instance.runner.pid is not None:
                    self.ledger.left(instance)
                    if self.telemetry is not None:
                        self.telemetry.hurry()

    # -- memory --------------------------------------------------------------------------------------------------------

    def processes(self) -> Mapping[str, int]:
        """Return the root process of each instance, by instance id."""
        return {i.id: pid for i in self._instances.values() if (pid := i.runner.pid) is not None}

    def sampled(self, sample: Sample) -> None:
        """Telemetry has seen the devices and the children."""
        self._post(partial(self._sampled, sample))

    def _sampled(self, sample: Sample) -> None:
        self.ledger.sampled(sample, self._instances.values())
        for instance in (i for i in self.ledger.learn(sample, self._instances.values()) if not i.profile.engine_path):
            usage = sample.usage[instance.id]
            self._metrics.hash(instance.profile.args_hash).used(usage.ram_mib, sum((usage.gpu_mib or {}).values()))
        for instance in self._instances.values():
            instance.footprint = self.ledger.charge(instance)
            warn_of_excess(instance)
        if self.ledger.ghosts.all and self.telemetry is not None:
            self.telemetry.hurry()
        self.first_sample.set()

    def footprints_changed(self) -> None:
        """What a profile needs is known now, or is known better."""
        self._post(lambda: None)
