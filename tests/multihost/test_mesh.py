"""Three boxes, one endpoint: real nodes with real llama-servers find each other and serve each other's clients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import Models, cookbook, eventually, profile
from tests.e2e.wire import CHAT
from tests.multihost.lab import Lab
from tests.multihost.nodes import MeshNode

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 16}
LONG: dict[str, Any] = {"ignore_eos": True, "max_tokens": 30_000}  # 10 s at the least, when nobody leaves
PATIENT = "-t 1 -tb 1 -c 65536 -np 2 --no-warmup"


class Trio:
    """a takes requests and has no model of its own; b and c have alpha."""

    def __init__(self, a: MeshNode, b: MeshNode, c: MeshNode) -> None:
        self.a, self.b, self.c = a, b, c

    def served_by(self, **keys: Any) -> tuple[int, str | None]:
        """Ask a for alpha; return the status and the node that served it."""
        response = self.a.http.post(CHAT, json={"model": "alpha", **BODY, **keys})
        return response.status_code, response.headers.get("x-llama-mesh-node")


@pytest.fixture
def trio(lab: Lab, models: Models, tmp_path: Path) -> Iterator[Trio]:
    with_alpha = cookbook({"alpha": profile(models.alpha, PATIENT, idle_timeout_seconds=600)})
    texts = {"a": cookbook({}), "b": with_alpha, "c": with_alpha}
    with ExitStack() as stack:
        nodes = {
            name: stack.enter_context(MeshNode(lab.host(name), tmp_path / name, text)) for name, text in texts.items()
        }
        for name, node in nodes.items():
            node.wait_for(*(other for other in nodes if other != name))
        yield Trio(**nodes)


def test_a_model_of_others_is_served_where_it_is_warm(trio: Trio) -> None:
    """The union of models; a cold start elsewhere; then whoever has it loaded, as everybody can see and explain."""
    a = trio.a
    listed = a.http.get("/v1/models").json()["data"]
    assert [(m["id"], m["metadata"]["nodes"]) for m in listed] == [("alpha", ["b", "c"])]
    assert a.cli("prewarm", "alpha", "--node", "c").returncode == 0
    assert trio.c.instances("alpha", "ready")
    eventually(lambda: trio.a.cluster()["c"]["loaded_models"] == ["alpha"], what="a hears of it")
    response = a.http.post(CHAT, json={"model": "alpha", **BODY})
    assert response.json()["choices"][0]["message"]["content"] == "I am alpha"
    assert response.headers["x-llama-mesh-node"] == "c"
    assert response.headers["x-llama-mesh-via"] == "a"
    assert response.headers["x-llama-mesh-instance"]
    with a.stream("alpha") as stream:
        assert "data: [DONE]" in list(stream.iter_lines())
    route = a.cli_json("route", "alpha")
    assert [candidate["node"] for candidate in route["candidates"]] == ["c", "b"]
    assert {row["node_id"] for row in a.cli_json("nodes")["nodes"].values()} == {"a", "b", "c"}
    assert trio.b.instances("alpha") == []


def test_the_first_request_starts_the_model_on_the_best_node(lab: Lab, models: Models, tmp_path: Path) -> None:
    """b could never load it and c can: nobody has to be told."""
    text = cookbook({"alpha": profile(models.alpha)})
    small = {"max_sysmem_mb": 8}
    with (
        MeshNode(lab.host("a"), tmp_path / "a", cookbook({})) as a,
        MeshNode(lab.host("b"), tmp_path / "b", text, small) as b,
        MeshNode(lab.host("c"), tmp_path / "c", text) as c,
    ):
        a.wait_for("b", "c")
        response = a.http.post(CHAT, json={"model": "alpha", **BODY})
        assert (response.status_code, response.headers["x-llama-mesh-node"]) == (200, "c")
        # its own client is not told that it is too large: another node has room
        response = b.http.post(CHAT, json={"model": "alpha", **BODY})
        assert (response.status_code, response.headers["x-llama-mesh-node"]) == (200, "c")
        assert c.instances("alpha", "ready")
        assert b.metric("llama_mesh_errors_total") == 0  # trap 6
        unknown = a.http.post(CHAT, json={"model": "no-such-model", **BODY})
        assert unknown.status_code == 404  # trap 62


def test_a_drained_node_leaves_the_rotation_at_once(trio: Trio) -> None:
    """What it does goes on, what comes goes elsewhere, its own clients too; undrained it works again."""
    a, b, c = trio.a, trio.b, trio.c
    for node in ("b", "c"):
        a.cli("prewarm", "alpha", "--node", node)
    with b.connection() as running:
        assert running.start_stream("alpha", **LONG) == 200
        assert a.cli("drain", "b").returncode == 0
        assert [trio.served_by() for _ in range(4)] == [(200, "c")] * 4
        own = b.http.post(CHAT, json={"model": "alpha", **BODY})
        assert (own.status_code, own.headers["x-llama-mesh-node"]) == (200, "c")
        assert b.instance("alpha")["active"] == 1
    assert a.cli("undrain", "b").returncode == 0
    c.http.post("/admin/drain", json={})
    eventually(lambda: trio.served_by() == (200, "b"), what="b serves again")


def test_a_client_that_leaves_frees_the_slot_on_the_other_node(trio: Trio) -> None:
    """Gone from a, gone from the llama-server on b (traps 5, 8)."""
    trio.a.cli("prewarm", "alpha", "--node", "b")
    eventually(lambda: trio.a.cluster()["b"]["loaded_models"] == ["alpha"])
    with trio.a.connection() as client:
        assert client.start_stream("alpha", **LONG) == 200
        assert trio.b.instance("alpha")["busy"] == 1
    eventually(lambda: trio.b.instance("alpha")["busy"] == 0, within_s=10, what="the slot is free")
    eventually(lambda: trio.a.cluster()["b"]["forwards_in_flight"] == 0)
    assert trio.a.cluster()["a"]["current_requests"] == 0


def test_a_burst_spreads_over_equal_nodes(trio: Trio) -> None:
    """Own forwards count at once: nobody waits for gossip (traps 50, 51)."""
    for node in ("b", "c"):
        trio.a.cli("prewarm", "alpha", "--node", node)
    eventually(lambda: all(trio.a.cluster()[n]["loaded_models"] == ["alpha"] for n in ("b", "c")))
    with ExitStack() as stack:
        clients = [stack.enter_context(trio.a.connection()) for _ in range(4)]
        assert [client.start_stream("alpha", **LONG) for client in clients] == [200] * 4
        assert [node.instance("alpha")["active"] for node in (trio.b, trio.c)] == [2, 2]


def test_nobody_chose_where_to_listen(lab: Lab, models: Models, tmp_path: Path) -> None:
    """``cluster: {enabled: true}`` alone: other nodes get in, clients of other machines do not (trap 100)."""
    unset = {"listen_addr": "127.0.0.1:8080"}  # the default
    text = cookbook({"alpha": profile(models.alpha)})
    with (
        MeshNode(lab.host("a"), tmp_path / "a", cookbook({}), unset) as a,
        MeshNode(lab.host("b"), tmp_path / "b", text, unset) as b,
    ):
        a.wait_for("b")
        assert a.say("alpha") == "I am alpha"
        with b.http_from(lab.host("c")) as stranger:
            refused = stranger.get("/v1/models")
        assert refused.status_code == 403
        assert "listen_addr" in refused.json()["error"]["message"]


def test_everywhere(trio: Trio) -> None:
    """One command for all nodes; who does not have the model has nothing to do."""
    result = trio.a.cli("prewarm", "alpha", "--everywhere", "--json")
    assert result.returncode == 0, result
    answer = json.loads(result.stdout)
    assert {name: entry["status"] for name, entry in answer["nodes"].items()} == {"a": "error", "b": "ok", "c": "ok"}
    assert trio.a.cli("unload", "--all", "--everywhere").returncode == 0
    eventually(lambda: not trio.b.instances() and not trio.c.instances())
