"""/admin/*: prewarm, unload, instances, and what happens when the client leaves."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mesh.api.request_scope import ADMIN_BODY_LIMIT_BYTES
from mesh.core.devices import Devices, Gpu
from mesh.core.footprint import Source
from mesh.core.lifecycle import State
from mesh.core.resources import Resources
from mesh.engine.memory_report import Holder, MemoryReport
from mesh.errors import CapacityError, InstanceError, TooLargeError
from tests.api.asgi import Exchange, request
from tests.api.node import AUTH, Node
from tests.fakes_supervisor import FakeFailure, FakeInstance

JSON = {"content-type": "application/json"}


def tasks() -> set[str]:
    return {task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()}


async def test_prewarm_waits_until_the_model_is_ready() -> None:
    node = Node()
    async with Exchange(node.app, "POST", "/admin/prewarm", headers=JSON, body=b'{"model": "smol"}') as exchange:
        await node.supervisor.prewarming.wait()
        assert not exchange.complete
        node.supervisor.loaded.set()
        await exchange.finished()
    assert exchange.status == 200
    assert (exchange.json["status"], exchange.json["message"]) == ("ok", "Model prewarmed")
    assert exchange.json["instance"]["id"] == "i-1"
    assert tasks() == set()


async def test_prewarm_without_waiting_answers_at_once() -> None:
    answer = await request(Node().app, "POST", "/admin/prewarm", json_body={"model": "Smol", "wait": False})
    assert (answer.status, answer.json) == (200, {"status": "ok", "message": "Model prewarmed", "instance": None})


async def test_a_client_that_leaves_while_prewarm_waits_frees_everything() -> None:
    """trap 2: the waiting caller of the supervisor and both tasks are gone."""
    node = Node()
    async with Exchange(node.app, "POST", "/admin/prewarm", headers=JSON, body=b'{"model": "Smol"}') as exchange:
        await node.supervisor.prewarming.wait()
        assert node.supervisor.loading == {"smol:default": 1}
        exchange.vanish()
        await exchange.finished()
    assert node.supervisor.loading == {"smol:default": 0}
    assert tasks() == set()


async def test_a_prewarm_that_is_cancelled_by_the_server_frees_everything() -> None:
    """trap 1"""
    node = Node()
    async with Exchange(node.app, "POST", "/admin/prewarm", headers=JSON, body=b'{"model": "Smol"}'):
        await node.supervisor.prewarming.wait()
    assert node.supervisor.loading == {"smol:default": 0}
    assert tasks() == set()


async def test_prewarm_ends_at_its_timeout() -> None:
    node = Node()
    body = {"model": "Smol", "timeout_s": 0.01}
    answer = await request(node.app, "POST", "/admin/prewarm", json_body=body)
    assert (answer.status, answer.json["status"]) == (503, "error")
    assert answer.json["error"]["type"] == "queue_timeout"
    assert answer.headers["retry-after"] == "5"
    assert node.supervisor.loading == {"smol:default": 0}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (CapacityError("Insufficient resources even after eviction"), 503),
        (TooLargeError("needs 9000 MiB, the budget is 8000"), 503),
        (InstanceError("llama-server exited with 1"), 503),
    ],
)
async def test_prewarm_tells_why_it_failed(error: Any, status: int) -> None:
    node = Node()
    node.supervisor.refusal = error
    answer = await request(node.app, "POST", "/admin/prewarm", json_body={"model": "Smol"})
    assert answer.status == status
    assert (answer.json["status"], answer.json["message"]) == ("error", error.message)
    assert answer.json["error"]["type"] == error.type


@pytest.mark.parametrize("path", ["/admin/prewarm", "/admin/unload"])
@pytest.mark.parametrize(
    ("headers", "body", "status", "message"),
    [
        (JSON, b"{}", 400, "Missing model field"),
        (JSON, b'{"model": null}', 400, "Missing model field"),
        (JSON, b'{"model": ""}', 400, "'model' must be a non-empty string"),
        (JSON, b'{"model": 5}', 400, "'model' must be a non-empty string"),
        (JSON, b'{"model": "nope"}', 404, "Model not found"),
        (JSON, b"{", 400, "Invalid JSON"),
        (JSON, b"", 400, "Invalid JSON"),
        (JSON, b"\xff", 400, "Invalid JSON"),
        (JSON, b"[]", 400, "the body must be a JSON object"),
        (JSON, b"[" * 50_000, 400, "Invalid JSON"),
        (JSON, b" " * (ADMIN_BODY_LIMIT_BYTES + 1), 413, "the body is larger than 65536 bytes"),
        ({"content-type": "text/plain"}, b'{"model": "Smol"}', 415, "must be sent as Content-Type: application/json"),
        ({}, b'{"model": "Smol"}', 415, "must be sent as Content-Type: application/json"),
    ],
)
async def test_bad_bodies(path: str, headers: dict[str, str], body: bytes, status: int, message: str) -> None:
    """traps 73, 74: llamesh's status and message, with the envelope beside them."""
    node = Node()
    answer = await request(node.app, "POST", path, headers=headers, body=body)
    assert answer.status == status
    assert answer.json["status"] == "error"
    assert message in answer.json["message"]
    assert answer.json["error"]["message"] == answer.json["message"]
    assert node.supervisor.unloaded == []


