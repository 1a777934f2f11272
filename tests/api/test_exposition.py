"""/metrics and /metrics/json: what promtool would check, and that counters never go back."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mesh.api import observe
from mesh.api.exposition import render
from mesh.core.resources import Resources
from mesh.metrics import NODE_COUNTERS, Gauges, Metrics
from tests.api.asgi import request
from tests.api.mesh import FakeMesh
from tests.api.node import Node
from tests.fakes_builds import OLD, FakeBuilds, attempt, status
from tests.fakes_supervisor import FakeInstance
from tests.members import member, profile

SAMPLE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(\{(?:[a-z_]+="(?:[^"\\\n]|\\[\\"n])*",?)*\})? (\S+)')
SUFFIXES = {
    "counter": (r"",),
    "gauge": ("",),
    "summary": ("_sum", "_count"),
    "histogram": ("_bucket", "_sum", "_count"),
}


def busy_node() -> Node:
    node = Node()
    metrics = node.ctx.metrics
    for number, name in enumerate(NODE_COUNTERS, 1):
        setattr(metrics, name, number)
    for args_hash, name in (("a1", "Smol"), ("b2", 'odd "na\\me"\n'), ("b2", "other")):
        model = metrics.model(args_hash, name)
        model.requests_total += 2
        model.tokens_generated_total += 50
        model.observe(0.2, 0.02)
        model.observe(9999.0)
    metrics.build_ended("default", "installed", duration_s=492.5)
    metrics.build_ended('odd "na\\me"', "failed", duration_s=3.0)
    metrics.build_ended("default", "unchanged")
    node.ctx.builds = FakeBuilds(status(), status("cuda", current=attempt(1, "cuda"), live_commit=None))
    node.supervisor.views = [FakeInstance("i-1", "smol:default", "Smol", active=3)]
    node.supervisor.waiting = {"smol:default": 4}
    node.supervisor.capacity = Resources.of(ram_mib=2048)
    node.supervisor.used = Resources.of(ram_mib=512, vram_mib=1)
    return node


def check_like_promtool(text: str) -> None:
    """Fail on what ``promtool check metrics`` reports, and on families that are not contiguous."""
    kinds: dict[str, str] = {}
    helped: set[str] = set()
    finished: set[str] = set()
    current = ""
    samples: set[str] = set()
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# "):
            _, word, name, rest = line.split(" ", 3)
            if name != current:
                finished.add(current)
                assert name not in finished, f"{name} is not contiguous"
                current = name
            if word == "HELP":
                assert name not in helped, f"second HELP of {name}"
                assert rest.strip(), f"no help text for {name}"
                helped.add(name)
            else:
                assert name not in kinds, f"second TYPE of {name}"
                kinds[name] = rest
            continue
        found = SAMPLE.fullmatch(line)
        assert found, f"not a sample: {line!r}"
        float(found[3])
        assert found[1].removeprefix(current) in SUFFIXES[kinds[current]], f"{found[1]} stands under {current}"
        assert line.rsplit(" ", 1)[0] not in samples, f"{line} twice"
        samples.add(line.rsplit(" ", 1)[0])
    assert helped == set(kinds)
    for name, kind in kinds.items():
        assert name.endswith("_total") == (kind == "counter"), f"{name} is a {kind}"
        assert not re.search(r"_(ms|mb|mib|milliseconds|megabytes)(_|$)", name), f"{name} is not in a base unit"
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name)


async def test_metrics_pass_promtools_checks() -> None:
    """trap 96"""
    answer = await request(busy_node().app, "GET", "/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    check_like_promtool(answer.body.decode())


def meshed_node() -> Node:
    node = busy_node()
    odd = 'odd "na\\me"'
    mesh = FakeMesh(
        node,
        member(1, profile("q:default", ready=1)),
        member(2, node_id=odd, status="dead"),
        member(3, node_id="twice"),
        member(4, node_id="twice", status="dead"),
    )
    peer = mesh.peers.named("n1")
    assert peer is not None
    peer.measured(0.25)
    peer.failed(peer.begin("q:default"))
    peer.begin("q:default")
    peer.corrected("q:default", "queue_full", peer.stamp)
    mesh.clock.time += 7
    return node


async def test_a_node_in_a_mesh_passes_too() -> None:
    """trap 96: also where a name has two keys, which would be the same series twice."""
    check_like_promtool((await request(meshed_node().app, "GET", "/metrics")).body.decode())


async def test_a_mesh_without_others_passes_too() -> None:
    node = Node()
    FakeMesh(node)
    check_like_promtool((await request(node.app, "GET", "/metrics")).body.decode())


async def test_peers_are_told_of_by_name() -> None:
    found = await samples(meshed_node())

    def value(name: str, peer: str = "n1", **labels: str) -> float | None:
        return found.get(("llama_mesh_peer_" + name, frozenset({"peer": peer, **labels}.items())))

    assert [value("up", peer) for peer in ("n1", 'odd "na\\me"', "twice", "node-a")] == [1, 0, 1, None]
    assert (value("record_age_seconds"), value("round_trip_seconds"), value("requests")) == (7, 0.25, 2)
    assert value("round_trip_seconds", "twice") is None, "not measured"
    assert [value("circuit", phase=phase) for phase in ("closed", "open", "half_open")] == [1, 0, 0]
    assert (value("forwards_total"), value("forward_failures_total"), value("forward_refusals_total")) == (2, 1, 1)


async def test_a_node_in_no_mesh_has_no_peers_and_says_whether_it_is_drained() -> None:
    node = Node()
    found = await samples(node)
    assert not any(name.startswith("llama_mesh_peer_") for name, _ in found)
    assert found["llama_mesh_drained", frozenset()] == 0
    node.ctx.drained = True
    assert (await samples(node))["llama_mesh_drained", frozenset()] == 1


async def test_an_idle_node_passes_too() -> None:
    """trap 96"""
    check_like_promtool((await request(Node().app, "GET", "/metrics")).body.decode())


@pytest.mark.parametrize(
    "broken",
    [
        "# HELP a_total x\n# TYPE a_total counter\na_total 1\n# HELP b x\n# TYPE b gauge\nb 1\na_total 2\n",
        "# HELP a x\n# TYPE a counter\na 1\n",
        "# HELP a_total x\n# TYPE a_total counter\n# TYPE a_total counter\na_total 1\n",
        '# HELP a_total x\n# TYPE a_total counter\na_total{m="x"y"} 1\n',
        "# HELP a_ms x\n# TYPE a_ms gauge\na_ms 1\n",
    ],
)
def test_the_check_itself_finds_faults(broken: str) -> None:
    with pytest.raises(AssertionError):
        check_like_promtool(broken)


async def samples(node: Node) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = (await request(node.app, "GET", "/metrics")).body.decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_values_are_what_was_counted() -> None:
    found = await samples(busy_node())

    def value(name: str, **labels: str) -> float:
        return found["llama_mesh_" + name, frozenset(labels.items())]

    assert value("requests_total") == NODE_COUNTERS.index("requests_total") + 1
    assert value("queue_drops_total", reason="timeout") == NODE_COUNTERS.index("queue_drops_timeout") + 1
    assert value("queue_wait_seconds_sum") == (NODE_COUNTERS.index("queue_wait_total_ms") + 1) / 1000
    assert value("build_info", version=Metrics().snapshot().version, engine_version="b123") == 1
    assert value("instances", state="ready") == 1
    assert value("instances", state="draining") == 0
    assert value("active_requests", model="Smol") == 3
    assert value("queue_length", model="Smol") == 4
    assert value("memory_used_bytes", kind="ram") == 512 * 1024 * 1024
    assert value("memory_limit_bytes", kind="ram") == 2048 * 1024 * 1024
    assert ("llama_mesh_memory_limit_bytes", frozenset({("kind", "vram")})) not in found  # not limited
    odd = {"model": 'odd "na\\me"\n', "args_hash": "b2"}
    assert value("model_generated_tokens_total", **odd) == 50
    assert value("request_duration_seconds_bucket", le="0.25", **odd) == 1
    assert value("request_duration_seconds_bucket", le="1800.0", **odd) == 1
    assert value("request_duration_seconds_bucket", le="+Inf", **odd) == 2
    assert value("request_duration_seconds_count", **odd) == 2
    assert value("request_duration_seconds_sum", **odd) == pytest.approx(9999.2)
    assert value("time_to_first_token_seconds_count", **odd) == 1
    assert [value("builds_total", build="default", outcome=how) for how in ("installed", "unchanged")] == [1, 1]
    assert value("builds_total", build='odd "na\\me"', outcome="failed") == 1
    assert [value("build_in_progress", build=name) for name in ("default", "cuda")] == [0, 1]
    assert value("engine_build_info", build="default", commit=OLD) == 1
    assert value("engine_build_info", build="cuda", commit="") == 1
    assert value("build_last_duration_seconds", build="default") == 492.5


async def test_no_counter_goes_back_across_a_restart(tmp_path: Path) -> None:
    """trap 96"""
    before = busy_node()
    await before.ctx.metrics.save(tmp_path / "m.json")
    after = Node()
    after.ctx.metrics.restore(tmp_path / "m.json")
    old, new = await samples(before), await samples(after)
    counters = {
        key
        for key in old
        if key[0].startswith("llama_mesh_") and key[0].endswith(("_total", "_count", "_sum", "_bucket"))
    }
    assert len(counters) > 60
    for key in counters:
        assert new[key] >= old[key], key


async def test_a_gauge_of_the_running_total_is_in_json_with_llameshs_names() -> None:
    node = busy_node()
    node.ctx.metrics.current_requests = 5
    answer = await request(node.app, "GET", "/metrics/json")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json["current_requests"] == 5
    assert answer.json["queue_length"] == 4
    assert answer.json["hashes"]["a1"]["display_names"] == ["Smol"]
    assert answer.json["node_resources"]["llamesh_sysmem_mb"] == 512


async def test_rendering_happens_off_the_loops_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """trap 108"""
    threads: list[str] = []

    def spy(*arguments: Any) -> bytes:
        threads.append(threading.current_thread().name)
        return render(*arguments)

    monkeypatch.setattr(observe, "render", spy)
    await request(Node().app, "GET", "/metrics")
    assert threads != [threading.main_thread().name]
    assert len(threads) == 1


def test_render_needs_nothing_but_its_arguments() -> None:
    metrics = Metrics("n", 1.0)
    text = render(metrics.snapshot(Gauges()), Gauges()).decode()
    assert "llama_mesh_start_time_seconds 1.0" in text
    assert "process_open_fds" in text
