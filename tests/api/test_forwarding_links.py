"""Links as requests use them: few handshakes at once, one link after the other, goodbyes, and what is no answer."""

from __future__ import annotations

import asyncio
import json
import socket
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mesh.api.client import ClientConnection
from mesh.core.breaker import Limits, Phase
from mesh.errors import QueueFullError
from mesh.net.link import Link
from tests.api.loopback import Answer, RawClient, post, profile
from tests.api.mesh_pair import TINY, MeshNode, mesh_node, met, offers
from tests.fakes import Received, Script, json_reply, reply

ASK = b'{"model":"tiny"}'
FAST: dict[str, Any] = {"decode_tps": 9999.0}
SSE = b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
MANY = 700


async def asked(node: MeshNode, body: bytes = ASK) -> RawClient:
    client = await node.client()
    client.send(post(body))
    return client


async def ask(node: MeshNode, body: bytes = ASK) -> Answer:
    return await (await asked(node, body)).answer()


def then(gate: asyncio.Event, *parts: bytes) -> Script:
    """Send the first part, the others when *gate* is open, then close."""

    async def play(request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(parts[0])
        await gate.wait()
        await reply(*parts[1:], close=True)(request, reader, writer)

    return play


# --- many at once


async def test_a_burst_to_a_peer_without_links() -> None:
    """Its limit on handshakes is against strangers, and no failure of it: nobody is refused, no circuit opens."""
    async with met(mesh_node(1, profiles=(), limits=Limits()), mesh_node(2)) as (one, two):
        clients = [await one.client() for _ in range(MANY)]
        most = 0

        def count(link: Link) -> bool:
            nonlocal most
            most = max(most, one.links.half_open)
            return False

        two.on_heard = count
        for client in clients:
            client.send(post(ASK))
        assert [(await client.answer()).status for client in clients] == [200] * MANY
        peer = one.peer(two)
        assert (peer.failures_total, peer.refusals_total, peer.forwards_total) == (0, 0, MANY)
        assert (peer.breaker.phase, peer.breaker.generation) == (Phase.CLOSED, 0)
        assert 0 < most <= 16
        assert len(one.dials) < MANY, "links that are free again carry some of them"
        assert one.ctx.metrics.errors_total == 0


async def test_a_burst_to_a_peer_that_is_not_there(unused_tcp_port: int) -> None:
    """The first handshake that fails says it for all that wait for one: they are served elsewhere."""
    async with met(mesh_node(1, profiles=(), limits=Limits()), mesh_node(2), mesh_node(3)) as (one, two, three):
        one.knows(two, offers(**FAST, slots=1000), port=unused_tcp_port)
        clients = [await one.client() for _ in range(100)]
        for client in clients:
            client.send(post(ASK))
        assert [(await client.answer()).field(b"x-llama-mesh-node") for client in clients] == [b"node-3"] * 100
        assert one.peer(two).breaker.phase is Phase.OPEN
        assert one.dials.count("node-2") <= 32
        assert len(three.instance.requests) == 100


async def test_who_leaves_while_waiting_for_a_link_is_not_sent_on() -> None:
    async with met(mesh_node(1, profiles=()), mesh_node(2)) as (one, two):
        clients = [await one.client() for _ in range(60)]
        for client in clients:
            client.send(post(ASK))
        await one.until(lambda: len(one.dials) == 16)
        for client in clients[16:50]:
            client.abort()
        answers = [await client.answer() for client in (*clients[:16], *clients[50:])]
        assert [answer.status for answer in answers] == [200] * 26
        await one.settled()
        assert len(two.instance.requests) <= 60
        assert not one.pool._waiting
        assert one.pool._dialing == 0


# --- links that were kept


async def test_a_link_that_was_opened_for_nobody_and_is_just_closed() -> None:
    """It has never answered, and yet the peer may close it for being idle: a new link, no failure (trap 75)."""
    async with met(mesh_node(1, profiles=()), mesh_node(2)) as (one, two):
        client = await asked(one)
        await one.until(lambda: one.dials == ["node-2"])
        next(iter(one.plane.connections)).abort()
        await one.until(lambda: bool(one.forwarder._endpoints) and len(one.pool.idle) == 1)
        assert await client.ended() == b""
        closed: list[Link] = []

        def close_once(link: Link) -> bool:
            if closed:
                return False
            closed.append(link)
            link.close()
            return True

        two.on_heard = close_once
        assert (await ask(one)).status == 200
        assert one.dials == ["node-2", "node-2"]
        assert one.peer(two).failures_total == 0
        assert one.ctx.metrics.upstream_retries_total == 1


# --- a peer that says goodbye


@pytest.mark.parametrize("reads_late", [False, True])
async def test_a_goodbye_in_the_middle_of_a_large_answer(reads_late: bool) -> None:
    """The peer has finished and is gone; what is still on its way to a slow client arrives."""
    size = 4_000_000
    async with met(mesh_node(1, profiles=()), mesh_node(2, json_reply(b"x" * size))) as (one, two):
        loop = asyncio.get_running_loop()
        with socket.socket() as sock:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await loop.sock_connect(sock, ("127.0.0.1", one.port))
            await loop.sock_sendall(sock, post(ASK))
            await one.until(lambda: any(c.write_paused for c in one.plane.connections))
            if reads_late:
                await two.until(lambda: all(lease.ended for lease in two.admission.leases))
            one.forgets(two)
            await one.turn(20)
            data = b""
            async with asyncio.timeout(20):
                while not data.endswith(b"x" * 100) or len(data.partition(b"\r\n\r\n")[2]) < size:
                    piece = await loop.sock_recv(sock, 1_000_000)
                    assert piece, "cut off"
                    data += piece
        await one.settled()
        assert one.access.lines[0]["error"] is None
        assert one.ctx.metrics.peer_stream_body_aborts_total == 0
        assert not one.forwarder._endpoints
        await one.until(lambda: not one.links.links)


FRAMES = {
    "events": (SSE, b"4\r\n:a\n\n\r\n", b"0\r\n\r\n", b":a\n\n"),
    "length": (b"Content-Length: 2\r\n\r\n", b"a", b"b", b"ab"),
    "the end": (b"Content-Type: text/plain\r\n\r\n", b"a", b"b", b"ab"),
}


@pytest.mark.parametrize("framing", FRAMES)
async def test_a_goodbye_in_the_middle_of_any_answer(framing: str) -> None:
    head, first, last, body = FRAMES[framing]
    gate = asyncio.Event()
    script = then(gate, b"HTTP/1.1 200 OK\r\n" + head + first, last)
    async with met(mesh_node(1, profiles=()), mesh_node(2, script)) as (one, two):
        client = await asked(one)
        await one.until(lambda: any(c._exchange and c._exchange.response for c in one.plane.connections))
        one.forgets(two)
        await one.turn(20)
        gate.set()
        answer = await client.answer()
        assert (answer.body, answer.ended != "broken") == (body, True)
        await one.settled()
        assert one.access.lines[0]["error"] is None
        await one.until(lambda: not one.links.links)


async def test_a_goodbye_before_the_first_byte() -> None:
    """It was sent there, and is worked on there: so it is answered from there."""
    gate = asyncio.Event()

    async def late(request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await gate.wait()
        await json_reply(b"late")(request, reader, writer)

    async with met(mesh_node(1, profiles=()), mesh_node(2, late), mesh_node(3)) as (one, two, three):
        one.knows(two, offers(**FAST))
        client = await asked(one)
        await two.instance.until(lambda: len(two.instance.requests) == 1)
        one.forgets(two)
        await one.turn(20)
        gate.set()
        assert (await client.answer()).body == b"late"
        assert three.instance.requests == []
        await one.until(lambda: not one.links.links)


async def test_a_peer_that_breaks_off_after_its_goodbye() -> None:
    """No clean end: that it is gone makes half an answer no whole one."""
    gate = asyncio.Event()
    async with met(mesh_node(1, profiles=()), mesh_node(2, then(gate, b"HTTP/1.1 200 OK\r\n\r\na"))) as (one, two):
        client = await asked(one)
        assert (await client.answer(head_only=True)).status == 200
        one.forgets(two)
        await one.turn(20)
        for link in two.links.links:
            link._tcp.abort()
        with pytest.raises(ConnectionResetError):
            async with asyncio.timeout(5):
                await client.reader.read()
        await one.settled()
        assert one.access.lines[0]["error"] == "peer_error"


async def test_a_goodbye_while_many_wait_for_a_link() -> None:
    """They are served elsewhere, and nothing of the peer is left (trap 63)."""
    async with met(mesh_node(1, profiles=()), mesh_node(2), mesh_node(3)) as (one, two, _):
        one.knows(two, offers(**FAST, slots=1000))
        clients = [await one.client() for _ in range(60)]
        for client in clients:
            client.send(post(ASK))
        await one.until(lambda: len(one.dials) >= 16)
        one.forgets(two)
        assert [(await client.answer()).status for client in clients] == [200] * 60
        assert two.identity.key not in one.forwarder._endpoints
        await one.until(lambda: not one.links_to(two))


# --- what is no answer


@pytest.mark.parametrize(
    "nonsense",
    [b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1 101 Switching Protocols\r\n\r\n", b"x" * 70_000],
    ids=["ssh", "status", "101", "endless"],
)
async def test_a_peer_that_speaks_no_http(nonsense: bytes) -> None:
    """Nothing was written to the client, so another one is asked; its link is cut, and it counts as a failure."""
    async with met(mesh_node(1, profiles=()), mesh_node(2), mesh_node(3)) as (one, two, three):
        one.knows(two, offers(**FAST))

        def answer(link: Link) -> bool:
            link.write(nonsense)
            return True

        two.on_heard = answer
        assert (await ask(one)).field(b"x-llama-mesh-node") == b"node-3"
        assert one.dials == ["node-2", "node-3"]
        peer = one.peer(two)
        assert (peer.failures_total, peer.refusals_total) == (1, 0)
        assert one.ctx.metrics.errors_total == 0
        await one.until(lambda: not one.links_to(two))
        one.forgets(three)
        refused = await ask(one)
        error = json.loads(refused.body)["error"]
        assert (refused.status, error["type"]) == (502, "peer_error")
        assert "node-2" in error["message"]


async def test_half_a_head_is_not_the_beginning_of_the_next_ones() -> None:
    """The next node's answer is its own."""
    async with met(mesh_node(1, profiles=()), mesh_node(2), mesh_node(3, json_reply(b"{}"))) as (one, two, _):
        one.knows(two, offers(**FAST))

        def half(link: Link) -> bool:
            link.write(b"HTTP/1.1 500 Oh\r\nX-From-The-Dead: 1\r\nContent-Le")
            asyncio.get_running_loop().call_later(0.01, link._tcp.abort)
            return True

        two.on_heard = half
        answer = await ask(one)
        assert (answer.status, answer.body) == (200, b"{}")
        assert answer.field(b"x-from-the-dead") is None


@pytest.mark.parametrize(
    "body",
    [b"[" * 50_000, b"", b"null", b'{"error":[]}', b'{"error":{"message":' + b"9" * 5000 + b"}}", b"\xff"],
    ids=["deep", "empty", "null", "list", "number", "bytes"],
)
async def test_a_refusal_in_no_words(body: bytes) -> None:
    """Whatever it is that a peer says beside its no: the no counts."""
    async with met(mesh_node(1, profiles=()), mesh_node(2), mesh_node(3)) as (one, two, three):
        one.knows(two, offers(**FAST))

        def refuse(link: Link) -> bool:
            head = b"HTTP/1.1 503 No\r\nX-Llama-Mesh-Error: model_too_large\r\nContent-Length: %d\r\n\r\n"
            link.write(head % len(body) + body)
            return True

        two.on_heard = refuse
        assert (await ask(one)).field(b"x-llama-mesh-node") == b"node-3"
        one.forgets(three)
        one.knows(two, offers(**FAST))
        answer = await ask(one)
        error = json.loads(answer.body)["error"]
        assert (answer.status, error["type"]) == (503, "model_too_large")
        assert error["message"] == "node node-2: model too large"


# --- limits of a peer


async def test_a_body_that_is_too_large_for_a_peer_only() -> None:
    """413 of one that has a lower limit than others; if all have, that is what the client sees."""
    low = {"http": {"request_body_limit_bytes": 1000}}
    body = json.dumps({"model": "tiny", "prompt": "x" * 5000}).encode()
    async with met(mesh_node(1, profiles=()), mesh_node(2, settings=low), mesh_node(3)) as (one, two, three):
        one.knows(two, offers(**FAST))
        answer = await ask(one, body)
        assert (answer.status, answer.field(b"x-llama-mesh-node")) == (200, b"node-3")
        assert one.peer(two).failures_total == 0
        one.forgets(three)
        answer = await ask(one, body)
        assert (answer.status, json.loads(answer.body)["error"]["type"]) == (413, "request_too_large")
        assert (await ask(two, body)).field(b"x-llama-mesh-error") is None, "a client is told in plain HTTP"


async def test_an_upload_that_is_too_slow_for_a_peer_only() -> None:
    quick = {"http": {"body_read_timeout_ms": 100}}
    async with met(mesh_node(1, profiles=()), mesh_node(2, settings=quick), mesh_node(3)) as (one, two, _):
        one.knows(two, offers(**FAST))

        def lose_the_end(link: Link) -> bool:
            ClientConnection.data_received(cast(ClientConnection, link.get_protocol()), bytes(two.heard[:-3]))
            return True

        two.on_heard = lose_the_end
        answer = await ask(one)
        assert (answer.status, answer.field(b"x-llama-mesh-node")) == (200, b"node-3")
        assert one.peer(two).failures_total == 0


async def test_a_request_that_took_too_long_is_not_begun_again_elsewhere() -> None:
    """max_request_duration_ms at the peer: 502 of it is the answer, as it would be of this node."""

    async def hang(request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        raise ConnectionError

    mine = profile(max_request_s=60.0)
    async with met(mesh_node(1, profiles=()), mesh_node(2, hang, profiles=(mine,)), mesh_node(3)) as (one, two, three):
        one.knows(two, offers(**FAST))
        client = await asked(one)
        await two.instance.until(lambda: len(two.instance.requests) == 1)
        two.late = 61.0
        answer = await client.answer()
        error = json.loads(answer.body)["error"]
        assert (answer.status, error["type"], error["source"]) == (502, "request_timeout", "peer")
        assert three.instance.requests == []


# --- this node


async def test_a_bug_in_a_later_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client gets its 500, and nothing stays counted (``settled`` looks at all of it)."""
    monkeypatch.setattr("mesh.api.waiting_line.FIRST_PAUSE_S", 0.01)
    async with met(mesh_node(1, profiles=()), mesh_node(2), mesh_node(3)) as (one, two, three):
        two.admission.refusal = three.admission.refusal = QueueFullError("full")
        client = await asked(one)
        await one.until(lambda: one.forwarder.waiting(TINY) == 1)

        def bug(*args: Any, **kwargs: Any) -> Any:
            raise ValueError("a bug")

        logged: list[str] = []
        log = SimpleNamespace(exception=lambda text, **fields: logged.append(text))
        monkeypatch.setattr("mesh.api.forwarding._log", log)
        monkeypatch.setattr(one.forwarder.local, "rank", bug)
        answer = await client.answer()
        assert (answer.status, json.loads(answer.body)["error"]["type"]) == (500, "internal_error")
        await one.settled()
        assert logged == ["a request failed unexpectedly"]
        monkeypatch.undo()
        two.admission.refusal = None
        one.knows(two, offers())
        client.send(post(ASK))
        assert (await client.answer()).status == 200, "the connection is in step"


async def test_what_a_peer_took_of_the_time_is_not_this_nodes_speed() -> None:
    """It was with a full peer for half a minute, and then served here in two seconds: that is what is learned."""

    async def play(request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        one.late += 2.0
        await json_reply(b'{"usage":{"completion_tokens":10,"prompt_tokens":10}}')(request, reader, writer)

    async with met(mesh_node(1, play), mesh_node(2)) as (one, two):
        one.plane.learn = one.own.finished
        one.knows(two, offers(**FAST))
        two.admission.hold = one.admission.cold = True
        client = await asked(one)
        ticket = await two.admission.ticket()
        one.late = 30.0
        ticket.refuse(QueueFullError("full"))
        assert (await client.answer()).field(b"x-llama-mesh-node") == b"node-1"
        await one.settled()
        assert one.own.speed(TINY).figures().service_s == pytest.approx(2.0, abs=1.0)
