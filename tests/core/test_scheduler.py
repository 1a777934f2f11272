"""The scheduler's rules on random worlds, its stated bounds in a moving one, and proof that the rules can fail."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
from hypothesis import given, settings

from mesh.core import scheduler
from mesh.core.lifecycle import State
from mesh.core.resources import Resources
from mesh.core.scheduler import (
    Admit,
    Demand,
    Drain,
    InstanceView,
    Plan,
    Reason,
    Recipe,
    Refusal,
    Refuse,
    Snapshot,
    Spawn,
    next_wakeup,
    plan,
)
from tests.core.rules import RULES, everything_feasible_is_served
from tests.core.worlds import NOW, Planner, Simulation, apply, seeded_worlds, worlds

MIB = Resources.of


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.__name__)
def test_rule_holds_on_random_worlds(rule: Callable[[Planner, Snapshot], None]) -> None:
    @given(worlds())
    @settings(deadline=None, max_examples=150)
    def holds(world: Snapshot) -> None:
        rule(plan, world)

    holds()


def test_everything_feasible_is_served_in_seeded_worlds() -> None:
    for world in seeded_worlds(150, seed=11):
        everything_feasible_is_served(plan, world)


@given(worlds())
@settings(deadline=None, max_examples=1000)
def test_next_wakeup_is_in_the_future_and_no_plan_changes_before_it(world: Snapshot) -> None:
    settled = apply(world, plan(world))
    when = next_wakeup(settled)
    assert when is None or when > settled.now
    just_before = settled.now + 1e6 if when is None else when - 1e-6
    assert plan(replace(settled, now=just_before)).decisions == ()


def world(*instances: InstanceView, vram: int = 10, demands: tuple[Demand, ...] = (), **recipes: Recipe) -> Snapshot:
    return Snapshot(NOW, MIB(vram_mib=vram), recipes, instances, demands)


def recipe(key: str, vram: int, **more: object) -> Recipe:
    return replace(Recipe(key, MIB(vram_mib=vram)), **more)  # type: ignore[arg-type]


def ready(id_: str, key: str, vram: int, **more: object) -> InstanceView:
    base = InstanceView(id_, key, State.READY, MIB(vram_mib=vram), ready_since=NOW - 100, idle_since=NOW - 10)
    return replace(base, **more)  # type: ignore[arg-type]


def test_two_first_requests_start_one_process() -> None:
    """Trap 18."""
    w = world(demands=(Demand("a", NOW, slotted=2),), a=recipe("a", 4, max_instances=5))
    assert plan(w).decisions == (Spawn("a"),)
    assert plan(apply(w, plan(w))).decisions == ()


def test_the_least_recently_used_idle_instance_goes_first() -> None:
    w = world(
        ready("old", "a", 5, idle_since=NOW - 50), ready("new", "b", 5, idle_since=NOW - 5),
        demands=(Demand("c", NOW, slotted=1),), a=recipe("a", 5), b=recipe("b", 5), c=recipe("c", 5),
    )  # fmt: skip
    assert plan(w).decisions == (Drain("old", Reason.ROOM, "c"),)


def test_the_right_victims_go_and_both_models_get_their_time() -> None:
    the_right_victims_go(plan)
    two_models_share_their_time(plan)


def test_memory_on_its_way_is_waited_for() -> None:
    """Never a victim too many: the stopping instance's memory will do."""
    w = world(
        ready("s", "a", 5, state=State.STOPPING), ready("idle", "b", 5),
        demands=(Demand("c", NOW, slotted=1),), a=recipe("a", 5), b=recipe("b", 5), c=recipe("c", 5),
    )  # fmt: skip
    assert plan(w).decisions == ()


def test_a_big_waiter_keeps_the_memory_it_waits_for_and_small_ones_go_ahead_in_the_rest() -> None:
    big, small, tiny = recipe("big", 8), recipe("small", 3), recipe("tiny", 2)
    w = world(
        ready("x", "x", 6, active=1, busy=1, ready_since=NOW - 1),
        demands=(Demand("big", NOW - 5, 1), Demand("small", NOW - 4, 1), Demand("tiny", NOW - 3, 1)),
        x=recipe("x", 6), big=big, small=small, tiny=tiny,
    )  # fmt: skip
    assert plan(w).decisions == (Spawn("tiny"),)


def test_a_hold_ends_when_the_competitor_leaves() -> None:
    """Trap 41."""
    busy = ready("a1", "a", 8, active=1, busy=1)
    waits = (Demand("b", NOW - 3, slotted=1),)
    w = world(busy, demands=waits, a=recipe("a", 8), b=recipe("b", 8))
    assert plan(w).held == {"a1"}
    assert plan(replace(w, demands=())).held == frozenset()


def test_a_removed_model_is_unknown_to_those_who_wait() -> None:
    assert plan(world(demands=(Demand("a", NOW, 1),))).decisions == (Refuse("a", Refusal.UNKNOWN),)


