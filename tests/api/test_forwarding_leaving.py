"""The client leaves, wherever its request is: the serving node's instance is cut off at once, nothing stays counted.

``met`` checks leases, tickets, gauges, own forwards, pauses and tasks of every node at the end (traps 1, 2, 8, 63).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.errors import InstanceError, QueueFullError
from tests.api.loopback import RawClient, post, profile
from tests.api.mesh_pair import TINY, MeshNode, mesh_node, met, offers
from tests.fakes import Received, Script, die, json_reply, reply, then_hang

ASK = b'{"model":"tiny","stream":true}'
FAST: dict[str, Any] = {"decode_tps": 9999.0}
SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNK = b'b\r\ndata: {"a"}\r\n'


async def asked(node: MeshNode) -> RawClient:
    client = await node.client()
    client.send(post(ASK))
    return client


async def left(node: MeshNode) -> None:
    """Check that *node* has noted the client's leaving, and no error."""
    await node.settled()
    line = node.access.lines[-1]
    assert (line["status"], line["error"]) == (499, "client_disconnected")
    assert node.ctx.metrics.errors_total == 0


@pytest.mark.parametrize("parts", [(), (SSE,), (SSE, CHUNK), (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n1",)])
async def test_leaving_while_the_peers_instance_works(parts: tuple[bytes, ...]) -> None:
    """Before the first byte and in the stream: its connection is closed at once, with two nodes between (trap 8)."""
    async with met(mesh_node(1, profiles=()), mesh_node(2, then_hang(*parts))) as (one, two):
        client = await asked(one)
        await two.instance.until(lambda: len(two.instance.requests) == 1)
        assert one.peer(two).forwards == {TINY: 1}
        assert one.ctx.metrics.current_requests == 1  # until the end (trap 5)
        if parts:
            await client.answer(head_only=True)
            assert one.peer(two).forwards == {TINY: 1}
        client.abort()
        await two.instance.until(lambda: two.instance.lost == 1)
        await left(one)
        await left(two)
        assert two.admission.leases[0].ended == ["abandon"]
        assert one.peer(two).failures_total == 0
        await two.until(lambda: not two.links.links)


async def test_leaving_while_it_waits_at_the_peer() -> None:
    """Its place there is given up (trap 2)."""
    async with met(mesh_node(1, profiles=()), mesh_node(2)) as (one, two):
        two.admission.hold = True
        client = await asked(one)
        ticket = await two.admission.ticket()
        client.writer.close()
        await two.admission.until(lambda: ticket.cancelled)
        await left(one)
        await left(two)


async def test_leaving_while_connecting(silent_port: int) -> None:
    """It is over at once, not when the dial is."""
    async with met(mesh_node(1, profiles=()), mesh_node(2)) as (one, two):
        one.dial_s = 0.3
        one.knows(two, offers(), port=silent_port)
        client = await asked(one)
        await one.until(lambda: one.dials == ["node-2"])
        client.abort()
        await one.until(lambda: one.ctx.metrics.current_requests == 0)
        assert one.links.half_open == 1
        await left(one)
        assert one.peer(two).failures_total == 0


async def test_the_link_that_nobody_waits_for_any_more_is_kept() -> None:
    async with met(mesh_node(1, profiles=()), mesh_node(2)) as (one, two):
        client = await asked(one)
        await one.until(lambda: one.dials == ["node-2"])
        next(iter(one.plane.connections)).abort()
        await one.until(lambda: one.ctx.metrics.current_requests == 0)
        await one.until(lambda: len(one.pool.idle) == 1)
        assert await client.ended() == b""
        assert (await (await asked(one)).answer()).status == 200
        assert one.dials == ["node-2"]
        assert len(two.instance.requests) == 1


async def test_leaving_in_the_pause_between_two_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.api.waiting_line.FIRST_PAUSE_S", 30.0)
    async with met(mesh_node(1, profiles=()), mesh_node(2)) as (one, two):
        two.admission.refusal = QueueFullError("full")
        client = await asked(one)
        await one.until(lambda: one.forwarder.waiting(TINY) == 1)
        client.abort()
        await left(one)
        assert one.forwarder.waiting(TINY) == 0


async def test_leaving_with_two_nodes_in_between() -> None:
    async with met(
        mesh_node(1, profiles=()), mesh_node(2, profiles=()), mesh_node(3, then_hang(SSE, CHUNK))
    ) as (one, two, three):  # fmt: skip
        one.knows(three)
        one.knows(two, offers())
        client = await asked(one)
        assert (await client.answer(head_only=True)).field(b"x-llama-mesh-node") == b"node-3"
        client.abort()
        await three.instance.until(lambda: three.instance.lost == 1)
        for node in (one, two, three):
            await left(node)


async def test_a_shielded_profile_whose_client_leaves_before_the_peer_refuses() -> None:
    """drain_on_disconnect (trap 11): nobody is asked in its stead, since nobody would read the answer."""
    mine = profile(drain_on_disconnect=True, max_instances=0)
    async with met(mesh_node(1, profiles=(mine,)), mesh_node(2), mesh_node(3)) as (one, two, three):
        one.knows(two, offers(**FAST))
        two.admission.hold = True
        client = await asked(one)
        ticket = await two.admission.ticket()
        client.abort()
        await one.until(lambda: len(one.plane.detached) == 1)
        ticket.refuse(QueueFullError("full"))
        await one.settled()
        assert three.admission.tickets == []
        assert one.access.lines[0]["error"] == "queue_full"


async def test_a_shielded_profile_finishes() -> None:
    gate = asyncio.Event()

    async def play(request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE + CHUNK)
        await gate.wait()
        writer.write(CHUNK + b"0\r\n\r\n")

    mine = profile(drain_on_disconnect=True, max_instances=0)
    async with met(mesh_node(1, profiles=(mine,)), mesh_node(2, play)) as (one, two):
        client = await asked(one)
        await client.answer(head_only=True)
        client.abort()
        await one.until(lambda: len(one.plane.detached) == 1)
        assert one.peer(two).forwards == {TINY: 1}
        gate.set()
        await two.settled()
        assert two.admission.leases[0].ended == ["release"]


async def test_the_entry_stops() -> None:
    """What it passed on ends there, too."""
    async with met(mesh_node(1, profiles=()), mesh_node(2, then_hang(SSE, CHUNK))) as (one, two):
        client = await asked(one)
        await client.answer(head_only=True)
        await one.plane.close()
        await two.instance.until(lambda: two.instance.lost == 1)
        await left(two)


@pytest.mark.parametrize("refusal", [QueueFullError("full"), InstanceError("dead")])
async def test_leaving_after_any_number_of_turns_of_the_loop(refusal: Exception) -> None:
    """The first peer refuses, the second one streams: wherever that stands, everything is given back (trap 1)."""
    async with met(mesh_node(1, profiles=()), mesh_node(2), mesh_node(3, then_hang(SSE, CHUNK))) as (one, two, three):
        two.admission.refusal = refusal  # type: ignore[assignment]
        for turns in range(70):
            one.knows(two, offers(**FAST))
            if turns % 7 == 0:  # as with links that are there, so without
                one.drop_links(two)
                one.drop_links(three)
            client = await asked(one)
            await one.turn(turns)
            client.abort()
            await one.until(lambda: not one.plane.connections)
            for node in (one, two, three):
                await node.settled()
            one.clients.clear()
        assert len(three.admission.leases) < 70  # some left before
        assert any(lease.ended == ["abandon"] for lease in three.admission.leases)
        assert all(node.ctx.metrics.errors_total == 0 for node in (one, three))


# --- anything at any time

_BEHAVIOURS: dict[str, Script] = {
    "answers": json_reply(b"{}"),
    "streams": reply(SSE, CHUNK, b"0\r\n\r\n"),
    "hangs": then_hang(),
    "breaks": reply(SSE, CHUNK, close=True),
    "dies": die,
}
_REFUSALS = {"full": QueueFullError("full"), "broken": InstanceError("dead")}
_NODE = st.sampled_from([*_BEHAVIOURS, *_REFUSALS, "drained", "gone"])


async def _anything(nodes: list[str], turns: int, cut_after: int) -> None:
    scripts = [_BEHAVIOURS.get(behaviour, die) for behaviour in nodes]
    made = [mesh_node(number, script) for number, script in enumerate(scripts, 1)]
    async with met(*made) as (one, two, three):
        all_nodes = (one, two, three)
        for node, behaviour in zip(all_nodes, nodes, strict=True):
            node.admission.refusal = _REFUSALS.get(behaviour)
            node.ctx.drained = behaviour == "drained"
            if behaviour == "gone" and node is not one:
                await node.listener.close()
        clients = [await asked(one) for _ in range(3)]
        await one.turn(turns)
        clients[0].abort()
        await one.turn(cut_after)
        for link in two.links.links:
            link._tcp.abort()
        await one.turn(100)
        for client in clients[1:]:
            client.abort()
        await one.until(lambda: not one.plane.connections)
        for node in all_nodes:
            await node.settled()
        for node in all_nodes:
            assert len(node.instance.requests) <= 2 * len(clients)  # a crash is met twice, by the node that has it


@settings(max_examples=25, deadline=None)
@given(st.lists(_NODE, min_size=3, max_size=3), st.integers(0, 60), st.integers(0, 60))
def test_anything_at_any_time(nodes: list[str], turns: int, cut_after: int) -> None:
    """Three requests, three nodes, one client that leaves and one node whose links are cut, whenever."""
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(_anything(nodes, turns, cut_after))
