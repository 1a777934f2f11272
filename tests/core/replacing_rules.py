"""What must hold of every plan where engines were replaced (rule 6)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mesh.core.lifecycle import State
from mesh.core.placement import place
from mesh.core.replacing import makes_room
from mesh.core.resources import Resources
from mesh.core.world import GOING, LIVE, Decision, Drain, InstanceView, Reason, Refuse, Snapshot, Spawn, Vet
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
    for d in result.decisions:
        if not isinstance(d, Drain) or d.reason is not Reason.ENGINE_REPLACED or _successor_serves(world, d.instance):
            continue
        i = _by_id(world)[d.instance]
        others = [x for x in living(world, i.key) if x is not i]
        if any(not x.superseded and x.state is State.READY for x in others):
            continue  # its successor serves
        assert makes_room(d) == (not others)
        recipe = world.recipes[i.key]
        assert recipe.need is not None
        assert recipe.vetted
        assert recipe.fresh
        assert not recipe.failing
        assert recipe.max_instances
        assert place(recipe.need, Resources(available(world)), owned(after) - i.footprint) is not None
        assert others or i.key in after.replacing


def two_copies_only_in_free_memory(planner: Planner, world: Snapshot) -> None:
    """The old one goes first only if there is no room for both."""
    result = planner(world)
    before = owned(world)
    for d in result.decisions:
        if isinstance(d, Drain) and makes_room(d) and not world.demands:
            need = world.recipes[d.competitor or ""].need
            assert need is not None
            assert place(need, Resources(available(world)), before) is None


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
    """New requests get the new engine."""
    after = apply(world, planner(world))
    for i in after.instances:
        if i.superseded and i.state is State.READY and not i.stale:
            assert not _successor_serves(world, i.key) or not _successor_serves(after, i.key)


def what_can_be_replaced_is(planner: Planner, world: Snapshot) -> None:
    """Left alone, every replaced engine is gone at last, unless there is no way to start the new one."""
    recipes = {key: replace(r, failing=False, ran_out=None) for key, r in world.recipes.items()}
    simulation = Simulation(replace(world, demands=(), replacing=frozenset(), recipes=recipes), planner)
    simulation.run(1000 * (1 + len(world.instances)), until_rest=True)
    over = simulation.world
    assert not over.demands or over.now - world.now < 1000 * (1 + len(world.instances))
    for i in over.instances:
        recipe = over.recipes.get(i.key)
        if recipe is None or not i.superseded or i.state not in LIVE or not recipe.max_instances:
            continue
        room = recipe.need and place(recipe.need, Resources(available(over)), owned(over) - i.footprint)
        assert room is None, f"{i} was never replaced"


def _by_id(world: Snapshot) -> dict[str, InstanceView]:
    return {i.id: i for i in world.instances}


def _successor_serves(world: Snapshot, key: str) -> bool:
    return any(i.state is State.READY and not i.superseded for i in living(world, key))


RULES: tuple[Rule, ...] = (
    only_the_superseded_are_replaced,
    somebody_serves_or_is_waited_for,
    two_copies_only_in_free_memory,
    one_replacement_at_a_time,
    nobody_is_stopped_for_a_successor,
    whoever_has_a_successor_leaves,
)
