"""What must hold of every plan. Each rule takes a planner, so that it can be tried on broken ones too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mesh.core.lifecycle import State
from mesh.core.placement import gpu_kinds, place
from mesh.core.resources import RAM, VRAM, Resources, total
from mesh.core.world import (
    LIVE,
    Admit,
    Drain,
    Reason,
    Recipe,
    Refusal,
    Refuse,
    Snapshot,
    Spawn,
    Vet,
)
from tests.core.replacing_rules import RULES as REPLACING_RULES
from tests.core.replacing_rules import is_replacement, what_is_charged_is_what_was_needed
from tests.core.simulation import apply, settled
from tests.core.worlds import Planner, available, ending, living, owned, staying

Rule = Callable[[Planner, Snapshot], None]


def never_over_budget(planner: Planner, world: Snapshot) -> None:
    """Draining and stopping instances count until they are gone; only others' use may push it over (traps 42, 44)."""
    before, after = owned(world), owned(apply(world, planner(world)))
    for kind, limit in available(world).items():
        assert after.mib.get(kind, 0) <= max(limit, before.mib.get(kind, 0)), kind


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
    """Trap 37: never beyond an instance's slots, never to one that is held, drained, loading or outdated.

    One that makes way for its successor may get the last of its requests in the same plan.
    """
    result = planner(world)
    replaced = {d.instance for d in result.decisions if isinstance(d, Drain) and is_replacement(world, d)}
    drained = {d.instance for d in result.decisions if isinstance(d, Drain)} - replaced
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
    """Or after one more for each time that requests were admitted while others waited."""
    assert planner(settled(world, planner)).decisions == ()
    result = planner(world)
    if not any(isinstance(d, Admit) for d in result.decisions):
        assert planner(apply(world, result)).decisions == ()


def order_does_not_matter(planner: Planner, world: Snapshot) -> None:
    recipes = dict(reversed(list(world.recipes.items())))
    turned = replace(world, instances=world.instances[::-1], demands=world.demands[::-1], recipes=recipes)
    one, other = planner(world), planner(turned)
    assert one.held == other.held
    assert len(one.decisions) == len(other.decisions)
    assert all(decision in other.decisions for decision in one.decisions)


def too_large(recipe: Recipe, world: Snapshot) -> bool:
    return recipe.need is not None and place(recipe.need, world.capacity) is None


def refuses_only_the_impossible(planner: Planner, world: Snapshot) -> None:
    """What others take now may be given back: it makes nothing impossible."""
    for d in planner(world).decisions:
        if isinstance(d, Refuse):
            recipe = world.recipes.get(d.key)
            impossible = {
                Refusal.TOO_LARGE: recipe is not None and too_large(recipe, world),
                Refusal.NOT_HERE: recipe is not None and recipe.max_instances == 0,
                Refusal.FAILING: recipe is not None and recipe.failing,
                Refusal.UNKNOWN: recipe is None,
            }
            assert impossible[d.refusal]
            assert not living(world, d.key)


def the_impossible_is_refused(planner: Planner, world: Snapshot) -> None:
    """Trap 49: what is larger than the whole budget does not wait for its deadline."""
    refused = {d.key for d in planner(world).decisions if isinstance(d, Refuse)}
    for d in world.demands:
        recipe = world.recipes.get(d.key)
        if not living(world, d.key) and (recipe is None or recipe.failing or too_large(recipe, world)):
            assert d.key in refused


def one_spawn_at_a_time(planner: Planner, world: Snapshot) -> None:
    """Trap 18: single flight per profile, within ``max_instances``, never one that is failing."""
    decisions = planner(world).decisions
    spawned = [d.key for d in decisions if isinstance(d, Spawn)]
    drained = {d.instance for d in decisions if isinstance(d, Drain)}
    assert len(spawned) == len(set(spawned))
    for key in spawned:
        live = [i for i in living(world, key) if i.id not in drained]
        assert not any(i.state is State.SPAWNING for i in live)
        successor = any(i.superseded for i in live)  # of which it takes the place
        assert len(live) < world.recipes[key].max_instances + successor
        assert not world.recipes[key].failing


def nobody_leaves_for_what_has_no_room(planner: Planner, world: Snapshot) -> None:
    """Not even if all others left: too much is pinned, or used by other programs."""
    for d in planner(world).decisions:
        if isinstance(d, Drain) and d.reason is Reason.ROOM:
            need = world.recipes[d.competitor or ""].need
            assert need is not None
            assert place(need, Resources(available(world)), staying(world)) is not None


