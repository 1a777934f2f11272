"""Who is charged how much memory, and how much there is: the supervisor's book-keeping, fed by telemetry.

An instance is charged from the decision to start it until its process is gone: at least what its profile is said or
known to need, and at least what it was last seen to use. GPU memory stays charged a little longer: see ``ghosts``.

Owned by the supervisor's loop; nothing here awaits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Final, Protocol

from mesh.config.profile import Profile
from mesh.core.budget import INSTANCES, BudgetLimits, capacity, taken_by_others
from mesh.core.devices import Devices
from mesh.core.footprint import Footprint, Source, needed_ram_mib
from mesh.core.lifecycle import State
from mesh.core.placement import Need, again, gpu_kinds, highest
from mesh.core.resources import RAM, VRAM, Resources, total
from mesh.engine.assignment import Assignment, assign
from mesh.engine.ghosts import TOLERANCE_MIB, Ghosts
from mesh.engine.instances import Instance
from mesh.engine.kinds import kind_of
from mesh.engine.telemetry import Sample, Usage

#: Of the machine's available memory, what a second copy of a model leaves to others.
RESERVE_SHARE: Final = 0.1
#: A sample that comes later than this after READY may see a prompt cache that has filled already.
EARLY_S = 10.0


class Footprints(Protocol):
    """What the ledger needs of ``mesh.engine.footprints.FootprintBook``."""

    def of(self, profile: Profile) -> Footprint | None: ...
    def fresh(self, profile: Profile) -> bool: ...
    def peek(self, profile: Profile) -> Footprint | None: ...
    async def look(self, profiles: Iterable[Profile]) -> None: ...
    def forget_looks(self) -> None: ...
    def learn(
        self,
        profile: Profile,
        usage_ram_mib: int,
        gpu_mib: Mapping[str, int] | None,
        *,
        first: bool,
        identity: str | None = None,
    ) -> None: ...


class CookbookFigures:
    """Footprints of a node that looks at no files: what the cookbook says, at once."""

    def of(self, profile: Profile) -> Footprint | None:
        said = profile.estimate.mib
        need = Need(Resources({RAM: said[RAM]} if said.get(RAM) else {}), split_mib=said.get(VRAM, 0))
        return Footprint(need, Source.COOKBOOK if said else Source.UNKNOWN)

    peek = of

    def fresh(self, profile: Profile) -> bool:
        return True

    async def look(self, profiles: Iterable[Profile]) -> None:
        """All is known."""

    def forget_looks(self) -> None:
        """There were none."""

    def learn(
        self,
        profile: Profile,
        usage_ram_mib: int,
        gpu_mib: Mapping[str, int] | None,
        *,
        first: bool,
        identity: str | None = None,
    ) -> None:
        """Such a node has nowhere to keep it."""


@dataclass(slots=True)
class Ledger:
    limits: BudgetLimits
    footprints: Footprints
    clock: Callable[[], float]
    devices: Devices | None = None
    capacity: Resources = field(default_factory=Resources)  #: the whole budget
    foreign: Resources = field(default_factory=Resources)  #: what of it others use
    others: Resources = field(default_factory=Resources)  #: all that others use of each GPU
    sampled_at: float | None = None
    ghosts: Ghosts = field(init=False)
    _seen: Devices | None = None  #: the last that were read in one piece, and what the children used then
    _ours: Resources = field(default_factory=Resources)
    _last_exit_at: float = -1.0

    def __post_init__(self) -> None:
        self.capacity = capacity(self.limits, self.devices)
        self.ghosts = Ghosts(self.clock)

    # -- one profile, one instance

    def need(self, profile: Profile) -> Need | None:
        """Return what the next instance of *profile* takes; None while that is being looked up."""
        footprint = self.footprints.of(profile)
        return None if footprint is None else footprint.need + Resources({INSTANCES: 1})

    def assignment(self, profile: Profile, placed: Resources) -> Assignment:
        """Return what an instance of *profile* that was given *placed* is to be told."""
        known = self.footprints.peek(profile)
        return Assignment() if known is None else assign(known, placed, self.devices or Devices())

    def charge(self, instance: Instance) -> Resources:
        """Return what *instance* is charged now."""
        charged = instance.placed if instance.state is State.SPAWNING else instance.footprint
        if instance.state is State.READY and (known := self.footprints.peek(instance.profile)) is not None:
            charged = again(known.need, instance.placed) + Resources({INSTANCES: 1})
        if instance.live is None:
            return charged
        charged = highest((charged, instance.live))
        if kinds := gpu_kinds(charged):
            charged = Resources({**charged.mib, VRAM: sum(charged.mib[kind] for kind in kinds)})
        return charged

    def spare_ram_mib(self) -> float:
        """Return what second copies may take of main memory where the budget does not limit it."""
        if RAM in self.capacity.mib:
            return inf
        return 0.0 if self.devices is None else self.devices.ram_available_mib * (1 - RESERVE_SHARE)

    # -- what telemetry says

    def sampled(self, sample: Sample, instances: Iterable[Instance]) -> None:
        """Take over *sample*: live figures, the budget, what others use, and memory that is back."""
        here = list(instances)
        for instance in here:
            usage = sample.usage.get(instance.id)
            if usage is not None and instance.started_at < sample.started_at:
                instance.live = self._live(instance, usage)
                ready_s = sample.started_at - instance.ready_since
                if instance.early_ram_mib is None and instance.ready_wall is not None and 0 < ready_s < EARLY_S:
                    instance.early_ram_mib = instance.live.mib[RAM]
        self.devices, self.sampled_at = sample.devices, sample.started_at
        self.capacity = capacity(self.limits, sample.devices)
        if sample.started_at > self._last_exit_at:  # else it may show a process in one place and not in another
            self._ours = self._used_by(sample, here)
            gpus = sample.devices.gpus
            self.others = Resources({g.kind: max(0, g.used_mib - self._ours.mib.get(g.kind, 0)) for g in gpus})
            self.ghosts.sampled(sample)
            self._seen = sample.devices
            self._count_foreign()

    def assume(self, devices: Devices) -> None:
        """Take *devices* for the machine until the first sample comes."""
        if self.sampled_at is None:
            self.devices, self.capacity = devices, capacity(self.limits, devices)

    def expire(self) -> float | None:
        """Give up waiting for what does not come back; return when to look again."""
        waiting = len(self.ghosts.all)
        self.ghosts.expire()
        if len(self.ghosts.all) != waiting:
            self._count_foreign()
        return self.ghosts.deadline()

    def left(self, instance: Instance) -> None:
        """The process of *instance* is gone; its GPU memory may take a while."""
        self._last_exit_at = self.clock()
        if not gpu_kinds(instance.footprint) or self.sampled_at is None:
            return
        listed = instance.live is not None and bool(gpu_kinds(instance.live))
        if not listed and (instance.ready_wall is None or instance.live is None):
            grown = self.ghosts.used - instance.used_before
            if all(grown.mib.get(kind, 0) < TOLERANCE_MIB for kind in gpu_kinds(instance.placed)):
                return  # it died before it took anything
        self.ghosts.add(instance.id, instance.profile.key, instance.footprint, listed=listed)

    def _count_foreign(self) -> None:
        held = Resources({**self.ghosts.held().mib, RAM: 0})  # what ghosts hold is charged to them, not to others
        self.foreign = taken_by_others(self.capacity, self._seen, self._ours + held)

    def _live(self, instance: Instance, usage: Usage) -> Resources:
        known = self.footprints.peek(instance.profile)
        estimate = None if known is None else known.estimate
        return Resources({RAM: needed_ram_mib(usage.ram_mib, usage.anon_mib, estimate), **(usage.gpu_mib or {})})

    def _used_by(self, sample: Sample, instances: Iterable[Instance]) -> Resources:
        """Return what the children use: as the driver says, or as charged where it does not see them."""
        parts, loading = [], []
        for instance in instances:
            usage = sample.usage.get(instance.id)
            parts.append(_ram_of(instance, usage, sample.devices))
            if usage is not None and usage.gpu_mib is not None:
                parts.append(Resources(dict(usage.gpu_mib)))
            elif instance.state is State.SPAWNING:
                loading.append(instance)
            else:
                kinds = gpu_kinds(instance.placed)
                parts.append(Resources({kind: instance.footprint.mib.get(kind, 0) for kind in kinds}))
        ours = total(parts)
        for instance in loading:  # unseen and still growing: what nobody else accounts for since it was started
            ours = ours + Resources({kind: _grown(instance, kind, sample, ours) for kind in gpu_kinds(instance.placed)})
        return ours

    # -- learning

    def learn(self, sample: Sample, instances: Iterable[Instance]) -> list[Instance]:
        """Remember what the instances that have served use; return those that were learned from.

        Not from one that shares its mapped weights: each then counts a part of them only (trap 45).
        """
        here = list(instances)
        learned = []
        for i in here:
            usage = sample.usage.get(i.id)
            if usage is None or i.state is not State.READY or not i.served or i.ready_since > sample.started_at:
                continue
            model = _mapped(i.profile)
            if any(o is not i and model is not None and _mapped(o.profile) == model for o in here):
                continue
            if not i.learned and i.early_ram_mib is not None:
                self.footprints.learn(i.profile, i.early_ram_mib, usage.gpu_mib, first=True, identity=i.launched_as)
            ram_mib = self._live(i, usage).mib[RAM]
            self.footprints.learn(i.profile, ram_mib, usage.gpu_mib, first=False, identity=i.launched_as)
            i.learned = True
            learned.append(i)
        return learned


def _mapped(profile: Profile) -> str | None:
    """Return the model file that instances of *profile* map, and so share."""
    kind = kind_of(profile)
    return kind.expected_model(profile) if kind.maps_model else None


def _ram_of(instance: Instance, usage: Usage | None, devices: Devices) -> Resources:
    """Return the main memory that *instance* holds, page cache aside.

    A GPU without memory of its own and without a list of processes uses main memory that no process shows: what it was
    charged beyond what it shows is taken to be that.
    """
    if usage is None:
        return Resources()
    unseen = any(gpu.unified and gpu.processes is None for gpu in devices.gpus)
    hidden = max(0, instance.footprint.mib.get(RAM, 0) - usage.ram_mib) if unseen else 0
    return Resources({RAM: usage.anon_mib + hidden})


def _grown(instance: Instance, kind: str, sample: Sample, ours: Resources) -> int:
    used = next((gpu.used_mib for gpu in sample.devices.gpus if gpu.kind == kind), 0)
    unexplained = used - ours.mib.get(kind, 0) - instance.others_before.mib.get(kind, 0)
    return min(instance.placed.mib.get(kind, 0), max(0, unexplained))
