"""What must hold of every plan. Each rule takes a planner, so that it can be tried on broken ones too."""

from __future__ import annotations

from dataclasses import replace

from mesh.core.lifecycle import State
from mesh.core.resources import Resources, total
from mesh.core.scheduler import LIVE, Admit, Drain, InstanceView, Reason, Refusal, Refuse, Snapshot, Spawn
from tests.core.worlds import Planner, Simulation, apply


def owned(world: Snapshot) -> Resources:
    return total(i.footprint for i in world.instances if i.state is not State.STOPPED)


def within(used: Resources, world: Snapshot) -> bool:
    return all(used.mib.get(kind, 0) <= limit for kind, limit in world.capacity.mib.items())


def never_over_budget(planner: Planner, world: Snapshot) -> None:
    """Draining and stopping instances count until they are gone."""
    if within(owned(world), world):
        assert within(owned(apply(world, planner(world))), world)


def only_harmless_victims(planner: Planner, world: Snapshot) -> None:
    """Trap 32, 33: no busy, loading, pinned or just-loaded-and-wanted victim for a competitor."""
    by_id = {i.id: i for i in world.instances}
    wanted = {d.key for d in world.demands}
    for d in planner(world).decisions:
        if isinstance(d, Drain) and d.reason is Reason.ROOM:
            victim = by_id[d.instance]
            assert victim.state is State.READY
            assert not victim.active
            assert not victim.pinned
            assert not (victim.key in wanted and victim.fresh)
            tenured = world.now >= victim.ready_since + world.recipes[victim.key].min_tenure_s
            assert victim.key not in wanted or tenured


def holds_only_after_tenure(planner: Planner, world: Snapshot) -> None:
    for i in world.instances:
        if i.id in planner(world).held and i.active:
            assert world.now >= i.ready_since + world.recipes[i.key].min_tenure_s
            assert not i.pinned


def admits_only_where_it_may(planner: Planner, world: Snapshot) -> None:
    """Trap 37: never beyond an instance's slots, never to one that is held, drained, loading or outdated."""
    result = planner(world)
    drained = {d.instance for d in result.decisions if isinstance(d, Drain)}
    by_id = {i.id: i for i in world.instances}
    for d in result.decisions:
        if isinstance(d, Admit):
            i = by_id[d.instance]
            assert d.slotted or d.free
            assert i.key == d.key
            assert i.state is State.READY
            assert not i.stale
            assert i.id not in drained
            assert i.id not in result.held
            assert i.slots == 0 or i.busy + d.slotted <= i.slots or not d.slotted


def admits_all_it_can(planner: Planner, world: Snapshot) -> None:
    """Nobody waits while a usable instance has a place."""
    result = planner(world)
    after = apply(world, result)
    for d in after.demands:
        for i in after.instances:
            usable = i.key == d.key and i.state is State.READY and not i.stale and i.id not in result.held
            assert not (usable and d.free)
            assert not (usable and d.slotted and (i.slots == 0 or i.busy < i.slots))


def at_rest_after_one(planner: Planner, world: Snapshot) -> None:
    after = apply(world, planner(world))
    assert planner(after).decisions == ()


def order_does_not_matter(planner: Planner, world: Snapshot) -> None:
    turned = replace(world, instances=list(reversed(world.instances)), demands=list(reversed(world.demands)))
    assert set(planner(turned).decisions) == set(planner(world).decisions)
    assert planner(turned).held == planner(world).held


def refuses_only_the_impossible(planner: Planner, world: Snapshot) -> None:
    for d in planner(world).decisions:
        if isinstance(d, Refuse):
            recipe = world.recipes[d.key]
            impossible = {
                Refusal.TOO_LARGE: not within(recipe.footprint, world),
                Refusal.NOT_HERE: recipe.max_instances == 0,
                Refusal.FAILING: recipe.failing,
                Refusal.UNKNOWN: False,
            }
            assert impossible[d.refusal]


def the_impossible_is_refused(planner: Planner, world: Snapshot) -> None:
    """Trap 49: what is larger than the whole budget does not wait for its deadline."""
    refused = {d.key for d in planner(world).decisions if isinstance(d, Refuse)}
    for d in world.demands:
        recipe = world.recipes[d.key]
        alive = any(i.key == d.key and i.state in LIVE and not i.stale for i in world.instances)
        idled = any(isinstance(x, Drain) for x in planner(world).decisions)
        if not alive and not idled and not within(recipe.footprint, world):
            assert d.key in refused


