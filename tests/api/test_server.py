"""The app as a whole: who may pass, what every failure looks like, and what each answer carries."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.routing import Route

from mesh.api.access import PUBLIC_PATHS
from mesh.config.profile import Catalog
from mesh.core.resources import Resources
from tests.api.asgi import Exchange, request
from tests.api.node import AUTH, STARTED_AT, Node
from tests.fakes_supervisor import FakeInstance

ENVELOPE = {"message", "type", "param", "code", "source"}


def all_routes(node: Node) -> list[tuple[str, str]]:
    found = []
    for route in node.app.routes:
        assert isinstance(route, Route)
        path = route.path.replace("{id:path}", "Smol")
        found += [(method, path) for method in sorted(route.methods or ())]
    return found


async def test_every_route_but_the_public_ones_is_denied_without_a_key() -> None:
    """trap 99: also a route that does not exist, and whatever is added later."""
    node = Node(auth=AUTH)
    for method, path in [*all_routes(node), ("GET", "/nowhere"), ("GET", "/v1/chat/completions")]:
        answer = await request(node.app, method, path)
        if path in PUBLIC_PATHS:
            assert answer.status == 200, path
        else:
            assert answer.status == 401, path
            assert answer.json["error"]["type"] == "authentication_error"
            assert answer.json["error"].keys() == ENVELOPE


@pytest.mark.parametrize(
    ("headers", "models", "admin"),
    [
        ({"authorization": "Bearer user-key"}, 200, 403),
        ({"authorization": "bearer user-key"}, 200, 403),
        ({"x-api-key": "user-key"}, 200, 403),
        ({"x-api-key": "admin-key"}, 200, 200),
        ({"authorization": "Bearer admin-key"}, 200, 200),
        ({"authorization": "Basic user-key"}, 401, 401),
        ({"authorization": "user-key"}, 401, 401),
        ({"x-api-key": "user-ke"}, 401, 401),
        ({"x-api-key": ""}, 401, 401),
        ({"x-other": "user-key"}, 401, 401),
    ],
)
async def test_keys(headers: dict[str, str], models: int, admin: int) -> None:
    """trap 99: inference keys do not reach admin routes once admin keys are set."""
    node = Node(auth=AUTH)
    assert (await request(node.app, "GET", "/v1/models", headers=headers)).status == models
    answer = await request(node.app, "GET", "/admin/instances", headers=headers)
    assert answer.status == admin
    if admin == 403:
        error = answer.json["error"]
        assert (error["type"], error["message"]) == ("permission_error", "this route needs one of auth.admin_keys")
        assert "www-authenticate" not in answer.headers


async def test_version_tells_the_engine_only_to_whom_it_concerns() -> None:
    node = Node(auth=AUTH)
    assert (await request(node.app, "GET", "/version")).json.keys() == {"version"}
    known = await request(node.app, "GET", "/version", headers={"x-api-key": "user-key"})
    assert known.json["llama_cpp_version"] == "b123"
    assert (await request(Node().app, "GET", "/version")).json["llama_cpp_version"] == "b123"


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/nowhere", 404, None),
        ("GET", "/v1/models/", 404, None),
        ("GET", "/healthz/", 404, None),
        ("POST", "/v1/models", 405, "GET, HEAD"),
        ("GET", "/admin/prewarm", 405, "POST"),
        ("DELETE", "/healthz", 405, "GET, HEAD"),
        ("GET", "/v1/chat/completions", 405, "POST"),
        ("POST", "/props", 405, "GET, HEAD"),
    ],
)
async def test_unknown_paths_and_methods_get_the_envelope(
    method: str, path: str, status: int, allow: str | None
) -> None:
    """trap 74"""
    answer = await request(Node().app, method, path)
    assert answer.status == status
    assert answer.json["error"].keys() == ENVELOPE
    assert answer.json["error"]["code"] is None
    assert answer.headers["content-type"] == "application/json"
    assert int(answer.headers["content-length"]) == len(answer.body)
    if allow:
        assert sorted(answer.headers["allow"].split(", ")) == allow.split(", ")


async def test_anthropics_routes_speak_anthropics_errors() -> None:
    """trap 74"""
    for node, status in ((Node(), 405), (Node(auth=AUTH), 401)):
        answer = await request(node.app, "GET", "/v1/messages")
        assert answer.status == status
        assert answer.json["type"] == "error"


async def test_a_bug_is_a_500_envelope_without_its_text(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """trap 74: the story is logged with the request's id, not told to the caller."""
    node = Node()

    def broken() -> Any:
        raise KeyError("s3cret detail")

    monkeypatch.setattr(node.supervisor, "instances", broken)
    answer = await request(node.app, "GET", "/admin/instances", headers={"x-request-id": "r-77"})
    assert answer.status == 500
    assert answer.json["error"]["type"] == "internal_error"
    assert b"s3cret" not in answer.body
    assert answer.headers["x-request-id"] == "r-77"
    assert "s3cret detail" in caplog.text
    assert node.access_log.lines[0]["error"] == "internal_error"


