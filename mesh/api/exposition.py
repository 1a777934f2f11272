"""Renders a snapshot in Prometheus' text format. Pure: it may run in a thread, and does (trap 108)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Final

from prometheus_client import ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector, CollectorRegistry

from mesh.core.breaker import Phase
from mesh.core.lifecycle import State
from mesh.core.resources import Resources
from mesh.metrics import Gauges, HistogramState, ModelState, Snapshot

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX: Final = "llama_mesh_"
_MIB: Final = 1024 * 1024

#: (name without _total, snapshot key, help)
_NODE_COUNTERS: Final = (
    ("requests", "requests_total", "Inference requests accepted for serving."),
    ("errors", "errors_total", "Inference requests that ended in an error."),
    ("client_disconnects", "client_disconnects_total", "Requests whose client left before the end."),
    ("upstream_retries", "upstream_retries_total", "Requests sent again before their first response byte."),
    ("instance_spawns", "spawns_total", "Instances started."),
    ("instance_spawn_failures", "spawn_failures_total", "Instances that did not become ready."),
    ("instance_crashes", "crashes_total", "Ready instances that died unasked."),
    ("instance_evictions", "evictions_total", "Instances stopped to make room."),
    ("wedged_instances_killed", "wedged_instances_killed_total", "Instances killed for making no progress."),
    ("token_counting_disabled", "token_counting_disabled_total", "Streams whose tokens could not be counted."),
)
_DROPS: Final = (
    ("full", "queue_drops_full"),
    ("timeout", "queue_drops_timeout"),
    ("global_limit", "queue_drops_global_limit"),
)
_MODEL_COUNTERS: Final = (
    ("model_requests", "requests_total", "Inference requests per model."),
    ("model_errors", "errors_total", "Failed inference requests per model."),
    ("model_generated_tokens", "tokens_generated_total", "Tokens generated per model, reasoning and tools included."),
    ("model_prompt_tokens", "tokens_prompt_total", "Prompt tokens per model."),
)
_PEER_COUNTERS: Final = (
    ("peer_forwards", "forwards_total", "Requests passed on to it."),
    ("peer_forward_failures", "failures_total", "Of those, the ones that it did not answer, or not to the end."),
    ("peer_forward_refusals", "refusals_total", "Of those, the ones that it turned away."),
)
_MODEL_LABELS: Final = ("model", "args_hash")


def render(snapshot: Snapshot, gauges: Gauges) -> bytes:
    """Return the exposition: every family contiguous, HELP and TYPE once each (trap 96)."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_SnapshotCollector(snapshot, gauges))
    ProcessCollector(registry=registry)  # process_cpu_seconds_total, process_open_fds, ...
    text: bytes = generate_latest(registry)
    return text


class _SnapshotCollector(Collector):
    """Presents one snapshot to prometheus_client."""

    def __init__(self, snapshot: Snapshot, gauges: Gauges) -> None:
        self._snapshot = snapshot
        self._gauges = gauges

    def collect(self) -> Iterator[Metric]:
        yield from _node(self._snapshot)
        yield from _now(self._snapshot, self._gauges)
        yield from _peers(self._gauges)
        yield from _builds(self._snapshot, self._gauges)
        yield from _models(self._snapshot)


def _node(snapshot: Snapshot) -> Iterator[Metric]:
    info = GaugeMetricFamily(_PREFIX + "build_info", "Always 1; the labels tell.", labels=("version", "engine_version"))
    info.add_metric((snapshot.version, snapshot.llama_cpp_version or ""), 1)
    yield info
    yield _gauge("start_time_seconds", "Unix time at which the node started.", snapshot.started_at_unix)
    for name, key, text in _NODE_COUNTERS:
        yield CounterMetricFamily(_PREFIX + name, text, value=getattr(snapshot, key))
    drops = CounterMetricFamily(_PREFIX + "queue_drops", "Requests that left a queue unserved.", labels=("reason",))
    for reason, key in _DROPS:
        drops.add_metric((reason,), getattr(snapshot, key))
    yield drops
    yield SummaryMetricFamily(
        _PREFIX + "queue_wait_seconds",
        "Time that admitted requests waited for an instance.",
        count_value=snapshot.queue_wait_count,
        sum_value=snapshot.queue_wait_total_ms / 1000,
    )


