"""The scheduler's rules on random worlds, its stated bounds in a moving one, and cases that one can follow.

The tests that take a planner are also run with planted bugs (``mutants.py``).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from mesh.core.lifecycle import State
from mesh.core.placement import Need
from mesh.core.resources import Resources
from mesh.core.scheduler import plan
from mesh.core.world import (
    Admit,
    Demand,
    Drain,
    InstanceView,
    Reason,
    Recipe,
    Refusal,
    Refuse,
    Snapshot,
    Spawn,
    Vet,
)
from tests.core.liveness import everything_feasible_is_served
from tests.core.rules import RULES, Rule
from tests.core.simulation import Simulation, apply
from tests.core.worlds import NOW, Planner, remembering, seeded_worlds, worlds

MIB = Resources.of


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.__name__)
def test_rule_holds_on_random_worlds(rule: Rule) -> None:
    @given(worlds())
    @settings(deadline=None, max_examples=60)
    def holds(world: Snapshot) -> None:
        rule(plan, world)

    holds()


def test_rules_hold_on_seeded_worlds() -> None:
    for seeded in seeded_worlds(2000):
        planner = remembering(plan)
        for rule in RULES:
            rule(planner, seeded)


def test_everything_feasible_is_served_in_seeded_worlds() -> None:
    for seeded in seeded_worlds(800, seed=11):
        everything_feasible_is_served(plan, seeded)


def world(*instances: InstanceView, vram: int = 10, demands: tuple[Demand, ...] = (), **recipes: Recipe) -> Snapshot:
    return Snapshot(NOW, MIB(vram_mib=vram), recipes, instances, demands)


def recipe(key: str, vram: int, **more: object) -> Recipe:
    return replace(Recipe(key, Need(split_mib=vram)), **more)  # type: ignore[arg-type]


def ready(id_: str, key: str, vram: int, **more: object) -> InstanceView:
    base = InstanceView(id_, key, State.READY, MIB(vram_mib=vram), ready_since=NOW - 100, idle_since=NOW - 10)
    return replace(base, **more)  # type: ignore[arg-type]


def test_two_first_requests_start_one_process(planner: Planner) -> None:
    """Trap 18."""
    w = world(demands=(Demand("a", NOW, slotted=2),), a=recipe("a", 4, max_instances=5))
    assert planner(w).decisions == (Spawn("a", MIB(vram_mib=4)),)
    assert planner(apply(w, planner(w))).decisions == ()


def test_one_load_of_a_model_at_a_time(planner: Planner) -> None:
    """Trap 18. The second instance loads: it is waited for, whatever room there is."""
    full, loading = ready("a1", "a", 4, active=1, busy=1), ready("a2", "a", 4, state=State.SPAWNING)
    w = world(full, loading, vram=99, demands=(Demand("a", NOW, slotted=2),), a=recipe("a", 4, max_instances=5))
    assert planner(w).decisions == ()


def test_the_least_recently_used_idle_instance_goes_first(planner: Planner) -> None:
    w = world(
        ready("old", "a", 5, idle_since=NOW - 50), ready("new", "b", 5, idle_since=NOW - 5),
        demands=(Demand("c", NOW, slotted=1),), a=recipe("a", 5), b=recipe("b", 5), c=recipe("c", 5),
    )  # fmt: skip
    assert planner(w).decisions == (Drain("old", Reason.ROOM, "c"),)


def test_the_right_victims_go(planner: Planner) -> None:
    instances = [ready(f"{n}", k, 5, idle_since=NOW - n) for n, k in enumerate("ab", start=1)]
    for order in (instances, instances[::-1]):
        w = world(*order, demands=(Demand("c", NOW, 1),), a=recipe("a", 5), b=recipe("b", 5), c=recipe("c", 5))
        assert [d.instance for d in planner(w).decisions if isinstance(d, Drain)] == ["2"]
    small, large = ready("small", "a", 2, idle_since=NOW - 9), ready("large", "b", 6, idle_since=NOW - 1)
    w = world(small, large, demands=(Demand("c", NOW, 1),), a=recipe("a", 2), b=recipe("b", 6), c=recipe("c", 7))
    assert [d.instance for d in planner(w).decisions if isinstance(d, Drain)] == ["large"]  # "small" would be spare


def test_memory_on_its_way_is_waited_for(planner: Planner) -> None:
    """Never a victim too many: the stopping instance's memory will do."""
    w = world(
        ready("s", "a", 5, state=State.STOPPING), ready("idle", "b", 5),
        demands=(Demand("c", NOW, slotted=1),), a=recipe("a", 5), b=recipe("b", 5), c=recipe("c", 5),
    )  # fmt: skip
    assert planner(w).decisions == ()


