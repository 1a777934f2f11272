"""/cluster/* and /admin/route: who may ask, what is told of each node, and that no secret is in it."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.routing import Route

from mesh.api.access import GOSSIP_PATH, PEER_PATHS, PUBLIC_PATHS
from mesh.core.resources import RAM, VRAM, Resources
from mesh.net.keys import fingerprint
from tests.api.asgi import Exchange, request
from tests.api.mesh import PEER, FakeMesh
from tests.api.node import AUTH, SMOL, Node
from tests.fakes_supervisor import FakeInstance
from tests.members import key_of, member, profile

USER = {"x-api-key": "user-key"}
ADMIN = {"x-api-key": "admin-key"}


# --- who may ask


@pytest.mark.parametrize("auth", [{}, {"auth": AUTH}])
@pytest.mark.parametrize("headers", [{}, USER, ADMIN])
async def test_gossip_is_for_links_only(auth: dict[str, Any], headers: dict[str, str]) -> None:
    """trap 103: plain HTTP is refused whatever key it brings, also where no keys are asked for."""
    node = Node(**auth)
    mesh = FakeMesh(node)
    answer = await request(node.app, "POST", GOSSIP_PATH, headers=headers, body=b"hello")
    refusal = (401, "authentication_error") if auth and not headers else (403, "permission_error")
    assert (answer.status, answer.json["error"]["type"]) == refusal
    assert mesh.gossiped == []


async def test_a_member_gossips_on_its_link() -> None:
    """Its link proved who it is: it needs no key, and sends none (trap 102)."""
    node = Node(auth=AUTH)
    mesh = FakeMesh(node)
    answer = await request(node.app, "POST", GOSSIP_PATH, body=b"hello", peer=PEER)
    assert (answer.status, answer.body) == (200, b"\x93answer")
    assert mesh.gossiped == [(PEER, b"hello")]


@pytest.mark.parametrize(("body", "status"), [(b"malformed", 400), (b"x" * 1001, 413)])
async def test_a_member_cannot_send_just_anything(body: bytes, status: int) -> None:
    node = Node()
    mesh = FakeMesh(node)
    assert (await request(node.app, "POST", GOSSIP_PATH, body=body, peer=PEER)).status == status
    assert mesh.gossiped == []


async def test_a_node_in_no_mesh_has_no_gossip() -> None:
    assert (await request(Node().app, "POST", GOSSIP_PATH, body=b"x", peer=PEER)).status == 400


async def test_a_link_opens_the_paths_of_peers_and_no_other() -> None:
    """trap 103: a member is no client and no admin; not even a key of ours makes it one."""
    node = Node(auth=AUTH)
    FakeMesh(node)
    paths = [(method, r.path) for r in node.app.routes if isinstance(r, Route) for method in sorted(r.methods or ())]
    for method, path in [*paths, ("GET", "/nowhere")]:
        for headers in ({}, ADMIN):
            async with Exchange(node.app, method, path, headers=headers, peer=PEER) as exchange:
                await exchange.finished()
            if path in PEER_PATHS or path in PUBLIC_PATHS:
                assert exchange.status != 403, path
            else:
                assert (exchange.status, exchange.json["error"]["type"]) == (403, "permission_error"), path


async def test_the_list_of_peer_paths_is_short() -> None:
    """Whatever is added to it can be done by every member without a key."""
    admin = {"/admin/prewarm", "/admin/unload", "/admin/drain", "/admin/undrain"}
    builds = {"/admin/rebuild-llama", "/admin/rebuild-llama/cancel", "/admin/rollback-llama", "/admin/builds"}
    assert {"/cluster/gossip", "/health", *admin, *builds} == PEER_PATHS


@pytest.mark.parametrize("path", ["/cluster/nodes", "/admin/route?model=Smol"])
async def test_the_view_of_the_mesh_needs_a_key(path: str) -> None:
    """trap 99"""
    node = Node(auth=AUTH)
    FakeMesh(node)
    assert (await request(node.app, "GET", path)).status == 401
    expected = 403 if path.startswith("/admin") else 200
    assert (await request(node.app, "GET", path, headers=USER)).status == expected
    assert (await request(node.app, "GET", path, headers=ADMIN)).status == 200


# --- what is told


async def nodes(node: Node) -> dict[str, Any]:
    answer = await request(node.app, "GET", "/cluster/nodes")
    assert answer.status == 200
    found: dict[str, Any] = answer.json["nodes"]
    return found


async def test_a_peer_has_everything_that_this_node_has_and_more() -> None:
    """One shape for both, so that a program need not care."""
    node = Node()
    FakeMesh(node, member(1))
    told = await nodes(node)
    assert list(told) == ["n1", "node-a"]
    assert told["node-a"].keys() < told["n1"].keys()
    assert told["n1"].keys() - told["node-a"].keys() == {
        "circuit",
        "forward_failures_total",
        "forward_refusals_total",
        "forwards_in_flight",
        "forwards_total",
        "record_age_s",
        "rejected",
        "rtt_ms",
    }
    assert (told["node-a"]["self"], told["n1"]["self"]) == (True, False)
    assert told["node-a"]["fingerprint"] == "own-fingerprint"
    assert (await nodes(Node()))["node-a"]["fingerprint"] is None


async def test_what_a_peers_record_says() -> None:
    node = Node()
    mesh = FakeMesh(
        node,
        member(
            1,
            profile("b:default", ready=1, loading=1),
            profile("a:x", id="A:x"),
            addresses=("192.0.2.7:8080", "[2001:db8::1]:8080"),
            engine_version="b9",
            started_at_unix=17,
            current_requests=3,
            queue_length=2,
            capacity_mib={VRAM: 100},
            used_mib={VRAM: 60, RAM: 5},
        ),
    )
    mesh.clock.time += 12.34
    (peer,) = mesh.peers
    peer.measured(0.0123)
    permit = peer.begin("b:default")
    peer.failed(permit)
    told = (await nodes(node))["n1"]
    assert told == {
        "node_id": "n1",
        "address": "192.0.2.7:8080",
        "version": "0.5.0",
        "llama_cpp_version": "b9",
        "started_at_unix": 17,
        "ready": True,
        "draining": False,
        "supported_models": ["b", "A:x"],
        "loaded_models": ["b"],
        "active_instances": 2,
        "current_requests": 3,
        "queue_length": 2,
        "llamesh_vram_mb": 60,
        "llamesh_sysmem_mb": 5,
        "max_vram_mb": 100,
        "max_sysmem_mb": None,
        "self": False,
        "status": "alive",
        "fingerprint": fingerprint(key_of(1)),
        "circuit": "closed",
        "rejected": None,
        "rtt_ms": 12.3,
        "record_age_s": 12.3,
        "forwards_in_flight": 1,
        "forwards_total": 1,
        "forward_failures_total": 1,
        "forward_refusals_total": 0,
    }
    peer.good_address = "[2001:db8::1]:8080"
    assert (await nodes(node))["n1"]["address"] == "[2001:db8::1]:8080"


@pytest.mark.parametrize(
    ("changes", "ready"),
    [
        ({}, True),
        ({"status": "suspect"}, True),
        ({"status": "dead"}, False),
        ({"draining": True}, False),
        ({"ready": False}, False),
        ({"profiles": ()}, False),
    ],
)
async def test_whether_a_peer_can_serve(changes: dict[str, Any], ready: bool) -> None:
    node = Node()
    profiles = changes.pop("profiles", (profile(),))
    FakeMesh(node, member(1, *profiles, **changes))
    told = (await nodes(node))["n1"]
    assert told["ready"] is ready
    assert told["status"] == changes.get("status", "alive")


async def test_a_drained_node_says_so() -> None:
    node = Node()
    node.ctx.drained = True
    told = (await nodes(node))["node-a"]
    assert (told["ready"], told["draining"], told["status"]) == (False, True, "alive")


async def test_a_name_with_two_keys_is_told_of_once() -> None:
    """A node that got a new key is known by its old one for a while; a node of this one's name does not hide it."""
    node = Node()
    FakeMesh(node, member(1, node_id="n"), member(2, node_id="n", status="dead"), member(3, node_id="node-a"))
    told = await nodes(node)
    assert told.keys() == {"n", "node-a"}
    assert (told["n"]["status"], told["n"]["fingerprint"]) == ("alive", fingerprint(key_of(1)))
    assert told["node-a"]["self"] is True


