"""Rule 6: instances whose engine was replaced make way for a successor, one model at a time.

A *superseded* instance runs another engine than its profile would be started with now. It goes on serving until its
turn. If a copy fits in free memory beside everything, the successor is started first, even above ``max_instances``, and
an old one drains once it is READY: as many at once as successors serve. Else as many old ones drain first as it takes,
and their room is kept for the successor; nobody else has to go for either. Whatever waits without an instance comes
before that. What an old one takes says more than a guess: the copy must fit if it takes as much.

A drain that makes room for a successor names its own profile as the competitor if none of it serves then; whoever
carries it out sees to it that the profile is waited for, and tells ``Snapshot.replacing`` until the successor is READY
or was given up. It is, if its room is gone and no client waits for it. If it cannot be loaded, that speaks against its
engine, and the one before is put in force again, if that is possible (``mesh.engine.successors``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from mesh.core.draft import Draft
from mesh.core.exits import Cause
from mesh.core.lifecycle import State
from mesh.core.world import GOING, LIVE, Demand, Drain, InstanceView, Reason, Recipe, Vet


def finish_replacements(draft: Draft) -> None:
    """Drain a superseded instance for each successor that serves; what it does is finished first, as always."""
    for key in sorted({i.key for i in draft.world.instances if i.superseded}):
        ready = [i for i in draft.live(key) if i.state is State.READY]
        old = sorted((i for i in ready if i.superseded), key=lambda i: _idle_first(draft, i))
        leaving = sum(i.superseded and i.key == key and i.state in GOING for i in draft.world.instances)
        draft.drain(old[: max(0, len(ready) - len(old) - leaving)], Reason.ENGINE_REPLACED)


def replace_next(draft: Draft, demands: Iterable[Demand]) -> None:
    """Begin the replacement of one model, if none is under way; *demands* are those that were not refused."""
    waiting = {d.key for d in demands}
    if still_to_come(draft.world.replacing, draft.world.instances, waiting) or _under_way(draft):
        return
    starved = any(not draft.live(key) and key not in draft.started for key in waiting)
    for recipe, old in _in_turn(draft):
        assert recipe.need is not None, "it was asked for"
        spot = draft.beside(recipe, recipe.need, old)
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


def speaks_against(engine: str, before: str | None, cause: Cause) -> bool:
    """Whether a failed load is to be laid to *engine*, an identity: the one *before* it served, and made room for this.

    None: no instance made room. What lacked memory, or a port, may lack it with any engine.
    """
    return bool(engine and before) and engine != before and cause not in (Cause.MEMORY, Cause.PORT)


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
        ready = recipe.need is not None and recipe.fresh and recipe.ran_out is None and not recipe.doubtful
        if ready and not loading and draft.obstacle(recipe) is None:
            old.sort(key=lambda i: _idle_first(draft, i))
            turns.append((recipe, old))
    return sorted(turns, key=lambda turn: (draft.in_use(turn[1][-1]), turn[1][-1].idle_since, turn[0].key))


def _idle_first(draft: Draft, i: InstanceView) -> tuple[bool, float, str]:
    return draft.in_use(i), i.idle_since, i.id


def _make_room(draft: Draft, recipe: Recipe, old: list[InstanceView]) -> bool:
    """Drain as many of *old* as their successor needs, if that is enough; first see whether the launch is sound."""
    assert recipe.need is not None, "it was asked for"
    chosen = draft.choose(recipe.need, old, draft.now, draft.soon, draft.future)
    if chosen is None:
        draft.cramped.add(recipe.key)
        return False
    if recipe.vetted:
        going = chosen[0] or old[:1]
        alone = len(draft.live(recipe.key)) == len(going)
        draft.drain(going[:-1], Reason.ENGINE_REPLACED)
        draft.drain(going[-1:], Reason.ENGINE_REPLACED, competitor=recipe.key if alone else None)
    elif not recipe.vetting:
        draft.decisions.append(Vet(recipe.key))
    return True