def test_a_big_waiter_keeps_the_memory_it_waits_for_and_small_ones_go_ahead_in_the_rest(
    planner: Planner,
) -> None:
    big, small, tiny = recipe("big", 8), recipe("small", 3), recipe("tiny", 2)
    w = world(
        ready("x", "x", 6, active=1, busy=1, ready_since=NOW - 1),
        demands=(Demand("big", NOW - 5, 1), Demand("small", NOW - 4, 1), Demand("tiny", NOW - 3, 1)),
        x=recipe("x", 6), big=big, small=small, tiny=tiny,
    )  # fmt: skip
    assert planner(w).decisions == (Spawn("tiny", MIB(vram_mib=2)),)


def reserved(*instances: InstanceView, waits: int, vram: int, **others: Recipe) -> Snapshot:
    """ "w" of *waits* MiB waits longest for what "s" (5 MiB) gives back; others are asked for later."""
    stopping = ready("s1", "s", 5, state=State.STOPPING)
    demands = (Demand("w", NOW - 9, 1), *(Demand(k, NOW, 1) for k in others if k != "x"))
    return world(stopping, *instances, vram=vram, demands=demands, w=recipe("w", waits), **others, s=recipe("s", 5))


def test_what_will_soon_be_anothers_is_not_taken(planner: Planner) -> None:
    """Neither for a first instance, though the draining one will be gone some day, nor for a second one."""
    drains = ready("x1", "x", 3, state=State.DRAINING, active=1, busy=1)
    w = reserved(drains, waits=7, vram=11, x=recipe("x", 3), n=recipe("n", 2))
    assert planner(w).decisions == ()
    full = ready("n1", "n", 3, active=1, busy=1)
    w = reserved(full, waits=8, vram=11, n=recipe("n", 3, max_instances=2))
    assert planner(w).decisions == ()


def test_a_busy_draining_one_may_take_long_so_an_idle_one_goes(planner: Planner) -> None:
    w = world(
        ready("x1", "x", 5, state=State.DRAINING, active=1, busy=1), ready("y1", "y", 5),
        demands=(Demand("w", NOW, 1),), w=recipe("w", 5), x=recipe("x", 5), y=recipe("y", 5),
    )  # fmt: skip
    assert planner(w).decisions == (Drain("y1", Reason.ROOM, "w"),)


def test_what_a_victim_gives_back_is_kept_for_whom_it_went(planner: Planner) -> None:
    demands = (Demand("w", NOW - 9, 1), Demand("n", NOW, 1))
    w = world(ready("y1", "y", 7), demands=demands, w=recipe("w", 9), n=recipe("n", 2), y=recipe("y", 7))
    assert planner(w).decisions == (Drain("y1", Reason.ROOM, "w"),)
    ran_out = recipe("w", 7, ran_out=MIB(vram_mib=7))
    demands = (Demand("w", NOW - 9, 1), Demand("y", NOW, 1))
    w = world(ready("y1", "y", 3), vram=8, demands=demands, w=ran_out, y=recipe("y", 3))
    assert planner(w).decisions == (Drain("y1", Reason.ROOM, "w"),)  # and "y" is not started again before "w"


def test_two_that_wait_count_on_two_others(planner: Planner) -> None:
    w = world(
        ready("a1", "a", 5, active=1, busy=1), ready("b1", "b", 5, active=1, busy=1),
        demands=(Demand("c", NOW - 1, 1), Demand("d", NOW, 1)),
        a=recipe("a", 5), b=recipe("b", 5), c=recipe("c", 5), d=recipe("d", 5),
    )  # fmt: skip
    assert planner(w).held == {"a1", "b1"}


def test_an_instance_that_idled_too_long_goes_with_its_queue(planner: Planner) -> None:
    """Both were held for a competitor that left; one serves who waited, nobody waits for the other."""
    w = world(
        ready("a1", "a", 4, idle_since=NOW - 5), ready("a2", "a", 4, idle_since=NOW - 500, ready_since=NOW - 500),
        demands=(Demand("a", NOW - 9, 1),), a=recipe("a", 4, max_instances=2),
    )  # fmt: skip
    assert planner(w).decisions == (Admit("a1", "a", 1, 0), Drain("a2", Reason.IDLE))


