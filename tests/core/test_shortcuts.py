"""The supervisor's shortcuts, which skip the plan where its answer is known: here they are held against the plan."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings

from mesh.core.lifecycle import State
from mesh.core.placement import place
from mesh.core.scheduler import plan
from mesh.core.world import Admit, Demand, Snapshot
from tests.core.simulation import apply, settled
from tests.core.worlds import worlds


@given(worlds())
@settings(deadline=None, max_examples=300)
def test_the_shortcut_for_joining_a_queue_is_what_the_plan_decides(w: Snapshot) -> None:
    """``Supervisor.submit``: one more of those who wait already changes nothing."""
    calm = settled(w, plan)
    for d in calm.demands:
        if d.slotted:
            others = [x for x in calm.demands if x is not d]
            joined = replace(calm, demands=[*others, replace(d, slotted=d.slotted + 1)])
            assert plan(joined) == plan(calm)


@given(worlds())
@settings(deadline=None, max_examples=500)
def test_the_shortcut_for_handing_a_place_over_is_what_the_plan_decides(w: Snapshot) -> None:
    """``Supervisor._hand_over``: the next of the profile takes the place of the one that ended, and nothing else."""
    calm = settled(w, plan)
    before = plan(calm)
    for d in calm.demands:
        for i in calm.instances:
            mine = i.key == d.key and i.state is State.READY and i.busy and i.active and i.id not in before.held
            room = not i.slots or i.busy <= i.slots
            if not (mine and room and d.slotted >= (1 if len(calm.demands) == 1 else 2)):
                continue
            ended = replace(i, busy=i.busy - 1, active=i.active - 1)
            world = replace(calm, instances=[ended if x is i else x for x in calm.instances])
            assert plan(world).decisions == (Admit(i.id, d.key, 1, 0),)
            handed = plan(apply(world, plan(world)))
            assert (handed.decisions, handed.held) == ((), before.held)


@given(worlds())
@settings(deadline=None, max_examples=300)
def test_the_shortcut_for_a_free_place_is_what_the_plan_decides(w: Snapshot) -> None:
    """``Supervisor._open_instance``: nobody waits for the profile, a READY instance that is not held has a place."""
    calm = settled(w, plan)
    held = plan(calm).held
    for key in {i.key for i in calm.instances} - {d.key for d in calm.demands}:
        usable = [
            i
            for i in calm.instances
            if i.key == key
            and i.state is State.READY
            and not i.stale
            and i.id not in held
            and (not i.slots or i.busy < i.slots)
        ]
        r = calm.recipes[key]
        too_large = r.need is not None and place(r.need, calm.capacity) is None
        if r.failing or not r.max_instances or too_large:
            continue  # wanted and not replaceable: the plan would lift a hold, the shortcut leaves that to the next one
        if usable:
            best = min(usable, key=lambda i: (i.busy, i.id))
            arrived = replace(calm, demands=[*calm.demands, Demand(key, calm.now, slotted=1)])
            assert Admit(best.id, key, 1, 0) in plan(arrived).decisions
