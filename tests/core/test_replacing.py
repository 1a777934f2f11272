"""Engines are replaced one model at a time: cases that one can follow, and what must come of it at last.

The tests that take a planner are also run with planted bugs (``mutants.py``).
"""

from __future__ import annotations

from dataclasses import replace

from mesh.core.lifecycle import State
from mesh.core.placement import Need
from mesh.core.replacing import still_to_come
from mesh.core.scheduler import plan
from mesh.core.world import Admit, Demand, Drain, Forgo, InstanceView, Reason, Snapshot, Spawn, Vet
from tests.core.replacing_rules import what_can_be_replaced_is
from tests.core.simulation import Simulation, apply, ended, gone, loaded
from tests.core.test_scheduler import MIB, ready, recipe, world
from tests.core.worlds import NOW, Planner, seeded_worlds

REPLACED = Reason.ENGINE_REPLACED


def old(id_: str, key: str, vram: int, **more: object) -> InstanceView:
    return ready(id_, key, vram, superseded=True, **more)


def step(planner: Planner, w: Snapshot) -> Snapshot:
    return apply(w, planner(w))


def spawned(w: Snapshot) -> str:
    return next(i.id for i in w.instances if i.state is State.SPAWNING)


def test_with_room_for_both_the_successor_is_ready_before_the_old_one_goes(planner: Planner) -> None:
    """Above ``max_instances`` by one meanwhile; the old one serves all the time."""
    w = world(old("a1", "a", 4, active=1, busy=1), a=recipe("a", 4))
    assert planner(w).decisions == (Spawn("a", MIB(vram_mib=4)),)
    w = step(planner, w)
    assert planner(w).decisions == ()
    w = replace(w, demands=(Demand("a", NOW, 1),), instances=[replace(i, slots=2) for i in w.instances])
    assert planner(w).decisions == (Admit("a1", "a", 1, 0),)
    w = loaded(step(planner, w), spawned(w))
    assert planner(w).decisions == (Drain("a1", REPLACED),)


def test_without_room_the_old_one_goes_first_and_the_successor_is_waited_for(planner: Planner) -> None:
    w = world(old("a1", "a", 8), a=recipe("a", 8))
    assert planner(w).decisions == (Drain("a1", REPLACED, "a"),)
    w = step(planner, w)
    assert w.replacing == {"a"}
    assert planner(w).decisions == ()  # the process has not exited
    w = gone(w, "a1")
    assert planner(w).decisions == (Spawn("a", MIB(vram_mib=8)),)


def test_nobody_else_has_to_go_while_the_old_one_finishes_its_requests(planner: Planner) -> None:
    """Though new requests wait for the successor, and another model idles whose memory would do."""
    w = world(
        old("a1", "a", 8, active=1, busy=1), ready("c1", "c", 8),
        vram=17, a=recipe("a", 8), c=recipe("c", 8),
    )  # fmt: skip
    w = step(planner, replace(w, capacity=MIB(vram_mib=17)))
    assert [i.id for i in w.instances if i.state is State.DRAINING] == ["a1"]
    w = replace(w, demands=(replace(w.demands[0], slotted=3),))
    assert planner(w).decisions == ()
    small = replace(w, demands=(*w.demands, Demand("n", NOW + 1, 1)), recipes={**w.recipes, "n": recipe("n", 2)})
    assert planner(small).decisions == (Drain("c1", Reason.ROOM, "n"),)
    busy = [replace(i, active=1, busy=1) for i in small.instances]
    assert planner(replace(small, instances=busy)).held == {"c1"}  # what "a1" gives back is kept
    assert planner(gone(ended(w, "a1"), "a1")).decisions == (Spawn("a", MIB(vram_mib=8)),)


def test_idle_models_go_first_and_one_at_a_time(planner: Planner) -> None:
    busy, idle = old("a1", "a", 4, active=1, busy=1, idle_since=NOW - 90), old("b1", "b", 4)
    w = world(busy, idle, vram=99, a=recipe("a", 4), b=recipe("b", 4))
    assert planner(w).decisions == (Spawn("b", MIB(vram_mib=4)),)
    tight = replace(w, capacity=MIB(vram_mib=8))
    assert planner(tight).decisions == (Drain("b1", REPLACED, "b"),)
    w = step(planner, tight)
    for _ in range(2):
        assert planner(w).decisions == ()
        w = gone(w, "b1")
        w = step(planner, w)
    w = loaded(w, spawned(w))
    assert planner(w).decisions == (Admit(w.instances[-1].id, "b", 0, 1), Drain("a1", REPLACED, "a"))