async def test_no_secret_is_told() -> None:
    """trap 101"""
    node = Node(auth=AUTH)
    mesh = FakeMesh(node, member(1, profile()))
    node.supervisor.views = [FakeInstance("i-1", SMOL.key, "Smol", command=("llama-server", "--api-key", "s3cret"))]
    node.supervisor.used = Resources.of(ram_mib=512)
    paths = ("/cluster/nodes", "/admin/route?model=Smol")
    told = [(await request(node.app, "GET", path, headers=ADMIN)).body for path in paths]
    for secret in (b"s3cret", b"user-key", b"admin-key", key_of(1).hex().encode(), b"llama-server"):
        assert not any(secret in body for body in told)
    assert "s3cret" not in repr(mesh.own.state())


# --- who would serve what


async def test_the_candidates_with_cost_terms_and_reasons() -> None:
    node = Node()
    FakeMesh(
        node,
        member(1, profile(SMOL.key, ready=1, slots=4, decode_tps=100.0, prefill_tps=1000.0)),
        member(2, profile(SMOL.key), draining=True),
        member(3, profile("other:default")),
    )
    answer = await request(node.app, "GET", "/admin/route?model=SMOL&prompt_tokens=500&max_tokens=50")
    assert answer.status == 200
    told = answer.json
    assert (told["model"], told["node_id"]) == ("Smol", "node-a")
    assert told["assumed"] == {"prompt_tokens": 500, "max_tokens": 50}
    first, second, third = told["candidates"]
    assert [entry["node"] for entry in (first, second, third)] == ["n1", "node-a", "n2"]
    assert (first["self"], second["self"]) == (False, True)
    assert first["cost_s"] == pytest.approx(sum(first["terms_s"].values()), abs=1e-3)
    assert first["terms_s"]["prefill"] == pytest.approx(0.5, rel=0.5)
    assert any(reason.startswith("decode") for reason in first["reasons"])
    assert any(reason.startswith("load") for reason in second["reasons"])
    assert (third["excluded"], third["cost_s"], third["terms_s"]) == ("draining", None, {})


