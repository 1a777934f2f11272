"""Random scheduler worlds, what a plan does to one, and a small simulation that lets time pass in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from random import Random

from hypothesis import strategies as st

from mesh.core.lifecycle import State
from mesh.core.resources import RAM, VRAM, Resources
from mesh.core.scheduler import (
    Admit,
    Demand,
    Drain,
    InstanceView,
    Plan,
    Recipe,
    Refuse,
    Snapshot,
    Spawn,
)

Planner = Callable[[Snapshot], Plan]
NOW = 1000.0
KEYS = ("a:x", "b:x", "c:x", "d:x")


def memory(draw: Callable[[int, int], int], high: int) -> Resources:
    return Resources({VRAM: draw(0, high), RAM: draw(0, high), "instances": 1})


def make_world(pick: Callable[[int, int], int]) -> Snapshot:
    """Build a world from *pick(low, high)*, a source of integers: Hypothesis or a seeded Random."""
    keys = KEYS[: pick(1, 4)]
    recipes = {
        k: Recipe(
            k,
            memory(pick, 12),
            max_instances=pick(0, 3) if pick(0, 3) == 0 else pick(1, 3),
            min_tenure_s=float(pick(0, 2) * 15),
            idle_timeout_s=float(pick(0, 2) * 100),
            pinned=pick(0, 5) == 0,
            failing=pick(0, 7) == 0,
        )
        for k in keys
    }
    capacity = Resources({VRAM: pick(6, 24), RAM: pick(6, 24), "instances": pick(1, 6)})
    instances: list[InstanceView] = []
    used = Resources()
    for n in range(pick(0, 5)):
        recipe = recipes[keys[pick(0, len(keys) - 1)]]
        if recipe.footprint.fits(capacity, used):
            used = used + recipe.footprint
            instances.append(make_instance(pick, f"i{n}", recipe))
    demands = [
        Demand(k, NOW - pick(0, 60), slotted=pick(0, 4), free=pick(0, 2)) for k in keys if pick(0, 2)
    ]  # fmt: skip
    return Snapshot(NOW, capacity, recipes, instances, [d for d in demands if d.slotted or d.free])


def make_instance(pick: Callable[[int, int], int], id_: str, recipe: Recipe) -> InstanceView:
    state = (State.SPAWNING, State.READY, State.READY, State.READY, State.DRAINING, State.STOPPING)[pick(0, 5)]
    serving = state in (State.READY, State.DRAINING)
    slots = pick(0, 3)
    busy = pick(0, slots or 3) if serving else 0
    active = max(0, busy - pick(0, 1)) + pick(0, 1) if serving else 0
    ready = NOW - pick(0, 60) * 5
    return InstanceView(
        id_, recipe.key, state, recipe.footprint, active, busy, slots,
        ready_since=ready if serving else 0.0,
        idle_since=max(ready, NOW - pick(0, 250)) if serving else 0.0,
        fresh=serving and not active and pick(0, 2) == 0,
        stale=pick(0, 7) == 0,
        pinned=recipe.pinned,
    )  # fmt: skip


@st.composite
def worlds(draw: st.DrawFn) -> Snapshot:
    return make_world(lambda low, high: draw(st.integers(low, high)))


def seeded_worlds(number: int, seed: int = 7) -> Iterator[Snapshot]:
    rng = Random(seed)
    return (make_world(rng.randint) for _ in range(number))


def apply(world: Snapshot, plan: Plan) -> Snapshot:
    """Return the world right after the supervisor carried *plan* out."""
    instances = {i.id: i for i in world.instances}
    demands = {d.key: d for d in world.demands}
    serial = count()
    for decision in plan.decisions:
        match decision:
            case Admit(instance=id_, key=key, slotted=slotted, free=free):
                i, d = instances[id_], demands[key]
                instances[id_] = replace(i, active=i.active + slotted + free, busy=i.busy + slotted, fresh=False)
                demands[key] = replace(d, slotted=d.slotted - slotted, free=d.free - free)
            case Spawn(key=key):
                new = f"new{next(serial)}-{world.now}"
                instances[new] = InstanceView(new, key, State.SPAWNING, world.recipes[key].footprint,
                                              fresh=True, pinned=world.recipes[key].pinned)  # fmt: skip
            case Drain(instance=id_):
                i = instances[id_]
                idle = not i.active or i.state is State.SPAWNING
                instances[id_] = replace(i, state=State.STOPPING if idle else State.DRAINING)
            case Refuse(key=key):
                del demands[key]
    left = [d for d in demands.values() if d.slotted or d.free]
    return replace(world, instances=list(instances.values()), demands=left)


@dataclass
class Simulation:
    """Time passes: loads finish, requests end, stopped processes vanish, and the plan runs after each step."""

    world: Snapshot
    planner: Planner
    service_s: float = 2.0
    load_s: float = 5.0
    stop_s: float = 1.0
    slots: int = 1
    swaps: int = 0
    waits: dict[str, float] = field(default_factory=dict)  #: longest time a profile's demand stood unserved
    _due: list[tuple[float, str, str]] = field(default_factory=list)

    def run(self, seconds: float, arrivals: Callable[[float], list[tuple[str, int]]] = lambda now: []) -> None:
        end = self.world.now + seconds
        while self.world.now < end:
            self._arrive(arrivals(self.world.now))
            self._plan()
            self.world = replace(self.world, now=self.world.now + 0.5)
            self._happen()
        self._plan()

    def _arrive(self, arrivals: list[tuple[str, int]]) -> None:
        demands = {d.key: d for d in self.world.demands}
        for key, number in arrivals:
            old = demands.get(key) or Demand(key, self.world.now)
            demands[key] = replace(old, slotted=old.slotted + number)
        self.world = replace(self.world, demands=list(demands.values()))

    def _plan(self) -> None:
        result = self.planner(self.world)
        before = {i.id: i for i in self.world.instances}
        for d in self.world.demands:
            self.waits[d.key] = max(self.waits.get(d.key, 0.0), self.world.now - d.since)
        served = {x.key for x in result.decisions if isinstance(x, Admit)}
        self.world = apply(self.world, result)
        self.world = replace(
            self.world,
            demands=[replace(d, since=self.world.now) if d.key in served else d for d in self.world.demands],
        )
        for i in self.world.instances:
            old = before.get(i.id)
            if old is None:
                self.swaps += 1
                self._due.append((self.world.now + self.load_s, "ready", i.id))
            elif i.state is State.STOPPING and old.state is not State.STOPPING:
                self._due.append((self.world.now + self.stop_s, "gone", i.id))
            for n in range(i.active - (old.active if old else 0)):  # not all at once: an instance may never fall idle
                self._due.append((self.world.now + self.service_s + n % 3 * 0.5, "end", i.id))

    def _happen(self) -> None:
        now = self.world.now
        instances = {i.id: i for i in self.world.instances}
        due, self._due = [x for x in self._due if x[0] <= now], [x for x in self._due if x[0] > now]
        for _, what, id_ in due:
            i = instances.get(id_)
            if i is None:
                continue
            if what == "ready" and i.state is State.SPAWNING:
                instances[id_] = replace(i, state=State.READY, ready_since=now, idle_since=now, slots=self.slots)
            elif what == "gone":
                del instances[id_]
            elif what == "end":
                i = replace(i, active=max(0, i.active - 1), busy=max(0, i.busy - 1), idle_since=now)
                instances[id_] = i
                if i.state is State.DRAINING and not i.active:
                    instances[id_] = replace(i, state=State.STOPPING)
                    self._due.append((now + self.stop_s, "gone", id_))
        self.world = replace(self.world, instances=list(instances.values()))
