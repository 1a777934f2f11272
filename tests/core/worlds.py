"""Random scheduler worlds: nodes with GPUs and without, profiles of every kind, and instances that fit somewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from math import inf
from random import Random

from hypothesis import strategies as st

from mesh.core.lifecycle import State
from mesh.core.placement import Need, gpu_kinds, place
from mesh.core.replacing import still_to_come
from mesh.core.resources import RAM, VRAM, Resources, total
from mesh.core.world import LIVE, Demand, InstanceView, Plan, Recipe, Snapshot

Planner = Callable[[Snapshot], Plan]
Pick = Callable[[int, int], int]  #: a source of integers between two: Hypothesis or a seeded Random
NOW = 1000.0
KEYS = ("a:x", "b:x", "c:x", "d:x")
GPUS = ("gpu0", "gpu1", "gpu2", "gpu3")


def make_capacity(pick: Pick) -> Resources:
    """Unequal GPUs, with or without a limit of their sum; or none, and GPU memory is one pool, limited or not."""
    amounts = {"instances": pick(1, 6)}
    gpus = GPUS[: max(0, pick(-1, 4))]
    amounts.update({kind: pick(2, 16) for kind in gpus})
    if pick(0, 2):
        amounts[RAM] = pick(6, 24)
    if pick(0, 2) == 0 or (not gpus and pick(0, 3)):
        amounts[VRAM] = pick(6, 24)
    return Resources(amounts)


def make_need(pick: Pick, gpus: list[str]) -> Need:
    """A need of any kind; *gpus* are those of the node."""
    need = Need(
        fixed=Resources({RAM: pick(0, 10) if pick(0, 1) else 0, "instances": 1}),
        split_mib=pick(0, 14),
        each_mib=pick(0, 2),
        grain_mib=pick(0, 1),
        single=pick(0, 5) == 0,
    )
    if gpus and pick(0, 4) == 0:  # the profile's `devices`, or the user's own --tensor-split
        mine = tuple(gpus[first:] if (first := pick(0, len(gpus) - 1)) else gpus[: pick(1, len(gpus))])
        fixed_set = not need.single and pick(0, 1) == 1
        proportions = tuple(float(pick(1, 3)) for _ in mine) if fixed_set and pick(0, 1) else ()
        need = replace(need, gpus=mine, all_gpus=fixed_set, proportions=proportions)
    return need


def make_recipe(pick: Pick, key: str, capacity: Resources) -> Recipe:
    need = make_need(pick, gpu_kinds(capacity))
    vetted = pick(0, 4) > 0
    return Recipe(
        key,
        need,
        max_instances=pick(0, 3) if pick(0, 3) == 0 else pick(1, 3),
        min_tenure_s=float(pick(0, 2) * 15),
        idle_timeout_s=float(pick(0, 2) * 100),
        pinned=pick(0, 5) == 0,
        failing=pick(0, 7) == 0,
        vetted=vetted,
        vetting=not vetted and pick(0, 1) == 1,
        ran_out=place(need, capacity) if vetted and pick(0, 7) == 0 else None,  # it got as far as to allocate
        turn_ended=-inf if pick(0, 2) else NOW - pick(0, 60),
    )


def make_instance(pick: Pick, id_: str, recipe: Recipe, footprint: Resources) -> InstanceView:
    state = (State.SPAWNING, State.READY, State.READY, State.READY, State.DRAINING, State.STOPPING)[pick(0, 5)]
    serving = state in (State.READY, State.DRAINING)
    slots = pick(0, 3)
    busy = pick(0, slots or 3) if serving else 0
    active = max(0, busy - pick(0, 1)) + pick(0, 1) if serving else 0  # less than busy: abandoned
    ready = NOW - pick(0, 60) * 5
    return InstanceView(
        id_, recipe.key, state, footprint, active, busy, slots,
        ready_since=ready if serving else 0.0,
        idle_since=max(ready, NOW - pick(0, 250)) if serving else 0.0,
        fresh=serving and not active and pick(0, 2) == 0,
        stale=pick(0, 7) == 0,
        pinned=recipe.pinned,
        superseded=pick(0, 4) == 0,
    )  # fmt: skip


def make_world(pick: Pick) -> Snapshot:
    keys = KEYS[: pick(1, 4)]
    capacity = make_capacity(pick)
    recipes = {key: make_recipe(pick, key, capacity) for key in keys}
    instances: list[InstanceView] = []
    used = Resources()
    for n in range(pick(0, 5)):
        recipe = recipes[keys[pick(0, len(keys) - 1)]]
        assert recipe.need is not None
        spot = place(recipe.need, capacity, used)
        if spot is not None:
            used = used + spot
            instances.append(make_instance(pick, f"i{n}", recipe, spot))
    for i in instances:  # one that serves has started before
        if i.state in (State.READY, State.DRAINING):
            recipes[i.key] = replace(recipes[i.key], vetted=True, vetting=False)
    for key in keys:  # the size of a changed file is being looked up, whatever runs of the old one
        if pick(0, 9) == 0:
            recipes[key] = replace(recipes[key], need=None)
    demands = [
        Demand(k, NOW - pick(0, 60), slotted=pick(0, 4), free=pick(0, 2)) for k in keys if pick(0, 2)
    ]  # fmt: skip
    waiting = [d for d in demands if d.slotted or d.free]
    world = Snapshot(NOW, capacity, recipes, instances, waiting, make_foreign(pick, capacity))
    made_way = frozenset(d.key for d in waiting if d.free and pick(0, 2) == 0)
    world = replace(world, replacing=made_way, spare_ram_mib=inf if RAM in capacity.mib else float(pick(0, 24)))
    return forgetting(_with_doubts(pick, world))


def _with_doubts(pick: Pick, world: Snapshot) -> Snapshot:
    """Return *world* with successors that nobody else waits for, and profiles of which little is known."""
    lonely = [d.key for d in world.demands if d.key in world.replacing and not d.slotted and d.free == 1 and pick(0, 2)]
    recipes = {
        key: replace(r, guessed=pick(0, 9) == 0, doubtful=pick(0, 9) == 0, yielding=pick(0, 9) == 0)
        for key, r in world.recipes.items()
    }
    demands = [replace(d, attended=d.key not in lonely) for d in world.demands]
    return replace(world, recipes=recipes, demands=demands)


def forgetting(world: Snapshot) -> Snapshot:
    """Return *world* as the supervisor tells it: successors that are ready or given up are not awaited any more."""
    waiting = {d.key for d in world.demands}
    return replace(world, replacing=still_to_come(world.replacing, world.instances, waiting))


def owned(world: Snapshot) -> Resources:
    return total(i.footprint for i in world.instances if i.state is not State.STOPPED)


def available(world: Snapshot) -> dict[str, int]:
    """What the node's own instances may use now, worked out anew: the limit less what others take (trap 42)."""
    return {kind: limit - world.foreign.mib.get(kind, 0) for kind, limit in world.capacity.mib.items()}


