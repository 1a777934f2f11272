"""Where a profile that waits is placed: cases that one can follow.

The tests that take a planner are also run with planted bugs (``mutants.py``).
"""

from __future__ import annotations

from dataclasses import replace

from mesh.core.resources import Resources
from mesh.core.world import Demand, Drain, InstanceView, Reason, Recipe, Snapshot, Spawn
from tests.core.simulation import apply
from tests.core.test_scheduler import MIB, idle_pair, ready, recipe, world
from tests.core.worlds import NOW, Planner


def test_a_load_that_ran_out_of_memory_gets_all_that_idles_there(planner: Planner) -> None:
    """Trap 46: the ledger said that it fits, so it is not asked how much has to go; and the exits are waited for."""
    w = replace(idle_pair(ran_out=MIB(vram_mib=5)), capacity=MIB(vram_mib=90))
    assert planner(w).decisions == (Drain("a1", Reason.ROOM, "c"), Drain("b1", Reason.ROOM, "c"))
    leaving = apply(w, planner(w))
    assert planner(leaving).decisions == ()
    assert planner(replace(leaving, instances=())).decisions == (Spawn("c", MIB(vram_mib=5)),)


def two_gpus(*instances: InstanceView, foreign: Resources | None = None, **recipes: Recipe) -> Snapshot:
    gpus = Resources({"gpu0": 14, "gpu1": 10})
    return Snapshot(NOW, gpus, recipes, instances, (Demand("a", NOW, 1),), foreign or Resources())


def test_the_retry_goes_to_the_gpus_that_were_cleared(planner: Planner) -> None:
    where = Resources({"gpu1": 5, "vram": 5})
    elsewhere = ready("b1", "b", 0, footprint=Resources({"gpu0": 4, "vram": 4}))
    w = two_gpus(elsewhere, a=recipe("a", 5, ran_out=where), b=recipe("b", 4))
    assert planner(w).decisions == (Spawn("a", where),)


def test_the_retry_goes_elsewhere_if_those_gpus_are_taken_for_good(planner: Planner) -> None:
    ran_out = recipe("a", 5, ran_out=Resources({"gpu1": 5, "vram": 5}))
    pinned = ready("b1", "b", 0, footprint=Resources({"gpu1": 8, "vram": 8}), pinned=True)
    there = (Spawn("a", Resources({"gpu0": 5, "vram": 5})),)
    assert planner(two_gpus(pinned, a=ran_out, b=recipe("b", 8, pinned=True))).decisions == there
    assert planner(two_gpus(a=ran_out, foreign=Resources({"gpu1": 8}))).decisions == there
    lost = replace(two_gpus(a=ran_out), capacity=Resources({"gpu0": 14}))
    assert planner(lost).decisions == there


def test_nobody_goes_for_a_retry_that_has_no_room(planner: Planner) -> None:
    ran_out = recipe("a", 9, ran_out=Resources({"gpu1": 9, "vram": 9}))
    idle = ready("b1", "b", 0, footprint=Resources({"gpu1": 2, "vram": 2}))
    taken = Resources({"gpu0": 12, "gpu1": 5})
    assert planner(two_gpus(idle, a=ran_out, b=recipe("b", 2), foreign=taken)).decisions == ()


def test_whoever_loses_its_instance_to_another_is_placed_after_it(planner: Planner) -> None:
    """It needs less than the one that runs: both fit once that one is gone, and nobody has to wait for it."""
    waits = (Demand("w", NOW - 9, 1), Demand("a", NOW - 1, 1))
    w = world(ready("a1", "a", 5), vram=12, demands=waits, w=recipe("w", 9), a=recipe("a", 2))
    assert planner(w).decisions == (Drain("a1", Reason.ROOM, "w"), Spawn("a", MIB(vram_mib=2)))


def test_what_a_busy_one_that_leaves_has_is_not_free_soon(planner: Planner) -> None:
    """So an idle one goes as well: a request may take for ever."""
    outdated = ready("a1", "a", 8, active=1, busy=1, stale=True)
    w = world(
        outdated, ready("c1", "c", 8), vram=17, demands=(Demand("n", NOW, 1),),
        a=recipe("a", 8), c=recipe("c", 8), n=recipe("n", 8),
    )  # fmt: skip
    went = {d.instance: d.reason for d in planner(w).decisions if isinstance(d, Drain)}
    assert went == {"a1": Reason.PROFILE_CHANGED, "c1": Reason.ROOM}
