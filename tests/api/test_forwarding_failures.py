"""Peers that are not there, fall silent or are cut off: before the first byte another one is asked, after it nobody."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from mesh.core.breaker import Limits, Phase
from mesh.net.link import Link
from tests.api.loopback import Answer, RawClient, post, profile
from tests.api.mesh_pair import TINY, MeshNode, mesh_node, met, offers
from tests.fakes import Received, json_reply, then_hang

ASK = b'{"model":"tiny","stream":true}'
FAST: dict[str, Any] = {"decode_tps": 9999.0}
SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.api.waiting_line.FIRST_PAUSE_S", 0.002)
    monkeypatch.setattr("mesh.api.waiting_line.LAST_PAUSE_S", 0.004)
    monkeypatch.setattr("mesh.net.peer.FULL_S", 0.003)


async def ask(node: MeshNode) -> Answer:
    return await (await asked(node)).answer()


async def asked(node: MeshNode) -> RawClient:
    client = await node.client()
    client.send(post(ASK))
    return client


def cut(node: MeshNode) -> None:
    """As if its machine lost its power."""
    for link in node.links.links:
        link._tcp.abort()


# --- not there


async def test_nobody_listens_there(unused_tcp_port: int) -> None:
    async with met(mesh_node(1, profiles=()), mesh_node(2), mesh_node(3)) as (one, two, three):
        one.knows(two, offers(**FAST), port=unused_tcp_port)
        assert (await ask(one)).field(b"x-llama-mesh-node") == b"node-3"
        assert one.dials == ["node-2", "node-3"]
        peer = one.peer(two)
        assert (peer.forwards_total, peer.failures_total) == (1, 1)
        assert one.ctx.metrics.errors_total == 0  # trap 6
        assert len(three.instance.requests) == 1


async def test_somebody_accepts_and_says_nothing(silent_port: int) -> None:
    """trap 56"""
    async with met(mesh_node(1, profiles=()), mesh_node(2), mesh_node(3)) as (one, two, _):
        one.dial_s = 0.05
        one.knows(two, offers(**FAST), port=silent_port)
        assert (await ask(one)).field(b"x-llama-mesh-node") == b"node-3"
        assert one.peer(two).failures_total == 1


async def test_another_node_answers_there() -> None:
    """Its key is not the one that was expected: it gets nothing of the request."""
    async with met(mesh_node(1, profiles=()), mesh_node(2), mesh_node(3)) as (one, two, three):
        one.knows(two, offers(**FAST), port=three.port)
        assert (await ask(one)).field(b"x-llama-mesh-node") == b"node-3"
        assert len(three.instance.requests) == 1
        assert one.peer(two).failures_total == 1


async def test_it_comes_back_while_the_request_waits(unused_tcp_port: int) -> None:
    async with met(mesh_node(1, profiles=()), mesh_node(2)) as (one, two):
        one.knows(two, offers(), port=unused_tcp_port)
        client = await asked(one)
        await one.until(lambda: len(one.dials) > 2)
        one.knows(two, offers())
        assert (await client.answer()).status == 200
        assert len(two.instance.requests) == 1


# --- cut off before the first byte


async def test_cut_while_it_works_on_it() -> None:
    """Another one gets it; the lost one drops it at once, and each instance got it once (traps 1, 8, 75)."""
    async with met(mesh_node(1, profiles=()), mesh_node(2, then_hang()), mesh_node(3)) as (one, two, three):
        one.knows(two, offers(**FAST))
        client = await asked(one)
        await two.instance.until(lambda: len(two.instance.requests) == 1)
        cut(two)
        assert (await client.answer()).field(b"x-llama-mesh-node") == b"node-3"
        await two.instance.until(lambda: two.instance.lost == 1)
        assert [len(node.instance.requests) for node in (two, three)] == [1, 1]
        assert one.peer(two).failures_total == 1
        assert one.ctx.metrics.errors_total == two.ctx.metrics.errors_total == 0
        assert two.admission.leases[0].ended == ["abandon"]


async def test_cut_everywhere() -> None:
    """Nobody is sent the same generation twice: the client gets 502, at once."""
    async with met(mesh_node(1, profiles=()), mesh_node(2, then_hang()), mesh_node(3, then_hang())) as (
        one,
        two,
        three,
    ):
        client = await asked(one)
        for _ in range(2):
            await one.until(lambda: any(n.ctx.metrics.current_requests and n.instance.requests for n in (two, three)))
            for node in (two, three):
                if node.instance.requests:
                    cut(node)
            await one.turn(20)
        answer = await client.answer()
        error = json.loads(answer.body)["error"]
        assert (answer.status, error["type"], error["source"]) == (502, "peer_error", "peer")
        assert [len(node.instance.requests) for node in (two, three)] == [1, 1]
        assert one.ctx.metrics.errors_total == 1


async def test_cut_while_it_waits_there() -> None:
    """It is out of the lost node's queue as well (trap 2)."""
    async with met(mesh_node(1, profiles=()), mesh_node(2), mesh_node(3)) as (one, two, _):
        one.knows(two, offers(**FAST))
        two.admission.hold = True
        client = await asked(one)
        ticket = await two.admission.ticket()
        cut(two)
        assert (await client.answer()).field(b"x-llama-mesh-node") == b"node-3"
        await two.until(lambda: ticket.cancelled)