def test_warm_requests_flow_while_another_model_loads() -> None:
    """Trap 40."""
    w = world(
        ready("a1", "a", 4), InstanceView("b1", "b", State.SPAWNING, MIB(vram_mib=4)),
        demands=(Demand("b", NOW - 9, 1), Demand("a", NOW, 1)), a=recipe("a", 4), b=recipe("b", 4),
    )  # fmt: skip
    assert plan(w).decisions == (Admit("a1", "a", 1, 0),)


def test_lowering_a_models_size_reevaluates_those_who_wait() -> None:
    """Trap 39."""
    w = world(demands=(Demand("a", NOW, 1),), a=recipe("a", 11))
    assert plan(w).decisions == (Refuse("a", Refusal.TOO_LARGE),)
    assert plan(replace(w, recipes={"a": recipe("a", 9)})).decisions == (Spawn("a"),)


@pytest.mark.parametrize("tenure_s", [0.0, 15.0])
def test_constant_demand_for_two_models_that_cannot_coexist_is_collated_and_bounded(tenure_s: float) -> None:
    """Traps 34, 35: A,B,A,B... becomes AA...BB..., and nobody waits beyond load + tenure + drain + stop + own load."""
    recipes = {k: recipe(k, 8, min_tenure_s=tenure_s) for k in "ab"}
    sim = Simulation(Snapshot(0.0, MIB(vram_mib=10), recipes, [], []), plan)
    sim.run(300, arrivals=lambda now: [("a", 1), ("b", 1)])
    cycle_s = (
        sim.load_s + tenure_s + sim.service_s + sim.stop_s + sim.load_s + 4.0
    )  # 4.0: uneven service and steps of half a second
    assert max(sim.waits.values()) <= cycle_s
    assert sim.swaps <= 300 / max(tenure_s, sim.service_s) + 2


def test_a_pulse_of_alternating_requests_swaps_once() -> None:
    """Trap 34: A,B,A,B at once is served as A,A,B,B."""
    recipes = {k: recipe(k, 8) for k in "ab"}
    demands = [Demand("a", 0.0, slotted=4), Demand("b", 0.1, slotted=4)]
    sim = Simulation(Snapshot(1.0, MIB(vram_mib=10), recipes, [], demands), plan)
    sim.run(60)
    assert (sim.swaps, sim.world.demands) == (2, [])


@given(worlds())
@settings(deadline=None, max_examples=300)
def test_the_shortcut_for_joining_a_queue_is_what_the_plan_decides(w: Snapshot) -> None:
    """``Supervisor.submit``: one more of those who wait already changes nothing."""
    settled = apply(w, plan(w))
    for d in settled.demands:
        if d.slotted:
            others = [x for x in settled.demands if x is not d]
            joined = replace(settled, demands=[*others, replace(d, slotted=d.slotted + 1)])
            assert plan(joined) == plan(settled)


@given(worlds())
@settings(deadline=None, max_examples=500)
def test_the_shortcut_for_handing_a_place_over_is_what_the_plan_decides(w: Snapshot) -> None:
    """``Supervisor._hand_over``: the next of the profile takes the place of the one that ended, and nothing else."""
    settled = apply(w, plan(w))
    before = plan(settled)
    for d in settled.demands:
        for i in settled.instances:
            mine = i.key == d.key and i.state is State.READY and i.busy and i.active and i.id not in before.held
            room = not i.slots or i.busy <= i.slots
            if not (mine and room and d.slotted >= (1 if len(settled.demands) == 1 else 2)):
                continue
            ended = replace(i, busy=i.busy - 1, active=i.active - 1)
            world = replace(settled, instances=[ended if x is i else x for x in settled.instances])
            assert plan(world).decisions == (Admit(i.id, d.key, 1, 0),)
            handed = plan(apply(world, plan(world)))
            assert (handed.decisions, handed.held) == ((), before.held)


@given(worlds())
@settings(deadline=None, max_examples=300)
def test_the_shortcut_for_a_free_place_is_what_the_plan_decides(w: Snapshot) -> None:
    """``Supervisor._open_instance``: nobody waits for the profile, a READY instance that is not held has a place."""
    settled = apply(w, plan(w))
    held = plan(settled).held
    for key in {i.key for i in settled.instances} - {d.key for d in settled.demands}:
        usable = [
            i
            for i in settled.instances
            if i.key == key
            and i.state is State.READY
            and not i.stale
            and i.id not in held
            and (not i.slots or i.busy < i.slots)
        ]
        r = settled.recipes[key]
        if r.failing or not r.max_instances or not r.footprint.fits(settled.capacity, Resources()):
            continue  # wanted and not replaceable: the plan would lift a hold, the shortcut leaves that to the next one
        if usable:
            best = min(usable, key=lambda i: (i.busy, i.id))
            arrived = replace(settled, demands=[*settled.demands, Demand(key, settled.now, slotted=1)])
            assert Admit(best.id, key, 1, 0) in plan(arrived).decisions


