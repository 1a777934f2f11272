"""GPU memory of processes that are gone, charged until the driver shows it back (trap 43).

Drivers free late, and a load that starts too early fails. Memory that is on its way back is used by nobody whom the
driver lists: a ghost leaves when no more is *unexplained* on its GPUs than was before the exit. Where the driver does
not list who uses what, or never listed that process (in a container), it leaves when the GPU's use has fallen and falls
no further. After ``LIMIT_S`` it leaves anyhow, by the clock, sample or no sample: what is still missing then counts as
foreign.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from mesh.core.devices import Gpu
from mesh.core.lifecycle import State
from mesh.core.placement import gpu_kinds
from mesh.core.resources import VRAM, Resources, total
from mesh.core.world import InstanceView
from mesh.engine.telemetry import Sample
from mesh.logs import Log

log = Log(__name__)

#: How long freed GPU memory is waited for.
LIMIT_S: Final = 10.0
#: What the driver may keep back of it without our waiting on.
TOLERANCE_MIB: Final = 256
#: How long the use of a GPU must not have fallen, by more than this, to fall no further.
STEADY_S: Final = 0.5
STEADY_MIB: Final = 32


@dataclass(slots=True)
class Ghost:
    instance: str
    key: str
    memory: Resources  #: what it was charged of GPUs, their sum included
    gone_at: float
    listed: bool  #: the driver said what it used
    used_before: Mapping[str, int]  #: MiB that everybody used of each GPU before
    level: dict[str, int] = field(default_factory=dict)  #: the least that everybody used since
    fell_at: float = 0.0  #: when that fell last

    @property
    def kinds(self) -> list[str]:
        return gpu_kinds(self.memory)


@dataclass(slots=True)
class Ghosts:
    """All of them, and what the last sample said of the GPUs."""

    clock: Callable[[], float]
    all: list[Ghost] = field(default_factory=list)
    _used: dict[str, int] = field(default_factory=dict)
    _unexplained: dict[str, int] = field(default_factory=dict)  #: without the GPUs whose users are not listed
    _baseline: dict[str, int] = field(default_factory=dict)  #: what was unexplained before the first of them

    @property
    def used(self) -> Resources:
        """What everybody uses of each GPU, as last seen."""
        return Resources(dict(self._used))

    def add(self, instance: str, key: str, charged: Resources, *, listed: bool) -> None:
        """The process of *instance* is gone, which was *charged* memory of GPUs."""
        memory = Resources({kind: charged.mib[kind] for kind in gpu_kinds(charged)})
        for kind in memory.mib:
            if not self._charged(kind):
                self._baseline[kind] = self._unexplained.get(kind, 0)
        memory = memory + Resources({VRAM: sum(memory.mib.values())})
        used, now = dict(self._used), self.clock()
        self.all.append(Ghost(instance, key, memory, now, listed, used, dict(used), now))

    def sampled(self, sample: Sample) -> None:
        """Let go of those whose memory *sample*, which began after the last exit, shows to be back."""
        gpus = sample.devices.gpus
        self._used = {gpu.kind: gpu.used_mib for gpu in gpus}
        self._unexplained = {gpu.kind: mib for gpu in gpus if (mib := _unexplained_mib(gpu)) is not None}
        for ghost in self.all:
            self._watch(ghost, sample.started_at)
        back = [g for g in self.all if not g.listed and self._is_back(g, sample)]
        self.all = [g for g in self.all if g not in back]
        for ghost in [g for g in self.all if g.listed]:
            if self._is_back(ghost, sample):
                self.all.remove(ghost)

    def expire(self) -> None:
        """Let go of those that were waited for long enough."""
        for ghost in list(self.all):
            if self.clock() < ghost.gone_at + LIMIT_S:
                continue
            self.all.remove(ghost)
            for kind in ghost.kinds:  # what is stuck must not hold up those that come later
                stuck = self._baseline.get(kind, 0) + ghost.memory.mib[kind]
                self._baseline[kind] = min(stuck, self._unexplained.get(kind, stuck))
            log.warning("the GPU memory of a process that is gone did not come back, or another program took it",
                        instance=ghost.instance, memory=ghost.memory.describe(), waited_s=LIMIT_S)  # fmt: skip

    def deadline(self) -> float | None:
        """Return when the next one expires."""
        return min((ghost.gone_at + LIMIT_S for ghost in self.all), default=None)

    def held(self) -> Resources:
        return total(ghost.memory for ghost in self.all)

    def views(self) -> list[InstanceView]:
        """Return them as the scheduler counts them: memory that will come without anybody's doing."""
        return [InstanceView(f"{g.instance} (gone)", g.key, State.STOPPING, g.memory) for g in self.all]

    def _is_back(self, ghost: Ghost, sample: Sample) -> bool:
        known = sample.stale.isdisjoint(ghost.kinds)
        return known and all(self._back(ghost, kind, sample.started_at) for kind in ghost.kinds)

    def _back(self, ghost: Ghost, kind: str, now: float) -> bool:
        if kind not in self._used:
            return True  # the GPU is gone too
        if kind not in self._unexplained or not ghost.listed:
            return self._fallen(ghost, kind, now)
        missing = self._unexplained[kind] - self._baseline.get(kind, 0) - TOLERANCE_MIB
        return missing <= 0 or missing <= self._charged(kind) - ghost.memory.mib[kind]  # then it is the others'

    def _watch(self, ghost: Ghost, now: float) -> None:
        for kind in ghost.kinds:
            used = self._used.get(kind, 0)
            if ghost.level.get(kind, used) - used > STEADY_MIB:
                ghost.fell_at = now
            ghost.level[kind] = min(ghost.level.get(kind, used), used)

    def _fallen(self, ghost: Ghost, kind: str, now: float) -> bool:
        """Whether the use of *kind* has fallen, by about what all such ghosts held, and for a while no further."""
        same = [g for g in self.all if kind in g.kinds and (not g.listed or kind not in self._unexplained)]
        fell = max(g.used_before.get(kind, 0) for g in same) - self._used[kind]
        steady = now - max(g.fell_at for g in same) >= STEADY_S
        return steady and fell >= sum(g.memory.mib[kind] for g in same) // 2

    def _charged(self, kind: str) -> int:
        return sum(ghost.memory.mib.get(kind, 0) for ghost in self.all)


def _unexplained_mib(gpu: Gpu) -> int | None:
    """Return what of *gpu* is used by nobody that the driver lists; None if it does not list who uses how much."""
    if gpu.processes is None or None in gpu.processes.values():
        return None
    return max(0, gpu.used_mib - sum(mib or 0 for mib in gpu.processes.values()))