def _now(snapshot: Snapshot, gauges: Gauges) -> Iterator[Metric]:
    yield _gauge("current_requests", "Inference requests in progress or waiting.", snapshot.current_requests)
    states = {str(state): gauges.instances.get(state, 0) for state in State}
    yield _labelled("instances", "Instances per state.", "state", states.items())
    yield _labelled("active_requests", "Requests inside instances.", "model", sorted(gauges.active.items()))
    yield _labelled("queue_length", "Requests waiting for an instance.", "model", sorted(gauges.queued.items()))
    yield _labelled("memory_used_bytes", "Memory charged to instances.", "kind", _bytes(gauges.used))
    yield _labelled("memory_limit_bytes", "The budget; absent if not limited.", "kind", _bytes(gauges.capacity))
    yield _labelled("memory_foreign_bytes", "GPU memory that other programs use.", "kind", _bytes(gauges.others))
    gpus = [] if gauges.devices is None else [(g.kind, g) for g in gauges.devices.budgeted]
    yield _labelled("gpu_memory_used_bytes", "As the driver says.", "kind", [(k, g.used_mib * _MIB) for k, g in gpus])
    yield _labelled("gpu_memory_total_bytes", "As the driver says.", "kind", [(k, g.total_mib * _MIB) for k, g in gpus])


def _peers(gauges: Gauges) -> Iterator[Metric]:
    yield _gauge("drained", "1 if an operator took the node out of rotation.", int(gauges.drained))
    if gauges.peers is None:
        return
    peers = gauges.peers
    ages = [(p.node_id, p.record_age_s) for p in peers]
    rtts = [(p.node_id, p.rtt_s) for p in peers if p.rtt_s is not None]
    yield _labelled(
        "peer_up", "1 for a member of the mesh that lives.", "peer", [(p.node_id, int(p.up)) for p in peers]
    )
    yield _labelled("peer_record_age_seconds", "Since its state was last heard.", "peer", ages)
    yield _labelled("peer_round_trip_seconds", "Moving mean over its link.", "peer", rtts)
    yield _labelled("peer_requests", "Own requests in flight there.", "peer", [(p.node_id, p.in_flight) for p in peers])
    circuit = GaugeMetricFamily(_PREFIX + "peer_circuit", "1 for the breaker's phase.", labels=("peer", "phase"))
    for peer in peers:
        for phase in Phase:
            circuit.add_metric((peer.node_id, str(phase)), int(peer.circuit == phase))
    yield circuit
    for name, field, text in _PEER_COUNTERS:
        counter = CounterMetricFamily(_PREFIX + name, text, labels=("peer",))
        for peer in peers:
            counter.add_metric((peer.node_id,), getattr(peer, field))
        yield counter


def _builds(snapshot: Snapshot, gauges: Gauges) -> Iterator[Metric]:
    """Yield what there is to tell of builds of llama.cpp; ``build`` is the configured name."""
    ended = CounterMetricFamily(_PREFIX + "builds", "Attempts that ended, by how.", labels=("build", "outcome"))
    for build, state in sorted(snapshot.builds.items()):
        for outcome, count in sorted(state.outcomes.items()):
            ended.add_metric((build, outcome), count)
    yield ended
    busy = [(build.name, int(build.in_progress)) for build in gauges.builds]
    yield _labelled("build_in_progress", "1 while it is built, tested or compared.", "build", busy)
    # not "build_info": that is the node's own version, and a family has one set of labels
    live = GaugeMetricFamily(_PREFIX + "engine_build_info", "Always 1; what is installed.", labels=("build", "commit"))
    for gauge in gauges.builds:
        live.add_metric((gauge.name, gauge.live_commit or ""), 1)
    yield live
    times = [(b, s.last_duration_s) for b, s in sorted(snapshot.builds.items()) if s.last_duration_s is not None]
    yield _labelled("build_last_duration_seconds", "Of the last one that really built.", "build", times)


def _models(snapshot: Snapshot) -> Iterator[Metric]:
    rows = [((name, key), state) for key, entry in snapshot.hashes.items() for name, state in entry.models.items()]
    rows.sort(key=lambda row: row[0])
    for family, key, text in _MODEL_COUNTERS:
        counter = CounterMetricFamily(_PREFIX + family, text, labels=_MODEL_LABELS)
        for labels, state in rows:
            counter.add_metric(labels, getattr(state, key))
        yield counter
    yield _histogram("request_duration_seconds", "Whole requests, queue included.", rows, "latency")
    yield _histogram("time_to_first_token_seconds", "From the request to the first byte of its answer.", rows, "ttft")


def _histogram(name: str, text: str, rows: Iterable[tuple[tuple[str, str], ModelState]], key: str) -> Metric:
    family = HistogramMetricFamily(_PREFIX + name, text, labels=_MODEL_LABELS)
    for labels, model in rows:
        state: HistogramState | None = getattr(model, key)
        if state is not None:
            bounds = [*(str(bound) for bound in state.le), "+Inf"]
            family.add_metric(labels, list(zip(bounds, accumulate(state.counts), strict=True)), state.sum)
    return family


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(_PREFIX + name, text, value=value)


def _labelled(name: str, text: str, label: str, values: Iterable[tuple[str, float]]) -> Metric:
    family = GaugeMetricFamily(_PREFIX + name, text, labels=(label,))
    for value, number in values:
        family.add_metric((value,), number)
    return family


def _bytes(resources: Resources) -> list[tuple[str, float]]:
    return [(kind, mib * _MIB) for kind, mib in sorted(resources.mib.items())]