async def test_a_peer_leads_back_to_this_node() -> None:
    """Which would have been slower, and is better than nothing."""
    async with met(mesh_node(1, json_reply(b"here")), mesh_node(2, then_hang())) as (one, two):
        one.admission.cold = True
        client = await asked(one)
        await two.instance.until(lambda: len(two.instance.requests) == 1)
        cut(two)
        assert (await client.answer()).body == b"here"


async def test_a_link_that_was_cut_while_idle() -> None:
    """The next request opens another one, and nobody counts it as a failure."""
    async with met(mesh_node(1, profiles=()), mesh_node(2)) as (one, two):
        assert (await ask(one)).status == 200
        cut(two)
        await one.until(lambda: not one.pool.open)
        assert (await ask(one)).status == 200
        assert one.dials == ["node-2", "node-2"]
        assert one.peer(two).failures_total == 0


async def test_a_link_that_was_idle_for_too_long_is_not_used() -> None:
    async with met(mesh_node(1, profiles=()), mesh_node(2)) as (one, two):
        for _ in range(2):
            assert (await ask(one)).status == 200
            one.late += 25.5
        assert len(one.dials) == 2
        assert len(two.instance.requests) == 2


@pytest.mark.parametrize("closes", [1, 2])
async def test_a_link_that_the_peer_just_closes(closes: int) -> None:
    """It said goodbye with the request on its way, so it never looked at that: a new link, at once, once (trap 75)."""
    async with met(mesh_node(1, profiles=()), mesh_node(2), mesh_node(3)) as (one, two, three):
        one.knows(two, offers(**FAST))
        assert (await ask(one)).field(b"x-llama-mesh-node") == b"node-2"
        closed: list[Link] = []

        def close(link: Link) -> bool:
            if len(closed) == closes:
                return False
            closed.append(link)
            link.close()
            return True

        two.on_heard = close
        assert (await ask(one)).field(b"x-llama-mesh-node") == (b"node-2" if closes == 1 else b"node-3")
        assert one.ctx.metrics.upstream_retries_total == 1
        assert (one.ctx.metrics.errors_total, one.peer(two).failures_total) == (0, closes - 1)
        assert len(two.instance.requests) + len(three.instance.requests) == 2


async def test_a_link_in_use_before_that_is_cut() -> None:
    """Not closed for being idle: the peer is in trouble and may be at work on it. Another one is asked (trap 75)."""
    async with met(mesh_node(1, profiles=()), mesh_node(2), mesh_node(3)) as (one, two, three):
        one.knows(two, offers(**FAST))
        assert (await ask(one)).field(b"x-llama-mesh-node") == b"node-2"
        two.instance.scripts = [then_hang()]
        client = await asked(one)
        await two.instance.until(lambda: len(two.instance.requests) == 2)
        cut(two)
        assert (await client.answer()).field(b"x-llama-mesh-node") == b"node-3"
        assert len(two.instance.requests) == 2
        assert len(three.instance.requests) == 1


# --- cut off after the first byte


