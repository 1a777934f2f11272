"""Rule 6: instances whose engine was replaced make way for a successor, one model at a time.

A *superseded* instance runs another engine than its profile would be started with now. It goes on serving until its
turn. If a copy fits in free memory beside everything, the successor is started first, even above ``max_instances``, and
the old ones drain once it is READY. Else the old one drains first, and its room is kept for the successor; nobody else
has to go for either. Whatever waits without an instance comes before that.

A drain that makes room for a successor names its own profile as the competitor; whoever carries it out sees to it that
the profile is waited for, and tells ``Snapshot.replacing`` until the successor is READY or was given up.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from mesh.core.draft import Draft
from mesh.core.lifecycle import State
from mesh.core.world import GOING, LIVE, Demand, Drain, InstanceView, Reason, Recipe, Vet


def finish_replacements(draft: Draft) -> None:
    """Drain the superseded instances whose successor serves; what they do is finished first, as always."""
    for key in sorted({i.key for i in draft.world.instances if i.superseded}):
        ready = [i for i in draft.live(key) if i.state is State.READY]
        if any(not i.superseded for i in ready):
            draft.drain([i for i in ready if i.superseded], Reason.ENGINE_REPLACED)


def replace_next(draft: Draft, demands: Iterable[Demand]) -> None:
    """Begin the replacement of one model, if none is under way; *demands* are those that were not refused."""
    waiting = {d.key for d in demands}
    if still_to_come(draft.world.replacing, draft.world.instances, waiting) or _under_way(draft):
        return
    starved = any(not draft.live(key) and key not in draft.started for key in waiting)
    for recipe, old in _in_turn(draft):
        assert recipe.need is not None, "it was asked for"
        spot = draft.room(recipe.need, draft.now, draft.soon, draft.future)
        if spot is not None and len(draft.live(recipe.key)) <= recipe.max_instances:
            draft.spawn(recipe.key, spot)
            return
        if not starved and _make_room(draft, recipe, old):
            return


def still_to_come(keys: Collection[str], instances: Iterable[InstanceView], waiting: Collection[str]) -> frozenset[str]:
    """Return those of *keys*, drained for their successors, whose successor is waited for or loads."""
    here = [i for i in instances if i.key in keys and i.state in LIVE and not i.stale]
    ready = {i.key for i in here if i.state is State.READY}
    coming = {i.key for i in here if i.state is State.SPAWNING}
    return frozenset(key for key in keys if key not in ready and (key in waiting or key in coming))


def makes_room(decision: Drain) -> bool:
    """Whether the successor is to be waited for: no other instance serves its profile meanwhile."""
    return decision.reason is Reason.ENGINE_REPLACED and decision.competitor is not None


def _under_way(draft: Draft) -> bool:
    old = [i for i in draft.world.instances if i.superseded]
    if any(i.state in GOING or i.id in draft.leaving for i in old):
        return True
    return any(_has_successor(draft, key) for key in {i.key for i in old if i.state in LIVE})


def _has_successor(draft: Draft, key: str) -> bool:
    return key in draft.started or any(i.state is State.SPAWNING and not i.superseded for i in draft.live(key))


def _in_turn(draft: Draft) -> list[tuple[Recipe, list[InstanceView]]]:
    """Return who may be replaced now and by what, idle profiles first; of each the instances, idle ones first."""
    waiting_for: dict[str, list[InstanceView]] = {}
    for i in draft.world.instances:
        if i.superseded and i.state is State.READY and not i.stale and i.id not in draft.leaving:
            waiting_for.setdefault(i.key, []).append(i)
    turns = []
    for key, old in waiting_for.items():
        recipe = draft.world.recipes[key]
        loading = any(i.state is State.SPAWNING for i in draft.live(key))
        ready = recipe.need is not None and recipe.fresh and recipe.ran_out is None
        if ready and not loading and draft.obstacle(recipe) is None:
            old.sort(key=lambda i: (draft.in_use(i), i.idle_since, i.id))
            turns.append((recipe, old))
    return sorted(turns, key=lambda turn: (draft.in_use(turn[1][-1]), turn[1][-1].idle_since, turn[0].key))


def _make_room(draft: Draft, recipe: Recipe, old: list[InstanceView]) -> bool:
    """Drain one of *old* if that is enough for its successor; first see whether the launch is sound at all."""
    assert recipe.need is not None, "it was asked for"
    for i in old:
        if draft.room(recipe.need, *(view - i.footprint for view in (draft.now, draft.soon, draft.future))) is None:
            continue
        if recipe.vetted:
            alone = draft.live(recipe.key) == [i]
            draft.drain([i], Reason.ENGINE_REPLACED, competitor=recipe.key if alone else None)
        elif not recipe.vetting:
            draft.decisions.append(Vet(recipe.key))
        return True
    return False
