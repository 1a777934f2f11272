"""The supervisor: the dispatcher, and what operators and the node itself ask of it.

Nothing here decides who is served where; every change goes through the dispatcher's events.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from operator import attrgetter
from pathlib import Path

from mesh.config.builds import DEFAULT_BUILD
from mesh.config.profile import Catalog, Profile
from mesh.core.lifecycle import Event, State
from mesh.core.resources import Resources, total
from mesh.core.world import LIVE
from mesh.engine import refusals
from mesh.engine.dispatcher import Dispatcher, Limits
from mesh.engine.failures import FailureInfo
from mesh.engine.holders import fit_of, memory_only
from mesh.engine.instances import ActiveLease, Instance, InstanceInfo, describe, launch_identity
from mesh.engine.memory_report import ModelFit
from mesh.engine.prewarm import Prewarm, prewarm
from mesh.engine.replacement import Found, Watch, differing, look, mark_superseded
from mesh.engine.trial import Guest, hidden, stay, visit, while_not
from mesh.errors import DrainingError
from mesh.host.logring import LogRing
from mesh.logs import Log

__all__ = ["Budget", "Limits", "Supervisor"]

log = Log(__name__)

#: How often a closing node looks whether it is done.
DRAIN_LOOK_S = 0.02
#: How long a question about all models waits for their files; what is not known by then is told so.
LOOK_S = 10.0


@dataclass(frozen=True, slots=True)
class Budget:
    capacity: Resources
    used: Resources


@dataclass(slots=True)
class ProfileLoad:
    """The load of one profile's instances, together."""

    queued: int = 0
    ready: int = 0
    loading: int = 0
    busy: int = 0  #: slots that are taken
    slots: int = 0
    unlimited: bool = False  #: an instance takes any number of requests

    @property
    def has_room(self) -> bool:
        """Whether a request would be admitted at once."""
        return bool(self.ready) and not self.queued and (self.unlimited or self.busy < self.slots)