async def _broken(*parts: bytes, how: str) -> Answer:
    async with met(mesh_node(1, profiles=()), mesh_node(2, then_hang(b"".join(parts))), mesh_node(3)) as nodes:
        one, two, three = nodes
        one.knows(two, offers(**FAST))
        client = await asked(one)
        await one.until(lambda: any(c._exchange and c._exchange.bytes_out for c in one.plane.connections))
        if how == "cut":
            cut(two)
        elif how == "stops":
            await two.plane.close()
        elif how == "links":
            await two.links.close(grace_s=1.0)
        else:
            two.instance.writers[0].transport.abort()
        answer = await client.answer()
        await one.settled()
        assert three.instance.requests == []  # no retry (trap 75)
        assert len(two.instance.requests) == 1
        assert one.ctx.metrics.errors_total == 1
        assert one.ctx.metrics.peer_stream_body_aborts_total == 1
        if how == "cut":
            assert one.peer(two).failures_total == 1
        elif how == "links":  # it said goodbye: it is there, whatever became of its instance
            assert one.peer(two).failures_total == 0
        return answer


@pytest.mark.parametrize("how", ["cut", "stops", "links", "instance"])
async def test_an_event_stream_that_breaks(how: str) -> None:
    """An error event, and the message stays open: never a clean end (trap 7)."""
    answer = await _broken(SSE, CHUNK, how=how)
    assert answer.ended == "broken"
    assert answer.body.startswith(EVENT)
    first = json.loads(answer.body.removeprefix(EVENT).split(b"data: ")[1])["error"]
    assert first["source"] == ("instance" if how == "instance" else "peer")


@pytest.mark.parametrize("how", ["cut", "stops", "links", "instance"])
@pytest.mark.parametrize("framing", [b"Content-Length: 100\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"])
async def test_a_body_that_breaks(framing: bytes, how: str) -> None:
    answer = await _broken(b"HTTP/1.1 200 OK\r\n" + framing, how=how)
    assert (answer.status, answer.ended) == (200, "broken")


@pytest.mark.parametrize("how", ["cut", "stops"])
async def test_a_body_without_an_end_of_its_own_that_breaks(how: str) -> None:
    """The connection's end is the body's: so it must not end cleanly."""
    async with met(mesh_node(1, profiles=()), mesh_node(2, then_hang(b"HTTP/1.1 200 OK\r\n\r\nabc"))) as (one, two):
        client = await asked(one)
        assert (await client.answer(head_only=True)).status == 200
        assert await client.reader.readexactly(3) == b"abc"
        if how == "cut":
            cut(two)
        else:
            await two.plane.close()
        with pytest.raises(ConnectionResetError):
            async with asyncio.timeout(5):
                await client.reader.read()
        await one.settled()
        assert one.access.lines[0]["error"] == "peer_error"


# --- silence


async def _ticks(nodes: tuple[MeshNode, ...], count: int) -> None:
    """Let *count* seconds pass for the links of *nodes*."""
    for _ in range(count):
        for node in nodes:
            for link in tuple(node.links.links):
                link.tick()
        await nodes[0].turn()