@pytest.mark.parametrize(
    "body", [{"wait": 1}, {"wait": "no"}, {"timeout_s": -1}, {"timeout_s": 0}, {"timeout_s": True}, {"timeout_s": "5"}]
)
async def test_bad_options(body: dict[str, Any]) -> None:
    answer = await request(Node().app, "POST", "/admin/prewarm", json_body={"model": "Smol", **body})
    assert answer.status == 400
    assert answer.json["error"]["param"] in body


async def test_a_body_that_does_not_come_is_a_408() -> None:
    node = Node(http={"body_read_timeout_ms": 10})
    async with Exchange(node.app, "POST", "/admin/prewarm", headers=JSON) as exchange:
        exchange._incoming.get_nowait()  # nothing arrives, not even the end
        await exchange.finished()
    assert exchange.status == 408
    assert exchange.json["error"]["type"] == "request_timeout"


async def test_a_draining_node_loads_nothing() -> None:
    node = Node()
    node.ctx.draining = True
    answer = await request(node.app, "POST", "/admin/prewarm", json_body={"model": "Smol"})
    assert (answer.status, answer.json["error"]["type"]) == (503, "draining")
    assert not node.supervisor.prewarming.is_set()


async def test_unload_one_and_all() -> None:
    node = Node()
    node.supervisor.views = [FakeInstance("i-1", "smol:default", "Smol"), FakeInstance("i-2", "gone:x", "gone:x")]
    answer = await request(node.app, "POST", "/admin/unload", json_body={"model": "GPT-4o"})
    assert answer.json == {"status": "ok", "message": "1 instance told to stop", "unloaded": 1}
    answer = await request(node.app, "POST", "/admin/unload", json_body={"all": True})
    assert answer.json["unloaded"] == 2
    assert node.supervisor.unloaded == ["smol:default", None]


async def test_a_model_that_left_the_cookbook_can_still_be_unloaded() -> None:
    node = Node()
    node.supervisor.views = [FakeInstance("i-2", "gone:x", "Gone:x", stale=True)]
    for name in ("gone:x", "Gone:x"):
        assert (await request(node.app, "POST", "/admin/unload", json_body={"model": name})).status == 200
    assert node.supervisor.unloaded == ["gone:x", "gone:x"]


async def test_instances_tells_all_that_ps_shows() -> None:
    node = Node()
    node.supervisor.views = [FakeInstance("i-1", "smol:default", "Smol", state=State.SPAWNING, active=2)]
    node.supervisor.waiting = {"smol:default": 3}
    node.supervisor.capacity = Resources.of(ram_mib=1000)
    node.supervisor.used = Resources.of(ram_mib=512)
    node.supervisor.failed = {"org/big model:long": FakeFailure("exited with 1", 2, 4.5, ("error: no such file",))}
    answer = await request(node.app, "GET", "/admin/instances")
    told = answer.json
    (instance,) = told.pop("instances")
    assert told == {
        "node_id": "node-a",
        "draining": False,
        "queues": {"smol:default": 3},
        "budget": {
            "capacity": {"ram": 1000},
            "used": {"ram": 512},
            "memory": {"ram": {"capacity_mib": 1000, "used_mib": 512, "foreign_mib": 0, "free_mib": 488}},
        },
        "failures": {
            "org/big model:long": {
                "reason": "exited with 1",
                "count": 2,
                "retry_in_s": 4.5,
                "log_tail": ["error: no such file"],
            }
        },
    }
    assert instance == {
        "id": "i-1",
        "key": "smol:default",
        "model_id": "Smol",
        "state": "spawning",
        "pid": 4711,
        "port": 40001,
        "slots": 4,
        "active": 2,
        "busy": 0,
        "ready_at_wall": 1_700_000_100.0,
        "started_at_wall": 1_700_000_090.0,
        "last_used_s_ago": 1.5,
        "memory": {"ram": 512},
        "live": None,
        "source": None,
        "command": ["llama-server", "-m", "a.gguf"],
        "stale": False,
        "engine": {"version": "b123", "build": "default", "path": "/opt/llama/llama-server"},
        "superseded": False,
    }