class Supervisor(Dispatcher):
    """See the module docstring. Create it inside the running event loop."""

    def apply_catalog(self, catalog: Catalog) -> None:
        """Swap the catalog. Instances whose launch changed drain; the others keep their pid and get the new limits."""
        self._post(partial(self._apply_catalog, catalog))

    def _apply_catalog(self, catalog: Catalog) -> None:
        for key in self._failures.forget_changed(self.catalog, catalog):
            self._ran_out.pop(key, None)
        self.catalog = catalog
        for instance in self._instances.values():
            new = self.profile(instance.profile.key)
            if new is None or not new.max_instances or launch_identity(new) != launch_identity(instance.profile):
                instance.stale = True
            elif not instance.stale:
                instance.adopt(new)
                instance.footprint = self.ledger.charge(instance)
        for key in {i.profile.key for i in self._instances.values()}:
            self._index(key)

    def engines_changed(self, build: str | None = None) -> None:
        """An engine was installed, of *build* if that is named; what runs an old one is replaced in turn.

        ``mesh.core.replacing`` says how. What waited for the engine before is started with what is in force now.
        """
        self._watch.installed()
        self._footprints.forget_looks()
        returning = [p for p in map(self.profile, self._successors.returning) if p is not None]
        profiles = (*map(attrgetter("profile"), self._usual()), *returning)
        mine = [p for p in profiles if build in (None, p.engine_build or DEFAULT_BUILD)]
        found = look(mine, self._launcher)
        self._post(partial(self._take_engines, found))
        self._post(partial(self._end_returns, mine, found))

    def no_way_back(self, key: str) -> None:
        """After ``go_back`` said yes: the engine before is not in force. Who waits for *key* is told of the failure.

        Does nothing if ``engines_changed`` was called since.
        """
        self._post(partial(self._give_up_return, key))

    async def look_at_engines(self) -> None:
        """As ``engines_changed``, for what somebody else replaced (trap 93): to be called every few seconds."""
        found = await self._watch.look(i.profile for i in self._usual())
        if any(differing(self._usual(), found)):
            self._footprints.forget_looks()
            self._post(partial(self._take_engines, found))

    @cached_property
    def _watch(self) -> Watch:
        return Watch(self._launcher)

    def _usual(self) -> list[Instance]:
        return [i for i in self._instances.values() if i.profile.key not in self._hidden]

    def _take_engines(self, found: Found) -> None:
        changed = list(mark_superseded(self._usual(), found))
        for instance, _ in changed:
            self._trust.engine_is_back(instance.profile)
        for instance, engine in changed:
            if instance.superseded:
                self._trust.engine_replaced(instance.profile, engine.identity)

    def _end_returns(self, profiles: list[Profile], found: Found) -> None:
        """What failed with the bad engine says nothing of what would run *profiles* now."""
        for profile in profiles:
            if (before := self._successors.end_return(profile.key)) is None:
                continue
            self._failures.forget(profile.key)
            if (engine := found.get(profile.key)) is None or engine.identity == before:
                self._trust.engine_is_back(profile)
            else:
                self._trust.engine_replaced(profile, engine.identity)

    def _give_up_return(self, key: str) -> None:
        over, profile = self._successors.end_return(key) is None, self.profile(key)
        failure = self._failures.get(key)  # none if its profile was edited since: that is worth a try
        if not over and profile is not None and failure is not None:
            self._refuse_all(key, refusals.failed(profile.id, failure, self._loop.time()))

    async def prewarm(
        self, profile: Profile, *, wait: bool = True, deadline: float | None = None
    ) -> InstanceInfo | None:
        """See ``mesh.engine.prewarm``; return the instance that is ready, if one was waited for."""
        instance = self._instances.get(await prewarm(self, profile, wait=wait, deadline=deadline) or "")
        return None if instance is None else describe(instance, self._loop.time())

    def unload(self, key: str | None) -> int:
        """Drain the instances of *key* (all, if None); return how many were told to."""
        for successor in [k for k in self._successors.keys if key in (None, k)]:
            self._successors.give_up(successor)
        mine = [i for i in self._instances.values() if key in (None, i.profile.key) and i.state in LIVE]
        for instance in mine:
            self._post(partial(self._step, instance, Event.DRAIN))
        return len(mine)

    @contextlib.asynccontextmanager
    async def trial(self, profile: Profile, binary: Path | None) -> AsyncIterator[ActiveLease]:
        """Hold a place in an instance of *profile*: of its usual engine, or else of one that runs *binary*.

        The latter is started for this and stopped after it, under the rules of every other, but that nobody is kept
        from work for it; one at a time. Raise the refusal (a ``MeshError``) if it cannot be started, or if there is no
        room in time; and ``DisplacedError``, in the middle of whatever is done with it, once requests wait for
        *profile* and nothing of it runs: they come first.
        """
        if binary is None:
            async with visit(self, profile) as lease:
                yield lease
            return
        async with while_not(partial(self._misses, profile.key)), stay(self, hidden(profile, binary)) as lease:
            yield lease

    def _misses(self, key: str) -> bool:
        """Whether requests wait for *key* and nothing of it runs or loads."""
        return self._clients(key) > 0 and not any(
            i.profile.key == key and i.state in LIVE and not i.stale for i in self._instances.values()
        )

    async def hide(self, profile: Profile) -> None:
        """See ``mesh.engine.trial.House``."""
        await self._one_trial.acquire()
        self._hidden[profile.key] = profile

    async def forget(self, profile: Profile) -> None:
        """See ``mesh.engine.trial.House``."""
        key = profile.key
        self.unload(key)
        while mine := [i for i in self._instances.values() if i.profile.key == key]:
            await mine[0].gone.wait()
        self._post(partial(self._forget, key))

    def _forget(self, key: str) -> None:
        self._hidden.pop(key, None)
        self._failures.forget(key)
        self._turn_ended.pop(key, None)
        self._ran_out.pop(key, None)
        self._one_trial.release()

    def begin_drain(self) -> None:
        """Take no new requests; what waits and what runs is still served."""
        self._post(self._begin_drain)

    def _begin_drain(self) -> None:
        self._closing = True
        self._closing_since = min(self._closing_since, self._loop.time())
        for place in self._queues.places():
            # else a load that nobody waits for would use up the grace (trap 16)
            if isinstance(place.waiter, Prewarm | Guest):
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
            self._refuse_all(key, DrainingError("Node is draining for shutdown"))
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
        """Return the number of waiting requests per profile key; profiles without any are left out, and trials."""
        waiting = {key: self._clients(key) for key in self._queues.keys if key not in self._hidden}
        return {key: number for key, number in waiting.items() if number}

    def load(self, key: str) -> ProfileLoad:
        """Return how busy *key*'s instances are. Cheap: it is asked for requests that other nodes could serve too."""
        load = ProfileLoad(queued=self._clients(key))
        for i in self._instances.values():
            if i.profile.key != key or i.stale:
                continue
            if i.state is State.READY:
                load.ready += 1
                load.busy += i.busy
                load.slots += i.slots
                load.unlimited = load.unlimited or not i.slots
            elif i.state is State.SPAWNING:
                load.loading += 1
        return load

    def budget(self) -> Budget:
        used = total(i.footprint for i in self._instances.values())
        return Budget(memory_only(self.ledger.capacity), memory_only(used))

    async def model_fits(self) -> tuple[ModelFit, ...]:
        """Return for each profile whether an instance could start now. Looks at the model files off the loop first."""
        profiles = self.catalog.profiles
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_S):
                await self._footprints.look(profiles)
        world = self._snapshot()
        fits = (fit_of(p, self._recipe(p, wanted=True), world, self._footprints) for p in profiles)
        reasons = {key: failure.reason for key, failure in self._failures.all().items() if failure.kind != "crash"}
        return tuple(replace(fit, failure=reasons.get(fit.key)) for fit in fits)

    def failures(self) -> Mapping[str, FailureInfo]:
        """Return the last load failure or crash per profile key; not those of trials.

        What waits for another engine is not tried again before that is in force.
        """
        usual = {key: failure for key, failure in self._failures.all().items() if key not in self._hidden}
        later = {key: replace(f, retry_in_s=max(1.0, f.retry_in_s)) for key, f in usual.items()
                 if self._successors.returns(key)}  # fmt: skip
        return usual | later

    def log_ring(self, key: str) -> list[tuple[str, LogRing]]:
        """Return the output of each instance of *key*, by instance id."""
        return [(i.id, i.runner.ring) for i in self._instances.values() if i.profile.key == key]
