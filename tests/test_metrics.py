"""mesh.metrics: counting, the snapshot with llamesh's keys, and the file that survives restarts and full disks."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core.resources import Resources
from mesh.metrics import NODE_COUNTERS, Gauges, Metrics
from mesh.metrics.counters import LATENCY_BOUNDS_S, Histogram, p95_ms

LLAMESH_KEYS = {
    "node_id", "version", "llama_cpp_version", "started_at_unix", "requests_total", "errors_total", "current_requests",
    "queue_length", "queue_drops_full", "queue_drops_timeout", "queue_drops_global_limit",
    "wedged_instances_killed_total", "queue_pending_tokens", "queue_wait_total_ms", "queue_wait_count",
    "token_counting_disabled_total", "skipped_stream_cleanups_total", "peer_stream_body_aborts_total", "hashes",
    "updated_at", "is_building", "last_build_error", "last_build_at", "node_resources",
}  # fmt: skip
LLAMESH_HASH_KEYS = {
    "display_names", "requests_total", "errors_total", "tokens_generated_total", "avg_latency_ms", "total_latency_ms",
    "p95_latency_ms", "peak_vram_mb", "peak_sysmem_mb", "sample_count", "parsed_model_params",
}  # fmt: skip
LLAMESH_RESOURCE_KEYS = {
    "llamesh_vram_mb", "llamesh_sysmem_mb", "external_vram_mb", "effective_vram_mb", "effective_sysmem_mb",
    "device_vram_used_mb", "device_vram_total_mb", "gpu_telemetry_available", "active_instances", "max_vram_mb",
    "max_sysmem_mb",
}  # fmt: skip

#: What llamesh 1.20 itself writes; the newest keys are missing, as in its older versions.
LLAMESH_FILE: dict[str, Any] = {
    "node_id": "old-node",
    "llama_cpp_version": None,
    "requests_total": 1000,
    "errors_total": 7,
    "current_requests": 3,
    "queue_drops_full": 2,
    "hashes": {
        "e3b0c44298fc1c14": {
            "display_names": ["qwen", "qwen:long"],
            "requests_total": 990,
            "errors_total": 5,
            "tokens_generated_total": 123456,
            "avg_latency_ms": 1500.5,
            "peak_vram_mb": 7000,
            "peak_sysmem_mb": 900,
            "sample_count": 40,
        }
    },
    "updated_at": "2026-01-01T00:00:00Z",
}


def as_json(metrics: Metrics, gauges: Gauges | None = None) -> dict[str, Any]:
    result: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(metrics.snapshot(gauges)))
    return result


def busy_metrics() -> Metrics:
    metrics = Metrics("n1", started_at_wall=1_700_000_000.5)
    for number, name in enumerate(NODE_COUNTERS, 1):
        setattr(metrics, name, number)
    model = metrics.model("abc", "smol")
    model.requests_total, model.errors_total = 3, 1
    model.tokens_generated_total, model.tokens_prompt_total = 500, 40
    for latency_s in (0.5, 1.0, 2.0):
        model.observe(latency_s, 0.1)
    metrics.build_ended("default", "installed", duration_s=492.0)
    metrics.build_ended("default", "unchanged")
    return metrics


def test_the_snapshot_has_all_of_llameshs_keys() -> None:
    """Compatibility contract, llamesh-config.md 9.10."""
    gauges = Gauges(
        instances={"ready": 1, "spawning": 1},
        queued={"smol": 2},
        used=Resources.of(ram_mib=100, vram_mib=50),
        capacity=Resources.of(ram_mib=1000),
        engine_version="b1",
    )
    found = as_json(busy_metrics(), gauges)
    assert found.keys() >= LLAMESH_KEYS
    assert found["hashes"]["abc"].keys() >= LLAMESH_HASH_KEYS
    assert found["node_resources"].keys() == LLAMESH_RESOURCE_KEYS
    assert found["started_at_unix"] == 1_700_000_000
    assert found["llama_cpp_version"] == "b1"
    assert found["queue_length"] == 2
    resources = found["node_resources"]
    assert (resources["llamesh_vram_mb"], resources["effective_sysmem_mb"]) == (50, 100)
    assert (resources["max_vram_mb"], resources["max_sysmem_mb"]) == (None, 1000)
    assert resources["active_instances"] == 2


def test_builds_are_told_with_llameshs_names() -> None:
    """Compatibility contract, llamesh-config.md 9.10: RFC 3339."""
    gauges = Gauges(is_building=True, last_build_error="cmake failed", last_build_at_wall=1_700_000_000.0)
    found = as_json(Metrics(), gauges)
    assert (found["is_building"], found["last_build_error"]) == (True, "cmake failed")
    assert found["last_build_at"] == "2023-11-14T22:13:20+00:00"
    assert as_json(Metrics())["last_build_at"] is None


def test_a_hash_sums_its_names_and_counts_latency_once() -> None:
    """trap 95"""
    metrics = Metrics()
    metrics.model("abc", "smol").requests_total += 1
    metrics.model("abc", "smol").observe(1.0)
    metrics.model("abc", "smol:copy").requests_total += 1
    metrics.model("abc", "smol:copy").observe(3.0)
    entry = as_json(metrics)["hashes"]["abc"]
    assert entry["display_names"] == ["smol", "smol:copy"]
    assert (entry["requests_total"], entry["total_latency_ms"], entry["avg_latency_ms"]) == (2, 4000, 2000.0)


def test_model_returns_the_same_object_every_time() -> None:
    metrics = Metrics()
    assert metrics.model("abc", "smol") is metrics.model("abc", "smol")
    assert metrics.model("abc", "smol") is not metrics.model("abd", "smol")


@given(st.lists(st.floats(0, 4000), max_size=50))
def test_a_histogram_counts_each_value_in_the_first_bucket_that_holds_it(values: list[float]) -> None:
    histogram = Histogram(LATENCY_BOUNDS_S)
    for value in values:
        histogram.observe(value)
    for position, bound in enumerate(LATENCY_BOUNDS_S):
        assert sum(histogram.counts[: position + 1]) == sum(value <= bound for value in values)
    assert sum(histogram.counts) == len(values)


def test_p95_is_llameshs_and_looks_back_100_requests() -> None:
    assert p95_ms([]) == 0
    assert p95_ms([5.0]) == 5000
    assert p95_ms(n / 1000 for n in range(1, 101)) == 95
    model = Metrics().model("abc", "smol")
    for _ in range(150):
        model.observe(9.0)
    for _ in range(100):
        model.observe(1.0)
    assert model.recent_s() == [1.0] * 100


async def test_counters_continue_after_a_restart(tmp_path: Path) -> None:
    """trap 96: monotonic across restart, histograms and per-model counters included."""
    path = tmp_path / "deep" / "node-metrics.json"
    before = busy_metrics()
    before.hash("abc").peak_vram_mb = 77
    before.hash("abc").parsed_model_params = {"params": {"n_ctx": 1}, "llama_cpp_version": None}
    assert await before.save(path)
    after = Metrics("n1")
    assert after.restore(path)
    old, new = as_json(before), as_json(after)
    for name in (*NODE_COUNTERS,):
        assert new[name] == old[name]
    old["hashes"]["abc"]["p95_latency_ms"] = 0  # a gauge over recent requests: it starts anew
    assert new["hashes"] == old["hashes"]
    assert new["builds"] == {"default": {"outcomes": {"installed": 1, "unchanged": 1}, "last_duration_s": 492.0}}
    assert after.current_requests == 0
    after.build_ended("default", "unchanged")
    assert as_json(after)["builds"]["default"] == {
        "outcomes": {"installed": 1, "unchanged": 2},
        "last_duration_s": 492.0,
    }
    model = after.model("abc", "smol")
    model.requests_total += 1
    model.observe(1.0, 0.1)
    assert as_json(after)["hashes"]["abc"]["total_latency_ms"] == 4500


async def test_llameshs_own_file_is_continued_and_stays_monotonic(tmp_path: Path) -> None:
    path = tmp_path / "node-metrics.json"
    path.write_text(json.dumps(LLAMESH_FILE))
    metrics = Metrics("n1")
    assert metrics.restore(path)
    assert (metrics.requests_total, metrics.queue_drops_full, metrics.current_requests) == (1000, 2, 0)
    entry = as_json(metrics)["hashes"]["e3b0c44298fc1c14"]
    assert (entry["requests_total"], entry["tokens_generated_total"]) == (990, 123456)
    assert entry["total_latency_ms"] == round(1500.5 * 990)
    assert (entry["peak_vram_mb"], entry["sample_count"]) == (7000, 40)
    assert entry["display_names"] == ["qwen", "qwen:long"]
    await metrics.save(path)
    again = Metrics("n1")
    again.restore(path)
    assert as_json(again)["hashes"] == as_json(metrics)["hashes"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"requests_total": "many"}', b'{"hashes": {"a": 1}}', b'{"x":' * 50_000],
)
def test_a_broken_file_is_a_warning_and_counters_start_at_0(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "node-metrics.json"
    path.write_bytes(content)
    metrics = Metrics()
    assert not metrics.restore(path)
    assert str(path) in caplog.text
    assert as_json(metrics)["requests_total"] == 0
    assert as_json(metrics)["hashes"] == {}


def test_negative_and_missing_values_are_tolerated(tmp_path: Path) -> None:
    path = tmp_path / "node-metrics.json"
    path.write_text(
        '{"requests_total": -5, "hashes": {"a": {"display_names": ["x"], "requests_total": -1}},'
        ' "builds": {"default": {"outcomes": {"failed": -2}}}}'
    )
    metrics = Metrics()
    assert metrics.restore(path)
    assert as_json(metrics)["builds"] == {"default": {"outcomes": {"failed": 0}, "last_duration_s": None}}
    assert metrics.requests_total == 0
    assert metrics.model("a", "x").requests_total == 0


def test_no_file_is_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not Metrics().restore(tmp_path / "none.json")
    assert not caplog.text


async def test_histograms_counted_by_other_bounds_are_dropped_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "node-metrics.json"
    await busy_metrics().save(path)
    content = json.loads(path.read_bytes())
    content["hashes"]["abc"]["models"]["smol"]["latency"]["le"][0] = 0.04
    path.write_text(json.dumps(content))
    metrics = Metrics()
    assert metrics.restore(path)
    model = metrics.model("abc", "smol")
    assert sum(model.latency.counts) == 0
    assert sum(model.ttft.counts) == 3
    assert as_json(metrics)["hashes"]["abc"]["total_latency_ms"] == 3500  # the sum is not lost


async def test_nothing_is_written_while_nothing_changes(tmp_path: Path) -> None:
    """trap 97: debounced"""
    path = tmp_path / "node-metrics.json"
    metrics = busy_metrics()
    await metrics.save(path)
    written = path.stat().st_ino
    assert await metrics.save(path)
    assert path.stat().st_ino == written
    metrics.requests_total += 1
    await metrics.save(path)
    assert json.loads(path.read_text())["requests_total"] == metrics.requests_total


async def test_the_file_is_replaced_atomically_off_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """trap 97: the old file stays whole until the new one is on disk; concurrent saves do not meet."""
    path = tmp_path / "node-metrics.json"
    metrics = busy_metrics()
    await metrics.save(path)
    before = path.read_bytes()
    synced: list[tuple[str, bytes]] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append((threading.current_thread().name, path.read_bytes()))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    metrics.requests_total += 1
    assert all(await asyncio.gather(*(metrics.save(path) for _ in range(5))))
    assert [content for _, content in synced] == [before]
    assert synced[0][0] != threading.main_thread().name
    assert os.listdir(tmp_path) == ["node-metrics.json"]


async def test_a_path_that_cannot_be_written_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bad input list: a full disk for metrics. One warning when it begins, one again after it worked between."""
    (tmp_path / "file").write_text("not a directory")
    metrics = busy_metrics()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert not await metrics.save(tmp_path / "file" / "node-metrics.json")
        assert len(caplog.records) == 1
        assert await metrics.save(tmp_path / "ok.json")
        metrics.requests_total += 1
        assert not await metrics.save(tmp_path / "file" / "node-metrics.json")
        assert len(caplog.records) == 2


async def test_a_failed_write_leaves_the_old_file_and_no_scratch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "node-metrics.json"
    metrics = busy_metrics()
    await metrics.save(path)
    before = path.read_bytes()

    def no_space(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    metrics.requests_total += 1
    assert not await metrics.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["node-metrics.json"]


def test_a_snapshot_is_a_copy() -> None:
    metrics = busy_metrics()
    snapshot = metrics.snapshot()
    metrics.model("abc", "smol").observe(1.0)
    metrics.model("new", "other")
    assert "new" not in snapshot.hashes
    latency = snapshot.hashes["abc"].models["smol"].latency
    assert latency is not None
    assert sum(latency.counts) == 3