SPAWN_TOO_SOON = "self.soon):\n            self.spawn(key)\n        el"
MUTANTS = [
    ("self.world.instances if i.state is not State.STOPPED", "self.world.instances if i.state in LIVE"),
    ("self.now, self.soon, self.future):\n            self.spawn(key)\n        el", SPAWN_TOO_SOON),
    ("        self.now = self.now + need\n", ""),
    ("if i.state is State.READY and not i.active]\n        mine", "if i.state is State.READY]\n        mine"),
    ("mine = [i for i in idle if i.key not in self.waiting or self.had_turn(i)]", "mine = idle"),
    ("replaceable and not i.fresh and", "replaceable and"),
    ("return replaceable and not", "return not"),
    ("i.state in LIVE and not i.pinned)", "i.state in LIVE)"),
    ("if i.state is State.READY and i.active and self.had_turn(i)]", "if i.state is State.READY and i.active]"),
    ("if self.fits(need, *with_it):", "if False:"),
    ("if n < limit[id_]]", "if n <= limit[id_]]"),
    ("if n + 1 < limit[id_]:", "if n < limit[id_]:"),
    ("and i.id not in self.held]\n        if not open_", "]\n        if not open_"),
    ("if i.state in LIVE and i.stale:", "if i.state is State.READY and i.stale:"),
    ("any(i.state is State.SPAWNING for i in mine)", "False"),
    ("len(mine) >= recipe.max_instances", "len(mine) > recipe.max_instances"),
    ("sorted(mine, key=lambda i: (i.idle_since, i.id))", "mine"),
    ("            self.reserve(need, soon=True)  # memory", "            pass  # memory"),
    ("            self.held.update(i.id for i in victims)", "            pass"),
    ("if not recipe.footprint.fits(self.world.capacity, Resources()):", "if False:"),
    ("if i.active or i.key in self.waiting or recipe.pinned", "if i.active or recipe.pinned"),
    ("demand.free if i is free_to else 0", "0"),
]  # fmt: skip


def mutant(old: str, new: str) -> ModuleType:
    source = inspect.getsource(scheduler)
    assert source.count(old) == 1, f"the planted bug no longer applies: {old}"
    spec = importlib.util.spec_from_loader("mutant_scheduler", loader=None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutant_scheduler"] = module  # dataclasses look their module up
    for name in ("Recipe", "InstanceView", "Demand", "Snapshot", "Admit", "Spawn", "Drain", "Refuse", "Plan"):
        assert hasattr(scheduler, name)
    exec(compile(source.replace(old, new), "mutant_scheduler", "exec"), module.__dict__)  # the point of this test
    return module


def translated(module: ModuleType) -> Planner:
    """Return the mutant's plan with its decisions as the real module's, which the rules know."""

    def planner(w: Snapshot) -> Plan:
        result = module.plan(w)
        real = []
        for d in result.decisions:
            fields = {name: getattr(d, name) for name in d.__dataclass_fields__}
            if isinstance(d, module.Drain):
                fields["reason"] = Reason(str(d.reason))
            if isinstance(d, module.Refuse):
                fields["refusal"] = Refusal(str(d.refusal))
            real.append(getattr(scheduler, type(d).__name__)(**fields))
        return Plan(tuple(real), result.held)

    return planner


@pytest.mark.parametrize(("old", "new"), MUTANTS, ids=range(len(MUTANTS)))
def test_a_planted_bug_is_caught(old: str, new: str) -> None:
    """Each of these edits breaks a rule, a bound or liveness in some seeded world."""
    broken = translated(mutant(old, new))

    def caught() -> bool:
        try:
            for w in seeded_worlds(1500):
                for rule in RULES:
                    rule(broken, w)
            for w in seeded_worlds(150, seed=11):
                everything_feasible_is_served(broken, w)
            two_models_share_their_time(broken)
            the_right_victims_go(broken)
        except (AssertionError, KeyError, RecursionError):
            return True
        return False

    assert caught()


def two_models_share_their_time(planner: Planner) -> None:
    recipes = {k: recipe(k, 8) for k in "ab"}
    sim = Simulation(Snapshot(0.0, MIB(vram_mib=10), recipes, [], []), planner, slots=3)
    sim.run(120, arrivals=lambda now: [("a", 1), ("b", 1)])
    assert max(sim.waits.values()) <= 15 + sim.service_s + sim.stop_s + 2 * sim.load_s + 4.0


def the_right_victims_go(planner: Planner) -> None:
    instances = [ready(f"{n}", k, 5, idle_since=NOW - n) for n, k in enumerate("ab", start=1)]
    for order in (instances, instances[::-1]):
        w = world(*order, demands=(Demand("c", NOW, 1),), a=recipe("a", 5), b=recipe("b", 5), c=recipe("c", 5))
        assert [d.instance for d in planner(w).decisions if isinstance(d, Drain)] == ["2"]
    small, large = ready("small", "a", 2, idle_since=NOW - 9), ready("large", "b", 6, idle_since=NOW - 1)
    w = world(small, large, demands=(Demand("c", NOW, 1),), a=recipe("a", 2), b=recipe("b", 6), c=recipe("c", 7))
    assert [d.instance for d in planner(w).decisions if isinstance(d, Drain)] == ["large"]  # "small" would be spare
