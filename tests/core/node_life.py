"""A node's life in small: every event that a supervisor may see, what it does to the world, and the plan after each."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from mesh.core.lifecycle import State
from mesh.core.placement import gpu_kinds
from mesh.core.resources import Resources
from mesh.core.world import LIVE, Admit, InstanceView, Recipe, Snapshot, Spawn
from tests.core.liveness import everything_feasible_is_served
from tests.core.rules import RULES
from tests.core.simulation import apply, arrived, ended, gone, loaded
from tests.core.worlds import KEYS, Pick, Planner, forgetting, make_foreign, make_need, make_recipe, remembering


@dataclass
class Life:
    """The events are the methods of ``EVENTS``; one that cannot happen now does nothing."""

    world: Snapshot
    planner: Planner
    retries: dict[str, int] = field(default_factory=dict)  #: starts of a profile since it ran out of memory

    def happen(self, event: str, pick: Pick) -> None:
        """Let *event* happen, carry out the plan, as the supervisor does after each, and check every rule."""
        getattr(self, event)(pick)
        self.settle()

    def settle(self) -> None:
        """Plan until at rest, as the supervisor does: once, and again after admissions while somebody waits."""
        admitted = True
        while admitted:
            before, planner = forgetting(self.world), remembering(self.planner)
            for rule in RULES:
                rule(planner, before)
            decisions = planner(before).decisions
            for d in decisions:
                if isinstance(d, Spawn) and before.recipes[d.key].ran_out is not None:
                    self.retries[d.key] = self.retries.get(d.key, 0) + 1
                    assert self.retries[d.key] == 1, "a load that ran out of memory is tried again once"
            self.world = apply(before, planner(before))
            admitted = bool(self.world.demands) and any(isinstance(d, Admit) for d in decisions)

    def end(self) -> None:
        """Nothing new comes: all that can be served is, within the bound."""
        everything_feasible_is_served(self.planner, self.world)

    # Requests

    def requests_arrive(self, pick: Pick) -> None:
        self.world = arrived(self.world, KEYS[pick(0, 3)], slotted=pick(0, 3), free=pick(1, 4) // 4)
        self.world = replace(self.world, demands=[d for d in self.world.demands if d.slotted or d.free])

    def clients_leave(self, pick: Pick) -> None:
        if demands := self.world.demands:
            left = demands[pick(0, len(demands) - 1)]
            self.world = replace(self.world, demands=[d for d in demands if d is not left])

    def a_request_ends(self, pick: Pick) -> None:
        if i := self._one(pick, [i for i in self._in(State.READY, State.DRAINING) if i.active or i.busy]):
            self.world = ended(self.world, i.id)

    # Processes

    def a_load_finishes(self, pick: Pick) -> None:
        if i := self._one(pick, self._in(State.SPAWNING)):
            self.world = loaded(self.world, i.id, slots=pick(0, 3))
            self.retries.pop(i.key, None)

    def a_load_fails(self, pick: Pick) -> None:
        if i := self._one(pick, self._in(State.SPAWNING)):
            self._fail(i)

    def a_load_runs_out_of_memory(self, pick: Pick) -> None:
        """Trap 46: once more with all that idles there gone, then it fails."""
        if i := self._one(pick, self._in(State.SPAWNING)):
            if self.world.recipes[i.key].ran_out is not None:
                self._fail(i)
            else:
                self.world = gone(self.world, i.id)
                self._put(replace(self.world.recipes[i.key], vetted=True, vetting=False, ran_out=i.footprint))

    def a_process_crashes(self, pick: Pick) -> None:
        if i := self._one(pick, self._in(State.READY)):
            self.world = gone(self.world, i.id)

    def a_stopped_process_exits_at_last(self, pick: Pick) -> None:
        if i := self._one(pick, self._in(State.STOPPING)):
            self.world = gone(self.world, i.id)

    # What is known of the profiles

    def vetting_ends(self, pick: Pick) -> None:
        """Well, or with a complaint: then the profile fails for a while."""
        if key := self._key(pick, [r for r in self.world.recipes.values() if r.vetting]):
            well = pick(0, 1) == 1
            self._put(replace(self.world.recipes[key], vetted=well, vetting=False, failing=not well))

    def a_profile_changes(self, pick: Pick) -> None:
        """Its instances are outdated; of its new file's size nothing may be known yet."""
        recipe = make_recipe(pick, KEYS[pick(0, 3)], self.world.capacity)
        self._put(replace(recipe, need=recipe.need if pick(0, 1) else None, ran_out=None, vetting=False))
        self._outdate(recipe.key)

    def a_size_becomes_known(self, pick: Pick) -> None:
        if key := self._key(pick, [r for r in self.world.recipes.values() if r.need is None]):
            self._put(replace(self.world.recipes[key], need=make_need(pick, gpu_kinds(self.world.capacity))))

    def a_size_is_learned(self, pick: Pick) -> None:
        """What runs keeps its charge; the next one is charged what was learned."""
        if key := self._key(pick, [r for r in self.world.recipes.values() if r.need is not None]):
            need = self.world.recipes[key].need
            assert need is not None
            self._put(replace(self.world.recipes[key], need=replace(need, split_mib=pick(0, 14))))

    def a_profile_vanishes(self, pick: Pick) -> None:
        if key := self._key(pick, list(self.world.recipes.values())):
            self.world = replace(self.world, recipes={k: r for k, r in self.world.recipes.items() if k != key})
            self._outdate(key)

    def an_engine_is_replaced(self, pick: Pick) -> None:
        """Of all models or of one; or the old one is back, and what ran it all the time is up to date again."""
        key, back = KEYS[pick(0, 3)] if pick(0, 1) else None, pick(0, 3) == 0
        instances = [
            replace(i, superseded=not back) if i.state in LIVE and key in (None, i.key) else i
            for i in self.world.instances
        ]
        self.world = replace(self.world, instances=instances)

    def back_offs_end(self, pick: Pick) -> None:
        recipes = {key: replace(r, failing=False) for key, r in self.world.recipes.items()}
        self.world = replace(self.world, recipes=recipes)

    # The machine

    def others_use_memory(self, pick: Pick) -> None:
        """Trap 42. More than what is free, too: what runs then is over the ceiling, by no doing of the plan."""
        self.world = replace(self.world, foreign=make_foreign(pick, self.world.capacity))

    def others_free_memory(self, pick: Pick) -> None:
        self.world = replace(self.world, foreign=Resources())

    def a_limit_changes_or_a_gpu_is_lost(self, pick: Pick) -> None:
        kinds = sorted(self.world.capacity.mib)
        kind, mib = kinds[pick(0, len(kinds) - 1)], pick(0, 20)
        capacity = {**self.world.capacity.mib, kind: max(1, mib)}
        if not mib and len(gpu_kinds(self.world.capacity)) > 1 and kind.startswith("gpu"):
            del capacity[kind]
        self.world = replace(self.world, capacity=Resources(capacity))

    def time_passes(self, pick: Pick) -> None:
        self.world = replace(self.world, now=self.world.now + (0.5, 5.0, 16.0, 120.0, 400.0)[pick(0, 4)])

    def _in(self, *states: State) -> list[InstanceView]:
        return [i for i in self.world.instances if i.state in states]

    def _one(self, pick: Pick, some: list[InstanceView]) -> InstanceView | None:
        return some[pick(0, len(some) - 1)] if some else None

    def _key(self, pick: Pick, some: list[Recipe]) -> str | None:
        return sorted(r.key for r in some)[pick(0, len(some) - 1)] if some else None

    def _put(self, recipe: Recipe) -> None:
        self.world = replace(self.world, recipes={**self.world.recipes, recipe.key: recipe})

    def _fail(self, i: InstanceView) -> None:
        self.world = gone(self.world, i.id)
        self._put(replace(self.world.recipes[i.key], failing=True, ran_out=None))
        self.retries.pop(i.key, None)

    def _outdate(self, key: str) -> None:
        self.retries.pop(key, None)
        instances = [replace(i, stale=True) if i.key == key else i for i in self.world.instances]
        self.world = replace(self.world, instances=instances)


_COMMON = ("requests_arrive", "a_request_ends", "a_load_finishes", "a_stopped_process_exits_at_last", "time_passes")
_RARE = (
    "clients_leave", "a_load_fails", "a_load_runs_out_of_memory", "a_process_crashes", "vetting_ends",
    "a_profile_changes", "a_size_becomes_known", "a_size_is_learned", "a_profile_vanishes", "back_offs_end",
    "an_engine_is_replaced",
    "others_use_memory", "others_free_memory", "a_limit_changes_or_a_gpu_is_lost",
)  # fmt: skip
EVENTS = _COMMON * 3 + _RARE
