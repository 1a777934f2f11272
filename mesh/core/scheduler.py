"""Who is served, what is started and what is stopped: one pure function from a snapshot to decisions.

``plan`` is run after every event and judges the whole picture each time (level-triggered), so nothing has to remember
what is still owed. Its rules, in the order in which they are applied:

1. **Refuse** the demand that can never be met here: unknown, too large for the whole budget, failing.
2. **Retire.** An instance whose profile changed or vanished drains; so does one that idled for ``idle_timeout_s``.
3. **Place** each *starved* profile (requests wait, no live instance), oldest waiting request first: start it if it
   fits; else wait for memory that is on its way; else drain idle instances, least recently used first; else *hold*
   busy ones that had their tenure: they get no new work, so they fall idle and are drained by a later plan. A hold is
   derived anew each time, never stored: when the competitor leaves, it is gone (trap 41).
4. **Admit** waiting requests, first come first served per profile, to live instances that are not held.
5. **Scale out** a profile whose instances are all taken, if ``max_instances`` and *free* memory allow.

A profile that waits for memory reserves it: a later one may start only in memory that the earlier one does not need.
Busy, loading, pinned and just-loaded instances are never drained for a competitor, and never one victim too many.

Memory is looked at three ways: ``now`` (everything not yet exited), ``soon`` (without what is already stopping) and
``future`` (without what will leave once its requests end). Reservations are counted where they will be taken from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from heapq import heapify, heappop, heappush
from math import inf

from mesh.core.lifecycle import State
from mesh.core.resources import Resources, total


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the scheduler needs to know of a profile."""

    key: str
    footprint: Resources
    max_instances: int = 1
    min_tenure_s: float = 15.0
    idle_timeout_s: float = 300.0  #: 0 = never
    pinned: bool = False
    failing: bool = False  #: its last start failed and its back-off is not over


@dataclass(frozen=True, slots=True)
class InstanceView:
    """One process, as counted by the supervisor. ``footprint`` is charged until the process has exited."""

    id: str
    key: str
    state: State
    footprint: Resources
    active: int = 0  #: requests it holds, of any kind, abandoned ones that still run included
    busy: int = 0  #: those of them that take a slot
    slots: int = 1  #: requests at once; 0 = unlimited
    ready_since: float = 0.0
    idle_since: float = 0.0  #: end of the last request, or when it became ready
    fresh: bool = False  #: nothing was admitted to it yet
    stale: bool = False  #: started from a profile that changed or is gone
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class Demand:
    """The requests that wait for one profile."""

    key: str
    since: float  #: arrival of the oldest
    slotted: int = 0  #: requests that need a slot
    free: int = 0  #: requests that do not (tokenize, prewarm)


@dataclass(frozen=True, slots=True)
class Snapshot:
    now: float
    capacity: Resources
    recipes: Mapping[str, Recipe]
    instances: Sequence[InstanceView]
    demands: Sequence[Demand]


class Reason(StrEnum):
    PROFILE_CHANGED = "profile changed"
    IDLE = "idle"
    ROOM = "room for another model"


class Refusal(StrEnum):
    UNKNOWN = "unknown"
    NOT_HERE = "max_instances is 0"
    TOO_LARGE = "larger than the whole budget"
    FAILING = "failing"


@dataclass(frozen=True, slots=True)
class Admit:
    """Send the first *slotted* and *free* waiting requests of the instance's profile to it."""

    instance: str
    key: str
    slotted: int
    free: int


@dataclass(frozen=True, slots=True)
class Spawn:
    key: str


@dataclass(frozen=True, slots=True)
class Drain:
    instance: str
    reason: Reason
    competitor: str | None = None


@dataclass(frozen=True, slots=True)
class Refuse:
    """Turn away every request that waits for *key*."""

    key: str
    refusal: Refusal


Decision = Admit | Spawn | Drain | Refuse


@dataclass(frozen=True, slots=True)
class Plan:
    decisions: tuple[Decision, ...]
    held: frozenset[str]  #: instances that must get no new work until the next plan


LIVE = frozenset({State.SPAWNING, State.READY})


def plan(world: Snapshot) -> Plan:
    """Return the decisions that *world* calls for; none when it is at rest."""
    draft = _Draft(world)
    demands = draft.refuse(sorted(world.demands, key=lambda d: (d.since, d.key)))
    draft.retire()
    for demand in demands:
        if not draft.live(demand.key):
            draft.place(demand.key)
    for demand in demands:
        if draft.admit(demand):
            draft.scale_out(demand.key)
    return Plan(tuple(draft.decisions), frozenset(draft.held))