def test_one_that_just_got_a_request_is_not_idle(planner: Planner) -> None:
    w = world(
        old("a1", "a", 4), old("b1", "b", 4, idle_since=NOW - 90),
        vram=99, demands=(Demand("b", NOW, 1),), a=recipe("a", 4), b=recipe("b", 4),
    )  # fmt: skip
    assert planner(w).decisions == (Admit("b1", "b", 1, 0), Spawn("a", MIB(vram_mib=4)))


def test_a_failing_successor_leaves_the_old_one_in_service(planner: Planner) -> None:
    w = step(planner, world(old("a1", "a", 4), old("b1", "b", 4), vram=12, a=recipe("a", 4), b=recipe("b", 4)))
    failing = replace(gone(w, spawned(w)), recipes={**w.recipes, "a": recipe("a", 4, failing=True)})
    assert planner(failing).decisions == (Spawn("b", MIB(vram_mib=4)),)  # its turn comes
    alone = replace(failing, instances=failing.instances[:1])
    assert planner(alone).decisions == ()
    later = replace(alone, recipes={"a": recipe("a", 4)})
    assert planner(later).decisions == (Spawn("a", MIB(vram_mib=4)),)


def test_it_does_not_go_for_arguments_that_the_new_engine_may_refuse(planner: Planner) -> None:
    w = world(old("a1", "a", 8), a=recipe("a", 8, vetted=False))
    assert planner(w).decisions == (Vet("a"),)
    w = step(planner, w)
    assert planner(w).decisions == ()
    refused = replace(w, recipes={"a": recipe("a", 8, vetted=False, failing=True)})
    assert planner(refused).decisions == ()
    accepted = replace(w, recipes={"a": recipe("a", 8)})
    assert planner(accepted).decisions == (Drain("a1", REPLACED, "a"),)


def test_it_does_not_go_for_what_would_not_fit_then(planner: Planner) -> None:
    """It needs more than before, or others took the rest."""
    w = world(old("a1", "a", 4), ready("b1", "b", 4), a=recipe("a", 7), b=recipe("b", 4))
    assert planner(w).decisions == ()


def test_who_waits_without_an_instance_comes_first(planner: Planner) -> None:
    """ "w" waits for memory that "x" will give back: "a" is not stopped meanwhile."""
    waits = (Demand("w", NOW - 1, 1),)
    leaving = ready("x1", "x", 5, state=State.STOPPING)
    w = world(old("a1", "a", 5), leaving, demands=waits, w=recipe("w", 5), a=recipe("a", 5), x=recipe("x", 5))
    assert planner(w).decisions == ()
    assert planner(gone(w, "x1")).decisions == (Spawn("w", MIB(vram_mib=5)), Drain("a1", REPLACED, "a"))


def test_a_successor_does_not_take_what_another_waits_for(planner: Planner) -> None:
    leaving = ready("x1", "x", 4, state=State.STOPPING)
    waits = (Demand("w", NOW, 1),)
    w = world(old("a1", "a", 2), leaving, demands=waits, w=recipe("w", 8), a=recipe("a", 2), x=recipe("x", 4))
    assert planner(w).decisions == ()


def test_where_a_load_just_ran_out_of_memory_no_successor_is_tried(planner: Planner) -> None:
    w = world(old("a1", "a", 2), a=recipe("a", 2, ran_out=MIB(vram_mib=2)))
    assert planner(w).decisions == ()


def test_of_several_instances_one_makes_room_and_the_others_serve(planner: Planner) -> None:
    """The idle one; nobody has to wait for its successor. Once that is ready, the others go too."""
    busy = old("a1", "a", 5, active=1, busy=1)
    w = world(busy, old("a2", "a", 5), a=recipe("a", 5, max_instances=2))
    assert planner(w).decisions == (Drain("a2", REPLACED),)
    w = step(planner, w)
    assert (w.demands, w.replacing) == ([], frozenset())
    w = gone(w, "a2")
    assert planner(w).decisions == (Spawn("a", MIB(vram_mib=5)),)
    w = step(planner, w)
    w = loaded(w, spawned(w))
    assert planner(w).decisions == (Drain("a1", REPLACED),)


def test_above_max_instances_by_one_and_no_more(planner: Planner) -> None:
    """The cookbook allows fewer than run."""
    w = world(old("a1", "a", 2), old("a2", "a", 2), vram=99, a=recipe("a", 2, max_instances=1))
    assert planner(w).decisions == (Drain("a1", REPLACED),)


