"""/admin/*, on another node and on all of them; draining and undraining."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mesh.errors import LinkError, PeerRefusalError, TooLargeError
from tests.api.asgi import Exchange, request
from tests.api.mesh import PEER, FakeMesh
from tests.api.node import AUTH, SMOL, Node
from tests.fakes_supervisor import FakeInstance
from tests.members import member, profile

JSON = {"content-type": "application/json"}
PATHS = ["/admin/prewarm", "/admin/unload", "/admin/drain", "/admin/undrain"]


async def post(node: Node, path: str, body: dict[str, Any], **options: Any) -> tuple[int, Any]:
    answer = await request(node.app, "POST", path, json_body=body, **options)
    return answer.status, answer.json


def tasks() -> set[str]:
    return {task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()}


# --- draining


async def test_drain_and_undrain() -> None:
    node = Node()
    node.ctx.metrics.current_requests = 2
    status, said = await post(node, "/admin/drain", {})
    assert (status, said["drained"], said["active"], said["unloaded"]) == (200, True, 2, 0)
    assert "2 requests are still served" in said["message"]
    assert node.ctx.drained
    assert node.supervisor.unloaded == []
    status, said = await post(node, "/admin/prewarm", {"model": "Smol"})
    assert (status, said["error"]["type"]) == (503, "draining")
    assert "llama-mesh undrain" in said["message"]
    status, said = await post(node, "/admin/undrain", {})
    assert (status, said["drained"]) == (200, False)
    assert not node.ctx.drained


async def test_drain_may_unload_too() -> None:
    node = Node()
    node.supervisor.views = [FakeInstance("i-1", SMOL.key, "Smol")]
    _, said = await post(node, "/admin/drain", {"unload": True})
    assert said["unloaded"] == 1
    assert node.supervisor.unloaded == [None]
    status, _ = await post(node, "/admin/drain", {"unload": "yes"})
    assert status == 400


async def test_a_node_that_shuts_down_does_not_come_back_by_undrain() -> None:
    node = Node()
    node.ctx.draining = node.ctx.drained = True
    status, said = await post(node, "/admin/undrain", {})
    assert (status, said["error"]["type"]) == (503, "draining")
    assert node.ctx.drained


async def test_the_log_tells_of_changes_only(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    node = Node()
    for path in ("/admin/drain", "/admin/drain", "/admin/undrain", "/admin/undrain"):
        await post(node, path, {})
    assert caplog.text.count("drained by an operator: no new work") == 1
    assert caplog.text.count("undrained by an operator") == 1


@pytest.mark.parametrize("path", PATHS)
async def test_they_are_for_admins(path: str) -> None:
    """trap 99"""
    node = Node(auth=AUTH)
    FakeMesh(node)
    for headers, expected in (({}, 401), ({"x-api-key": "user-key"}, 403)):
        status, _ = await post(node, path, {"model": "Smol", "node": "*"}, headers=headers)
        assert status == expected
    assert not node.ctx.drained


# --- another node


@pytest.mark.parametrize("path", PATHS)
async def test_on_another_node(path: str) -> None:
    """What was asked goes there, without the name of the node; its answer comes back with it."""
    node = Node()
    mesh = FakeMesh(node, member(1))
    mesh.answers["n1"] = {"status": "ok", "message": "did it"}
    body = {"model": "Smol", "wait": False}
    status, said = await post(node, path, {**body, "node": "n1"})
    assert (status, said) == (200, {"status": "ok", "message": "did it", "node": "n1"})
    assert mesh.calls == [("n1", path, body, 30.0)]
    assert not node.ctx.drained
    assert node.supervisor.unloaded == []


async def test_a_load_elsewhere_has_its_own_deadline() -> None:
    """A model may take minutes; the node there keeps ``timeout_s``."""
    node = Node()
    mesh = FakeMesh(node, member(1))
    mesh.answers["n1"] = {"status": "ok"}
    await post(node, "/admin/prewarm", {"model": "Smol", "timeout_s": 5, "node": "n1"})
    assert mesh.calls == [("n1", "/admin/prewarm", {"model": "Smol", "timeout_s": 5}, None)]


async def test_this_node_by_its_name() -> None:
    node = Node()
    mesh = FakeMesh(node, member(1, node_id="node-a"))
    status, said = await post(node, "/admin/drain", {"node": "node-a"})
    assert (status, said["drained"], node.ctx.drained) == (200, True, True)
    assert mesh.calls == []


@pytest.mark.parametrize(
    ("error", "status", "type"),
    [
        (LinkError("n1 does not answer"), 502, "peer_error"),
        (PeerRefusalError("node n1: Model not found", status=404, type="model_not_found"), 404, "model_not_found"),
    ],
)
async def test_why_another_node_did_not(error: Any, status: int, type: str) -> None:
    node = Node()
    FakeMesh(node, member(1)).answers["n1"] = error
    found, said = await post(node, "/admin/unload", {"model": "Smol", "node": "n1"})
    assert (found, said["status"], said["message"]) == (status, "error", error.message)
    assert (said["error"]["type"], said["error"]["source"]) == (type, "peer")


@pytest.mark.parametrize("name", ["", 5, ["n1"], True])
async def test_a_name_is_text(name: Any) -> None:
    node = Node()
    status, said = await post(node, "/admin/drain", {"node": name})
    assert (status, said["error"]["param"]) == (400, "node")
    assert not node.ctx.drained


async def test_without_a_mesh_there_is_no_other_node() -> None:
    status, said = await post(Node(), "/admin/drain", {"node": "n1"})
    assert (status, said["error"]["param"]) == (400, "node")
    assert "node-a" in said["message"]


async def test_what_comes_on_a_link_is_for_this_node() -> None:
    """trap 60: a member cannot send this one on to a third."""
    node = Node(auth=AUTH)
    mesh = FakeMesh(node, member(1), member(2))
    for name in ("n2", "*", "node-a"):
        status, _ = await post(node, "/admin/drain", {"node": name}, peer=PEER)
        assert status == 200
    assert mesh.calls == []
    assert node.ctx.drained


# --- only elsewhere


async def test_what_only_others_have_is_loaded_where_it_is_best() -> None:
    node = Node()
    far = member(1, profile("big:default", fit="wait"))
    mesh = FakeMesh(node, far, member(2, profile("big:default", fit="now")))
    mesh.answers["n2"] = {"status": "ok", "message": "Model prewarmed", "instance": None}
    status, said = await post(node, "/admin/prewarm", {"model": "Big"})
    assert (status, said["node"]) == (200, "n2")
    assert mesh.calls == [("n2", "/admin/prewarm", {"model": "Big"}, None)]


async def test_what_only_others_have_and_cannot_load_is_503_not_404() -> None:
    """trap 62"""
    node = Node()
    FakeMesh(node, member(1, profile("big:default", fit="never")))
    assert (await post(node, "/admin/prewarm", {"model": "big"}))[0] == 503
    assert (await post(node, "/admin/prewarm", {"model": "nobody"}))[0] == 404


async def test_a_member_asks_for_what_is_here_only() -> None:
    """trap 60"""
    node = Node()
    mesh = FakeMesh(node, member(1), member(2, profile("big:default")))
    status, said = await post(node, "/admin/prewarm", {"model": "big"}, peer=PEER)
    assert (status, said["error"]["type"]) == (404, "model_not_found")
    assert mesh.calls == []


async def test_a_client_that_leaves_while_another_node_loads_frees_everything() -> None:
    """trap 2: the call is cancelled, which closes its link, and the other node notices."""
    node = Node()
    mesh = FakeMesh(node, member(1, profile("big:default")))
    for body in (b'{"model": "big"}', b'{"model": "Smol", "node": "n1"}'):
        mesh.asked.clear()
        async with Exchange(node.app, "POST", "/admin/prewarm", headers=JSON, body=body) as exchange:
            await mesh.asked.wait()
            assert mesh.waiting == {"n1"}
            exchange.vanish()
            await exchange.finished()
        assert mesh.waiting == set()
        assert tasks() == set()


# --- everywhere


async def test_on_all_nodes_each_ones_answer_is_told() -> None:
    """The dead are not asked; a name is asked once."""
    node = Node()
    node.supervisor.views = [FakeInstance("i-1", SMOL.key, "Smol")]
    mesh = FakeMesh(
        node, member(1), member(2, status="dead"), member(3, node_id="n1", status="dead"), member(4, node_id="node-a")
    )
    mesh.answers["n1"] = {"status": "ok", "unloaded": 2}
    status, said = await post(node, "/admin/unload", {"model": "Smol", "node": "*"})
    assert (status, said["status"], said["message"]) == (200, "ok", "2 of 2 nodes did it")
    assert said["nodes"]["n1"] == {"status": "ok", "unloaded": 2}
    assert said["nodes"]["node-a"]["unloaded"] == 1
    assert mesh.calls == [("n1", "/admin/unload", {"model": "Smol"}, 30.0)]


async def test_who_does_not_have_the_model_has_nothing_to_do() -> None:
    node = Node()
    mesh = FakeMesh(node, member(1), member(2))
    not_there = PeerRefusalError("node n1: Model not found", status=404, type="model_not_found")
    mesh.answers = {"n1": not_there, "n2": {"status": "ok"}}
    status, said = await post(node, "/admin/prewarm", {"model": "big", "node": "*", "wait": False})
    assert (status, said["status"], said["message"]) == (200, "ok", "1 of 3 nodes did it")
    assert said["nodes"]["n1"] == {"status": "error", "message": not_there.message, "type": "model_not_found"}
    mesh.answers["n2"] = not_there
    status, said = await post(node, "/admin/prewarm", {"model": "big", "node": "*", "wait": False})
    assert (status, said["status"]) == (404, "error")


async def test_one_failure_is_a_failure_of_all() -> None:
    node = Node()
    mesh = FakeMesh(node, member(1), member(2))
    mesh.answers = {"n1": {"status": "ok"}, "n2": LinkError("n2 is silent")}
    node.supervisor.refusal = TooLargeError("needs 9000 MiB")
    status, said = await post(node, "/admin/prewarm", {"model": "Smol", "node": "*"})
    assert (status, said["status"], said["message"]) == (503, "error", "1 of 3 nodes did it")
    assert {name: entry["status"] for name, entry in said["nodes"].items()} == {
        "node-a": "error",
        "n1": "ok",
        "n2": "error",
    }


async def test_all_are_asked_at_once_and_given_up_together() -> None:
    """traps 2, 58: none waits for another; a client that leaves ends all of it."""
    node = Node()
    mesh = FakeMesh(node, member(1), member(2))
    body = b'{"model": "Smol", "node": "*"}'
    async with Exchange(node.app, "POST", "/admin/prewarm", headers=JSON, body=body) as exchange:
        await node.supervisor.prewarming.wait()
        await mesh.asked.wait()
        assert mesh.waiting == {"n1", "n2"}
        exchange.vanish()
        await exchange.finished()
    assert mesh.waiting == set()
    assert node.supervisor.loading == {SMOL.key: 0}
    assert tasks() == set()


async def test_a_node_alone_is_everywhere() -> None:
    node = Node()
    status, said = await post(node, "/admin/drain", {"node": "*"})
    assert (status, list(said["nodes"]), node.ctx.drained) == (200, ["node-a"], True)
