"""What each instance uses of the machine's memory: its whole process tree, main memory and every GPU.

Reads /proc and a list of processes that the driver gave; keeps nothing. Blocks: ``mesh.engine.telemetry`` calls it in
its thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mesh.core.devices import Devices, Gpu
from mesh.host import nvml
from mesh.host.memory import resident, tree_pids


@dataclass(frozen=True, slots=True)
class Usage:
    """What one instance's process tree uses. Memory it has of a GPU without memory of its own counts as main memory."""

    ram_mib: int
    gpu_mib: Mapping[str, int] | None  #: the GPUs it uses, by name; None = the driver does not say
    anon_mib: int  #: of ``ram_mib``, what the kernel cannot drop: without mapped weights


def read_usage(roots: Mapping[str, int], devices: Devices) -> Mapping[str, Usage]:
    """Return the usage of each instance by its id, *roots* being its process; one whose process is gone is left out."""
    trees = tree_pids(set(roots.values()))
    usage = {name: of_tree(trees[pid], devices) for name, pid in roots.items() if pid in trees}
    return {name: use for name, use in usage.items() if use is not None}


def of_tree(pids: tuple[int, ...], devices: Devices) -> Usage | None:
    """Return what *pids* use together; None if they are gone."""
    ram = resident(pids)
    if ram is None:
        return None
    shared_mib = sum(_use_of(gpu, pids) or 0 for gpu in devices.gpus if gpu.unified)
    return Usage(ram.total_mib + shared_mib, _gpu_mib(pids, devices), ram.held_mib + shared_mib)


def _gpu_mib(pids: tuple[int, ...], devices: Devices) -> Mapping[str, int] | None:
    used = {gpu.kind: _use_of(gpu, pids) for gpu in devices.budgeted}
    if any(mib is None for mib in used.values()):
        return None
    known = {kind: mib for kind, mib in used.items() if mib}
    if used and not known and nvml.opened_by(pids):
        return None  # it uses a GPU and the driver lists it under another pid, or not at all: a container
    return known


def _use_of(gpu: Gpu, pids: tuple[int, ...]) -> int | None:
    """Return the MiB that *pids* have of *gpu*; None if the driver does not say."""
    if gpu.processes is None:
        return None
    parts = [gpu.processes[pid] for pid in pids if pid in gpu.processes]
    return None if None in parts else sum(mib or 0 for mib in parts)