def test_one_that_loads_is_let_be(planner: Planner) -> None:
    """It becomes ready, and has its turn then."""
    loading = old("a2", "a", 4, state=State.SPAWNING)
    serving = ready("a1", "a", 4)
    w = world(serving, loading, vram=99, a=recipe("a", 4, max_instances=2))
    assert planner(w).decisions == ()
    assert planner(loaded(w, "a2")).decisions == (Drain("a2", REPLACED),)
    w = world(old("a1", "a", 4), loading, vram=99, a=recipe("a", 4, max_instances=3))
    assert planner(w).decisions == ()


def test_steady_traffic_loses_no_request_while_all_engines_are_replaced(planner: Planner) -> None:
    """Three models on a GPU that holds just them; each is replaced in turn."""
    instances = [old(f"{k}1", k, 5) for k in "abc"]
    w = world(*instances, vram=15, a=recipe("a", 5), b=recipe("b", 5), c=recipe("c", 5))
    simulation = Simulation(w, planner)
    simulation.run(120, arrivals=lambda now: [(k, 1) for k in "abc"] if now % 3 == 0 else [])
    assert not any(i.superseded for i in simulation.world.instances)
    assert simulation.swaps == 3  # nobody was stopped for another
    one_load_s = simulation.service_s + 1 + simulation.stop_s + simulation.load_s
    assert max(simulation.waits.values()) <= one_load_s + 1.5


def test_whoever_waits_for_the_first_request_of_a_successor_is_told_apart() -> None:
    loading, serving = ready("a1", "a", 4, state=State.SPAWNING), ready("b1", "b", 4)
    assert still_to_come({"a", "b", "c", "d"}, [loading, serving], {"b", "c"}) == {"a", "c"}


def test_every_replaced_engine_is_gone_at_last() -> None:
    for seeded in seeded_worlds(800, seed=13):
        what_can_be_replaced_is(plan, seeded)


def made_room(*others: InstanceView, foreign: int = 0, **more: object) -> Snapshot:
    """ "a" left for its successor, which nobody else waits for; others use *foreign* of what it left."""
    lonely = (Demand("a", NOW, free=1, attended=False),)
    w = world(*others, demands=lonely, a=recipe("a", 6), o=recipe("o", 4))
    return replace(w, replacing=frozenset("a"), foreign=MIB(vram_mib=foreign), **more)  # type: ignore[arg-type]


def test_a_successor_that_nobody_waits_for_is_given_up_when_its_room_is_gone(planner: Planner) -> None:
    """Rather than that others go, or are held, for it."""
    for other in (ready("o1", "o", 4), ready("o1", "o", 4, active=1, busy=1)):
        result = planner(made_room(other, foreign=3))
        assert (result.decisions, result.held) == ((Forgo("a"),), frozenset())
    w = made_room(ready("o1", "o", 4), foreign=3)
    asked = replace(w, demands=(Demand("a", NOW, slotted=1, free=1),))
    assert planner(asked).decisions == (Drain("o1", Reason.ROOM, "a"),)
    unvetted = replace(w, recipes={**w.recipes, "a": recipe("a", 6, vetted=False)})
    assert planner(unvetted).decisions == (Forgo("a"),)


def test_a_successor_that_nobody_waits_for_keeps_its_room(planner: Planner) -> None:
    leaving = old("a1", "a", 6, state=State.DRAINING, active=1, busy=1)
    w = made_room(leaving, ready("o1", "o", 4))
    assert planner(w).decisions == ()
    other = replace(w, demands=(*w.demands, Demand("n", NOW + 1, 1)), recipes={**w.recipes, "n": recipe("n", 5)})
    assert planner(other).decisions == ()
    assert planner(gone(ended(w, "a1"), "a1")).decisions == (Spawn("a", MIB(vram_mib=6)),)
    other_leaves = replace(w, instances=[ready("o1", "o", 6, state=State.STOPPING)])
    assert planner(other_leaves).decisions == ()


def test_what_the_old_one_takes_says_more_than_a_guess(planner: Planner) -> None:
    """No second copy beside one that is seen to use eight of ten, nor before it is gone."""
    for odd in (recipe("a", 1, guessed=True), recipe("a", 2)):
        w = world(old("a1", "a", 8, active=1, busy=1), a=odd)
        assert planner(w).decisions == (Drain("a1", REPLACED, "a"),)
        w = step(planner, w)
        assert planner(w).decisions == ()
        w = gone(ended(w, "a1"), "a1")
        assert [type(d) for d in planner(w).decisions] == [Spawn]
    w = world(old("a1", "a", 4), a=recipe("a", 2))
    assert planner(w).decisions == (Spawn("a", MIB(vram_mib=4)),)