async def test_a_slow_prefill_is_not_a_dead_peer() -> None:
    """Five minutes without a byte of an answer: pings keep the link, nobody else is asked (trap 57)."""
    gate = asyncio.Event()

    async def slow(request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await gate.wait()
        await json_reply(b"at last")(request, reader, writer)

    async with met(mesh_node(1, profiles=()), mesh_node(2, slow), mesh_node(3)) as (one, two, three):
        one.knows(two, offers(**FAST))
        client = await asked(one)
        await two.instance.until(lambda: len(two.instance.requests) == 1)
        await _ticks((one, two), 300)
        one.late = two.late = 300.0
        await asyncio.sleep(0.05)  # and the sweeps see it
        gate.set()
        assert (await client.answer()).body == b"at last"
        assert three.instance.requests == []
        assert (len(one.dials), one.peer(two).failures_total) == (1, 0)


async def test_a_peer_that_hangs() -> None:
    """Its process stands still, its connections stay: dead after ten seconds without a ping, then the next one."""
    async with met(mesh_node(1, profiles=()), mesh_node(2, then_hang()), mesh_node(3)) as (one, two, three):
        one.knows(two, offers(**FAST))
        client = await asked(one)
        await two.instance.until(lambda: len(two.instance.requests) == 1)
        (link,) = one.links_to(two)
        await _ticks((one,), 9)
        assert not link.is_closing()
        await _ticks((one,), 2)
        assert (await client.answer()).field(b"x-llama-mesh-node") == b"node-3"
        assert one.peer(two).failures_total == 1
        assert [len(node.instance.requests) for node in (two, three)] == [1, 1]


# --- the circuit breaker

BREAKER = Limits(failure_threshold=2, success_threshold=2, open_base_s=5.0, probe_interval_s=1.0)


async def test_an_open_circuit_and_its_probes(unused_tcp_port: int) -> None:
    """Not asked while it is open; requests probe it after the pause, and it closes (trap 52)."""
    async with met(mesh_node(1, profiles=(), limits=BREAKER), mesh_node(2), mesh_node(3)) as (one, two, three):
        one.knows(two, offers(**FAST), port=unused_tcp_port)

        async def asked_at(late: float) -> tuple[bytes | None, bool, Phase]:
            """Return who served, whether the first peer was dialled, and how its circuit stands after that."""
            one.late, before = late, len(one.dials)
            answer = await ask(one)
            dialled = "node-2" in one.dials[before:]
            return answer.field(b"x-llama-mesh-node"), dialled, one.peer(two).breaker.phase

        assert await asked_at(0.0) == (b"node-3", True, Phase.CLOSED)
        assert await asked_at(0.0) == (b"node-3", True, Phase.OPEN)
        for _ in range(2):
            assert await asked_at(0.1) == (b"node-3", False, Phase.OPEN)
        assert await asked_at(5.5) == (b"node-3", True, Phase.OPEN)  # the probe failed
        one.knows(two, offers(**FAST))
        assert await asked_at(11.0) == (b"node-3", False, Phase.OPEN)  # the pause is longer than the first one
        assert await asked_at(16.0) == (b"node-2", True, Phase.HALF_OPEN)
        assert await asked_at(18.0) == (b"node-2", False, Phase.CLOSED)  # by the link that it has
        assert len(three.instance.requests) == 6


async def test_what_was_sent_before_it_opened_moves_nothing(unused_tcp_port: int) -> None:
    """trap 53"""
    async with met(mesh_node(1, profiles=(), limits=BREAKER), mesh_node(2), mesh_node(3)) as (one, two, _):
        one.knows(two, offers(**FAST))
        two.admission.hold = True
        client = await asked(one)
        ticket = await two.admission.ticket()
        peer = one.knows(two, offers(**FAST), port=unused_tcp_port)
        for _ in range(2):
            assert (await ask(one)).status == 200
        assert peer.breaker.phase is Phase.OPEN
        ticket.admit()
        assert (await client.answer()).field(b"x-llama-mesh-node") == b"node-2"
        assert peer.breaker.phase is Phase.OPEN


async def test_a_probe_whose_client_leaves_makes_way(silent_port: int) -> None:
    """Nothing came of it: the next request is the next probe (trap 53)."""
    async with met(mesh_node(1, profiles=(), limits=BREAKER), mesh_node(2), mesh_node(3)) as (one, two, _):
        one.dial_s = 0.2
        peer = one.knows(two, offers(**FAST))
        for _ in range(2):
            peer.failed(peer.breaker.allows(one.plane.now()))
        one.late = 6.0
        one.knows(two, offers(**FAST), port=silent_port)
        client = await asked(one)
        await one.until(lambda: peer.breaker.phase is Phase.HALF_OPEN)
        client.abort()
        await one.settled()
        one.knows(two, offers(**FAST))
        one.late = 8.0
        assert (await ask(one)).field(b"x-llama-mesh-node") == b"node-2"


async def test_breaking_off_counts_as_a_failure() -> None:
    async with met(mesh_node(1, profiles=(), limits=BREAKER), mesh_node(2, then_hang(SSE, CHUNK))) as (one, two):
        for _ in range(2):
            client = await asked(one)
            assert (await client.answer(head_only=True)).status == 200
            cut(two)
            assert b"peer_error" in await client.ended()
            await one.settled()
        assert one.peer(two).failures_total == 2
        assert one.peer(two).in_the_way(TINY) is None  # both had answered, which is what counts in a row


async def test_a_stand_in_profile_has_this_nodes_limits() -> None:
    async with met(mesh_node(1, profiles=()), mesh_node(2, profiles=(profile(max_wait_s=None),))) as (one, two):
        one.stand_in_wait_s = 7.0
        assert (await ask(one)).status == 200
        ticket = two.admission.tickets[0]
        assert ticket.deadline is not None
        assert ticket.deadline - ticket.since == pytest.approx(7.0, abs=0.5)
