"""The typed snapshot of all counters, key by key llamesh's ``/metrics/json`` and ``node-metrics.json``. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from mesh.core.devices import Devices
from mesh.core.resources import Resources


@dataclass(frozen=True, slots=True)
class PeerGauge:
    """One other node, as seen from this one."""

    node_id: str
    up: bool  #: a member that is not declared dead
    circuit: str
    rtt_s: float | None
    record_age_s: float
    in_flight: int  #: own requests there
    forwards_total: int
    failures_total: int
    refusals_total: int


@dataclass(frozen=True, slots=True)
class BuildGauge:
    """One build of llama.cpp."""

    name: str
    in_progress: bool
    live_commit: str | None  #: what its binary was made from, None if not known


@dataclass(frozen=True, slots=True)
class Gauges:
    """What is true now, read from its owners at the moment of a snapshot."""

    instances: Mapping[str, int] = field(default_factory=dict)  #: per lifecycle state
    active: Mapping[str, int] = field(default_factory=dict)  #: requests inside instances, per model id
    queued: Mapping[str, int] = field(default_factory=dict)  #: waiting requests per model id
    used: Resources = field(default_factory=Resources)
    capacity: Resources = field(default_factory=Resources)
    others: Resources = field(default_factory=Resources)  #: what other programs use of each GPU
    devices: Devices | None = None  #: as last sampled
    engine_version: str | None = None
    peers: tuple[PeerGauge, ...] | None = None  #: None if this node is in no mesh
    drained: bool = False
    builds: tuple[BuildGauge, ...] = ()
    is_building: bool = False
    last_build_error: str | None = None
    last_build_at_wall: float | None = None


class HistogramState(msgspec.Struct, frozen=True):
    """A histogram's counts per bucket (not cumulative; the last one is +Inf), with the bounds they were counted by."""

    le: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float


class ModelState(msgspec.Struct, frozen=True):
    """The counters of one model name under one set of arguments."""

    requests_total: int = 0
    errors_total: int = 0
    tokens_generated_total: int = 0
    tokens_prompt_total: int = 0
    latency: HistogramState | None = None
    ttft: HistogramState | None = None


class HashState(msgspec.Struct, frozen=True):
    """llamesh's entry per args_hash; ``models`` is ours and splits it by name."""

    display_names: list[str] = msgspec.field(default_factory=list)
    requests_total: int = 0
    errors_total: int = 0
    tokens_generated_total: int = 0
    avg_latency_ms: float = 0.0
    total_latency_ms: int = 0
    p95_latency_ms: int = 0
    peak_vram_mb: int = 0
    peak_sysmem_mb: int = 0
    sample_count: int = 0
    parsed_model_params: dict[str, Any] | None = None
    models: dict[str, ModelState] = msgspec.field(default_factory=dict)


class BuildState(msgspec.Struct, frozen=True):
    """The attempts at one build that have ended, by their outcome; the time is of the last that really built."""

    outcomes: dict[str, int] = msgspec.field(default_factory=dict)
    last_duration_s: float | None = None


class NodeResources(msgspec.Struct, frozen=True):
    """Memory as llamesh reports it; a maximum that is null is not limited."""

    llamesh_vram_mb: int = 0
    llamesh_sysmem_mb: int = 0
    external_vram_mb: int = 0
    effective_vram_mb: int = 0
    effective_sysmem_mb: int = 0
    device_vram_used_mb: int = 0
    device_vram_total_mb: int = 0
    gpu_telemetry_available: bool = False
    active_instances: int = 0
    max_vram_mb: int | None = None
    max_sysmem_mb: int | None = None


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The whole of ``/metrics/json``; every key has a default, so that any version's file can be read."""

    node_id: str = ""
    version: str = ""
    llama_cpp_version: str | None = None
    started_at_unix: int = 0
    requests_total: int = 0
    errors_total: int = 0
    current_requests: int = 0
    queue_length: int = 0
    queue_drops_full: int = 0
    queue_drops_timeout: int = 0
    queue_drops_global_limit: int = 0
    wedged_instances_killed_total: int = 0
    queue_pending_tokens: int = 0
    queue_wait_total_ms: int = 0
    queue_wait_count: int = 0
    token_counting_disabled_total: int = 0
    skipped_stream_cleanups_total: int = 0
    peer_stream_body_aborts_total: int = 0
    client_disconnects_total: int = 0
    upstream_retries_total: int = 0
    spawns_total: int = 0
    spawn_failures_total: int = 0
    crashes_total: int = 0
    evictions_total: int = 0
    hashes: dict[str, HashState] = msgspec.field(default_factory=dict)
    builds: dict[str, BuildState] = msgspec.field(default_factory=dict)
    updated_at: str = ""
    is_building: bool = False
    last_build_error: str | None = None
    last_build_at: str | None = None
    node_resources: NodeResources = msgspec.field(default_factory=NodeResources)