def nobody_comes_straight_back(planner: Planner, world: Snapshot) -> None:
    """Who has to go for another is not started again by the same plan where that one needs the room."""
    decisions = planner(world).decisions
    by_id = {i.id: i for i in world.instances}
    spawned = {d.key: d.footprint for d in decisions if isinstance(d, Spawn)}
    for d in decisions:
        if isinstance(d, Drain) and d.reason is Reason.ROOM and (again := spawned.get(by_id[d.instance].key)):
            need = world.recipes[d.competitor or ""].need
            assert need is not None
            assert place(need, Resources(available(world)), staying(world) + again) is not None


def no_spare_victim(planner: Planner, world: Snapshot) -> None:
    """Keeping any one of the victims for a competitor leaves that competitor without room."""
    decisions = planner(world).decisions
    by_id = {i.id: i for i in world.instances}
    drains = [d for d in decisions if isinstance(d, Drain)]
    rooms = [d for d in drains if d.reason is Reason.ROOM]
    competitors = {d.competitor for d in rooms}
    if len(competitors) != 1 or any(isinstance(d, Spawn) for d in decisions):
        return  # with several, one victim may serve two
    recipe = world.recipes[competitors.pop() or ""]
    if recipe.ran_out is not None or [r.key for r in _starved(planner, world)][:1] != [recipe.key]:
        return  # it gets all that idles there; or others reserved memory before it
    gone = {d.instance for d in drains if not by_id[d.instance].active}  # a busy one may take its time
    staying = total(i.footprint for i in world.instances if i.id not in gone and not ending(i))
    assert recipe.need is not None
    for spare in rooms:
        kept = staying + by_id[spare.instance].footprint
        assert place(recipe.need, Resources(available(world)), kept) is None


def nobody_leaves_while_it_fits(planner: Planner, world: Snapshot) -> None:
    """The oldest of those without an instance starts at once if there is room beside all that runs."""
    recipe = next(iter(_starved(planner, world)), None)
    if recipe is None or recipe.ran_out is not None or recipe.need is None:
        return
    if recipe.key in world.replacing and any(i.key == recipe.key and i.superseded for i in world.instances):
        return  # its predecessor leaves first
    if place(recipe.need, Resources(available(world)), owned(world)) is not None:
        decisions = planner(world).decisions
        assert recipe.key in {d.key for d in decisions if isinstance(d, Spawn)}
        assert recipe.key not in {d.competitor for d in decisions if isinstance(d, Drain)}


def only_the_vetted_displace(planner: Planner, world: Snapshot) -> None:
    """Nobody goes, or is held, for a launch that was never looked over, that fails, or whose size is unknown."""
    result = planner(world)
    by_id = {i.id: i for i in world.instances}
    drained = {d.instance for d in result.decisions if isinstance(d, Drain)}
    for d in result.decisions:
        if isinstance(d, Drain) and d.reason is Reason.ROOM:
            recipe = world.recipes[d.competitor or ""]
            assert recipe.vetted
            assert not recipe.failing
            assert recipe.need is not None
            assert not living(world, recipe.key) or any(by_id[x].key == recipe.key for x in drained)
    sound = [r for r in map(world.recipes.get, {d.key for d in world.demands}) if r and r.vetted and r.need is not None]
    assert sound or not result.held


def looks_over_only_what_needs_it(planner: Planner, world: Snapshot) -> None:
    """A look costs a process: only for a launch that waits, was never looked over and has no room; and only once."""
    result = planner(world)
    for d in result.decisions:
        if isinstance(d, Vet):
            recipe = world.recipes[d.key]
            assert not recipe.vetted
            assert not recipe.vetting
            assert recipe.need is not None
            old = any(i.superseded for i in living(world, d.key))  # it would have to go for its successor
            assert old or recipe in _starved(planner, world)
            assert d.key not in {x.key for x in result.decisions if isinstance(x, Spawn)}


