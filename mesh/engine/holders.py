"""Views of the ledger for people: who holds what, and what would have to go for whom. Changes no figure."""

from __future__ import annotations

from collections.abc import Iterable

from mesh.config.profile import Profile
from mesh.core import scheduler
from mesh.core.budget import INSTANCES
from mesh.core.footprint import Source
from mesh.core.lifecycle import State
from mesh.core.placement import gpu_kinds
from mesh.core.resources import VRAM, Resources, total
from mesh.core.world import Recipe, Snapshot
from mesh.engine.instances import Instance
from mesh.engine.ledger import Footprints, Ledger
from mesh.engine.memory_report import Fit, Holder, MemoryReport, ModelFit
from mesh.logs import Log

log = Log(__name__)

#: By how much, beyond a tenth, an instance may use more than it was given without a word.
EXCESS_MIB = 64


def memory_only(amounts: Resources) -> Resources:
    """Return *amounts* without the count of instances."""
    return Resources({kind: mib for kind, mib in amounts.mib.items() if kind != INSTANCES})


def report_of(ledger: Ledger, instances: Iterable[Instance], footprints: Footprints, now: float) -> MemoryReport:
    here = list(instances)
    used = total([*(i.footprint for i in here), ledger.ghosts.held()])
    sampled_s_ago = None if ledger.sampled_at is None else max(0.0, now - ledger.sampled_at)
    capacity, foreign = memory_only(ledger.capacity), memory_only(ledger.foreign)
    return MemoryReport(
        capacity=capacity,
        ceiling=Resources({kind: mib - foreign.mib.get(kind, 0) for kind, mib in capacity.mib.items()}),
        foreign=foreign,
        used=memory_only(used),
        holders=tuple(_holder(i, footprints) for i in here),
        others=ledger.others,
        devices=ledger.devices,
        sampled_s_ago=sampled_s_ago,
    )


def fit_of(profile: Profile, recipe: Recipe, world: Snapshot, footprints: Footprints) -> ModelFit:
    """Return whether one (more) instance of *profile* could start in *world*, and what would have to go."""
    footprint = footprints.peek(profile)
    mine = [i for i in world.instances if i.key == profile.key and i.state in (State.SPAWNING, State.READY)]
    if mine:
        return ModelFit(profile.key, profile.id, Fit.LOADED, footprint, memory_only(mine[0].footprint))
    nothing = footprint is None or (footprint.source is Source.UNKNOWN and not footprint.need.fixed.mib)
    if recipe.need is None or footprint is None or nothing or footprint.problem is not None:
        return ModelFit(profile.key, profile.id, Fit.UNKNOWN, footprint)
    outlook = scheduler.outlook(world, recipe)
    if outlook.placement is None:
        return ModelFit(profile.key, profile.id, Fit.NEVER, footprint)
    fit = Fit.WAITS if outlook.waits else Fit.AFTER_EVICTION if outlook.victims else Fit.NOW
    return ModelFit(profile.key, profile.id, fit, footprint, memory_only(outlook.placement), outlook.victims)


def warn_of_excess(instance: Instance) -> None:
    """Say once that *instance* uses clearly more than it was given: a figure in the cookbook is too low."""
    if instance.live is None or instance.warned or instance.state is not State.READY:
        return
    given = instance.placed.mib
    over = {k: mib for k, mib in instance.live.mib.items() if mib > given.get(k, 0) * 1.1 + EXCESS_MIB}
    if over:
        instance.warned = True
        log.warning("an instance uses more memory than it was given; it is charged what it uses", over_mib=over,
                    instance=instance.id, model=instance.profile.id, given=in_words(instance.placed))  # fmt: skip


def in_words(amounts: Resources) -> str:
    """Return e.g. ``"ram 2048 MiB, gpu0 512 MiB"``; the sum over the GPUs only if it says more than they do."""
    kinds = gpu_kinds(amounts)
    told = bool(kinds) and amounts.mib.get(VRAM, 0) >= sum(amounts.mib[kind] for kind in kinds)
    shown = {kind: mib for kind, mib in amounts.mib.items() if kind != INSTANCES and not (kind == VRAM and told)}
    return Resources(shown).describe()


def _holder(instance: Instance, footprints: Footprints) -> Holder:
    known = footprints.peek(instance.profile)
    return Holder(
        instance=instance.id,
        key=instance.profile.key,
        model_id=instance.profile.id,
        state=instance.state,
        memory=memory_only(instance.footprint),
        live=instance.live,
        source=None if known is None else known.source,
        active=len(instance.leases),
        pinned=instance.profile.pinned,
        evictable=instance.state is State.READY and not instance.leases and not instance.profile.pinned,
    )
