"""Who is served, what is started and what is stopped: one pure function from a snapshot to decisions.

``plan`` is run after every event and judges the whole picture each time (level-triggered), so nothing has to remember
what is still owed. Its rules, in the order in which they are applied:

1. **Refuse** the demand that can never be met here: unknown, too large for the whole budget, failing. One whose size is
   still being looked up waits.
2. **Retire.** An instance whose profile changed or vanished drains; so does one that idled for ``idle_timeout_s``.
3. **Place** each *starved* profile (requests wait, no live instance), oldest waiting request first, but who had to go
   for another comes after that one, however old its own queue is: start it if it fits; else wait for memory that is on
   its way; else drain idle instances, least recently used first; else *hold* busy ones that had their tenure: they get
   no new work, so they fall idle and are drained by a later plan. A hold is derived anew each time, never stored: when
   the competitor leaves, it is gone (trap 41). Before anybody has to go for a launch that never succeeded, its
   arguments are *vetted*: a typing mistake must not cost others their memory.
4. **Admit** waiting requests, first come first served per profile, to live instances that are not held.
5. **Scale out** a profile whose instances are all taken, if ``max_instances`` and *free* memory allow.
6. **Replace** instances whose engine was replaced, one model at a time: see ``replacing``.

A profile that waits for memory reserves it: a later one may start only in memory that the earlier one does not need.
Busy, loading, pinned and just-loaded instances are never drained for a competitor, and never one victim too many.

Memory is looked at three ways: ``now`` (everything not yet exited), ``soon`` (without what is already stopping) and
``future`` (without what will leave once its requests end). Reservations are counted where they will be taken from.
Memory is a vector, RAM and each GPU; *where* on the GPUs something fits is ``placement``'s business. ``capacity`` is
the whole budget, ``ceiling`` what other programs leave of it now: too large for the first is refused, for the second
it waits.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf

from mesh.core.draft import Draft
from mesh.core.lifecycle import State
from mesh.core.placement import place
from mesh.core.replacing import finish_replacements, replace_next
from mesh.core.world import LIVE, Demand, Outlook, Plan, Recipe, Snapshot


def plan(world: Snapshot) -> Plan:
    """Return the decisions that *world* calls for; none when it is at rest."""
    draft = Draft(world)
    demands = draft.refuse(sorted(world.demands, key=lambda d: turn(world, d)))
    finish_replacements(draft)
    draft.retire()
    placed: set[str] = set()
    while starved := [d for d in demands if d.key not in placed and not draft.live(d.key)]:
        for demand in starved:  # it may cost others that wait their instance: they are placed after it
            placed.add(demand.key)
            draft.place(demand)
    for demand in demands:
        if draft.admit(demand):
            draft.scale_out(demand.key)
    draft.retire()  # those whose profile had requests waiting until now, and that got none of them
    replace_next(draft, demands)
    return Plan(tuple(draft.decisions), frozenset(draft.held), frozenset(draft.cramped))


def turn(world: Snapshot, demand: Demand) -> tuple[float, bool, str]:
    """Return the place of *demand* in the order of turns: whoever had to go for another comes after that one."""
    recipe = world.recipes.get(demand.key)
    ended = -inf if recipe is None else recipe.turn_ended
    return max(demand.since, ended), ended >= demand.since, demand.key


def next_wakeup(world: Snapshot) -> float | None:
    """Return the next moment at which time alone may change the plan, or None. It is always after ``world.now``."""
    waiting = {d.key for d in world.demands}
    moments = []
    for i in world.instances:
        recipe = world.recipes.get(i.key)
        if i.state is not State.READY or recipe is None:
            continue
        if not i.active and recipe.idle_timeout_s and not recipe.pinned and i.key not in waiting:
            moments.append(i.idle_since + recipe.idle_timeout_s)
        if waiting:
            moments.append(i.ready_since + recipe.min_tenure_s)
    return min((m for m in moments if m > world.now), default=None)


def outlook(world: Snapshot, recipe: Recipe) -> Outlook:
    """Return where one more instance of *recipe* would go, as if nobody waited for anything. Its need must be known."""
    assert recipe.need is not None, "an unknown need has no outlook"
    draft = Draft(replace(world, demands=()))
    if place(recipe.need, world.capacity) is None:
        return Outlook(None)
    pinned = [i for i in world.instances if i.pinned and i.state in LIVE and i.key != recipe.key]
    others = draft.others(recipe.key)
    for waits, pool in ((False, draft.evictable(recipe.key)), (True, others), (True, others + pinned)):
        if (chosen := draft.choose(recipe.need, pool, draft.soon)) is not None:
            return Outlook(chosen[1], tuple(i.id for i in chosen[0]), waits)
    return Outlook(place(recipe.need, world.capacity), (), waits=True)
