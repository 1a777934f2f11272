"""The sole owner of queues: who is admitted where, and what the scheduler's decisions lead to.

Shortcuts keep the plan off the hot path; tests prove each equal to it: a request for which a place is free and nobody
waits is admitted at once; one that joins others of its profile just queues; one that ends hands its place to the next
of its profile, or just gives it back if nobody waits anywhere.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import inf

from mesh.config.profile import Profile
from mesh.core import scheduler
from mesh.core.footprint import Source
from mesh.core.lifecycle import Event, State
from mesh.core.replacing import makes_room, still_to_come
from mesh.core.world import Admit, Decision, Drain, Forgo, Reason, Recipe, Refuse, Snapshot, Spawn, Vet
from mesh.engine import refusals
from mesh.engine.abandoned import abandon
from mesh.engine.holders import report_of
from mesh.engine.instances import ActiveLease, Instance
from mesh.engine.lease import Ticket, Waiter
from mesh.engine.lives import Lives
from mesh.engine.memory_report import MemoryReport
from mesh.engine.prewarm import unattended
from mesh.engine.queues import ADMITTED, Place
from mesh.engine.surroundings import Limits
from mesh.errors import DrainingError, MeshError
from mesh.logs import Log

log = Log(__name__)

__all__ = ["Dispatcher", "Limits"]


class Dispatcher(Lives):
    """See the module docstring. Create it inside the running event loop."""

    _cramped: frozenset[str] = frozenset()  #: of which it was said that their successors have no room

    # -- requests ------------------------------------------------------------------------------------------------------

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
        profile = self.profile(place.key)
        if profile is None or self._open_instance(place.key, place.needs_slot) is not None:
            return None
        if profile.max_queue and self._clients(profile.key) >= profile.max_queue:
            self._metrics.queue_drops_full += 1
            return refusals.queue_full(profile.id, profile.max_queue)
        clients = self._queues.total - self._successors.places
        if self.limits.max_total_queue and clients >= self.limits.max_total_queue:
            self._metrics.queue_drops_global_limit += 1
            return refusals.node_queue_full(self.limits.max_total_queue)
        return None

    def _clients(self, key: str) -> int:
        """Return how many requests wait for *key*: a successor that only makes up for its predecessor is none."""
        return self._queues.length(key) - self._successors.has_place(key)

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

    def _cancelled(self, place: Place) -> None:
        self._post(partial(self._queues.remove, place))

    def _expired(self, place: Place) -> None:
        if place.open:
            self._queues.remove(place)
            self._metrics.queue_drops_timeout += 1
            self._refuse(place, self._timed_out(place))

    def _timed_out(self, place: Place) -> MeshError:
        """Return what *place* waited for in vain."""
        now, profile = self._loop.time(), self.profile(place.key)
        name = place.key if profile is None else profile.id
        if self._successors.returns(place.key) and (failure := self._failures.get(place.key)) is not None:
            return refusals.failed(name, failure, now)
        mine = [i.view() for i in self._instances.values() if i.profile.key == place.key]
        known = None if profile is None else self._footprints.peek(profile)
        return refusals.queue_timeout(name, now - place.since, mine, known, self.memory_report())

    def _ended(self, lease: ActiveLease, abandoned: bool) -> None:
        instance = lease.instance
        if self._settling or self._closing or abandoned or instance.state is not State.READY:
            self._post(partial(self._give_back, lease, abandoned))
        elif not self._queues.total:  # as ``_give_back`` does it, but for one who is READY
            instance.leases.discard(lease)
            if lease.needs_slot:
                instance.busy -= 1
                self._served(instance)
            if not instance.leases:
                instance.idle_since = now = self._loop.time()
                if timeout_s := instance.profile.idle_timeout_s:
                    self._alarm.at(now + timeout_s)
        elif not self._hand_over(lease, instance):
            self._post(partial(self._give_back, lease, abandoned))

    def _served(self, instance: Instance) -> None:
        """Note that its buffers have been used; from the first time on it may be learned from."""
        if not instance.served:
            instance.served = True
            if self.telemetry is not None:
                self.telemetry.hurry()

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
                self._served(instance)
        if not instance.in_use and instance.state is State.DRAINING:
            self._step(instance, Event.IDLE)

    # -- decisions -----------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        for key in self._ran_out.keys() - self._queues.lines.keys():
            del self._ran_out[key]  # nobody waits for that load any more
        look_again_at = self.ledger.expire()
        world = self._snapshot()
        for key in self._successors.keys - world.replacing:
            self._successors.give_up(key)
        result = scheduler.plan(world)
        self._held = result.held
        self._tell_cramped(world, result.cramped)
        for decision in result.decisions:
            self._carry_out(decision)
        if self._queues.total and any(isinstance(d, Admit) for d in result.decisions):
            self._inbox.append(lambda: None)  # who waits may have an instance now that others no longer wait for
        moments = (scheduler.next_wakeup(world), look_again_at, *self._retries(world))
        self._alarm.reset(min((m for m in moments if m is not None), default=None))
        if self.telemetry is not None:
            moving = bool(self.ledger.ghosts.all) or any(i.state is not State.READY for i in self._instances.values())
            self.telemetry.set_busy(moving or not self._queues.lines.keys() <= self._ready.keys())
        if self._stopped and not self._instances:
            self._empty.set()

    def _snapshot(self) -> Snapshot:
        ledger = self.ledger
        demands = [replace(d, attended=self._clients(d.key) > 0) for d in self._queues.demands()]
        views = [i.view() for i in self._instances.values()]
        if self._closing:  # a node that stops replaces nothing any more
            views = [replace(v, superseded=False) for v in views]
        waiting = {d.key for d in demands}
        wanted = waiting | {v.key for v in views if v.superseded}
        profiles = [p for key in {*waiting, *(v.key for v in views)} if (p := self.profile(key)) is not None]
        recipes = {p.key: self._recipe(p, wanted=p.key in wanted) for p in profiles}
        replacing = still_to_come(self._successors.keys, views, waiting)
        views += ledger.ghosts.views()
        return Snapshot(self._loop.time(), ledger.capacity, recipes, views, demands, ledger.foreign, replacing,
                        ledger.spare_ram_mib())  # fmt: skip

    def _recipe(self, profile: Profile, *, wanted: bool) -> Recipe:
        fresh = self._footprints.fresh(profile)  # asked first: the need is then as fresh, whatever time it gets
        returns = self._successors.returns(profile.key)  # then its room is kept, and nobody else has to go for it
        return Recipe(
            key=profile.key,
            need=self.ledger.need(profile) if wanted else None,
            fresh=fresh and not returns,
            max_instances=profile.max_instances,
            min_tenure_s=profile.min_tenure_s,
            idle_timeout_s=profile.idle_timeout_s,
            pinned=profile.pinned,
            failing=self._failures.failing(profile.key) and not returns,
            vetted=self._trust.passed(profile) and not returns,
            vetting=self._trust.under_way(profile) or returns,
            turn_ended=self._turn_ended.get(profile.key, -inf),
            ran_out=self._ran_out.get(profile.key),
            guessed=(known := self._footprints.peek(profile)) is not None and known.source is Source.UNKNOWN,
            doubtful=self._trust.doubtful(profile),
            yielding=profile.key in self._hidden,
        )

    def _carry_out(self, decision: Decision) -> None:
        match decision:
            case Admit():
                self._admit(decision)
            case Spawn():
                self._spawn(decision)
            case Vet():
                profile = self.profile(decision.key)
                assert profile is not None, "the scheduler was told of it"
                self._trust.begin(profile)
            case Drain():
                instance = self._instances[decision.instance]
                log.info("draining", instance=instance.id, reason=decision.reason, competitor=decision.competitor)
                if decision.reason is Reason.ROOM:
                    self._metrics.evictions_total += 1
                    self._turn_ended[instance.profile.key] = self._loop.time()
                if makes_room(decision):
                    self._await_successor(instance)
                self._step(instance, Event.DRAIN)
            case Forgo():
                log.info("no room for the successor any more: the next request starts it", model=decision.key)
                self._successors.give_up(decision.key)
            case Refuse():
                self._refuse_all(decision.key, self._refusal(decision))

    def _tell_cramped(self, world: Snapshot, cramped: frozenset[str]) -> None:
        """Say once for each profile that its old engine goes on, for want of room for the new one."""
        superseded = {i.key for i in world.instances if i.superseded}
        for key in sorted(cramped - self._cramped):
            log.warning("the old engine goes on: there is no room for an instance of the new one", model=key)
        self._cramped = (self._cramped | cramped) & superseded

    def _await_successor(self, going: Instance) -> None:
        """Start the profile of *going* again once there is room, without a request."""
        key = going.profile.key
        place = Place(key, unattended(), self._loop.time(), needs_slot=False, on_cancel=self._cancelled)
        self._successors.expect(place, going)
        self._queues.add(place)

    def _retries(self, world: Snapshot) -> list[float]:
        """Return when the back-offs of successors that failed to start are over."""
        keys = {i.key for i in world.instances if i.superseded}
        backed_off = [f.retry_at for f in map(self._failures.get, keys) if f is not None]
        doubted = [self._trust.doubted_until(p) for p in map(self.profile, keys) if p is not None]
        return [moment for moment in (*backed_off, *doubted) if moment > world.now]

    def _admit(self, decision: Admit) -> None:
        instance = self._instances[decision.instance]
        for needs_slot, number in ((True, decision.slotted), (False, decision.free)):
            for _ in range(number):
                place = self._queues.pop(decision.key, needs_slot=needs_slot)
                if place is not None and place.close():
                    self._grant(instance, place.waiter, needs_slot)

    def _refusal(self, decision: Refuse) -> MeshError:
        profile = self.profile(decision.key)
        if profile is None:
            return refusals.gone(decision.key)
        failure, now = self._failures.get(decision.key), self._loop.time()
        return refusals.refused(profile, decision.refusal, self._footprints.peek(profile), self.memory_report(),
                                failure, now)  # fmt: skip

    def memory_report(self) -> MemoryReport:
        """Return who holds what of the node's memory."""
        return report_of(self.ledger, self._instances.values(), self._footprints, self._loop.time())