GPU = Gpu("gpu0", "GPU-aa", "NVIDIA H200", 24564, 16000, index=0)
REPORT = MemoryReport(
    capacity=Resources({"gpu0": 24564, "vram": 24000, "instances": 100}),
    ceiling=Resources({"gpu0": 21564, "vram": 21000, "instances": 100}),
    foreign=Resources({"gpu0": 3000, "vram": 3000}),
    used=Resources({"gpu0": 13000, "vram": 13000, "ram": 512, "instances": 1}),
    holders=(
        Holder(
            "i-1",
            "smol:default",
            "Smol",
            State.READY,
            Resources({"gpu0": 13000, "vram": 13000, "ram": 512}),
            live=Resources({"gpu0": 12900, "ram": 499}),
            source=Source.LEARNED,
            evictable=True,
        ),
    ),
    devices=Devices("nvml", (GPU,), 64000, 50000, ("gpu1: Unknown Error",)),
    sampled_s_ago=0.25,
)


async def test_the_budget_by_kind_holder_and_device() -> None:
    node = Node()
    node.supervisor.report = REPORT
    answer = await request(node.app, "GET", "/admin/budget")
    assert answer.status == 200
    assert answer.json == {
        "node_id": "node-a",
        "memory": {
            "gpu0": {"capacity_mib": 24564, "used_mib": 13000, "foreign_mib": 3000, "free_mib": 8564},
            "ram": {"capacity_mib": None, "used_mib": 512, "foreign_mib": 0, "free_mib": None},
            "vram": {"capacity_mib": 24000, "used_mib": 13000, "foreign_mib": 3000, "free_mib": 8000},
        },
        "held_by": [
            {
                "instance": "i-1",
                "key": "smol:default",
                "model": "Smol",
                "state": "ready",
                "memory_mib": {"gpu0": 13000, "vram": 13000, "ram": 512},
                "live_mib": {"gpu0": 12900, "ram": 499},
                "source": "learned",
                "active": 0,
                "pinned": False,
                "evictable": True,
            }
        ],
        "devices": {
            "telemetry": "nvml",
            "ram_total_mib": 64000,
            "ram_available_mib": 50000,
            "gpus": [
                {
                    "kind": "gpu0",
                    "name": "NVIDIA H200",
                    "uuid": "GPU-aa",
                    "vendor": "nvidia",
                    "index": 0,
                    "total_mib": 24564,
                    "used_mib": 16000,
                    "unified": False,
                }
            ],
            "problems": ["gpu1: Unknown Error"],
        },
        "sampled_s_ago": 0.25,
    }


async def test_a_budget_before_the_first_sample() -> None:
    answer = await request(Node().app, "GET", "/admin/budget")
    assert answer.json == {
        "node_id": "node-a", "memory": {}, "held_by": [], "devices": None, "sampled_s_ago": None
    }  # fmt: skip


async def test_instances_tell_what_they_really_use_and_whose_figure_they_are_charged() -> None:
    node = Node()
    node.supervisor.report = REPORT
    node.supervisor.views = [FakeInstance("i-1", "smol:default", "Smol"), FakeInstance("i-2", "b:default", "b")]
    first, second = (await request(node.app, "GET", "/admin/instances")).json["instances"]
    assert (first["live"], first["source"]) == ({"gpu0": 12900, "ram": 499}, "learned")
    assert (second["live"], second["source"]) == (None, None)
    node.supervisor.loaded.set()
    prewarmed = await request(node.app, "POST", "/admin/prewarm", json_body={"model": "Smol"})
    assert prewarmed.json["instance"]["source"] == "learned"


async def test_the_budget_is_for_admins() -> None:
    """trap 99"""
    node = Node(auth=AUTH)
    assert (await request(node.app, "GET", "/admin/budget", headers={"x-api-key": "user-key"})).status == 403
    assert (await request(node.app, "GET", "/admin/budget", headers={"x-api-key": "admin-key"})).status == 200