def one_spawn_at_a_time(planner: Planner, world: Snapshot) -> None:
    """Trap 18: single flight per profile, within ``max_instances``, never one that is failing."""
    spawned = [d.key for d in planner(world).decisions if isinstance(d, Spawn)]
    assert len(spawned) == len(set(spawned))
    for key in spawned:
        live = [i for i in world.instances if i.key == key and i.state in LIVE and not i.stale]
        assert not any(i.state is State.SPAWNING for i in live)
        assert len(live) < world.recipes[key].max_instances
        assert not world.recipes[key].failing


def no_spare_victim(planner: Planner, world: Snapshot) -> None:
    """Keeping any one of the victims for a competitor leaves that competitor without room."""
    decisions = planner(world).decisions
    by_id = {i.id: i for i in world.instances}
    drains = [d for d in decisions if isinstance(d, Drain)]
    rooms = [d for d in drains if d.reason is Reason.ROOM]
    competitors = {d.competitor for d in rooms}
    if len(competitors) != 1 or any(isinstance(d, Spawn) for d in decisions):
        return  # with several, one victim may serve two
    key = competitors.pop()
    assert key is not None
    waiting = [d for d in world.demands if not _live(world, d.key)]
    if [d.key for d in sorted(waiting, key=lambda d: (d.since, d.key))][:1] != [key]:
        return  # others reserved memory before it
    gone = {d.instance for d in drains if not by_id[d.instance].active}  # a busy one may take its time
    staying = total(i.footprint for i in world.instances if i.id not in gone and not _ending(i))
    for spare in rooms:
        kept = staying + by_id[spare.instance].footprint
        assert not world.recipes[key].footprint.fits(world.capacity, kept)


def only_stale_or_idle_retire(planner: Planner, world: Snapshot) -> None:
    by_id = {i.id: i for i in world.instances}
    wanted = {d.key for d in world.demands}
    for d in planner(world).decisions:
        if isinstance(d, Drain) and d.reason is Reason.PROFILE_CHANGED:
            assert by_id[d.instance].stale
        if isinstance(d, Drain) and d.reason is Reason.IDLE:
            i = by_id[d.instance]
            limit_s = world.recipes[i.key].idle_timeout_s
            assert limit_s
            assert not i.active
            assert i.key not in wanted
            assert world.now - i.idle_since >= limit_s


def the_stale_retire(planner: Planner, world: Snapshot) -> None:
    """Trap 83."""
    drained = {d.instance for d in planner(world).decisions if isinstance(d, Drain)}
    assert all(i.id in drained for i in world.instances if i.stale and i.state in LIVE)


def everything_feasible_is_served(planner: Planner, world: Snapshot) -> None:
    """With the world moving and no new arrivals, all demand is met or refused (liveness)."""
    pinned = total(i.footprint for i in world.instances if i.pinned and i.state is not State.STOPPED)
    recipes = {k: replace(r, failing=False) for k, r in world.recipes.items()}
    settled = [replace(i, active=0, busy=0) for i in world.instances if i.state in LIVE and not i.stale]
    start = replace(world, recipes=recipes, instances=[replace(i, state=State.READY) for i in settled])
    simulation = Simulation(start, planner)
    simulation.run(400)
    pins = total(i.footprint for i in simulation.world.instances if i.pinned)
    for d in simulation.world.demands:
        need = recipes[d.key].footprint
        assert not need.fits(world.capacity, pinned + pins), f"{d} was never served"


def _live(world: Snapshot, key: str) -> bool:
    return any(i.key == key and i.state in LIVE and not i.stale for i in world.instances)


def _ending(i: InstanceView) -> bool:
    return i.state is State.STOPPING or (i.state is State.DRAINING and not i.active)


RULES = (
    never_over_budget,
    only_harmless_victims,
    holds_only_after_tenure,
    admits_only_where_it_may,
    admits_all_it_can,
    at_rest_after_one,
    order_does_not_matter,
    refuses_only_the_impossible,
    the_impossible_is_refused,
    one_spawn_at_a_time,
    no_spare_victim,
    only_stale_or_idle_retire,
    the_stale_retire,
)
