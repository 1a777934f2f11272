"""Keys: what is denied without one, and to whom they are never told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import psutil
import pytest

from mesh.api.routes import ROUTES
from mesh.api.server import build_app
from tests.e2e.harness import Node, cookbook, eventually, profile
from tests.e2e.robustness import fake_node, fake_profile
from tests.e2e.wire import child_get

KEY, ADMIN_KEY, CHILD_KEY = "client-key-5f0c9f", "admin-key-77aa31", "child-key-c0ffee"
AUTH = {"enabled": True, "required_header": "X-My-Key", "allowed_keys": [KEY], "admin_keys": [ADMIN_KEY]}
PUBLIC = {"/health", "/healthz", "/readyz", "/version"}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


def all_paths() -> list[str]:
    """Return every path of both route tables, parameters filled in."""
    app = build_app(cast(Any, SimpleNamespace()))
    paths = {cast(Any, route).path.replace("{id:path}", "m") for route in app.routes}
    assert not any("{" in path for path in paths), paths
    return sorted(paths | {route.path for route in ROUTES})


def keyed_node(directory: Path, **config: Any) -> Node:
    """Return a node that asks for keys; its client sends the admin key."""
    args = f"-np 4 --api-key {CHILD_KEY}"
    node = fake_node(directory, {"m": fake_profile(args)}, {"auth": AUTH, **config}, flags=["--log-level", "debug"])
    node._client = httpx.Client(
        base_url=node.url, timeout=30, trust_env=False, headers={"Authorization": f"Bearer {ADMIN_KEY}"}
    )
    return node


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """One such node for the tests that only ask."""
    with keyed_node(tmp_path_factory.mktemp("keyed")) as node:
        node.prewarm("m")
        yield node


WRONG = [
    {},
    {"Authorization": "Bearer wrong"},
    {"Authorization": f"Bearer {KEY}x"},
    {"Authorization": f"Bearer {KEY[:-1]}"},
    {"Authorization": "Bearer"},
    {"Authorization": f"Basic {KEY}"},
    {"Authorization": KEY},
    {"X-My-Key": ""},
    {"X-My-Key": "wrong"},
    {"X-Api-Key": KEY},
    {"Cookie": f"X-My-Key={KEY}"},
]


def test_every_route_of_both_tables_needs_a_key_but_four(tmp_path: Path) -> None:
    """Deny by default, whatever the method, and unknown paths too (trap 99)."""
    paths = all_paths()
    assert len(paths) > 30
    assert set(paths) >= PUBLIC
    with keyed_node(tmp_path) as node, httpx.Client(base_url=node.url, trust_env=False) as stranger:
        node.prewarm("m")
        for path in [*paths, "/", "/nowhere", "/admin", "/admin/", "/admin/nowhere", "/v1", "/docs", "/openapi.json"]:
            for method in METHODS:
                for headers in WRONG if method in ("GET", "POST") else WRONG[:2]:
                    status = stranger.request(method, path, headers=headers, json={"model": "m"}).status_code
                    if path in PUBLIC:
                        assert status in (200, 405), (method, path)
                    else:
                        assert status == 401, (method, path, headers, status)
        assert node.metric("llama_mesh_requests_total") == 0, "no stranger got as far as a model"


def test_no_spelling_of_a_path_gets_around_the_key(keyed: Node) -> None:
    """Dots, doubled slashes, escapes, absolute form, case, a query that looks public (traps 78, 99)."""
    targets = [
        "/healthz/../admin/instances", "//admin/instances", "/healthz/", "/healthz//", "/HEALTHZ", "/%61dmin/logs",
        "/admin/instances?/healthz", "/admin/instances#/healthz", "/healthz;/../admin/logs", "/healthz%2f..%2fadmin",
        "/healthz/%2e%2e/metrics", "/metrics/", "/metrics%00", "http://t/admin/instances", "http://t/metrics?/version",
        "/v1/chat/completions/", "/./metrics", "*",
    ]  # fmt: skip
    for target in targets:
        for method in ("GET", "POST"):
            with keyed.connection(timeout_s=5) as raw:
                raw.send(f"{method} {target} HTTP/1.1\r\nHost: t\r\nContent-Length: 0\r\n\r\n".encode())
                status, _, body = raw.answer()
            assert status in (400, 401), (method, target, status, body)
            assert b"instances" not in body


def test_admin_and_inference_keys_are_two_things(keyed: Node) -> None:
    """A client's key reaches models and nothing under /admin; the admin's reaches both, by either header (trap 99)."""
    with httpx.Client(base_url=keyed.url, trust_env=False) as other:
        body = {"model": "m", "messages": []}
        for headers in ({"Authorization": f"Bearer {KEY}"}, {"X-My-Key": KEY}, {"authorization": f"bearer {KEY}"}):
            assert other.post("/v1/chat/completions", json=body, headers=headers).status_code == 200
            assert other.get("/v1/models", headers=headers).status_code == 200
            for path in ("/admin/instances", "/admin/logs?model=m"):
                assert other.get(path, headers=headers).status_code in (401, 403)
            for path in ("/admin/prewarm", "/admin/unload"):
                assert other.post(path, json={"model": "m"}, headers=headers).status_code in (401, 403)
        for headers in ({"Authorization": f"Bearer {ADMIN_KEY}"}, {"X-My-Key": ADMIN_KEY}):
            assert other.post("/v1/chat/completions", json=body, headers=headers).status_code == 200
            assert other.get("/admin/instances", headers=headers).status_code == 200


def test_a_key_on_one_request_is_none_on_the_next(keyed: Node) -> None:
    """Heads are memoised per connection; the key is checked on each all the same (trap 102)."""
    with keyed.connection() as raw:
        body = {"model": "m", "messages": []}
        for _ in range(3):
            raw.post("/v1/chat/completions", body, f"X-My-Key: {KEY}")
            assert raw.answer()[0] == 200
            raw.post("/v1/chat/completions", body)
            assert raw.answer()[0] == 401
            raw.post("/v1/chat/completions", body, "X-My-Key: " + "z" * len(KEY))
            assert raw.answer()[0] == 401


def test_a_stranger_cannot_make_the_node_read_a_body(keyed: Node) -> None:
    """401 comes on the head: 64 MiB need not be sent for it, and are not kept (trap 99)."""
    with keyed.connection() as raw:
        raw.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: t\r\nContent-Length: 60000000\r\n\r\n")
        assert raw.answer()[0] == 401
        assert raw.rest() == b""


def test_secrets_are_told_to_nobody(tmp_path: Path) -> None:
    """Keys of clients, admins and children: not in logs, status, metrics, argv, nor in what a child gets (101, 102)."""
    with keyed_node(tmp_path) as node:
        instance = node.prewarm("m")
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
        for number, headers in enumerate(
            [
                {"Authorization": f"Bearer {KEY}", "Cookie": f"session={KEY}", "Proxy-Authorization": f"Bearer {KEY}"},
                {"X-My-Key": KEY, "X-Llama-Mesh-Hops": "1", "Connection": "x-private", "X-Private": "hop"},
                {"X-My-Key": KEY, "X-Api-Key": KEY, "X-Kept": "yes"},
                {"Authorization": "Bearer wrong-key-1234"},
            ]
        ):
            status = httpx.post(
                f"{node.url}/v1/chat/completions", json=body, headers=headers, trust_env=False
            ).status_code
            assert status == (401 if number == 3 else 200)
        received = child_get(instance, "/fake/log").json()
        chats = [entry for entry in received if entry["path"] == "/v1/chat/completions"]
        assert len(chats) == 3
        text = json.dumps(chats)
        for secret in (KEY, ADMIN_KEY, "wrong-key"):
            assert secret not in text, f"{secret} reached the child"
        names = {name for entry in chats for name, _ in entry["headers"]}
        assert not names & {"cookie", "proxy-authorization", "x-my-key", "x-private", "x-llama-mesh-hops"}
        assert "x-kept" in names
        for entry in received:  # probes and requests carry the child's own key (trap 104)
            assert ["authorization", f"Bearer {CHILD_KEY}"] in entry["headers"], entry["path"]
        told = [
            node.http.get(path).text for path in ("/admin/instances", "/metrics", "/metrics/json", "/cluster/nodes")
        ]
        told += [node.http.get("/admin/logs", params={"model": "m"}).text, node.http.get("/v1/models").text]
        told += [" ".join(process.cmdline()) for process in node.marked()]
        eventually(lambda: len(node.log("/v1/chat/completions")) >= 4, what="the access log is flushed")
        told += [node.stdout(), node.stderr()]
    told += [path.read_text() for path in (tmp_path / "state").iterdir()]
    for secret in (KEY, ADMIN_KEY, CHILD_KEY, "wrong-key"):
        assert not any(secret in text for text in told), secret


def test_the_real_server_gets_its_key_without_showing_it(tmp_path: Path, models: Any) -> None:
    """``--api-key`` goes to the real llama-server by its environment: served, and not in any argv (traps 101, 104)."""
    with Node(tmp_path, cookbook({"alpha": profile(models.alpha, f"-t 1 -c 2048 --api-key {CHILD_KEY}")})) as node:
        assert node.say("alpha") == "I am alpha"
        instance = node.instance("alpha")
        assert child_get(instance, "/v1/models").status_code == 401, "it does ask for it"
        for process in node.marked():
            assert CHILD_KEY not in " ".join(process.cmdline())
        assert CHILD_KEY in psutil.Process(instance["pid"]).environ()["LLAMA_API_KEY"]
        assert CHILD_KEY not in json.dumps(node.status()) + node.stdout() + node.stderr()