async def test_a_model_that_only_others_have_is_explained() -> None:
    node = Node()
    FakeMesh(node, member(1, profile("big:long", id="Big:long", aliases=("b",))))
    for name in ("big:LONG", "b"):
        told = (await request(node.app, "GET", f"/admin/route?model={name}")).json
        assert told["model"] == "Big:long"
        assert [entry["node"] for entry in told["candidates"]] == ["n1"]
        assert told["assumed"] == {"prompt_tokens": 1000, "max_tokens": None}
    assert (await request(node.app, "GET", "/admin/route?model=nobody")).status == 404


async def test_without_a_mesh_this_node_serves_all() -> None:
    told = (await request(Node().app, "GET", "/admin/route?model=Smol")).json
    (only,) = told["candidates"]
    assert (only["node"], only["self"], only["excluded"]) == ("node-a", True, None)
    assert "no mesh" in only["reasons"][0]


@pytest.mark.parametrize("query", ["prompt_tokens=-1", "max_tokens=x", "prompt_tokens=1e3", "max_tokens=9999999999"])
async def test_bad_numbers(query: str) -> None:
    answer = await request(Node().app, "GET", f"/admin/route?model=Smol&{query}")
    assert answer.status == 400
    assert answer.json["error"]["param"] == query.partition("=")[0]


async def test_to_ask_counts_nothing() -> None:
    """A question is no request: it takes nobody's turn, no permit and no place."""
    node = Node()
    mesh = FakeMesh(node, *(member(number, profile("x:default", ready=1, slots=4)) for number in (1, 2, 3)))
    answers = {(await request(node.app, "GET", "/admin/route?model=x")).body for _ in range(4)}
    assert len(answers) == 1
    assert all(peer.forwards_total == 0 and not peer.forwards for peer in mesh.peers)
