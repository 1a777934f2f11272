"""From the operator's limits and what the devices report to the node's budget. Pure.

``capacity`` is what all instances together may ever hold; ``taken_by_others`` is how much of it other programs have
now. Both are per kind: RAM, each GPU, and "vram", the sum over the GPUs, if that is limited. So what is free is the
smaller of the own ledger's figure and the driver's (trap 44), and foreign memory is never evictable (trap 42).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mesh.core.devices import Devices, Gpu
from mesh.core.resources import RAM, VRAM, Resources

#: What "auto" gives to models: the rest is for the system, and for what no estimate foresees.
AUTO_RAM_SHARE = 0.85
AUTO_VRAM_SHARE = 0.95
#: The node's instance limit is a kind of memory, one MiB each, so that one rule bounds both.
INSTANCES = "instances"

Limit = int | Literal["auto"]


@dataclass(frozen=True, slots=True)
class BudgetLimits:
    """MiB; None = not limited by the operator."""

    ram_mib: Limit | None = None
    vram_mib: Limit | None = None  #: over all GPUs
    per_gpu_mib: Mapping[str, Limit] = field(default_factory=dict)  #: by index ("0"), name ("gpu0") or UUID
    instances: int = 100


def capacity(limits: BudgetLimits, devices: Devices | None) -> Resources:
    """Return the whole budget; a kind that is absent is not limited. No kind exceeds what the device has."""
    amounts = {INSTANCES: limits.instances}
    total = devices.ram_total_mib if devices is not None else 0
    if (ram := _limited(limits.ram_mib, total, AUTO_RAM_SHARE)) is not None:
        amounts[RAM] = ram
    gpus = {gpu.kind: _of_gpu(limits, gpu) for gpu in (devices.budgeted if devices is not None else ())}
    amounts |= gpus
    if isinstance(limits.vram_mib, int):
        amounts[VRAM] = min(limits.vram_mib, sum(gpus.values())) if gpus else limits.vram_mib
    elif gpus and limits.vram_mib == "auto":
        amounts[VRAM] = sum(gpus.values())
    return Resources(amounts)


def taken_by_others(budget: Resources, devices: Devices | None, ours: Resources) -> Resources:
    """Return how much of *budget* other programs use. *ours*: what the children use now, RAM without page cache."""
    if devices is None:
        return Resources()
    others = {gpu.kind: max(0, gpu.used_mib - ours.mib.get(gpu.kind, 0)) for gpu in devices.budgeted}
    usable = {gpu.kind: gpu.total_mib - others[gpu.kind] for gpu in devices.budgeted}
    if usable:
        usable[VRAM] = sum(usable.values())
    usable[RAM] = devices.ram_available_mib + ours.mib.get(RAM, 0)
    return Resources(
        {kind: limit - usable[kind] for kind, limit in budget.mib.items() if kind in usable and usable[kind] < limit}
    )


def _of_gpu(limits: BudgetLimits, gpu: Gpu) -> int:
    names = (gpu.kind, str(gpu.index), gpu.uuid)
    own = next((limits.per_gpu_mib[name] for name in names if name in limits.per_gpu_mib), None)
    limit = _limited("auto" if own is None and limits.vram_mib == "auto" else own, gpu.total_mib, AUTO_VRAM_SHARE)
    return gpu.total_mib if limit is None else limit


def _limited(limit: Limit | None, total_mib: int, share: float) -> int | None:
    """Return the limit in MiB, at most *total_mib* if that is known; None if there is none."""
    if limit is None or (limit == "auto" and not total_mib):
        return None
    amount = int(total_mib * share) if limit == "auto" else limit
    return min(amount, total_mib) if total_mib else amount