def test_a_second_copy_of_unknown_size_is_not_tried_even_where_all_is_free(planner: Planner) -> None:
    w = world(old("a1", "a", 1), vram=99, a=recipe("a", 1, guessed=True))
    assert planner(w).decisions == (Drain("a1", REPLACED, "a"),)


def test_without_a_limit_the_machines_own_memory_is_one(planner: Planner) -> None:
    """No second copy of 60 GB on a machine of 64."""
    big = replace(recipe("a", 0), need=Need(MIB(ram_mib=60)))
    serving = replace(old("a1", "a", 0), footprint=MIB(ram_mib=60))
    w = replace(world(serving, a=big), capacity=MIB(), spare_ram_mib=59.0)
    assert planner(w).decisions == (Drain("a1", REPLACED, "a"),)
    assert planner(step(planner, w)).decisions == ()  # it is not gone yet
    roomy = replace(w, spare_ram_mib=60.0)
    assert planner(roomy).decisions == (Spawn("a", MIB(ram_mib=60)),)
    loads = ready("b1", "b", 0, state=State.SPAWNING, footprint=MIB(ram_mib=1))
    also = replace(roomy, instances=[serving, loads], recipes={"a": big, "b": recipe("b", 0)})
    assert planner(also).decisions == (Drain("a1", REPLACED, "a"),)


def test_one_goes_for_each_successor_that_serves(planner: Planner) -> None:
    """The others go on; idle ones first, and nobody more while one is on its way out."""
    busy = [old(f"a{n}", "a", 2, active=1, busy=1) for n in (1, 2, 3)]
    w = world(*busy, ready("b1", "a", 2), old("a4", "a", 2), vram=99, a=recipe("a", 2, max_instances=4))
    assert planner(w).decisions == (Drain("a4", REPLACED),)
    w = step(planner, w)
    assert planner(w).decisions == ()
    two = replace(w, instances=[*w.instances, ready("b2", "a", 2)])
    assert planner(two).decisions == (Drain("a1", REPLACED),)


def test_as_many_make_room_as_it_takes(planner: Planner) -> None:
    """A new engine may need more; the first request is waited for if none is left, else nobody notices."""
    two = [old("a1", "a", 5, active=1, busy=1), old("a2", "a", 5)]
    w = world(*two, a=recipe("a", 6, max_instances=2))
    assert planner(w).decisions == (Drain("a2", REPLACED), Drain("a1", REPLACED, "a"))
    assert step(planner, w).replacing == {"a"}
    three = [*two, old("a3", "a", 5, active=1, busy=1)]
    w = world(*three, vram=15, a=recipe("a", 6, max_instances=3))
    assert planner(w).decisions == (Drain("a2", REPLACED), Drain("a1", REPLACED))


def test_who_never_has_room_is_told(planner: Planner) -> None:
    w = world(old("a1", "a", 6), ready("o1", "o", 4), a=recipe("a", 7), o=recipe("o", 4))
    result = planner(w)
    assert result.decisions == ()
    assert result.cramped == {"a"}
    assert planner(replace(w, capacity=MIB(vram_mib=11))).cramped == frozenset()


def test_one_that_failed_again_and_again_is_left_alone(planner: Planner) -> None:
    w = world(old("a1", "a", 4), a=recipe("a", 4, doubtful=True))
    assert planner(w).decisions == ()
    asked = replace(w, instances=[], demands=(Demand("a", NOW, 1),))
    assert planner(asked).decisions == (Spawn("a", MIB(vram_mib=4)),)


def test_a_guest_keeps_nobody_from_work(planner: Planner) -> None:
    waits = (Demand("g", NOW, 1),)
    busy = ready("o1", "o", 8, active=1, busy=1)
    w = world(busy, demands=waits, g=recipe("g", 8, yielding=True), o=recipe("o", 8))
    assert planner(w).held == frozenset()
    assert planner(replace(w, recipes={**w.recipes, "g": recipe("g", 8)})).held == {"o1"}
    idle = replace(w, instances=[ready("o1", "o", 8)])
    assert planner(idle).decisions == (Drain("o1", Reason.ROOM, "g"),)
