"""A ``MemoryReport`` as JSON: the answer of ``GET /admin/budget``, and `llama-mesh fit --json` without a node."""

from __future__ import annotations

from typing import Any

from mesh.core.budget import INSTANCES
from mesh.core.devices import Devices
from mesh.core.resources import Resources
from mesh.engine.memory_report import Holder, MemoryReport


def budget_entry(report: MemoryReport) -> dict[str, Any]:
    """Return *report* as JSON. A capacity of null is not limited; "vram" is the sum of the GPUs."""
    return {
        "memory": memory_entry(report),
        "held_by": [_holder(holder) for holder in report.holders],
        "devices": None if report.devices is None else _devices(report.devices),
        "sampled_s_ago": report.sampled_s_ago,
    }


def memory_entry(report: MemoryReport) -> dict[str, dict[str, int | None]]:
    """Return the figures of each kind of memory."""
    return {kind: _kind(report, kind) for kind in sorted(_kinds(report))}


def _kinds(report: MemoryReport) -> set[str]:
    amounts = (report.capacity, report.used, report.foreign)
    return {kind for amount in amounts for kind in amount.mib} - {INSTANCES}


def _kind(report: MemoryReport, kind: str) -> dict[str, int | None]:
    return {
        "capacity_mib": report.capacity.mib.get(kind),
        "used_mib": report.used.mib.get(kind, 0),
        "foreign_mib": report.foreign.mib.get(kind, 0),
        "free_mib": report.free.mib.get(kind),
    }


def _holder(holder: Holder) -> dict[str, Any]:
    return {
        "instance": holder.instance,
        "key": holder.key,
        "model": holder.model_id,
        "state": str(holder.state),
        "memory_mib": _memory(holder.memory),
        "live_mib": None if holder.live is None else _memory(holder.live),
        "source": None if holder.source is None else str(holder.source),
        "active": holder.active,
        "pinned": holder.pinned,
        "evictable": holder.evictable,
    }


def _devices(devices: Devices) -> dict[str, Any]:
    return {
        "telemetry": devices.kind,
        "ram_total_mib": devices.ram_total_mib,
        "ram_available_mib": devices.ram_available_mib,
        "gpus": [
            {
                "kind": gpu.kind,
                "name": gpu.name,
                "uuid": gpu.uuid,
                "vendor": gpu.vendor,
                "index": gpu.index,
                "total_mib": gpu.total_mib,
                "used_mib": gpu.used_mib,
                "unified": gpu.unified,
            }
            for gpu in devices.gpus
        ],
        "problems": list(devices.problems),
    }


def _memory(resources: Resources) -> dict[str, int]:
    return dict(resources.mib)