async def test_every_answer_carries_the_node_and_a_request_id() -> None:
    node = Node(auth=AUTH)
    for path in ("/healthz", "/v1/models", "/nowhere"):
        answer = await request(node.app, "GET", path, headers={"x-request-id": "mine-1"})
        assert answer.headers["x-llama-mesh-node"] == "node-a"
        assert answer.headers["x-request-id"] == "mine-1"
    first, second = [await request(node.app, "GET", "/healthz") for _ in range(2)]
    assert first.headers["x-request-id"] != second.headers["x-request-id"]


@pytest.mark.parametrize("bad", ["", "a b", "x" * 129, "\r\nSet-Cookie: x", "\u00e9"])
async def test_a_strange_request_id_is_replaced(bad: str) -> None:
    answer = await request(Node().app, "GET", "/healthz", headers={"x-request-id": bad})
    assert answer.headers["x-request-id"] != bad
    assert answer.headers["x-request-id"].isalnum()


async def test_requests_are_logged_but_not_the_probes_that_succeed() -> None:
    node = Node(auth=AUTH)
    await request(node.app, "GET", "/healthz")
    await request(node.app, "GET", "/v1/models?key=s3cret", headers={"x-request-id": "r-1"})
    (line,) = node.access_log.lines
    assert (line["status"], line["path"], line["client"]) == (401, "/v1/models", "10.1.2.3")
    assert (line["request_id"], line["error"]) == ("r-1", "authentication_error")
    assert line["bytes_out"] > 0


async def test_get_routes_answer_head() -> None:
    node = Node()
    for method, path in all_routes(node):
        if method == "HEAD":
            suffix = "?model=Smol&follow=true" if path in ("/admin/logs", "/admin/route") else ""
            assert (await request(node.app, "HEAD", path + suffix)).status == 200, path


async def test_health_follows_models_engine_and_draining() -> None:
    """trap 98: all from memory."""
    node = Node()
    for path in ("/health", "/healthz"):
        assert (await request(node.app, "GET", path)).json == {"status": "ok"}
    node.engine_problem = "Binary missing"
    answer = await request(node.app, "GET", "/healthz")
    assert (answer.status, answer.json) == (503, {"status": "error", "message": "Binary missing"})
    answer = await request(node.app, "GET", "/readyz")
    assert (answer.status, answer.json) == (503, {"status": "not_ready", "message": "Binary missing"})
    node.engine_problem = None
    node.supervisor.catalog = Catalog()
    answer = await request(node.app, "GET", "/healthz")
    assert (answer.status, answer.json) == (503, {"status": "error", "message": "No models configured"})
    answer = await request(node.app, "GET", "/readyz")
    assert answer.json == {"status": "not_ready", "message": "No models configured"}
    node.ctx.draining = True
    answer = await request(node.app, "GET", "/readyz")
    assert (answer.status, answer.json) == (503, {"status": "draining", "message": "Node is draining"})


async def test_readyz_tells_whether_memory_is_left() -> None:
    node = Node()
    assert (await request(node.app, "GET", "/readyz")).json == {"status": "ready", "can_spawn": True}
    node.supervisor.capacity = Resources.of(ram_mib=100, vram_mib=10)
    node.supervisor.used = Resources.of(ram_mib=99, vram_mib=9)
    assert (await request(node.app, "GET", "/readyz")).json["can_spawn"] is True
    node.supervisor.used = Resources.of(ram_mib=100, vram_mib=9)
    assert (await request(node.app, "GET", "/readyz")).json["can_spawn"] is False


async def test_cluster_nodes_holds_this_node_and_no_secret() -> None:
    """trap 101"""
    node = Node(auth=AUTH, public_url="https://n.example")
    node.supervisor.views = [
        FakeInstance("i-1", "smol:default", "Smol", command=("llama-server", "--api-key", "s3cret"))
    ]
    answer = await request(node.app, "GET", "/cluster/nodes", headers={"x-api-key": "user-key"})
    own = answer.json["nodes"]["node-a"]
    assert (own["node_id"], own["ready"], own["started_at_unix"]) == ("node-a", True, int(STARTED_AT))
    assert own["supported_models"] == ["Smol", "org/Big Model:long"]
    assert own["loaded_models"] == ["Smol"]
    assert own["address"] == "https://n.example"
    for secret in (b"s3cret", b"user-key", b"admin-key"):
        assert secret not in answer.body


async def test_a_client_that_leaves_is_logged_as_such() -> None:
    node = Node()
    body = {"content-type": "application/json", "content-length": "100"}
    async with Exchange(node.app, "POST", "/admin/prewarm", headers=body, body=b'{"model":"Smol"}') as exchange:
        await node.supervisor.prewarming.wait()
        exchange.vanish()
        await exchange.finished()
    assert (exchange.status, node.access_log.lines[0]["status"]) == (0, 499)
    assert node.access_log.lines[0]["error"] == "client_disconnected"
