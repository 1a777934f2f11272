"""What is foretold comes true: when time alone changes the plan, and what asking for a model would do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mesh.core.resources import Resources
from mesh.core.world import LIVE, Demand, Drain, Outlook, Recipe, Refuse, Snapshot, Spawn
from tests.core.simulation import settled
from tests.core.worlds import Planner

Wakeup = Callable[[Snapshot], float | None]
Foresee = Callable[[Snapshot, Recipe], Outlook]


def nothing_changes_before_the_wakeup(planner: Planner, wakeup: Wakeup, seen: Snapshot) -> None:
    """Neither what is decided nor who is held."""
    world = settled(seen, planner)
    when = wakeup(world)
    assert when is None or when > world.now
    just_before = world.now + 1e6 if when is None else when - 1e-6
    assert planner(replace(world, now=just_before)) == planner(world)


def the_outlook_is_what_the_plan_does(planner: Planner, foresee: Foresee, seen: Snapshot) -> None:
    """Ask for each model when nobody waits for anything: it goes where the outlook says, and the same have to go."""
    calm = settled(replace(seen, demands=(), replacing=frozenset()), planner)
    for key, r in calm.recipes.items():
        if r.need is None:
            continue
        looked = foresee(calm, r)
        views = {i.id: i for i in calm.instances}
        assert all(views[id_].key != key for id_ in looked.victims)
        assert looked.waits or not any(views[id_].active or views[id_].pinned for id_ in looked.victims)
        alive = any(i.key == key and i.state in LIVE and not i.stale for i in calm.instances)
        if alive or key in calm.replacing or r.failing or not r.max_instances or not r.vetted or r.ran_out is not None:
            continue
        decisions = planner(replace(calm, demands=(Demand(key, calm.now, slotted=1),))).decisions
        refused = any(isinstance(d, Refuse) for d in decisions)
        assert refused == (looked.placement is None)
        drained = {d.instance for d in decisions if isinstance(d, Drain)}
        if not looked.waits:
            assert drained == set(looked.victims)
        assert not (looked.waits and (drained or any(isinstance(d, Spawn) for d in decisions)))
        spawned = [d for d in decisions if isinstance(d, Spawn)]
        if spawned and all(i.state in LIVE for i in calm.instances):  # nothing is on its way out: one view of memory
            assert spawned == [Spawn(key, looked.placement or Resources())]
