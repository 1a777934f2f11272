"""The plan in the making: what was decided so far, and what that leaves of the memory. ``scheduler`` has the rules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from heapq import heapify, heappop, heappush
from math import inf

from mesh.core.lifecycle import State
from mesh.core.placement import Need, at_least, gpu_kinds, place
from mesh.core.resources import RAM, VRAM, Resources, total
from mesh.core.world import (
    GOING,
    LIVE,
    Admit,
    Decision,
    Demand,
    Drain,
    Forgo,
    InstanceView,
    Reason,
    Recipe,
    Refusal,
    Refuse,
    Snapshot,
    Spawn,
    Vet,
)


@dataclass(slots=True)
class Draft:
    """See the module docstring. (One idea; a split would hide it.)"""

    world: Snapshot
    decisions: list[Decision] = field(default_factory=list)
    held: set[str] = field(default_factory=set)
    leaving: set[str] = field(default_factory=set)
    promised: set[str] = field(default_factory=set)  #: whose memory some competitor already counts on, one day
    waiting: frozenset[str] = frozenset()  #: profiles with demand that was not refused, nor admitted as a whole
    admitting: set[str] = field(default_factory=set)  #: instances that get requests
    started: set[str] = field(default_factory=set)  #: profiles
    cramped: set[str] = field(default_factory=set)  #: see ``Plan``
    now: Resources = field(default_factory=Resources)
    soon: Resources = field(default_factory=Resources)
    future: Resources = field(default_factory=Resources)
    ceiling: Resources = field(default_factory=Resources)
    settled: Resources = field(default_factory=Resources)  #: of the pinned ones that are being started

    def __post_init__(self) -> None:
        self.ceiling = self.world.ceiling
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
            if i.id in self.leaving or i.id in self.admitting:
                continue
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
            if not self.in_use(i):
                self.soon = self.soon - i.footprint

    def in_use(self, i: InstanceView) -> bool:
        return i.active > 0 or i.id in self.admitting

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
        if recipe.need is not None and place(recipe.need, self.world.capacity) is None:
            return Refusal.TOO_LARGE
        return Refusal.FAILING if recipe.failing else None

    def room(self, need: Need, *used: Resources) -> Resources | None:
        """Return where *need* fits beside each of *used* at once, or None."""
        return place(need, self.ceiling, *used)

    def place(self, demand: Demand) -> None:
        """Start the profile of *demand*, or see to it that a later plan can (rule 3)."""
        key, recipe = demand.key, self.world.recipes[demand.key]
        need = recipe.need
        if need is None or self.awaits_exit(recipe, need):
            return
        if not demand.attended:
            self.follow(key, need)
            return
        spot = None
        if recipe.ran_out is not None:
            cleared = self.there_again(need, recipe.ran_out)
            if self.room(cleared, self.pinned()) is not None and self.clear(key, recipe.ran_out):
                self.wait(cleared)
                return
            spot = self.room(cleared, self.now, self.soon, self.future)
        spot = spot or self.room(need, self.now, self.soon, self.future)
        if spot is not None:
            self.spawn(key, spot)
        elif (spot := self.room(need, self.soon, self.future)) is not None:
            self.reserve(spot, soon=True)  # memory is on its way: drain nobody
        elif not recipe.vetted:
            self.decisions += [] if recipe.vetting else [Vet(key)]
            self.claim(key, need)
        elif (chosen := self.choose(need, self.evictable(key), self.soon, self.future)) is not None:
            victims, spot = chosen
            self.drain(victims, Reason.ROOM, competitor=key)
            self.reserve(spot, soon=True)
        elif not recipe.yielding:
            self.hold(key, need)

    def awaits_exit(self, recipe: Recipe, need: Need) -> bool:
        """Whether the successor of who still makes room for it is to wait: both at once might be too much."""
        if recipe.key not in self.world.replacing:
            return False
        old = [i for i in self.world.instances if i.key == recipe.key and i.superseded and i.state in GOING]
        return bool(old) and self.beside(recipe, need, old) is None and self.wait(need)

    def beside(self, recipe: Recipe, need: Need, old: Iterable[InstanceView]) -> Resources | None:
        """Return where a copy goes beside all of *old*; None if there is no room, or none that is known to be enough.

        What an old one takes says more than a guess: there must be room for as much.
        """
        enlarged = reduce(at_least, (i.footprint for i in old), need)
        spot = None if recipe.guessed else self.room(enlarged, self.now, self.soon, self.future)
        return spot if spot is not None and spot.mib.get(RAM, 0) <= self.spare_ram_mib() else None

    def spare_ram_mib(self) -> float:
        """Return what is left for second copies where no limit says it: who loads has not taken all of its own yet."""
        shown = total(i.footprint for i in self.world.instances if i.state is not State.SPAWNING)
        return self.world.spare_ram_mib - max(0, (self.now - shown).mib.get(RAM, 0))

    def follow(self, key: str, need: Need) -> None:
        """Start the successor *key* in the room that was made for it, or wait for that; nobody has to go for it."""
        if (spot := self.room(need, self.now, self.soon, self.future)) is not None:
            self.spawn(key, spot)
        elif not self.wait(need):
            self.decisions.append(Forgo(key))

    def spawn(self, key: str, spot: Resources) -> None:
        """Start *key* there; or only keep the room, while its size is being looked up again."""
        if self.world.recipes[key].fresh:
            self.decisions.append(Spawn(key, spot))
            self.started.add(key)
        if self.world.recipes[key].pinned:
            self.settled = self.settled + spot
        self.now = self.now + spot
        self.reserve(spot, soon=True)

    def reserve(self, spot: Resources, *, soon: bool) -> None:
        self.future = self.future + spot
        if soon:
            self.soon = self.soon + spot

    def wait(self, need: Need) -> bool:
        """Keep the room for *need* where it will be, so that nobody takes it; return whether there will be any."""
        if (spot := self.room(need, self.soon, self.future)) is not None:
            self.reserve(spot, soon=True)
        elif (spot := self.room(need, self.future)) is not None:
            self.reserve(spot, soon=False)
        return spot is not None

    def there_again(self, need: Need, where: Resources) -> Need:
        """Return *need* bound to the GPUs of *where*, which are cleared for it; as it is, if it must not go there."""
        kinds = tuple(gpu_kinds(where))
        allowed = need.gpus is None or set(kinds) <= set(need.gpus)
        return replace(need, gpus=kinds, all_gpus=True) if kinds and allowed else need

    def pinned(self) -> Resources:
        """Return what will never be free."""
        stay = (i for i in self.world.instances if i.pinned and i.state in LIVE and i.id not in self.leaving)
        return total((self.settled, *(i.footprint for i in stay)))

    def clear(self, key: str, where: Resources) -> bool:
        """Drain all that idles where a load of *key* ran out of memory; return whether there is anything to wait for.

        The ledger said that it fits, so the ledger is wrong: how much has to go is not known.
        """
        kinds = set(gpu_kinds(where)) or {RAM, VRAM}
        near = [i for i in self.evictable(key) if kinds & {k for k, mib in i.footprint.mib.items() if mib}]
        self.drain(near, Reason.ROOM, competitor=key)
        going = (i for i in self.world.instances if i.state in GOING or i.id in self.leaving)
        ending = (i for i in going if i.state is State.STOPPING or not i.active)
        return any(kinds & i.footprint.mib.keys() for i in ending)

    def hold(self, key: str, need: Need) -> None:
        """Keep new work from instances that had their turn; if even that is not enough, reserve what will be free."""
        tenured = self.evictable(key) + self.tenured(key)
        chosen = self.choose(need, tenured, self.future)
        if chosen is not None:
            self.held.update(i.id for i in chosen[0])
        self.claim(key, need, chosen)

    def claim(self, key: str, need: Need, chosen: tuple[list[InstanceView], Resources] | None = None) -> None:
        """Keep for *key* the memory that will be free one day: of *chosen*, or of whoever leaves."""
        chosen = chosen or self.choose(need, self.others(key), self.future)
        if chosen is not None:
            victims, spot = chosen
            self.promised.update(i.id for i in victims)
            self.future = self.future - total(i.footprint for i in victims)
            self.reserve(spot, soon=False)

    def others(self, key: str) -> list[InstanceView]:
        """Return the live, unpinned instances of other profiles that no earlier competitor counts on."""
        mine = (i for i in self.world.instances if i.key != key and i.state in LIVE and not i.pinned)
        usable = (i for i in mine if i.id not in self.leaving and i.id not in self.promised)
        return sorted(usable, key=lambda i: (i.ready_since, i.id))

    def evictable(self, key: str) -> list[InstanceView]:
        """Return those that may go at once, least recently used first: idle, and not (or no longer) wanted.

        One that yields ends nobody's turn: who is idle for a moment, with requests waiting, is in use.
        """
        recipe = self.world.recipes.get(key)
        turns_end = recipe is None or not recipe.yielding
        idle = [i for i in self.others(key) if i.state is State.READY and not i.active]
        mine = [i for i in idle if i.key not in self.waiting or (turns_end and self.had_turn(i))]
        return sorted(mine, key=lambda i: (i.idle_since, i.id))

    def tenured(self, key: str) -> list[InstanceView]:
        """Return those that are busy but had their turn, longest in service first: an order that work cannot change."""
        return [i for i in self.others(key) if i.state is State.READY and i.active and self.had_turn(i)]

    def had_turn(self, i: InstanceView) -> bool:
        """Whether *i* served for its tenure, and those who wait for it could be served by a new one later."""
        recipe = self.world.recipes[i.key]
        replaceable = i.key not in self.waiting or self.obstacle(recipe) is None
        return replaceable and not i.fresh and self.world.now >= i.ready_since + recipe.min_tenure_s

    def choose(
        self, need: Need, pool: Sequence[InstanceView], *used: Resources
    ) -> tuple[list[InstanceView], Resources] | None:
        """Return the first of *pool* whose leaving makes room for *need*, none of them spare, and where the room is.

        *used* are the views of memory in which there must be room. None if it is not enough that all of *pool* leave.
        """
        chosen: list[InstanceView] = []
        spot = self.room(need, *used)
        for i in pool:
            if spot is not None:
                break
            used = tuple(u - i.footprint for u in used)
            chosen.append(i)
            spot = self.room(need, *used)
        if spot is None:
            return None
        for i in reversed(chosen.copy()):
            with_it = tuple(u + i.footprint for u in used)
            if (there := self.room(need, *with_it)) is not None:
                used, spot = with_it, there
                chosen.remove(i)
        return chosen, spot

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
                self.admitting.add(i.id)
        if not slotted:
            self.waiting -= {demand.key}
        return slotted > 0

    def scale_out(self, key: str) -> None:
        """Start one more instance of *key* in free memory; one at a time, and nobody is drained for it."""
        recipe = self.world.recipes[key]
        mine = self.live(key)
        if recipe.failing or len(mine) >= recipe.max_instances or any(i.state is State.SPAWNING for i in mine):
            return
        if recipe.need is not None and (spot := self.room(recipe.need, self.now, self.soon, self.future)) is not None:
            self.spawn(key, spot)