def after_running_out_of_memory_it_gets_all_that_idles_there(planner: Planner, world: Snapshot) -> None:
    """Trap 46: the ledger was wrong, so nothing may idle, or be on its way out, where the load is tried again."""
    result = planner(world)
    drained = {d.instance for d in result.decisions if isinstance(d, Drain)}
    wanted = {d.key for d in world.demands}
    for d in result.decisions:
        if not isinstance(d, Spawn):
            continue
        recipe = world.recipes[d.key]
        lonely = any(x.key == d.key and not x.attended for x in world.demands)  # nobody goes for it
        if recipe.ran_out is None or recipe not in _starved(planner, world) or lonely:
            continue
        assert recipe.need is not None
        if not recipe.need.gpu_mib and gpu_kinds(recipe.ran_out):
            continue  # the profile changed: it needs no GPU any more
        if recipe.need.gpus is not None and not set(gpu_kinds(recipe.ran_out)) <= set(recipe.need.gpus):
            continue  # the profile changed: it may not go there any more
        where = gpu_kinds(recipe.ran_out) or [RAM, VRAM]
        bound = replace(recipe.need, gpus=tuple(where), all_gpus=True) if RAM not in where else recipe.need
        if place(bound, Resources(available(world)), staying(world)) is None:
            continue  # somebody took those GPUs for good: it goes elsewhere
        if set(gpu_kinds(d.footprint)) != set(gpu_kinds(recipe.ran_out)):
            continue  # there is no room there yet, and elsewhere there is
        for i in world.instances:
            if i.key != recipe.key and any(i.footprint.mib.get(kind, 0) for kind in where):
                assert i.id not in drained or i.active
                assert i.state is not State.STOPPING
                if i.state is State.DRAINING or i.id in drained:
                    assert i.active, "it ends now, and would have been waited for"
                    continue
                assert i.active or i.pinned or i.state is State.SPAWNING or i.key in wanted


def an_old_figure_only_delays_the_start(planner: Planner, world: Snapshot) -> None:
    """Who waits keeps its turn, its hold and its room while its size is looked up again; nothing else changes.

    But for replacements: nobody waits for those.
    """
    old = replace(world, recipes={key: replace(r, fresh=False) for key, r in world.recipes.items()})
    before, result = planner(world), planner(old)
    assert result.decisions == tuple(
        d for d in before.decisions if not (isinstance(d, Spawn) or is_replacement(world, d))
    )
    assert result.held == before.held


def only_stale_or_idle_retire(planner: Planner, world: Snapshot) -> None:
    by_id = {i.id: i for i in world.instances}
    admitted = {d.instance for d in planner(world).decisions if isinstance(d, Admit)}
    wanted = {d.key for d in apply(world, planner(world)).demands}
    for d in planner(world).decisions:
        if isinstance(d, Drain) and d.reason is Reason.PROFILE_CHANGED:
            assert by_id[d.instance].stale
        if isinstance(d, Drain) and d.reason is Reason.IDLE:
            i = by_id[d.instance]
            limit_s = world.recipes[i.key].idle_timeout_s
            assert limit_s
            assert not i.active
            assert i.id not in admitted
            assert i.key not in wanted
            assert world.now - i.idle_since >= limit_s


def the_stale_retire(planner: Planner, world: Snapshot) -> None:
    """Trap 83."""
    drained = {d.instance for d in planner(world).decisions if isinstance(d, Drain)}
    assert all(i.id in drained for i in world.instances if i.stale and i.state in LIVE)


def _starved(planner: Planner, world: Snapshot) -> list[Recipe]:
    """Return the profiles that wait without an instance and were not refused, the oldest (since their turn) first."""
    refused = {d.key for d in planner(world).decisions if isinstance(d, Refuse)}
    waiting = [d for d in world.demands if d.key not in refused and not living(world, d.key)]
    had = {d.key: world.recipes[d.key].turn_ended for d in waiting}
    waiting.sort(key=lambda d: (max(d.since, had[d.key]), had[d.key] >= d.since, d.key))
    return [world.recipes[d.key] for d in waiting]


RULES: tuple[Rule, ...] = (
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
    nobody_leaves_for_what_has_no_room,
    nobody_comes_straight_back,
    no_spare_victim,
    nobody_leaves_while_it_fits,
    only_the_vetted_displace,
    an_old_figure_only_delays_the_start,
    looks_over_only_what_needs_it,
    what_is_charged_is_what_was_needed,
    after_running_out_of_memory_it_gets_all_that_idles_there,
    only_stale_or_idle_retire,
    the_stale_retire,
    *REPLACING_RULES,
)
