"""A simulated node: the real scheduler decides who is loaded, evicted and admitted; this is the physics under it.

Requests on an instance share it: prompts are computed in turns, and each token of an answer takes longer the more are
generated at once. Instances of one box share its GPU: each gets its part of the time. Memory is given back half a
second after an instance was told to stop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from random import Random

from benchmarks.routing_load import Arrival, Box, Model, load_s
from mesh.core.lifecycle import State
from mesh.core.node_state import Fit, ProfileState
from mesh.core.placement import Need
from mesh.core.resources import Resources
from mesh.core.scheduler import next_wakeup, outlook, plan
from mesh.core.speed import Speed
from mesh.core.world import Admit, Demand, Drain, InstanceView, Recipe, Snapshot, Spawn

STOP_S = 0.5
#: what a prompt that is being computed costs those that generate, in tokens' time
PREFILL_DISTURBS = 1.0
_EPSILON = 1e-9

#: at(when, what): call *what* with the time, then
Timer = Callable[[float, Callable[[float], None]], None]
Done = Callable[[Arrival, float], None]


@dataclass(slots=True, eq=False)
class Job:
    """One request on a node."""

    arrival: Arrival
    since: float
    done: Done
    prompt_left: float
    output_left: float
    admitted_at: float = 0.0
    first_token_at: float = 0.0
    company_at: float = 0.0  #: of its instance's integrals, when it was admitted
    shared_at: float = 0.0


@dataclass(slots=True, eq=False)
class Instance:
    id: str
    model: Model
    state: State = State.SPAWNING
    jobs: list[Job] = field(default_factory=list)
    began: float = 0.0
    ready_since: float = 0.0
    idle_since: float = 0.0
    fresh: bool = True
    at: float = 0.0  #: until when its jobs were advanced
    company: float = 0.0  #: integral of the number of its jobs over time
    shared: float = 0.0  #: integral of the number of instances that compute on the box
    version: int = 0  #: of its next event

    def rates(self, box: Box, computing: int) -> tuple[float, float]:
        """Return prompt tokens and answer tokens per second of each of its jobs."""
        prefilling = sum(job.prompt_left > 0 for job in self.jobs)
        slow = 1.0 + box.sharing * (len(self.jobs) - 1)
        speed = box.speed / max(1, computing)
        prefill = self.model.prefill_tps * speed / max(1, prefilling) / (1 + 0.1 * (len(self.jobs) - prefilling))
        return prefill, self.model.decode_tps * speed / (slow + (PREFILL_DISTURBS if prefilling else 0.0))

    def advance(self, box: Box, computing: int, now: float) -> None:
        elapsed = now - self.at
        if elapsed > 0 and self.jobs:
            prefill, decode = self.rates(box, computing)
            for job in self.jobs:
                if job.prompt_left > 0:
                    job.prompt_left -= prefill * elapsed
                    if job.prompt_left <= _EPSILON * prefill:
                        job.prompt_left, job.first_token_at = 0.0, now
                else:
                    job.output_left -= decode * elapsed
            self.company += len(self.jobs) * elapsed
            self.shared += computing * elapsed
        self.at = now

    def next_s(self, box: Box, computing: int) -> float:
        """Return after how many seconds one of its jobs gets to the end of its phase."""
        prefill, decode = self.rates(box, computing)
        return min((j.prompt_left / prefill if j.prompt_left > 0 else j.output_left / decode) for j in self.jobs)


class Node:
    def __init__(
        self, box: Box, models: dict[str, Model], timer: Timer, random: Random, tenure_s: float = 15.0
    ) -> None:
        self.box, self.models, self.random = box, {key: models[key] for key in sorted(box.models)}, random
        self.queues: dict[str, deque[Job]] = {}
        self.instances: list[Instance] = []
        self.speeds = {key: Speed() for key in self.models}
        self.loads = 0
        self._timer = timer
        self._wakeup = inf
        self._capacity = Resources({"vram": box.gpu_mib})
        self._recipes = {
            key: Recipe(key, Need(split_mib=m.size_mib), min_tenure_s=tenure_s, idle_timeout_s=0.0)
            for key, m in self.models.items()
        }

    def submit(self, arrival: Arrival, done: Done, now: float) -> None:
        job = Job(arrival, now, done, float(arrival.prompt), float(arrival.output))
        self.queues.setdefault(arrival.model, deque()).append(job)
        self._plan(now)

    def profiles(self, now: float) -> dict[str, ProfileState]:
        """Return what it tells of itself: the shape and the learned figures, as the real node's record."""
        world = self._world(now)
        return {key: self._profile(key, world) for key in self.models}

    def profile(self, key: str, now: float) -> ProfileState:
        return self._profile(key, self._world(now))

    def _profile(self, key: str, world: Snapshot) -> ProfileState:
        mine = [i for i in self.instances if i.model.key == key]
        ready = [i for i in mine if i.state is State.READY]
        loading = sum(i.state is State.SPAWNING for i in mine)
        fit = Fit.NOW
        if not ready and not loading:
            found = outlook(world, self._recipes[key])
            fit = Fit.NEVER if found.placement is None else Fit.WAIT if found.waits else Fit.NOW
            fit = Fit.EVICT if fit is Fit.NOW and found.victims else fit
        figures = self.speeds[key].figures()
        return ProfileState(
            key=key,
            id=key,
            fit=fit,
            ready=len(ready),
            loading=loading,
            slots=len(ready) * self.box.slots,
            busy=sum(len(i.jobs) for i in mine),
            queued=len(self.queues.get(key, ())),
            load_s=figures.load_s,
            prefill_tps=figures.prefill_tps,
            decode_tps=figures.decode_tps,
            service_s=figures.service_s,
        )

    def _world(self, now: float) -> Snapshot:
        views = [
            InstanceView(
                i.id, i.model.key, i.state, Resources({"vram": i.model.size_mib}), len(i.jobs), len(i.jobs),
                self.box.slots, i.ready_since, i.idle_since, i.fresh,
            )
            for i in self.instances
        ]  # fmt: skip
        demands = [Demand(key, queue[0].since, len(queue)) for key, queue in self.queues.items() if queue]
        return Snapshot(now, self._capacity, self._recipes, views, demands)

    def _plan(self, now: float) -> None:
        while any(self.queues.values()):
            world = self._world(now)
            decisions = plan(world).decisions
            for decision in decisions:
                match decision:
                    case Spawn(key=key):
                        self._spawn(key, now)
                    case Drain(instance=id_):
                        self._drain(id_, now)
                    case Admit(instance=id_, key=key, slotted=count):
                        for _ in range(count):
                            self._admit(id_, self.queues[key].popleft(), now)
                    case _:
                        raise AssertionError(decision)
            if not decisions:
                self._wake(next_wakeup(world), now)
                return

    def _wake(self, when: float | None, now: float) -> None:
        if when is not None and (when < self._wakeup or self._wakeup <= now):
            self._wakeup = when
            self._timer(when, self._plan)

    def _spawn(self, key: str, now: float) -> None:
        self.loads += 1
        instance = Instance(f"{self.loads:06}", self.models[key], began=now)
        self.instances.append(instance)
        self._timer(now + load_s(self.random, self.box, instance.model), lambda then: self._loaded(instance, then))

    def _loaded(self, instance: Instance, now: float) -> None:
        if instance.state is State.SPAWNING:
            instance.state = State.READY
            instance.ready_since = instance.idle_since = instance.at = now
            self.speeds[instance.model.key].observe_load(now - instance.began, now)
            self._plan(now)

    def _drain(self, id_: str, now: float) -> None:
        (instance,) = (i for i in self.instances if i.id == id_)
        key = instance.model.key
        self._recipes[key] = Recipe(
            key, self._recipes[key].need, min_tenure_s=self._recipes[key].min_tenure_s, idle_timeout_s=0.0,
            turn_ended=now,
        )  # fmt: skip
        instance.state = State.DRAINING
        self._stop_if_idle(instance, now)

    def _stop_if_idle(self, instance: Instance, now: float) -> None:
        if instance.state is State.DRAINING and not instance.jobs:
            instance.state = State.STOPPING
            self._timer(now + STOP_S, lambda then: self._exited(instance, then))

    def _exited(self, instance: Instance, now: float) -> None:
        self.instances.remove(instance)
        self._plan(now)

    def _admit(self, id_: str, job: Job, now: float) -> None:
        (instance,) = (i for i in self.instances if i.id == id_)
        assert len(instance.jobs) < self.box.slots, "more than its slots"
        self._advance(now)
        instance.fresh = False
        job.admitted_at, job.company_at, job.shared_at = now, instance.company, instance.shared
        instance.jobs.append(job)
        self._arm(now)

    def _computing(self) -> int:
        return sum(1 for i in self.instances if i.jobs)

    def _advance(self, now: float) -> None:
        computing = self._computing()
        for instance in self.instances:
            instance.advance(self.box, computing, now)

    def _arm(self, now: float) -> None:
        """Set every instance's next event: what one does changes how fast the others are."""
        computing = self._computing()
        for i in self.instances:
            i.version += 1
            if i.jobs:
                self._timer(
                    now + i.next_s(self.box, computing),
                    lambda then, i=i, version=i.version: self._due(i, version, then),  # type: ignore[misc]
                )

    def _due(self, instance: Instance, version: int, now: float) -> None:
        if version != instance.version:
            return
        self._advance(now)
        ended = [j for j in instance.jobs if j.prompt_left <= 0 and j.output_left <= _EPSILON * self.box.speed * 1000]
        for job in ended:
            instance.jobs.remove(job)
            self._learn(instance, job, now)
        if not instance.jobs:
            instance.idle_since = now
        self._arm(now)
        self._stop_if_idle(instance, now)
        for job in ended:
            job.done(job.arrival, now)
        if ended:
            self._plan(now)

    def _learn(self, instance: Instance, job: Job, now: float) -> None:
        held = now - job.admitted_at
        self.speeds[instance.model.key].observe_request(
            now=now,
            prompt_tokens=job.arrival.prompt,
            ttft_s=job.first_token_at - job.admitted_at,
            generated=job.arrival.output,
            decode_s=now - job.first_token_at,
            slot_s=held,
            concurrency=(instance.company - job.company_at) / held if held else 1.0,
            shared=(instance.shared - job.shared_at) / held if held else 1.0,
        )