def test_a_hold_ends_when_the_competitor_leaves(planner: Planner) -> None:
    """Trap 41."""
    busy = ready("a1", "a", 8, active=1, busy=1)
    waits = (Demand("b", NOW - 3, slotted=1),)
    w = world(busy, demands=waits, a=recipe("a", 8), b=recipe("b", 8))
    assert planner(w).held == {"a1"}
    assert planner(replace(w, demands=())).held == frozenset()


def test_a_removed_model_is_unknown_to_those_who_wait() -> None:
    assert plan(world(demands=(Demand("a", NOW, 1),))).decisions == (Refuse("a", Refusal.UNKNOWN),)


def test_warm_requests_flow_while_another_model_loads(planner: Planner) -> None:
    """Trap 40."""
    w = world(
        ready("a1", "a", 4), InstanceView("b1", "b", State.SPAWNING, MIB(vram_mib=4)),
        demands=(Demand("b", NOW - 9, 1), Demand("a", NOW, 1)), a=recipe("a", 4), b=recipe("b", 4),
    )  # fmt: skip
    assert planner(w).decisions == (Admit("a1", "a", 1, 0),)


def test_lowering_a_models_size_reevaluates_those_who_wait(planner: Planner) -> None:
    """Trap 39."""
    w = world(demands=(Demand("a", NOW, 1),), a=recipe("a", 11))
    assert planner(w).decisions == (Refuse("a", Refusal.TOO_LARGE),)
    assert planner(replace(w, recipes={"a": recipe("a", 9)})).decisions == (Spawn("a", MIB(vram_mib=9)),)


def turns(number: int, tenure_s: float, planner: Planner) -> Simulation:
    """*number* models that fill the GPU each, asked for all the time: more than can be served."""
    recipes = {k: recipe(k, 8, min_tenure_s=tenure_s) for k in "abcd"[:number]}
    simulation = Simulation(Snapshot(0.0, MIB(vram_mib=10), recipes, [], []), planner)
    simulation.run(300, arrivals=lambda now: [(k, 1) for k in recipes])
    return simulation


@pytest.mark.parametrize("tenure_s", [0.0, 15.0])
@pytest.mark.parametrize("number", [2, 3, 4])
def test_constant_demand_for_models_that_cannot_coexist_is_collated_and_bounded(number: int, tenure_s: float) -> None:
    """Traps 34, 35: A,B,A,B... becomes AA...BB...; nobody waits beyond the others' turns and the own load."""
    sim = turns(number, tenure_s, plan)
    turn_s = sim.load_s + tenure_s + sim.service_s + sim.stop_s + 2.0  # 2.0: uneven service, steps of half a second
    assert max(sim.waits.values()) <= (number - 1) * turn_s + sim.load_s + 2.0
    assert sim.swaps <= 300 / max(tenure_s, sim.service_s) + number


def test_several_models_share_their_time(planner: Planner) -> None:
    sim = turns(3, 15.0, planner)
    assert max(sim.waits.values()) <= 2 * (sim.load_s + 15.0 + sim.service_s + sim.stop_s + 2.0) + sim.load_s + 2.0


def test_a_long_queue_is_no_claim_to_come_straight_back(planner: Planner) -> None:
    """Trap 34. All of the queue for "a" is older than the one request for "b", which still comes next."""
    recipes = {k: recipe(k, 8) for k in "ab"}
    demands = [Demand("a", 0.0, slotted=20), Demand("b", 1.0, slotted=1)]
    sim = Simulation(Snapshot(1.0, MIB(vram_mib=10), recipes, [], demands), planner)
    sim.run(200)
    assert (sim.swaps, sim.world.demands) == (3, [])  # a, b, a
    assert sim.waits["b"] <= sim.load_s + 15.0 + sim.service_s + 1.0 + sim.stop_s + sim.load_s


def test_a_pulse_of_alternating_requests_swaps_once(planner: Planner) -> None:
    """Trap 34: A,B,A,B at once is served as A,A,B,B."""
    recipes = {k: recipe(k, 8) for k in "ab"}
    demands = [Demand("a", 0.0, slotted=4), Demand("b", 0.1, slotted=4)]
    sim = Simulation(Snapshot(1.0, MIB(vram_mib=10), recipes, [], demands), planner)
    sim.run(60)
    assert (sim.swaps, sim.world.demands) == (2, [])


