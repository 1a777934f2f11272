"""The memory of the node as people ask for it: who holds what, what fits, and what would have to go. Values only.

The supervisor fills these in (``Supervisor.memory_report``, ``Supervisor.model_fits``); the API, refusals and the CLI
show them. The kinds of every ``Resources`` here are kinds of memory ("ram", "vram", "gpu0", ...), in MiB; the budget's
"instances" is not among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from mesh.core.budget import INSTANCES
from mesh.core.devices import Devices
from mesh.core.footprint import Footprint, Source
from mesh.core.lifecycle import State
from mesh.core.placement import Need
from mesh.core.resources import VRAM, Resources


@dataclass(frozen=True, slots=True)
class Holder:
    """One instance and the memory that it holds, from its start until its process is gone."""

    instance: str
    key: str
    model_id: str
    state: State
    memory: Resources  #: what it is charged
    live: Resources | None = None  #: what the last sample saw it use; None = not known
    source: Source | None = None  #: of the figure that it is charged
    active: int = 0  #: requests in flight
    pinned: bool = False
    evictable: bool = False  #: it could go now: READY, idle, not pinned


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """One moment of the node's memory. A kind that ``capacity`` lacks is not limited."""

    capacity: Resources  #: the whole budget
    ceiling: Resources  #: what all instances together may hold now: the budget less what others use of it
    foreign: Resources  #: what others use of the budget; never evictable
    used: Resources  #: what the holders are charged together
    holders: tuple[Holder, ...] = ()
    others: Resources = field(default_factory=Resources)  #: all that others use of each GPU, within the budget or not
    devices: Devices | None = None  #: as last read; None = not read yet
    sampled_s_ago: float | None = None

    @property
    def free(self) -> Resources:
        """What is left of each limited kind; never negative, though others may take what was in use."""
        ceiling = _memory(self.ceiling).mib
        return Resources({kind: max(0, mib - self.used.mib.get(kind, 0)) for kind, mib in ceiling.items()})


class Fit(StrEnum):
    """Whether one more instance of a model could start."""

    LOADED = "loaded"  # an instance of it is there already
    NOW = "now"  # there is room
    AFTER_EVICTION = "after_eviction"  # idle instances would make room
    WAITS = "waits"  # busy or pinned instances, or foreign processes, are in the way
    NEVER = "never"  # more than the node has
    UNKNOWN = "unknown"  # its need is not known, or its file cannot be read


@dataclass(frozen=True, slots=True)
class ModelFit:
    """One model of the cookbook and its place in the node's memory."""

    key: str
    model_id: str
    fit: Fit
    footprint: Footprint | None = None
    placement: Resources | None = None  #: where it is (LOADED) or would go, GPU by GPU
    evict: tuple[str, ...] = field(default=())  #: ids of the instances that would have to go
    failure: str | None = None  #: why its last start failed, if it did


def capacity_details(need: Need | Resources, report: MemoryReport) -> Mapping[str, Any]:
    """Return what the error envelope says as ``memory``: what is needed, what there is, and who holds it."""
    wanted = need if isinstance(need, Resources) else unplaced(need)
    return {
        "need_mib": dict(_memory(wanted).mib),
        "capacity_mib": dict(_memory(report.capacity).mib),
        "free_mib": dict(report.free.mib),
        "held_by": [_held_by(holder) for holder in report.holders],
        "foreign_mib": dict(_memory(report.foreign).mib),
    }


def unplaced(need: Need) -> Resources:
    """Return what *need* takes if it goes on one GPU, no matter which: for what has no place yet."""
    return need.fixed + Resources({VRAM: need.gpu_mib} if need.gpu_mib else {})


def _held_by(holder: Holder) -> dict[str, Any]:
    return {
        "model": holder.model_id,
        "instance": holder.instance,
        "state": str(holder.state),
        "memory_mib": dict(_memory(holder.memory).mib),
        "active": holder.active,
        "pinned": holder.pinned,
    }


def _memory(amounts: Resources) -> Resources:
    return Resources({kind: mib for kind, mib in amounts.mib.items() if kind != INSTANCES})
