"""What must hold of every plan where engines were replaced (rule 6)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import reduce

from mesh.core.lifecycle import State
from mesh.core.placement import Need, at_least, gpu_kinds, place
from mesh.core.replacing import makes_room
from mesh.core.resources import RAM, VRAM, Resources, total
from mesh.core.world import GOING, LIVE, Decision, Drain, Forgo, InstanceView, Reason, Refuse, Snapshot, Spawn, Vet
from tests.core.simulation import Simulation, apply
from tests.core.worlds import Planner, available, living, owned

Rule = Callable[[Planner, Snapshot], None]


def is_replacement(world: Snapshot, d: Decision) -> bool:
    """Whether *d* is done for a successor alone."""
    match d:
        case Drain(reason=Reason.ENGINE_REPLACED):
            return not _successor_serves(world, _by_id(world)[d.instance].key)
        case Spawn(key=key):
            return any(i.superseded for i in living(world, key)) and key not in {x.key for x in world.demands}
        case Vet(key=key):
            return bool(living(world, key))
        case _:
            return False


def only_the_superseded_are_replaced(planner: Planner, world: Snapshot) -> None:
    """They serve until then: no loading one, and none whose profile changed, which goes at once anyhow."""
    for d in planner(world).decisions:
        if isinstance(d, Drain) and d.reason is Reason.ENGINE_REPLACED:
            i = _by_id(world)[d.instance]
            assert i.superseded
            assert i.state is State.READY
            assert not i.stale


def somebody_serves_or_is_waited_for(planner: Planner, world: Snapshot) -> None:
    """The last one that serves a profile goes only for a successor that is waited for, and can be started then."""
    result = planner(world)
    after = apply(world, result)
    drained = {d.instance for d in result.decisions if isinstance(d, Drain) and d.reason is Reason.ENGINE_REPLACED}
    for d in result.decisions:
        if not isinstance(d, Drain) or d.reason is not Reason.ENGINE_REPLACED or _successor_serves(world, d.instance):
            continue
        i = _by_id(world)[d.instance]
        others = [x for x in living(world, i.key) if x is not i]
        if others and {x.id for x in others} <= drained:
            assert sum(makes_room(x) for x in result.decisions if isinstance(x, Drain)) == 1  # they all go for it
            continue
        others = [x for x in others if x.id not in drained]
        if any(not x.superseded and x.state is State.READY for x in others):
            continue  # its successor serves
        assert makes_room(d) == (not others)
        recipe = world.recipes[i.key]
        assert recipe.need is not None
        assert recipe.vetted
        assert recipe.fresh
        assert not recipe.failing
        assert recipe.max_instances
        gone = total(x.footprint for x in world.instances if x.id in drained)
        assert place(recipe.need, Resources(available(world)), owned(after) - gone) is not None
        assert others or i.key in after.replacing


def two_copies_only_in_free_memory(planner: Planner, world: Snapshot) -> None:
    """The old one goes first only if there is no room for both."""
    for d in planner(world).decisions:
        if isinstance(d, Drain) and makes_room(d) and not world.demands:
            assert not _fits_beside(world, d.competitor or "")
        if isinstance(d, Spawn) and is_replacement(world, d):
            assert not world.recipes[d.key].guessed
            for old in (i for i in living(world, d.key) if i.state is State.READY):
                assert d.footprint.mib.get(RAM, 0) >= old.footprint.mib.get(RAM, 0)
                if len(gpu_kinds(d.footprint)) >= len(gpu_kinds(old.footprint)):  # each costs something of its own
                    assert d.footprint.mib.get(VRAM, 0) >= old.footprint.mib.get(VRAM, 0)
            assert d.footprint.mib.get(RAM, 0) <= _spare_ram_mib(world)


def as_many_go_as_successors_serve(planner: Planner, world: Snapshot) -> None:
    """Who has none yet goes on serving."""
    drained = [d for d in planner(world).decisions if isinstance(d, Drain) and d.reason is Reason.ENGINE_REPLACED]
    for key in {_by_id(world)[d.instance].key for d in drained}:
        new = sum(i.state is State.READY and not i.superseded for i in living(world, key))
        going = sum(i.superseded and i.key == key and i.state in GOING for i in world.instances)
        now = sum(_by_id(world)[d.instance].key == key for d in drained)
        assert not new or now <= new - going


def what_nobody_asked_for_costs_nobody(planner: Planner, world: Snapshot) -> None:
    """The successor of an instance that made room waits, and is given up if that room is gone."""
    result = planner(world)
    lonely = {d.key for d in world.demands if not d.attended}
    after = owned(apply(world, result))
    for d in result.decisions:
        assert not isinstance(d, Vet) or d.key not in lonely
        assert not isinstance(d, Drain) or d.reason is not Reason.ROOM or d.competitor not in lonely
        if isinstance(d, Forgo):
            need = world.recipes[d.key].need
            assert d.key in lonely
            assert need is not None
            assert place(need, Resources(available(world)), after) is None
    assert not result.held or {d.key for d in world.demands} - lonely
    if len(lonely) == 1 == len(world.demands) and not any(isinstance(d, Refuse) for d in result.decisions):
        (key,) = lonely
        need, gone = world.recipes[key].need, total(i.footprint for i in world.instances if i.state in GOING)
        there = (
            living(world, key)
            or need is None
            or place(need, Resources(available(world)), owned(world) - gone) is not None
        )
        assert there or Forgo(key) in result.decisions


def who_yields_keeps_nobody_from_work(planner: Planner, world: Snapshot) -> None:
    result = planner(world)
    if result.held:
        assert any(not r.yielding for d in world.demands if (r := world.recipes.get(d.key)) is not None)


def cramped_is_who_could_never_fit(planner: Planner, world: Snapshot) -> None:
    for key in planner(world).cramped:
        old = [i for i in living(world, key) if i.superseded and i.state is State.READY]
        assert old
        need, rest = world.recipes[key].need, owned(world) - total(i.footprint for i in old)
        assert need is not None
        assert (
            world.demands
            or any(i.state is State.SPAWNING for i in world.instances)
            or (place(need, Resources(available(world)), rest) is None)
        )


def one_replacement_at_a_time(planner: Planner, world: Snapshot) -> None:
    result = planner(world)
    begun = [d for d in result.decisions if is_replacement(world, d)]
    assert len(begun) <= 1
    going = [i for i in world.instances if i.superseded and i.state in GOING]
    loading = {i.key for i in world.instances if i.state is State.SPAWNING and not i.superseded}
    loads = any(i.superseded and i.state in LIVE and i.key in loading and not i.stale for i in world.instances)
    gone = {d.instance for d in result.decisions if isinstance(d, Drain) and d not in begun}
    refused = {d.key for d in result.decisions if isinstance(d, Refuse)}
    if going or loads or world.replacing - refused or any(i.superseded and i.id in gone for i in world.instances):
        assert not begun


def nobody_is_stopped_for_a_successor(planner: Planner, world: Snapshot) -> None:
    """Neither while somebody waits without an instance, nor an instance of another profile."""
    result = planner(world)
    after = apply(world, result)
    refused = {d.key for d in result.decisions if isinstance(d, Refuse)}
    for d in result.decisions:
        if isinstance(d, Drain) and is_replacement(world, d):
            own = _by_id(world)[d.instance].key
            assert d.competitor in (None, own)
            for x in after.demands:
                assert x.key == own or x.key in refused or living(after, x.key), f"{x.key} comes first"


def whoever_has_a_successor_leaves(planner: Planner, world: Snapshot) -> None:
    """One for each of them."""
    after = apply(world, planner(world))
    for key in {i.key for i in living(after, None) if i.superseded and i.state is State.READY}:
        new = [i for i in living(after, key) if i.state is State.READY and not i.superseded]
        going = [i for i in after.instances if i.key == key and i.superseded and i.state in GOING]
        assert len(going) >= len(new)


def what_can_be_replaced_is(planner: Planner, world: Snapshot) -> None:
    """Left alone, every replaced engine is gone at last, unless there is no way to start the new one."""
    recipes = {key: replace(r, failing=False, ran_out=None, doubtful=False) for key, r in world.recipes.items()}
    simulation = Simulation(replace(world, demands=(), replacing=frozenset(), recipes=recipes), planner)
    simulation.run(1000 * (1 + len(world.instances)), until_rest=True)
    over = simulation.world
    assert not over.demands or over.now - world.now < 1000 * (1 + len(world.instances))
    for i in over.instances:
        recipe = over.recipes.get(i.key)
        if recipe is None or not i.superseded or i.state not in LIVE or not recipe.max_instances:
            continue
        old = total(x.footprint for x in living(over, i.key) if x.superseded)
        room = recipe.need and place(recipe.need, Resources(available(over)), owned(over) - old)
        assert room is None, f"{i} was never replaced"


def what_is_charged_is_what_was_needed(planner: Planner, world: Snapshot) -> None:
    """A new instance is charged its whole need, on GPUs that it may use."""
    for d in planner(world).decisions:
        if isinstance(d, Spawn):
            need = _needed(world, d)
            spread = gpu_kinds(d.footprint)
            assert bool(spread) == bool(gpu_kinds(world.capacity) and need.gpu_mib)
            extra = (need.each_mib + (need.grain_mib if len(spread) > 1 else 0)) * max(1, len(spread))
            assert d.footprint.mib.get(VRAM, 0) == (need.split_mib + extra if need.gpu_mib else 0)
            assert not spread or sum(d.footprint.mib[kind] for kind in spread) == d.footprint.mib[VRAM]
            assert d.footprint.mib.get(RAM, 0) == need.fixed.mib.get(RAM, 0)
            assert need.gpus is None or set(spread) <= set(need.gpus)


def _needed(world: Snapshot, d: Spawn) -> Need:
    """Return what *d* is to take: at least as much as those whose place it takes, if it is started beside them."""
    need = world.recipes[d.key].need
    assert need is not None
    old = [i for i in living(world, d.key) if i.superseded and i.state is State.READY]
    larger = reduce(at_least, (i.footprint for i in old), need)
    waiting = next((x for x in world.demands if x.key == d.key), None)
    return need if waiting is not None and d.footprint.mib.get(VRAM, 0) < larger.gpu_mib else larger


def _by_id(world: Snapshot) -> dict[str, InstanceView]:
    return {i.id: i for i in world.instances}


def _fits_beside(world: Snapshot, key: str) -> bool:
    """Whether a copy surely fits beside the one of *key* that serves."""
    recipe, need = world.recipes[key], world.recipes[key].need
    assert need is not None
    for i in living(world, key):
        need = at_least(need, i.footprint)
    spot = place(need, Resources(available(world)), owned(world))
    return not recipe.guessed and spot is not None and spot.mib.get(RAM, 0) <= _spare_ram_mib(world)


def _spare_ram_mib(world: Snapshot) -> float:
    return world.spare_ram_mib - sum(i.footprint.mib.get(RAM, 0) for i in world.instances if i.state is State.SPAWNING)


def _successor_serves(world: Snapshot, key: str) -> bool:
    return any(i.state is State.READY and not i.superseded for i in living(world, key))


RULES: tuple[Rule, ...] = (
    only_the_superseded_are_replaced,
    somebody_serves_or_is_waited_for,
    two_copies_only_in_free_memory,
    one_replacement_at_a_time,
    nobody_is_stopped_for_a_successor,
    whoever_has_a_successor_leaves,
    as_many_go_as_successors_serve,
    what_nobody_asked_for_costs_nobody,
    who_yields_keeps_nobody_from_work,
    cramped_is_who_could_never_fit,
)
