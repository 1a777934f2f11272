"""The sole owner of instances, queues and the memory budget.

Everything that happens is an event; ``_post`` applies the events that have come in, asks ``scheduler.plan`` what the
picture now calls for, and carries it out. Nothing here awaits, so within one event loop each event is atomic and needs
no lock. Slow work (starting, stopping, probing) is done by a ``Runner`` or a task whose result comes back as the next
event, carrying the instance it was started for; if that instance is gone, the result is dropped.

Shortcuts keep the plan off the hot path; tests prove each equal to it: a request for which a place is free and nobody
waits is admitted at once; one that joins others of its profile just queues; one that ends hands its place to the next
of its profile, or just gives it back if nobody waits anywhere.

(Longer than our usual file: it is one state machine, and its parts only make sense together.)
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count

from mesh.config.profile import Catalog, Profile
from mesh.core import lifecycle, scheduler
from mesh.core.lifecycle import Effect, Event, State
from mesh.core.resources import Resources, total
from mesh.core.scheduler import Admit, Drain, Recipe, Refuse, Snapshot, Spawn
from mesh.engine import refusals
from mesh.engine.abandoned import abandon
from mesh.engine.alarm import Alarm
from mesh.engine.failures import FailureBook, FailureInfo
from mesh.engine.instances import (
    ActiveLease,
    Instance,
    InstanceInfo,
    LauncherLike,
    describe,
    footprint,
    launch_identity,
)
from mesh.engine.lease import Ticket, Waiter
from mesh.engine.prewarm import Prewarm, prewarm
from mesh.engine.queues import ADMITTED, Place, Queues
from mesh.engine.runner import Exited, Healthy, Report, Stalled
from mesh.errors import DrainingError, EngineMissingError, InstanceError, MeshError
from mesh.host.logring import LogRing
from mesh.logs import Log
from mesh.metrics import Metrics
from mesh.tasks import wall_time

log = Log(__name__)

#: How often a closing node looks whether it is done.
DRAIN_LOOK_S = 0.02


@dataclass(frozen=True, slots=True)
class Limits:
    """The node's limits; a kind of memory that ``capacity`` lacks is not limited."""

    capacity: Resources
    max_instances: int = 100
    max_total_queue: int = 0  #: waiting requests on the node; 0 = unlimited
    kill_grace_s: float = 10.0  #: from SIGTERM to SIGKILL


@dataclass(frozen=True, slots=True)
class Budget:
    capacity: Resources
    used: Resources


