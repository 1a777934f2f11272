"""What a plan does to a world, and a simulation in which time passes: the supervisor and its processes, in small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count

from mesh.core.lifecycle import State
from mesh.core.replacing import makes_room
from mesh.core.scheduler import next_wakeup
from mesh.core.world import Admit, Demand, Drain, Forgo, InstanceView, Plan, Reason, Refuse, Snapshot, Spawn, Vet
from tests.core.worlds import Planner, forgetting


def apply(world: Snapshot, plan: Plan) -> Snapshot:
    """Return the world right after the supervisor carried *plan* out."""
    instances = {i.id: i for i in world.instances}
    demands = {d.key: d for d in world.demands}
    recipes, replacing = dict(world.recipes), world.replacing
    for decision in plan.decisions:
        match decision:
            case Admit(instance=id_, key=key, slotted=slotted, free=free):
                i, d = instances[id_], demands[key]
                instances[id_] = replace(i, active=i.active + slotted + free, busy=i.busy + slotted, fresh=False)
                demands[key] = replace(d, slotted=d.slotted - slotted, free=d.free - free)
            case Spawn(key=key, footprint=footprint):
                new = next(id_ for n in count() if (id_ := f"new{n}@{world.now:g}") not in instances)
                pinned = recipes[key].pinned
                instances[new] = InstanceView(new, key, State.SPAWNING, footprint, fresh=True, pinned=pinned)
            case Drain(instance=id_, reason=reason, competitor=competitor):
                i = instances[id_]
                if competitor == i.key:  # its successor is waited for
                    old = demands.get(i.key) or Demand(i.key, world.now, attended=False)
                    demands[i.key], replacing = replace(old, free=old.free + 1), replacing | {i.key}
                if reason is Reason.ROOM and i.key in recipes:
                    recipes[i.key] = replace(recipes[i.key], turn_ended=world.now)
                idle = not i.active or i.state is State.SPAWNING
                instances[id_] = replace(i, state=State.STOPPING if idle else State.DRAINING)
            case Refuse(key=key):
                del demands[key]
            case Forgo(key=key):
                demands[key] = replace(demands[key], free=demands[key].free - 1)
            case Vet(key=key):
                recipes[key] = replace(recipes[key], vetting=True)
    left = [d for d in demands.values() if d.slotted or d.free]
    after = replace(world, instances=list(instances.values()), demands=left, recipes=recipes, replacing=replacing)
    return forgetting(after)


def settled(world: Snapshot, planner: Planner) -> Snapshot:
    """Return *world* as the supervisor leaves it: it plans again after admissions while somebody waits.

    An admission may make others evictable: a sibling that nobody waits for any more, one that served its first request.
    """
    while True:
        result = planner(world)
        world = apply(world, result)
        if not world.demands or not any(isinstance(d, Admit) for d in result.decisions):
            return world


def loaded(world: Snapshot, id_: str, slots: int = 1) -> Snapshot:
    """The load of *id_* succeeded: whatever was doubted of its profile is not any more."""
    i = next(i for i in world.instances if i.id == id_)
    recipe = world.recipes.get(i.key)
    recipes = dict(world.recipes)
    if recipe is not None:
        recipes[i.key] = replace(recipe, vetted=True, vetting=False, failing=False, ran_out=None)
    ready = replace(i, state=State.READY, ready_since=world.now, idle_since=world.now, slots=slots)
    return replace(world, recipes=recipes, instances=[ready if x is i else x for x in world.instances])


def ended(world: Snapshot, id_: str) -> Snapshot:
    """One request of *id_* ended; a draining instance without any is told to stop."""

    def less(i: InstanceView) -> InstanceView:
        i = replace(i, active=max(0, i.active - 1), busy=max(0, i.busy - 1), idle_since=world.now)
        return replace(i, state=State.STOPPING) if i.state is State.DRAINING and not i.active else i

    return replace(world, instances=[less(i) if i.id == id_ else i for i in world.instances])


def gone(world: Snapshot, id_: str) -> Snapshot:
    return replace(world, instances=[i for i in world.instances if i.id != id_])


def vetted(world: Snapshot, key: str) -> Snapshot:
    recipe = replace(world.recipes[key], vetted=True, vetting=False)
    return replace(world, recipes={**world.recipes, key: recipe})


def arrived(world: Snapshot, key: str, slotted: int = 0, free: int = 0) -> Snapshot:
    old = next((d for d in world.demands if d.key == key), None) or Demand(key, world.now)
    new = replace(old, slotted=old.slotted + slotted, free=old.free + free, attended=True)
    return replace(world, demands=[*(d for d in world.demands if d.key != key), new])


@dataclass
class Simulation:
    """Time passes: loads finish, requests end, stopped processes vanish, and the plan runs after each of that.

    Without arrivals it goes from event to event, and time alone wakes the planner only when ``next_wakeup`` says so.
    """

    world: Snapshot
    planner: Planner
    service_s: float = 2.0
    load_s: float = 5.0
    stop_s: float = 1.0
    vet_s: float = 0.5
    slots: int = 1
    swaps: int = 0
    waits: dict[str, float] = field(
        default_factory=dict
    )  #: longest time that a profile had demand and none of it was served
    _due: list[tuple[float, str, str]] = field(default_factory=list)
    _served: dict[str, float] = field(default_factory=dict)  #: when anything of a profile was last served
    _line: dict[str, list[float]] = field(default_factory=dict)  #: when those who wait for a profile arrived

    def __post_init__(self) -> None:
        self._line = {d.key: [d.since] * (d.slotted + d.free) for d in self.world.demands}
        empty = replace(self.world, instances=[], recipes={})
        self._watch(empty)

    def run(
        self,
        seconds: float,
        arrivals: Callable[[float], list[tuple[str, int]]] | None = None,
        *,
        until_rest: bool = False,
    ) -> None:
        """Until nobody waits; or, with *until_rest*, until nothing happens any more."""
        end = self.world.now + seconds
        while self.world.now < end:
            for key, number in arrivals(self.world.now) if arrivals else []:
                self.world = arrived(self.world, key, number)
                self._line.setdefault(key, []).extend([self.world.now] * number)
            self._plan()
            if not (arrivals or self.world.demands or (until_rest and self._due)):
                return
            later = self.world.now + 0.5 if arrivals else self._next()
            if later is None:
                return
            self.world = replace(self.world, now=later)
            self._happen()
        self._plan()

    def _next(self) -> float | None:
        wakeup = next_wakeup(self.world)
        return min([when for when, _, _ in self._due] + ([] if wakeup is None else [wakeup]), default=None)

    def _plan(self) -> None:
        before = forgetting(self.world)
        result = self.planner(before)
        for d in before.demands:
            unserved_since = max(d.since, self._served.get(d.key, d.since))
            self.waits[d.key] = max(self.waits.get(d.key, 0.0), before.now - unserved_since)
        for x in result.decisions:
            if isinstance(x, Admit):
                del self._line[x.key][: x.slotted + x.free]
                self._served[x.key] = before.now
            elif isinstance(x, Refuse):
                del self._line[x.key]
            elif isinstance(x, Forgo):
                self._line[x.key].pop()
            elif isinstance(x, Drain) and makes_room(x):
                self._line.setdefault(x.competitor or "", []).append(before.now)
        after = apply(before, result)
        self.world = replace(after, demands=[replace(d, since=self._line[d.key][0]) for d in after.demands])
        self.swaps += sum(isinstance(x, Spawn) for x in result.decisions)
        self._watch(before)

    def _watch(self, before: Snapshot) -> None:
        """Note when what began since *before* will end."""
        now, old = self.world.now, {i.id: i for i in before.instances}
        for i in self.world.instances:
            was = old.get(i.id)
            ending = i.state is State.STOPPING or (i.state is State.DRAINING and not i.active)
            if i.state is State.SPAWNING and was is None:
                self._due.append((now + self.load_s, "ready", i.id))
            if ending and (was is None or was.state is not i.state):
                self._due.append((now + self.stop_s, "gone", i.id))
            for n in range(max(i.active, i.busy) - (max(was.active, was.busy) if was else 0)):
                # Not all at once: an instance may never fall idle.
                self._due.append((now + self.service_s + n % 3 * 0.5, "end", i.id))
        for key, recipe in self.world.recipes.items():
            if recipe.vetting and not (key in before.recipes and before.recipes[key].vetting):
                self._due.append((now + self.vet_s, "vetted", key))

    def _happen(self) -> None:
        now, before = self.world.now, self.world
        due, self._due = [x for x in self._due if x[0] <= now], [x for x in self._due if x[0] > now]
        for _, what, id_ in due:
            state = next((i.state for i in self.world.instances if i.id == id_), None)
            if what == "vetted":
                self.world = vetted(self.world, id_)
            elif what == "gone":
                self.world = gone(self.world, id_)
            elif what == "end" and state is not None:
                self.world = ended(self.world, id_)
            elif what == "ready" and state is State.SPAWNING:
                self.world = loaded(self.world, id_, self.slots)
        self._watch(before)
