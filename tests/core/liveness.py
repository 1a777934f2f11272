"""That everybody is served at last, and how long that may take: the scheduler's stated bound."""

from __future__ import annotations

from dataclasses import replace

from mesh.core.placement import place
from mesh.core.resources import Resources, total
from mesh.core.world import Snapshot
from tests.core.simulation import Simulation
from tests.core.worlds import Planner, available


def everything_feasible_is_served(planner: Planner, world: Snapshot) -> None:
    """With the world moving and no new arrivals, all demand is met or refused, within the stated bound (liveness).

    The bound: while a profile waits, every other has one more turn at most, besides those who run now.
    """
    recipes = {key: replace(r, failing=False) for key, r in world.recipes.items()}
    simulation = Simulation(replace(world, recipes=recipes), planner)
    waited_s = {d.key: world.now - max(d.since, 0.0) for d in world.demands}
    requests = sum(d.slotted + d.free for d in world.demands) + sum(i.superseded for i in world.instances)
    simulation.run((2 + requests) * len(recipes) * turn_s(simulation))
    over = simulation.world
    pins = total(i.footprint for i in over.instances if i.pinned)
    for d in over.demands:
        need = over.recipes[d.key].need
        feasible = need is not None and place(need, Resources(available(over)), pins) is not None
        assert not feasible, f"{d} was never served"
    bound_s = (1 + len(recipes)) * turn_s(simulation)
    for key in waited_s.keys() - {d.key for d in over.demands}:
        assert simulation.waits.get(key, 0.0) <= waited_s[key] + bound_s, key


def turn_s(simulation: Simulation) -> float:
    """A turn is a look at the arguments, a load, the tenure, the requests that run at its end, and the exit."""
    tenure_s = max((r.min_tenure_s for r in simulation.world.recipes.values()), default=0.0)
    service_s = simulation.service_s + 1.0  # the longest of the simulation's requests
    return simulation.vet_s + simulation.load_s + tenure_s + service_s + simulation.stop_s