def idle_pair(**of_c: object) -> Snapshot:
    """ "a" and "b" idle, of 5 MiB each of 10; "c" of 5 MiB is asked for."""
    idle = [ready("a1", "a", 5, idle_since=NOW - 50), ready("b1", "b", 5)]
    waits = (Demand("c", NOW, slotted=1),)
    return world(*idle, demands=waits, a=recipe("a", 5), b=recipe("b", 5), c=recipe("c", 5, **of_c))


def test_nobody_goes_for_arguments_that_nobody_looked_at(planner: Planner) -> None:
    w = idle_pair(vetted=False)
    assert planner(w).decisions == (Vet("c"),)
    looking = apply(w, planner(w))
    assert planner(looking).decisions == ()
    well = replace(looking, recipes={**w.recipes, "c": recipe("c", 5)})
    assert planner(well).decisions == (Drain("a1", Reason.ROOM, "c"),)
    badly = replace(looking, recipes={**w.recipes, "c": recipe("c", 5, vetted=False, failing=True)})
    assert planner(badly).decisions == (Refuse("c", Refusal.FAILING),)


def test_what_fits_needs_no_look_at_its_arguments(planner: Planner) -> None:
    w = world(demands=(Demand("a", NOW, 1),), a=recipe("a", 5, vetted=False))
    assert planner(w).decisions == (Spawn("a", MIB(vram_mib=5)),)


def test_who_waits_for_a_look_waits_for_nobody_else(planner: Planner) -> None:
    """It reserves nothing and holds nobody; nor does one whose size is being looked up."""
    busy = ready("a1", "a", 8, active=1, busy=1)
    for unsure in (recipe("b", 8, vetted=False, vetting=True), replace(recipe("b", 8), need=None)):
        w = world(
            busy, demands=(Demand("b", NOW - 9, 1), Demand("c", NOW, 1)), a=recipe("a", 8), b=unsure, c=recipe("c", 2)
        )
        assert planner(w).decisions == (Spawn("c", MIB(vram_mib=2)),)
        assert planner(w).held == frozenset()


def test_who_had_its_turn_comes_after_the_competitor_of_the_same_moment(planner: Planner) -> None:
    stopping = ready("a1", "a", 8, state=State.STOPPING)
    demands = (Demand("a", NOW - 50, 1), Demand("b", NOW - 1, 1))
    w = world(stopping, demands=demands, a=recipe("a", 8, turn_ended=NOW - 1), b=recipe("b", 8))
    assert planner(replace(w, instances=())).decisions == (Spawn("b", MIB(vram_mib=8)),)


def test_a_failing_model_gets_no_second_instance(planner: Planner) -> None:
    full = ready("a1", "a", 4, active=1, busy=1)
    w = world(full, demands=(Demand("a", NOW, 1),), a=recipe("a", 4, max_instances=2, failing=True))
    assert planner(w).decisions == ()


def test_what_others_use_is_waited_for_but_makes_nothing_impossible(planner: Planner) -> None:
    """Trap 42."""
    w = replace(world(demands=(Demand("a", NOW, 1),), a=recipe("a", 8)), foreign=MIB(vram_mib=4))
    assert planner(w).decisions == ()
    assert planner(replace(w, foreign=MIB(vram_mib=2))).decisions == (Spawn("a", MIB(vram_mib=8)),)


def test_an_unknown_size_waits(planner: Planner) -> None:
    w = world(demands=(Demand("a", NOW, 1),), a=replace(recipe("a", 8), need=None))
    assert planner(w).decisions == ()


def test_one_that_is_being_looked_over_keeps_the_room_it_will_get() -> None:
    """Else a later, smaller one takes what will be free, in the moment that the look takes."""
    w = world(
        ready("x", "x", 8), demands=(Demand("big", NOW - 5, 1), Demand("small", NOW - 1, 1)),
        x=recipe("x", 8), big=recipe("big", 9, vetted=False), small=recipe("small", 2),
    )  # fmt: skip
    assert plan(w).decisions == (Vet("big"),)
    assert Spawn("small", MIB(vram_mib=2)) in plan(replace(w, demands=w.demands[1:])).decisions
