"""GPU memory of processes that are gone, charged until the driver shows it back (trap 43).

Drivers free late, and a load that starts too early fails. Memory that is on its way back is used by nobody whom the
driver lists: a ghost leaves when no more is *unexplained* on its GPUs than was before the exit. Where the driver does
not list who uses what, it leaves when the GPU's use has fallen and falls no further. After ``LIMIT_S`` it leaves
anyhow, by the clock, sample or no sample: what is still missing then counts as foreign.
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
#: What the use of a GPU may still fall between two samples and count as steady.
STEADY_MIB: Final = 32


@dataclass(slots=True)
class Ghost:
    instance: str
    key: str
    memory: Resources  #: what it was charged of GPUs, their sum included
    gone_at: float
    used_before: Mapping[str, int]  #: MiB that everybody used of each GPU before
    used_last: Mapping[str, int] | None = None  #: in the sample before

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

    def add(self, instance: str, key: str, charged: Resources) -> None:
        """The process of *instance* is gone, which was *charged* memory of GPUs."""
        memory = Resources({kind: charged.mib[kind] for kind in gpu_kinds(charged)})
        for kind in memory.mib:
            if not self._charged(kind):
                self._baseline[kind] = self._unexplained.get(kind, 0)
        memory = memory + Resources({VRAM: sum(memory.mib.values())})
        self.all.append(Ghost(instance, key, memory, self.clock(), dict(self._used)))

    def sampled(self, sample: Sample) -> None:
        """Let go of those whose memory *sample*, which began after the last exit, shows to be back."""
        gpus = sample.devices.gpus
        self._used = {gpu.kind: gpu.used_mib for gpu in gpus}
        self._unexplained = {gpu.kind: mib for gpu in gpus if (mib := _unexplained_mib(gpu)) is not None}
        for ghost in list(self.all):
            if sample.stale.isdisjoint(ghost.kinds) and all(self._back(ghost, kind) for kind in ghost.kinds):
                self.all.remove(ghost)
            ghost.used_last = self._used

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

    def _back(self, ghost: Ghost, kind: str) -> bool:
        if kind not in self._used:
            return True  # the GPU is gone too
        if kind not in self._unexplained:
            return self._fallen(ghost, kind)
        missing = self._unexplained[kind] - self._baseline.get(kind, 0) - TOLERANCE_MIB
        return missing <= 0 or missing <= self._charged(kind) - ghost.memory.mib[kind]  # then it is the others'

    def _fallen(self, ghost: Ghost, kind: str) -> bool:
        """Whether the use of *kind* has fallen since the exit, and not any more since the last sample."""
        now = self._used[kind]
        steady = ghost.used_last is not None and ghost.used_last.get(kind, now) - now <= STEADY_MIB
        return steady and ghost.used_before.get(kind, now) - now >= min(TOLERANCE_MIB, ghost.memory.mib[kind] // 2)

    def _charged(self, kind: str) -> int:
        return sum(ghost.memory.mib.get(kind, 0) for ghost in self.all)


def _unexplained_mib(gpu: Gpu) -> int | None:
    """Return what of *gpu* is used by nobody that the driver lists; None if it does not list who uses how much."""
    if gpu.processes is None or None in gpu.processes.values():
        return None
    return max(0, gpu.used_mib - sum(mib or 0 for mib in gpu.processes.values()))
