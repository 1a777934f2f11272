"""Boxes and cables that fail under requests: nothing is lost that could have been served."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.harness import Models, cookbook, eventually, profile
from tests.e2e.wire import CHAT
from tests.multihost.lab import Lab
from tests.multihost.nodes import PORT, MeshNode
from tests.multihost.test_mesh import BODY, LONG, PATIENT, Trio


@pytest.fixture
def trio(lab: Lab, models: Models, tmp_path: Path) -> Iterator[Trio]:
    """b and c have alpha loaded. In the end whatever still runs is killed: these hosts have been through a lot."""
    with_alpha = cookbook({"alpha": profile(models.alpha, PATIENT, idle_timeout_seconds=600)})
    texts = {"a": cookbook({}), "b": with_alpha, "c": with_alpha}
    nodes = {name: MeshNode(lab.host(name), tmp_path / name, text) for name, text in texts.items()}
    try:
        for node in nodes.values():
            node.start()
        for name, node in nodes.items():
            node.wait_for(*(other for other in nodes if other != name))
        for name in ("b", "c"):
            nodes[name].prewarm("alpha")
        eventually(lambda: all(nodes["a"].cluster()[name]["loaded_models"] for name in ("b", "c")))
        yield Trio(**nodes)
        for node in nodes.values():
            assert "Traceback" not in node.stdout() + node.stderr(), node.tail(60)
    finally:
        for node in nodes.values():
            node.__exit__(AssertionError, AssertionError(), None)


def freeze(node: MeshNode) -> None:
    """Stop the node's llama-servers: what they were asked takes for ever, as a long prefill would."""
    for pid in node.server_pids():
        psutil.Process(pid).suspend()


def ask(node: MeshNode, **keys: Any) -> httpx.Response:
    """One request on a connection of its own; threads use it."""
    with node.host.http(node.url, timeout=90) as client:
        return client.post(CHAT, json={"model": "alpha", **BODY, **keys})


def in_flight(trio: Trio, count: int) -> tuple[ThreadPoolExecutor, list[Future[httpx.Response]]]:
    pool = ThreadPoolExecutor(count)
    return pool, [pool.submit(ask, trio.a) for _ in range(count)]


def assert_all_served(futures: list[Future[httpx.Response]]) -> set[str]:
    """Return who served them."""
    responses = [future.result(90) for future in futures]
    assert [r.status_code for r in responses] == [200] * len(responses), [r.text for r in responses]
    return {r.headers["x-llama-mesh-node"] for r in responses}


@pytest.mark.parametrize("how", ["power", "kill"])
def test_the_serving_node_dies_before_it_answers(trio: Trio, how: str) -> None:
    """Requests that were with it are served by the other one; by whom and how often is nobody's trouble."""
    freeze(trio.b)
    pool, futures = in_flight(trio, 6)
    with pool:
        eventually(lambda: trio.b.instance("alpha")["active"] >= 1, what="b has some of them")
        if how == "power":
            trio.b.power_off()  # no reset, no goodbye: only silence tells
        else:
            trio.b.sigkill()
        assert assert_all_served(futures) == {"c"}
    assert trio.a.metric("llama_mesh_errors_total") == 0
    eventually(lambda: trio.a.cluster()["b"]["status"] == "dead", within_s=60, what="b is declared dead")


def test_the_serving_node_dies_in_the_middle_of_an_answer(trio: Trio) -> None:
    """The stream ends with an error and does not look complete (trap 7); the next request is served elsewhere."""
    assert trio.a.cli("drain", "c").returncode == 0
    with trio.a.connection() as client:
        assert client.start_stream("alpha", **LONG) == 200
        assert trio.a.cli("undrain", "c").returncode == 0
        trio.b.sigkill()
        rest = client.rest()
    assert b'"type":"peer_error"' in rest
    assert b"[DONE]" not in rest
    assert not rest.endswith(b"0\r\n\r\n")
    assert trio.served_by() == (200, "c")


def test_a_partition_heals_under_requests(trio: Trio, lab: Lab) -> None:
    """Everybody who has the model is out of reach; requests wait within their limit and are served when it heals."""
    freeze(trio.b)
    freeze(trio.c)
    pool, futures = in_flight(trio, 4)
    with pool:
        eventually(lambda: sum(node.instance("alpha")["active"] for node in (trio.b, trio.c)) == 4)
        lab.partition({"a"}, {"b", "c"})
        for node in (trio.b, trio.c):
            for pid in node.server_pids():
                psutil.Process(pid).resume()
        futures += [pool.submit(ask, trio.a) for _ in range(2)]  # and some that come now
        trio.a.wait_log("cannot be reached", within_s=40)
        # among themselves the others are well
        assert trio.b.say("alpha") == "I am alpha"
        lab.heal()
        assert_all_served(futures)
    trio.a.wait_for("b", "c", within_s=60)
    eventually(lambda: trio.a.cluster()["b"]["circuit"] == "closed", within_s=60, what="trap 52")
    assert trio.served_by()[0] == 200


def test_a_node_that_hangs(trio: Trio) -> None:
    """It accepts and says nothing: requests go to the other one, and it is let in again when it goes on (trap 56)."""
    psutil.Process(trio.b.pid).suspend()
    try:
        pool, futures = in_flight(trio, 6)
        with pool:
            assert assert_all_served(futures) == {"c"}
        eventually(lambda: trio.a.cluster()["b"]["status"] != "alive", within_s=60, what="b is suspected")
    finally:
        psutil.Process(trio.b.pid).resume()
    eventually(lambda: trio.a.cluster()["b"]["status"] == "alive", within_s=60, what="b is back")
    assert trio.c.cluster()["a"]["status"] == "alive"  # trap 58: nobody else was dropped for it


def test_strangers_on_the_network(lab: Lab, models: Models, tmp_path: Path) -> None:
    """Peers that accept and say nothing, refuse, or cannot be resolved hold up neither start nor join (trap 56)."""
    with ExitStack() as stack:
        silent = stack.enter_context(lab.host("c").new_socket())
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        silent.bind(("0.0.0.0", PORT))
        silent.listen(64)
        peers = [f"{lab.host('c').address}:{PORT}", f"{lab.host('c').address}:9", "no-such-host.invalid:8080"]
        text = cookbook({"alpha": profile(models.alpha)})
        a = stack.enter_context(MeshNode(lab.host("a"), tmp_path / "a", cookbook({}), cluster={"peers": peers}))
        b = stack.enter_context(MeshNode(lab.host("b"), tmp_path / "b", text, cluster={"peers": peers}))
        a.wait_for("b", within_s=10)
        b.wait_for("a", within_s=10)
        assert a.say("alpha") == "I am alpha"


def test_a_node_stops_while_it_serves_others(trio: Trio) -> None:
    """SIGTERM: what it was asked is answered, what comes goes elsewhere, and it is gone from the list at once."""
    freeze(trio.b)
    pool, futures = in_flight(trio, 4)
    with pool:
        eventually(lambda: trio.b.instance("alpha")["active"] >= 1)
        pids = trio.b.server_pids()
        trio.b.process.terminate()
        eventually(lambda: trio.a.cluster().get("b", {"draining": True})["draining"], what="a knows")
        assert [trio.served_by()[1] for _ in range(3)] == ["c"] * 3
        for pid in pids:
            psutil.Process(pid).resume()
        assert_all_served(futures)
        assert trio.b.process.wait(30) == 0
    trio.a.wait_for("c", within_s=10)