def staying(world: Snapshot) -> Resources:
    """Return what never leaves for anybody."""
    return total(i.footprint for i in world.instances if i.pinned and not i.stale and i.state in LIVE)


def ending(i: InstanceView) -> bool:
    return i.state is State.STOPPING or (i.state is State.DRAINING and not i.active)


def living(world: Snapshot, key: str | None) -> list[InstanceView]:
    """Return the instances of *key* (None: of any profile) that serve it, or will."""
    return [i for i in world.instances if key in (None, i.key) and i.state in LIVE and not i.stale]


def make_foreign(pick: Pick, capacity: Resources) -> Resources:
    """What other programs take, mostly nothing; it may be more than what is left."""
    if pick(0, 2):
        return Resources()
    return Resources({k: mib for k in capacity.mib if k != "instances" and (mib := pick(0, 12))})


@st.composite
def worlds(draw: st.DrawFn) -> Snapshot:
    return make_world(lambda low, high: draw(st.integers(low, high)))


def seeded_worlds(number: int, seed: int = 7) -> Iterator[Snapshot]:
    return iter(_seeded(number, seed))


@cache
def _seeded(number: int, seed: int) -> tuple[Snapshot, ...]:
    rng = Random(seed)
    return tuple(make_world(rng.randint) for _ in range(number))


def remembering(planner: Planner) -> Planner:
    """Return *planner*, asked only once for the same world: every rule asks again."""
    last: list[tuple[Snapshot, Plan]] = []

    def asked_once(world: Snapshot) -> Plan:
        if not last or last[0][0] is not world:
            last[:] = [(world, planner(world))]
        return last[0][1]

    return asked_once