class Supervisor:
    """See the module docstring. Create it inside the running event loop."""

    def __init__(self, *, catalog: Catalog, launcher: LauncherLike, limits: Limits, metrics: Metrics) -> None:
        self.catalog = catalog
        self.limits = limits
        self._loop = asyncio.get_running_loop()
        self._launcher = launcher
        self._metrics = metrics
        self._capacity = limits.capacity + Resources({"instances": limits.max_instances})
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

    # -- requests -----------------------------------------------------------------------------------------------

    def submit(
        self, profile: Profile, waiter: Waiter, *, since: float, deadline: float | None, needs_slot: bool = True
    ) -> Ticket:
        """See ``mesh.engine.lease.Admission``."""
        key = profile.key
        if not self._settling and (instance := self._open_instance(key, needs_slot)) is not None:
            self._grant(instance, waiter, needs_slot)
            return ADMITTED
        place = Place(key, waiter, since, needs_slot, self._cancelled, deadline)
        if needs_slot and not self._settling and self._queues.slotted(key):
            self._enqueue(place)  # others wait for the same already: one more of them changes no decision
        else:
            self._post(partial(self._enqueue, place))
        return place

    def _open_instance(self, key: str, needs_slot: bool) -> Instance | None:
        """Return the instance that the plan would choose for a request that need not queue, if there is one."""
        if self._closing or key in self._queues.lines:
            return None
        best = None
        for i in self._ready.get(key, ()):
            usable = i.id not in self._held and (not needs_slot or i.busy < i.limit)
            if usable and (best is None or (i.busy, i.id) < (best.busy, best.id)):
                best = i
        return best

    def _enqueue(self, place: Place) -> None:
        if not place.open:
            return
        if (error := self._no_room_to_wait(place)) is not None:
            self._refuse(place, error)
            return
        self._queues.add(place)
        if place.deadline is not None:
            place.timer = self._loop.call_at(place.deadline, self._post, partial(self._expired, place))

    def _no_room_to_wait(self, place: Place) -> MeshError | None:
        """Return why *place* may not queue, or None. One that would be admitted at once always may."""
        let_in = place.since < self._closing_since  # one that is sent again after a crash was let in before the drain
        if self._stopped or (self._closing and not let_in):
            return DrainingError("Node is draining for shutdown")
        profile = self.catalog.names.get(place.key)
        if profile is None or self._open_instance(place.key, place.needs_slot) is not None:
            return None
        if profile.max_queue and self._queues.length(profile.key) >= profile.max_queue:
            self._metrics.queue_drops_full += 1
            return refusals.queue_full(profile.id, profile.max_queue)
        if self.limits.max_total_queue and self._queues.total >= self.limits.max_total_queue:
            self._metrics.queue_drops_global_limit += 1
            return refusals.node_queue_full(self.limits.max_total_queue)
        return None

    def _grant(self, instance: Instance, waiter: Waiter, needs_slot: bool) -> None:
        """Count first, then tell: the count must be right whatever the waiter does next."""
        lease = ActiveLease(instance.runner.endpoint, instance, needs_slot, self._loop.time(), self._ended)
        if needs_slot:
            instance.leases.add(lease)
            instance.busy += 1
        elif waiter.only_looks:
            instance.looks.add(lease)
            lease.on_end = self._looked
        else:
            instance.leases.add(lease)
        instance.fresh = False
        try:
            waiter.admitted(lease)
        except Exception:
            log.exception("a waiter failed on admission", instance=instance.id)
            lease.release()

    def _refuse(self, place: Place, error: MeshError) -> None:
        if place.close():
            try:
                place.waiter.refused(error)
            except Exception:
                log.exception("a waiter failed on refusal", model=place.key)

    def _cancelled(self, place: Place) -> None:
        self._post(partial(self._queues.remove, place))

    def _expired(self, place: Place) -> None:
        if place.open:
            self._queues.remove(place)
            self._metrics.queue_drops_timeout += 1
            mine = [i.view() for i in self._instances.values() if i.profile.key == place.key]
            self._refuse(place, refusals.queue_timeout(place.key, self._loop.time() - place.since, mine))

    def _ended(self, lease: ActiveLease, abandoned: bool) -> None:
        instance = lease.instance
        if self._settling or self._closing or abandoned or instance.state is not State.READY:
            self._post(partial(self._give_back, lease, abandoned))
        elif not self._queues.total:  # as ``_give_back`` does it, but for one who is READY
            instance.leases.discard(lease)
            if lease.needs_slot:
                instance.busy -= 1
            if not instance.leases:
                instance.idle_since = now = self._loop.time()
                if timeout_s := instance.profile.idle_timeout_s:
                    self._alarm.at(now + timeout_s)
        elif not self._hand_over(lease, instance):
            self._post(partial(self._give_back, lease, abandoned))

    def _looked(self, lease: ActiveLease, abandoned: bool) -> None:
        self._post(partial(self._give_back_look, lease))

    def _give_back_look(self, lease: ActiveLease) -> None:
        instance = lease.instance
        instance.looks.discard(lease)
        if not instance.in_use and instance.state is State.DRAINING:
            self._step(instance, Event.IDLE)

    def _hand_over(self, lease: ActiveLease, instance: Instance) -> bool:
        """Give the place of a request that ended to the next one of its profile, if the plan would do just that."""
        key, queues = instance.profile.key, self._queues
        if not lease.needs_slot or instance.id in self._held or instance.busy > instance.limit:
            return False
        if queues.slotted(key) < (1 if len(queues.lines) == 1 else 2):
            return False  # nobody there, or the last one: others may be waiting for this profile's demand to end
        place = queues.pop(key, needs_slot=True)
        assert place is not None
        self._settling = True  # what the waiter does at once is an event like any other
        try:
            self._give_back(lease, abandoned=False)
            if place.close():
                self._grant(instance, place.waiter, needs_slot=True)
        finally:
            self._settling = False
        if self._inbox:
            self._post(self._inbox.popleft())
        return True

    def _give_back(self, lease: ActiveLease, abandoned: bool) -> None:
        instance = lease.instance
        instance.leases.discard(lease)
        if not instance.leases:
            instance.idle_since = self._loop.time()
        if lease.needs_slot:
            if abandoned and instance.state in (State.READY, State.DRAINING):
                abandon(instance, self._post, soon=lease.streaming)
            else:
                instance.busy -= 1
        if not instance.in_use and instance.state is State.DRAINING:
            self._step(instance, Event.IDLE)

    # -- events and decisions -----------------------------------------------------------------------------------

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
        world = self._snapshot()
        result = scheduler.plan(world)
        self._held = result.held
        for decision in result.decisions:
            self._carry_out(decision)
        self._alarm.reset(scheduler.next_wakeup(world))
        if self._stopped and not self._instances:
            self._empty.set()

    def _snapshot(self) -> Snapshot:
        demands = self._queues.demands()
        views = [i.view() for i in self._instances.values()]
        keys = {d.key for d in demands} | {v.key for v in views}
        recipes = {key: self._recipe(p) for key in keys if (p := self.catalog.names.get(key)) is not None}
        return Snapshot(self._loop.time(), self._capacity, recipes, views, demands)

    def _recipe(self, profile: Profile) -> Recipe:
        return Recipe(
            key=profile.key,
            footprint=footprint(profile),
            max_instances=profile.max_instances,
            min_tenure_s=profile.min_tenure_s,
            idle_timeout_s=profile.idle_timeout_s,
            pinned=profile.pinned,
            failing=self._failures.failing(profile.key),
        )

    def _carry_out(self, decision: scheduler.Decision) -> None:
        match decision:
            case Admit():
                self._admit(decision)
            case Spawn():
                self._spawn(decision.key)
            case Drain():
                instance = self._instances[decision.instance]
                log.info("draining", instance=instance.id, reason=decision.reason, competitor=decision.competitor)
                self._metrics.evictions_total += decision.reason is scheduler.Reason.ROOM
                self._step(instance, Event.DRAIN)
            case Refuse():
                error = self._refusal(decision)
                for place in self._queues.pop_all(decision.key):
                    self._refuse(place, error)

    def _admit(self, decision: Admit) -> None:
        instance = self._instances[decision.instance]
        for needs_slot, number in ((True, decision.slotted), (False, decision.free)):
            for _ in range(number):
                place = self._queues.pop(decision.key, needs_slot=needs_slot)
                if place is not None and place.close():
                    self._grant(instance, place.waiter, needs_slot)

    def _refusal(self, decision: Refuse) -> MeshError:
        profile = self.catalog.names.get(decision.key)
        if profile is None:
            return refusals.gone(decision.key)
        failure, now = self._failures.get(decision.key), self._loop.time()
        need = footprint(profile)
        return refusals.refused(profile.id, decision.refusal, need, self.limits.capacity, failure, now)

    # -- instances ----------------------------------------------------------------------------------------------

    def _spawn(self, key: str) -> None:
        profile = self.catalog.names[key]
        instance_id = f"{key.replace(':', '.').replace('/', '_')}-{next(self._serial)}"
        self._metrics.spawns_total += 1
        try:
            runner = self._launcher.launch(instance_id, profile, partial(self._report, instance_id))
        except MeshError as error:
            self._post(partial(self._failed, profile, "load", error.message, (), 0.0))
            return
        now = self._loop.time()
        instance = Instance(instance_id, profile, runner, footprint(profile), now, started_wall=wall_time())
        self._instances[instance_id] = instance
        try:
            runner.start()
        except MeshError as error:
            self._post(partial(self._not_started, instance, error))
        except Exception as error:  # a bug, or an error that nobody foresaw: no process will ever report
            log.exception("starting an instance failed unexpectedly", instance=instance_id)
            self._post(partial(self._not_started, instance, InstanceError(f"cannot be started: {error!r}")))
        else:
            port = runner.endpoint.port
            log.info("instance started", instance=instance_id, model=profile.id, pid=runner.pid, port=port)

    def _not_started(self, instance: Instance, error: MeshError) -> None:
        """No process came of it."""
        self._step(instance, Event.EXITED)
        kind = "engine" if isinstance(error, EngineMissingError) else "load"
        self._failed(instance.profile, kind, error.message, (), 0.0)

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
            case Stalled():
                if instance.state is State.SPAWNING:
                    self._step(instance, Event.DEADLINE)
                    tail = tuple(instance.runner.ring.tail(refusals.QUOTED_LINES))
                    self._failed(instance.profile, "load", report.reason, tail, 0.0)
            case Exited():
                self._exited(instance, report)

    def _exited(self, instance: Instance, report: Exited) -> None:
        """Tell the three ends apart (trap 29): load failure, crash, and a stop that was asked for."""
        state, profile = instance.state, instance.profile
        self._step(instance, Event.EXITED)
        lived_s = self._loop.time() - instance.ready_since if instance.ready_wall is not None else 0.0
        if state is State.STOPPING:
            log.info("instance stopped", instance=instance.id, model=profile.id, returncode=report.returncode)
        elif state is State.SPAWNING:
            refused = report.returncode == 1  # how llama-server ends when a file or an argument is wrong
            reason = refusals.to_correct(report.reason, profile) if refused else report.reason
            self._failed(profile, "load", reason, report.log_tail, lived_s)
        else:
            self._metrics.crashes_total += 1
            self._failed(profile, "crash", report.reason, report.log_tail, lived_s)

    def _failed(self, profile: Profile, kind: str, reason: str, tail: tuple[str, ...], lived_s: float) -> None:
        """Remember the failure; after a failed load nobody who waited for it goes on waiting (trap 19)."""
        failure = self._failures.record(profile.key, kind, reason, tail, lived_s)
        fields = {"kind": kind, "reason": reason, "failures_in_a_row": failure.count, "log_tail": list(tail)}
        log.error("instance failed", model=profile.id, **fields)
        if kind != "crash":
            self._metrics.spawn_failures_total += 1
            if profile.key not in self._ready:
                error = refusals.failed(profile.id, failure, self._loop.time())
                for place in self._queues.pop_all(profile.key):
                    self._refuse(place, error)

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
        now = self._loop.time()
        instance.ready_since = instance.idle_since = now
        instance.ready_wall = wall_time()
        self._failures.started(instance.profile.key)
        load_s = round(now - instance.started_at, 3)
        log.info("instance ready", instance=instance.id, model=instance.profile.id, slots=instance.slots, load_s=load_s)

    def _index(self, key: str) -> None:
        ready = [i for i in self._instances.values() if i.profile.key == key and i.state is State.READY and not i.stale]
        if ready:
            self._ready[key] = ready
        else:
            self._ready.pop(key, None)

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

    # -- what operators ask of it -------------------------------------------------------------------------------

    def apply_catalog(self, catalog: Catalog) -> None:
        """Swap the catalog. Instances whose launch changed drain; the others keep their pid and get the new limits."""
        self._post(partial(self._apply_catalog, catalog))

    def _apply_catalog(self, catalog: Catalog) -> None:
        self._failures.forget_changed(self.catalog, catalog)
        self.catalog = catalog
        for instance in self._instances.values():
            new = catalog.names.get(instance.profile.key)
            if new is None or not new.max_instances or launch_identity(new) != launch_identity(instance.profile):
                instance.stale = True
            elif not instance.stale:
                instance.adopt(new)
        for key in {i.profile.key for i in self._instances.values()}:
            self._index(key)

    async def prewarm(
        self, profile: Profile, *, wait: bool = True, deadline: float | None = None
    ) -> InstanceInfo | None:
        """See ``mesh.engine.prewarm``; return the instance that is ready, if one was waited for."""
        instance = self._instances.get(await prewarm(self, profile, wait=wait, deadline=deadline) or "")
        return None if instance is None else describe(instance, self._loop.time())

    def unload(self, key: str | None) -> int:
        """Drain the instances of *key* (all, if None); return how many were told to."""
        mine = [i for i in self._instances.values() if key in (None, i.profile.key) and i.state in scheduler.LIVE]
        for instance in mine:
            self._post(partial(self._step, instance, Event.DRAIN))
        return len(mine)

    def begin_drain(self) -> None:
        """Take no new requests; what waits and what runs is still served."""
        self._post(self._begin_drain)

    def _begin_drain(self) -> None:
        self._closing = True
        self._closing_since = min(self._closing_since, self._loop.time())
        for place in self._queues.places():
            if isinstance(place.waiter, Prewarm):  # else a load that nobody waits for would use up the grace (trap 16)
                self._queues.remove(place)
                self._refuse(place, DrainingError("Node is draining for shutdown"))

    async def close(self, grace_s: float, busy: Callable[[], bool] = lambda: False) -> None:
        """Serve what is there for at most *grace_s* seconds, then refuse the rest and stop all children in parallel.

        *busy* tells of requests that are not here at the moment, but will (again) be: bodies that are still being
        read, requests between a crash and their second attempt.
        """
        self.begin_drain()
        try:
            async with asyncio.timeout(grace_s):
                while self._serving() or busy():  # noqa: ASYNC110  # several owners, none of whom signals
                    await asyncio.sleep(DRAIN_LOOK_S)
        except TimeoutError:
            log.warning("shutdown grace is over", waiting=self._queues.total, grace_s=grace_s)
        self._post(self._stop_all)
        await self._empty.wait()
        self._alarm.reset(None)

    def _serving(self) -> bool:
        return bool(self._queues.total) or any(i.in_use for i in self._instances.values())

    def _stop_all(self) -> None:
        self._stopped = True
        for key in self._queues.keys:
            for place in self._queues.pop_all(key):
                self._refuse(place, DrainingError("Node is draining for shutdown"))
        for instance in list(self._instances.values()):
            self._step(instance, Event.DRAIN)
            if instance.state is State.DRAINING:
                self._step(instance, Event.DEADLINE)

    def kill_all(self) -> None:
        """SIGKILL every child now (second signal). Does not wait."""
        for instance in self._instances.values():
            instance.runner.kill()

    def instances(self) -> tuple[InstanceInfo, ...]:
        now = self._loop.time()
        return tuple(describe(i, now) for i in self._instances.values())

    def queues(self) -> Mapping[str, int]:
        """Return the number of waiting requests per profile key; profiles without any are left out."""
        return {key: self._queues.length(key) for key in self._queues.keys}

    def budget(self) -> Budget:
        used = total(i.footprint for i in self._instances.values())
        return Budget(self.limits.capacity, Resources({k: v for k, v in used.mib.items() if k != "instances"}))

    def failures(self) -> Mapping[str, FailureInfo]:
        """Return the last load failure or crash per profile key."""
        return self._failures.all()

    def log_ring(self, key: str) -> list[tuple[str, LogRing]]:
        """Return the output of each instance of *key*, by instance id."""
        return [(i.id, i.runner.ring) for i in self._instances.values() if i.profile.key == key]