def next_wakeup(world: Snapshot) -> float | None:
    """Return the next moment at which time alone may change the plan, or None. It is always after ``world.now``."""
    waiting = {d.key for d in world.demands}
    moments = []
    for i in world.instances:
        recipe = world.recipes.get(i.key)
        if i.state is not State.READY or recipe is None:
            continue
        if not i.active and recipe.idle_timeout_s and not recipe.pinned and i.key not in waiting:
            moments.append(i.idle_since + recipe.idle_timeout_s)
        if waiting:
            moments.append(i.ready_since + recipe.min_tenure_s)
    return min((m for m in moments if m > world.now), default=None)


@dataclass(slots=True)
class _Draft:
    """The plan in the making: decisions so far, and what they do to memory. (One idea; a split would hide it.)"""

    world: Snapshot
    decisions: list[Decision] = field(default_factory=list)
    held: set[str] = field(default_factory=set)
    leaving: set[str] = field(default_factory=set)
    promised: set[str] = field(default_factory=set)  #: whose memory some competitor already counts on, one day
    waiting: frozenset[str] = frozenset()  #: profiles with demand that was not refused
    now: Resources = field(default_factory=Resources)
    soon: Resources = field(default_factory=Resources)
    future: Resources = field(default_factory=Resources)

    def __post_init__(self) -> None:
        owned = [i for i in self.world.instances if i.state is not State.STOPPED]
        self.now = total(i.footprint for i in owned)
        going = [i for i in owned if i.state in (State.STOPPING, State.DRAINING)]
        ending = [i for i in going if i.state is State.STOPPING or not i.active]
        self.soon = self.now - total(i.footprint for i in ending)
        self.future = self.now - total(i.footprint for i in going)

    def live(self, key: str) -> list[InstanceView]:
        """Return the instances of *key* that serve or will serve it, in a fixed order."""
        mine = (i for i in self.world.instances if i.key == key and i.state in LIVE and not i.stale)
        return sorted((i for i in mine if i.id not in self.leaving), key=lambda i: i.id)

    def retire(self) -> None:
        for i in sorted(self.world.instances, key=lambda i: i.id):
            if i.state in LIVE and i.stale:
                self.drain([i], Reason.PROFILE_CHANGED)
            elif i.state is State.READY and self.idled_out(i):
                self.drain([i], Reason.IDLE)

    def idled_out(self, i: InstanceView) -> bool:
        recipe = self.world.recipes[i.key]
        if i.active or i.key in self.waiting or recipe.pinned or not recipe.idle_timeout_s:
            return False
        return self.world.now >= i.idle_since + recipe.idle_timeout_s

    def drain(self, victims: Iterable[InstanceView], reason: Reason, competitor: str | None = None) -> None:
        for i in victims:
            self.decisions.append(Drain(i.id, reason, competitor))
            self.leaving.add(i.id)
            self.future = self.future - i.footprint
            if not i.active:
                self.soon = self.soon - i.footprint

    def refuse(self, demands: Iterable[Demand]) -> list[Demand]:
        """Turn away what can never be served; return the rest."""
        rest = []
        for demand in demands:
            refusal = self.refusal(demand.key)
            if refusal is None:
                rest.append(demand)
            else:
                self.decisions.append(Refuse(demand.key, refusal))
        self.waiting = frozenset(d.key for d in rest)
        return rest

    def refusal(self, key: str) -> Refusal | None:
        recipe = self.world.recipes.get(key)
        if recipe is None:
            return Refusal.UNKNOWN
        return None if self.live(key) else self.obstacle(recipe)

    def obstacle(self, recipe: Recipe) -> Refusal | None:
        """Return why no instance can be started now, whatever was stopped for it."""
        if recipe.max_instances == 0:
            return Refusal.NOT_HERE
        if not recipe.footprint.fits(self.world.capacity, Resources()):
            return Refusal.TOO_LARGE
        return Refusal.FAILING if recipe.failing else None

    def fits(self, need: Resources, *used: Resources) -> bool:
        return all(need.fits(self.world.capacity, u) for u in used)

    def place(self, key: str) -> None:
        """Start *key*, or see to it that a later plan can (rule 3)."""
        need = self.world.recipes[key].footprint
        if self.fits(need, self.now, self.soon, self.future):
            self.spawn(key)
        elif self.fits(need, self.soon, self.future):
            self.reserve(need, soon=True)  # memory is on its way: drain nobody
        elif (victims := self.choose(need, self.evictable(key), self.soon, self.future)) is not None:
            self.drain(victims, Reason.ROOM, competitor=key)
            self.reserve(need, soon=True)
        else:
            self.hold(key, need)

    def spawn(self, key: str) -> None:
        need = self.world.recipes[key].footprint
        self.decisions.append(Spawn(key))
        self.now = self.now + need
        self.reserve(need, soon=True)

    def reserve(self, need: Resources, *, soon: bool) -> None:
        self.future = self.future + need
        if soon:
            self.soon = self.soon + need

    def hold(self, key: str, need: Resources) -> None:
        """Keep new work from instances that had their turn; if even that is not enough, reserve what will be free."""
        tenured = self.evictable(key) + self.tenured(key)
        victims = self.choose(need, tenured, self.future)
        if victims is not None:
            self.held.update(i.id for i in victims)
        else:
            victims = self.choose(need, self.others(key), self.future)
        if victims is not None:
            self.promised.update(i.id for i in victims)
            self.future = self.future - total(i.footprint for i in victims)
            self.reserve(need, soon=False)

    def others(self, key: str) -> list[InstanceView]:
        """Return the live, unpinned instances of other profiles that no earlier competitor counts on."""
        mine = (i for i in self.world.instances if i.key != key and i.state in LIVE and not i.pinned)
        usable = (i for i in mine if i.id not in self.leaving and i.id not in self.promised)
        return sorted(usable, key=lambda i: (i.ready_since, i.id))

    def evictable(self, key: str) -> list[InstanceView]:
        """Return those that may go at once, least recently used first: idle, and not (or no longer) wanted."""
        idle = [i for i in self.others(key) if i.state is State.READY and not i.active]
        mine = [i for i in idle if i.key not in self.waiting or self.had_turn(i)]
        return sorted(mine, key=lambda i: (i.idle_since, i.id))

    def tenured(self, key: str) -> list[InstanceView]:
        """Return those that are busy but had their turn, longest in service first: an order that work cannot change."""
        return [i for i in self.others(key) if i.state is State.READY and i.active and self.had_turn(i)]

    def had_turn(self, i: InstanceView) -> bool:
        """Whether *i* served for its tenure, and those who wait for it could be served by a new one later."""
        recipe = self.world.recipes[i.key]
        replaceable = i.key not in self.waiting or self.obstacle(recipe) is None
        return replaceable and not i.fresh and self.world.now >= i.ready_since + recipe.min_tenure_s

    def choose(self, need: Resources, pool: Sequence[InstanceView], *used: Resources) -> list[InstanceView] | None:
        """Return the first of *pool* whose leaving makes room for *need*, none of them spare; None if all do not.

        *used* are the views of memory in which there must be room.
        """
        chosen: list[InstanceView] = []
        for i in pool:
            if self.fits(need, *used):
                break
            used = tuple(u - i.footprint for u in used)
            chosen.append(i)
        if not self.fits(need, *used):
            return None
        for i in reversed(chosen.copy()):
            with_it = tuple(u + i.footprint for u in used)
            if self.fits(need, *with_it):
                used = with_it
                chosen.remove(i)
        return chosen

    def admit(self, demand: Demand) -> bool:
        """Hand the demand's requests to live instances, the least busy first; return whether slots ran out."""
        open_ = [i for i in self.live(demand.key) if i.state is State.READY and i.id not in self.held]
        if not open_:
            return False
        busy = {i.id: i.busy for i in open_}
        limit = {i.id: i.slots or inf for i in open_}
        least_busy = [(n, id_) for id_, n in busy.items() if n < limit[id_]]
        heapify(least_busy)
        slotted = demand.slotted
        while slotted and least_busy:
            n, id_ = heappop(least_busy)
            busy[id_] = n + 1
            slotted -= 1
            if n + 1 < limit[id_]:
                heappush(least_busy, (n + 1, id_))
        free_to = min(open_, key=lambda i: (busy[i.id], i.id))
        for i in open_:
            share = Admit(i.id, demand.key, busy[i.id] - i.busy, demand.free if i is free_to else 0)
            if share.slotted or share.free:
                self.decisions.append(share)
        return slotted > 0

    def scale_out(self, key: str) -> None:
        """Start one more instance of *key* in free memory; one at a time, and nobody is drained for it."""
        recipe = self.world.recipes[key]
        mine = self.live(key)
        if recipe.failing or len(mine) >= recipe.max_instances or any(i.state is State.SPAWNING for i in mine):
            return
        if self.fits(recipe.footprint, self.now, self.soon, self.future):
            self.spawn(key)
