"""The node's counters: plain ints that the hot path bumps, and one typed snapshot of them.

The snapshot is what ``/metrics/json`` and the file at ``metrics_path`` hold (llamesh's keys) and what
``mesh.api.exposition`` renders for Prometheus. This package never asks the supervisor (gauges come in through a
callable) and never lets a full disk reach a request. Counters belong to the event loop's thread; a ``Snapshot`` is a
copy, so it may go to another one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec

from mesh import __version__
from mesh.core.resources import RAM, VRAM
from mesh.files import replace_file
from mesh.metrics.counters import HashMetrics, ModelMetrics
from mesh.metrics.state import (
    BuildGauge,
    BuildState,
    Gauges,
    HashState,
    HistogramState,
    ModelState,
    NodeResources,
    PeerGauge,
    Snapshot,
)
from mesh.tasks import rfc3339, wall_time

__all__ = [
    "BuildGauge",
    "BuildState",
    "Gauges",
    "HashMetrics",
    "HashState",
    "HistogramState",
    "Metrics",
    "ModelMetrics",
    "ModelState",
    "PeerGauge",
    "Snapshot",
]

_log = logging.getLogger(__name__)

#: Node-wide counters, each a plain int attribute of ``Metrics`` and a key of the snapshot; all survive a restart.
NODE_COUNTERS: Final = (
    "requests_total",
    "errors_total",
    "queue_drops_full",
    "queue_drops_timeout",
    "queue_drops_global_limit",
    "wedged_instances_killed_total",
    "queue_wait_total_ms",
    "queue_wait_count",
    "token_counting_disabled_total",
    "skipped_stream_cleanups_total",
    "peer_stream_body_aborts_total",
    "client_disconnects_total",
    "upstream_retries_total",
    "spawns_total",
    "spawn_failures_total",
    "crashes_total",
    "evictions_total",
)


class Metrics:
    """All counters of the node. Set ``gauges`` once the owners of the gauges exist."""

    def __init__(self, node_id: str = "", started_at_wall: float | None = None) -> None:
        self.node_id = node_id
        self.started_at_wall = wall_time() if started_at_wall is None else started_at_wall
        self.gauges: Callable[[], Gauges] = Gauges
        self.current_requests = 0
        self.requests_total = 0
        self.errors_total = 0
        self.queue_drops_full = 0
        self.queue_drops_timeout = 0
        self.queue_drops_global_limit = 0
        self.wedged_instances_killed_total = 0
        self.queue_wait_total_ms = 0
        self.queue_wait_count = 0
        self.token_counting_disabled_total = 0
        self.skipped_stream_cleanups_total = 0
        self.peer_stream_body_aborts_total = 0
        self.client_disconnects_total = 0
        self.upstream_retries_total = 0
        self.spawns_total = 0
        self.spawn_failures_total = 0
        self.crashes_total = 0
        self.evictions_total = 0
        self._hashes: dict[str, HashMetrics] = {}
        self._builds: dict[str, BuildState] = {}
        self._file = _StateFile()

    def model(self, args_hash: str, name: str) -> ModelMetrics:
        """Return the counters of *name* run with these arguments; the same object every time."""
        models = self.hash(args_hash).models
        return models.get(name) or models.setdefault(name, ModelMetrics())

    def hash(self, args_hash: str) -> HashMetrics:
        """Return what is known about one set of launch arguments."""
        return self._hashes.get(args_hash) or self._hashes.setdefault(args_hash, HashMetrics())

    def build_ended(self, build: str, outcome: str, *, duration_s: float | None = None) -> None:
        """Count an attempt at a build of llama.cpp; only one that really built has a duration."""
        before = self._builds.get(build, BuildState())
        outcomes = {**before.outcomes, outcome: before.outcomes.get(outcome, 0) + 1}
        self._builds[build] = BuildState(outcomes, before.last_duration_s if duration_s is None else duration_s)

    def snapshot(self, gauges: Gauges | None = None) -> Snapshot:
        """Return a copy of everything; call it on the event loop's thread."""
        gauges = gauges or self.gauges()
        return Snapshot(
            node_id=self.node_id,
            version=__version__,
            llama_cpp_version=gauges.engine_version,
            started_at_unix=int(self.started_at_wall),
            current_requests=self.current_requests,
            queue_length=sum(gauges.queued.values()),
            hashes={key: entry.state() for key, entry in self._hashes.items()},
            builds=dict(self._builds),
            updated_at=datetime.now(UTC).isoformat(),
            is_building=gauges.is_building,
            last_build_error=gauges.last_build_error,
            last_build_at=rfc3339(gauges.last_build_at_wall),
            node_resources=_node_resources(gauges),
            **{name: getattr(self, name) for name in NODE_COUNTERS},
        )

    async def save(self, path: Path) -> bool:
        """Write the snapshot if anything changed since the last time, off the loop; False if it could not be."""
        return await self._file.write(path, self.snapshot())

    def restore(self, path: Path) -> bool:
        """Continue from *path*, ours or llamesh's, so that counters stay monotonic; a bad file is a warning."""
        try:
            state = msgspec.json.decode(path.read_bytes(), type=Snapshot, strict=False)
        except FileNotFoundError:
            return False
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            _log.warning("counters start at 0: %s cannot be read: %s", path, error)
            return False
        for name in NODE_COUNTERS:
            setattr(self, name, max(0, getattr(state, name)))
        for key, entry in state.hashes.items():
            self.hash(key).restore(entry)
        for build, counted in state.builds.items():
            outcomes = {outcome: max(0, count) for outcome, count in counted.outcomes.items()}
            self._builds[build] = BuildState(outcomes, counted.last_duration_s)
        return True


def _node_resources(gauges: Gauges) -> NodeResources:
    vram, ram = gauges.used.mib.get(VRAM, 0), gauges.used.mib.get(RAM, 0)
    gpus = gauges.devices.budgeted if gauges.devices is not None else ()
    external_vram = sum(gauges.others.mib.values())
    return NodeResources(
        llamesh_vram_mb=vram,
        llamesh_sysmem_mb=ram,
        external_vram_mb=external_vram,
        effective_vram_mb=vram + external_vram,
        effective_sysmem_mb=ram,
        device_vram_used_mb=sum(gpu.used_mib for gpu in gpus),
        device_vram_total_mb=sum(gpu.total_mib for gpu in gpus),
        gpu_telemetry_available=bool(gpus),
        active_instances=sum(gauges.instances.values()),
        max_vram_mb=gauges.capacity.mib.get(VRAM),
        max_sysmem_mb=gauges.capacity.mib.get(RAM),
    )


class _StateFile:
    """Writes snapshots atomically, one at a time and only when they differ; warns once until it works again."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._written: Snapshot | None = None
        self._failing = False

    async def write(self, path: Path, snapshot: Snapshot) -> bool:
        async with self._lock:
            comparable = msgspec.structs.replace(snapshot, updated_at="")
            if comparable == self._written:
                return True
            try:
                await asyncio.to_thread(_replace, path, snapshot)
            except OSError as error:
                self._warn(path, error)
                return False
            self._written, self._failing = comparable, False
            return True

    def _warn(self, path: Path, error: OSError) -> None:
        if not self._failing:  # edge-triggered: a disk that is full for a day is one line, not 8640
            _log.warning("metrics are kept in memory only: cannot write %s: %s", path, error)
        self._failing = True


def _replace(path: Path, snapshot: Snapshot) -> None:
    replace_file(path, msgspec.json.format(msgspec.json.encode(snapshot), indent=2))
