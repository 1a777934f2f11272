"""Whatever goes wrong at whatever moment: the client learns it as well as it can, and everything is given back once.

``loopback`` checks after each test that every lease and ticket ended exactly once and the gauge is back at 0 (trap 1).
"""

from __future__ import annotations

import asyncio
import json
import socket

import pytest

from mesh.engine.lease import Endpoint
from mesh.errors import InstanceError
from tests.api.loopback import Answer, LoopbackNode, get, loopback, post, profile
from tests.fakes import Received, ScriptedUpstream, die, hang, json_reply, reply, then_hang

ASK = b'{"model":"tiny","stream":true}'
SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)


async def test_events_are_sent_on_one_by_one_and_counted() -> None:
    """Each event leaves before the next one comes (trap 77); usage wins over counting (trap 95)."""
    gate = asyncio.Event()

    async def play(request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE + CHUNK)
        for tail in (CHUNK, b":\n\n", b'data: {"usage":{"completion_tokens":7,"prompt_tokens":2}}\n\n'):
            await gate.wait()
            gate.clear()
            writer.write(tail if tail == CHUNK else b"%x\r\n%b\r\n" % (len(tail), tail))
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    async with ScriptedUpstream(play) as upstream, loopback(upstream) as node:
        client = await node.client()
        client.send(post(ASK))
        head = await client.answer(head_only=True)
        assert head.field(b"x-accel-buffering") == b"no"
        assert await client.reader.readexactly(len(CHUNK)) == CHUNK
        gate.set()
        assert await client.reader.readexactly(len(CHUNK)) == CHUNK
        gate.set()
        assert await client.reader.readexactly(8) == b"3\r\n:\n\n\r\n"
        gate.set()
        rest = await client.reader.readuntil(b"0\r\n\r\n")
        assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        await node.settled()
        line = node.access.lines[0]
        assert (line["tokens"], line["error"]) == (7, None)
        assert line["ttft_s"] is not None


@pytest.mark.parametrize("cut", range(1, len(CHUNK) + 1, 5))
async def test_an_event_stream_that_breaks_ends_with_an_error_event(cut: int) -> None:
    """Wherever it breaks: the client reads the error and sees that the message did not end (trap 7)."""
    async with ScriptedUpstream(reply(SSE + CHUNK, CHUNK[:cut], close=True)) as upstream, loopback(upstream) as node:
        client = await node.client()
        client.send(post(ASK))
        answer = await client.answer()
        assert answer.ended == "broken"
        assert answer.body.startswith(EVENT)
        if cut > 3 or cut == len(CHUNK):  # in the middle of a size line nothing can be said any more
            event = answer.body.rpartition(b"data: ")[2]
            assert json.loads(event)["error"]["source"] == "instance"
        await node.settled()
        assert node.access.lines[0]["error"] == "upstream_error"
        assert node.ctx.metrics.errors_total == 1
        assert node.admission.leases[0].ended == ["release"]


async def test_an_anthropic_stream_that_breaks() -> None:
    async with ScriptedUpstream(reply(SSE, CHUNK, close=True)) as upstream, loopback(upstream) as node:
        client = await node.client()
        client.send(post(ASK, path=b"/v1/messages"))
        answer = await client.answer()
        assert answer.ended == "broken"
        assert b'\n\nevent: error\ndata: {"type":"error"' in answer.body


@pytest.mark.parametrize("status", [b"200 OK", b"500 Oops"])
async def test_a_json_answer_that_breaks_is_cut_off(status: bytes) -> None:
    """Never a clean 200 (trap 7), with a length or with chunks."""
    counted = b"HTTP/1.1 %b\r\nContent-Length: 100\r\n\r\n{" % status
    chunked = b"HTTP/1.1 %b\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n" % status
    async with ScriptedUpstream(reply(counted, close=True), reply(chunked, close=True)) as up, loopback(up) as node:
        for _ in range(2):
            client = await node.client()
            client.send(post(ASK))
            assert (await client.answer()).ended == "broken"
        assert node.ctx.metrics.errors_total == 2


async def test_a_malformed_chunk_ends_the_answer() -> None:
    async with ScriptedUpstream(then_hang(SSE, CHUNK, b"zz\r\n")) as upstream, loopback(upstream) as node:
        client = await node.client()
        client.send(post(ASK))
        answer = await client.answer()
        assert answer.ended == "broken"
        assert node.admission.leases[0].ended == ["abandon"]


@pytest.mark.parametrize(
    "head", [b"garbage\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000, b"HTTP/1.1 101 S\r\n\r\n"]
)
async def test_an_answer_that_is_not_http(head: bytes) -> None:
    async with ScriptedUpstream(then_hang(head)) as upstream, loopback(upstream) as node:
        client = await node.client()
        client.send(post(ASK))
        answer = await client.answer()
        assert (answer.status, json.loads(answer.body)["error"]["type"]) == (502, "upstream_error")
        assert node.admission.leases[0].ended == ["abandon"]


async def test_half_a_response_head_is_not_retried() -> None:
    """Bytes of an answer have come: the child was at work on it (trap 75)."""
    async with ScriptedUpstream(reply(b"HTTP/1.1 200 OK\r\n", close=True)) as upstream, loopback(upstream) as node:
        client = await node.client()
        client.send(post(ASK))
        assert (await client.answer()).status == 502
        assert len(upstream.requests) == 1


async def test_a_stale_connection_is_retried_at_once() -> None:
    """llama-server closed the kept connection just when it was used again."""
    async with ScriptedUpstream(json_reply(b"{}"), die, json_reply(b"{}")) as upstream, loopback(upstream) as node:
        client = await node.client()
        for _ in range(2):
            client.send(post(ASK))
            assert (await client.answer()).status == 200
        assert upstream.connections == 2
        assert node.ctx.metrics.upstream_retries_total == 1
        assert len(node.admission.tickets) == 2


async def test_a_connection_that_the_child_closed_while_idle() -> None:
    async with ScriptedUpstream(json_reply(b"{}")) as upstream, loopback(upstream) as node:
        client = await node.client()
        client.send(post(ASK))
        assert (await client.answer()).status == 200
        upstream.writers[0].transport.abort()
        await node.until(lambda: not node.admission.endpoint.pool.open)
        client.send(post(ASK))
        assert (await client.answer()).status == 200
        assert node.ctx.metrics.upstream_retries_total == 0


async def test_a_connection_idle_for_too_long_is_not_used() -> None:
    async with ScriptedUpstream(json_reply(b"{}")) as upstream, loopback(upstream) as node:
        client = await node.client()
        client.send(post(ASK))
        await client.answer()
        pool = node.admission.endpoint.pool
        pool.idle[0].idle_since -= 4.1
        client.send(post(ASK))
        assert (await client.answer()).status == 200
        assert upstream.connections == 2
        assert len(pool.open) == len(pool.idle) == 1


async def test_idle_connections_are_dropped_without_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.api.upstream.IDLE_LIMIT_S", 0.05)
    async with ScriptedUpstream(json_reply(b"{}")) as upstream, loopback(upstream) as node:
        client = await node.client()
        client.send(post(ASK))
        await client.answer()
        await upstream.until(lambda: upstream.lost == 1)
        assert not node.admission.endpoint.pool.open


async def test_what_a_child_says_unasked_is_nobodys_answer() -> None:
    gate = asyncio.Event()

    async def play(request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await json_reply(b"1")(request, reader, writer)
        await gate.wait()
        await json_reply(b"unasked")(request, reader, writer)

    async with ScriptedUpstream(play, json_reply(b"2")) as upstream, loopback(upstream) as node:
        client = await node.client()
        client.send(post(ASK))
        assert (await client.answer()).body == b"1"
        gate.set()
        async with asyncio.timeout(1):  # at once, not when it was idle for too long
            await node.until(lambda: not node.admission.endpoint.pool.open)
        client.send(post(ASK))
        assert (await client.answer()).body == b"2"


async def test_a_crash_before_the_answer_goes_back_to_the_queue_once() -> None:
    """With its old place; the second instance answers (trap 75)."""
    async with ScriptedUpstream(die) as dying, ScriptedUpstream(json_reply(b"{}")) as healthy, loopback(dying) as node:
        node.admission.hold = True
        client = await node.client()
        client.send(post(ASK))
        first = await node.admission.ticket()
        first.admit()
        second = await node.admission.ticket(1)
        assert second.since == first.since
        assert node.admission.leases[0].ended == ["release"]
        second.admit(Endpoint("tiny-2", profile(), "127.0.0.1", healthy.port))
        answer = await client.answer()
        assert (answer.status, answer.field(b"x-llama-mesh-instance")) == (200, b"tiny-2")
        assert node.ctx.metrics.errors_total == 0


async def test_only_time_in_the_queue_counts_as_waiting() -> None:
    """Not the upload, and not the service before a crash: a second attempt has what the first one left."""
    waits = (profile(max_wait_s=1.0),)
    async with ScriptedUpstream(die) as dying, ScriptedUpstream(json_reply(b"{}")) as healthy:  # noqa: SIM117
        async with loopback(dying, profiles=waits) as node:
            node.admission.hold = True
            now, late = node.plane.now, 0.0
            node.plane.now = lambda: now() + late
            client = await node.client()
            client.send(post(ASK)[:-1])
            await node.until(lambda: any(c.reads_body for c in node.plane.connections))
            late = 5.0
            client.send(ASK[-1:])
            first = await node.admission.ticket()
            assert first.deadline is not None
            assert first.deadline - first.since == pytest.approx(6.0, abs=0.5)
            late = 5.4
            first.admit()
            late = 50.0
            second = await node.admission.ticket(1)
            assert second.deadline is not None
            assert second.deadline - second.since == pytest.approx(50.6, abs=0.5)
            assert node.ctx.metrics.queue_wait_total_ms < 1000
            second.admit(Endpoint("tiny-2", profile(), "127.0.0.1", healthy.port))
            assert (await client.answer()).status == 200


async def test_a_bug_in_admission_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised out of the supervisor's call, it would leave the client waiting (trap 74)."""

    def broken(self: object, now: float) -> None:
        raise RuntimeError("bug")

    monkeypatch.setattr("mesh.api.upstream.Pool.take", broken)
    async with loopback() as node:
        node.admission.hold = True
        client = await node.client()
        client.send(post(ASK))
        (await node.admission.ticket()).admit()
        answer = await client.answer()
        assert (answer.status, json.loads(answer.body)["error"]["type"]) == (500, "internal_error")
        assert node.admission.leases[0].ended == ["release"]


class FewThreads:
    """Answers like llama-server: a connection has a thread from its first request to its end, others wait for one."""

    def __init__(self, threads: int) -> None:
        self.free = asyncio.Semaphore(threads)

    async def __call__(self, request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with self.free:
            await json_reply(b"{}")(request, reader, writer)
            await reader.read(0)
            while not reader.at_eof():
                if await reader.read(65536):
                    await json_reply(b"{}")(request, reader, writer)
        raise ConnectionError


async def test_idle_connections_do_not_starve_new_ones() -> None:
    """Each occupies one of llama-server's few threads: they are dropped when a new one gets no answer."""
    async with ScriptedUpstream(FewThreads(3)) as upstream, loopback(upstream) as node:
        clients = [await node.client() for _ in range(30)]
        async with asyncio.timeout(2):  # one round of three takes 4 s, if idle ones are kept
            for client in clients:
                client.send(post(ASK))
            for client in clients:
                assert (await client.answer()).status == 200


async def test_few_idle_connections_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest would hold threads that probes and others need."""
    monkeypatch.setattr("mesh.api.upstream._PRUNE_INTERVAL_S", 0.05)
    async with ScriptedUpstream(json_reply(b"{}")) as upstream, loopback(upstream) as node:
        node.admission.hold = True
        clients = [await node.client() for _ in range(6)]
        for client in clients:
            client.send(post(ASK))
        await node.admission.ticket(5)
        for ticket in node.admission.tickets:
            ticket.admit()
        for client in clients:
            assert (await client.answer()).status == 200
        pool = node.admission.endpoint.pool
        assert len(pool.idle) == 6
        await node.until(lambda: len(pool.open) == 2)
        await asyncio.sleep(0.1)  # these two are kept for longer
        assert len(pool.idle) == 2


async def test_two_crashes_are_an_error() -> None:
    async with ScriptedUpstream(die) as upstream, loopback(upstream) as node:
        client = await node.client()
        client.send(post(ASK))
        answer = await client.answer()
        assert (answer.status, json.loads(answer.body)["error"]["source"]) == (502, "instance")
        assert len(upstream.requests) == 2
        client.send(get(b"/alive"))
        assert (await client.answer()).status == 200


async def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        async with loopback() as node:
            node.admission.endpoint.port = free.getsockname()[1]
            client = await node.client()
            client.send(post(ASK))
            answer = await client.answer()
            assert answer.status == 502
            assert b"cannot connect" in answer.body


async def test_an_instance_that_stops_closes_its_connections() -> None:
    """Idle and busy ones; what had no answer yet goes elsewhere, what had one ends with an error."""
    async with ScriptedUpstream(then_hang(SSE, CHUNK), hang, json_reply(b"{}")) as up, loopback(up) as node:
        streaming, waiting = await node.client(), await node.client()
        streaming.send(post(ASK))
        assert (await streaming.answer(head_only=True)).status == 200
        node.admission.hold = True
        waiting.send(post(ASK))
        (await node.admission.ticket(1)).admit()
        await up.until(lambda: len(up.requests) == 2)
        node.admission.endpoint.close()
        assert b"error" in await streaming.ended()
        ticket = await node.admission.ticket(2)
        ticket.refuse(InstanceError("it died\nlast line"))
        answer = await waiting.answer()
        assert answer.status == 503
        assert "last line" in json.loads(answer.body)["error"]["message"]


# --- the client leaves


async def test_leaving_the_queue() -> None:
    """The place is given up at once (trap 2)."""
    async with loopback() as node:
        node.admission.hold = True
        client = await node.client()
        client.send(post(ASK))
        ticket = await node.admission.ticket()
        client.writer.close()
        await node.admission.until(lambda: ticket.cancelled)
        assert node.ctx.metrics.client_disconnects_total == 1
        assert node.access.lines[0]["status"] == 499


@pytest.mark.parametrize("parts", [(), (SSE,), (SSE, CHUNK), (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n1",)])
async def test_leaving_while_the_instance_works(parts: tuple[bytes, ...]) -> None:
    """Its connection is closed at once (trap 8), the slot stays counted until it has stopped (trap 9)."""
    async with ScriptedUpstream(then_hang(*parts)) as upstream, loopback(upstream) as node:
        client = await node.client()
        client.send(post(ASK))
        await upstream.until(lambda: bool(upstream.requests))
        if parts:
            await client.answer(head_only=True)
        client.writer.close()
        await upstream.until(lambda: upstream.lost == 1)
        await node.settled()
        assert node.admission.leases[0].ended == ["abandon"]
        assert node.ctx.metrics.errors_total == 0


async def test_half_closing_counts_as_leaving_even_with_an_answer_unread() -> None:
    """Nothing is waited for: what is still to be written will not be read."""
    async with ScriptedUpstream(json_reply(b"x" * 30_000_000)) as upstream, loopback(upstream) as node:
        client = await node.client()
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.send(post(ASK))
        await node.until(lambda: any(connection.write_paused for connection in node.plane.connections))
        client.writer.write_eof()
        await node.settled()
        assert node.admission.leases[0].ended == ["abandon"]


async def test_leaving_while_connecting() -> None:
    async with ScriptedUpstream(json_reply(b"{}")) as upstream, loopback(upstream) as node:
        node.admission.hold = True
        client = await node.client()
        client.send(post(ASK))
        ticket = await node.admission.ticket()
        connection = next(iter(node.plane.connections))
        lease = ticket.admit()
        connection.abort()
        connection.connection_lost(None)  # before the connection to the instance can be there
        assert lease.ended == ["release"]
        await node.until(lambda: len(node.admission.endpoint.pool.idle) == 1)
        assert upstream.requests == []


async def test_leaving_between_a_crash_and_the_second_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.api.delivery.CRASH_NOTICE_S", 0.05)
    async with ScriptedUpstream(die) as upstream, loopback(upstream) as node:
        client = await node.client()
        client.send(post(ASK))
        await node.until(lambda: node.ctx.metrics.upstream_retries_total == 1)
        client.abort()
        await node.settled()
        await asyncio.sleep(0.1)  # the second attempt would have been made by now
        assert len(node.admission.tickets) == 1
        assert node.admission.leases[0].ended == ["release"]


async def test_leaving_during_the_body_and_the_head() -> None:
    async with loopback() as node:
        for part in (post(ASK)[:-3], post(ASK)[:20], b""):
            client = await node.client()
            client.send(part)
            await node.until(lambda: len(node.plane.connections) == 1)
            client.writer.close()
            await node.until(lambda: not node.plane.connections)
        assert node.admission.tickets == []


async def test_a_shielded_instance_finishes() -> None:
    """drain_on_disconnect: the child is not cancelled, and its slot is free when it is done (trap 11)."""
    gate = asyncio.Event()

    async def play(request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE + CHUNK)
        await gate.wait()
        writer.write(CHUNK + b"0\r\n\r\n")

    async with (
        ScriptedUpstream(play) as upstream,
        loopback(upstream, profiles=(profile(drain_on_disconnect=True),)) as node,
    ):
        client = await node.client()
        client.send(post(ASK))
        await client.answer(head_only=True)
        client.writer.close()
        await node.until(lambda: len(node.plane.detached) == 1)
        assert node.ctx.metrics.current_requests == 1
        gate.set()
        await node.settled()
        assert node.admission.leases[0].ended == ["release"]
        assert upstream.lost == 0
        assert node.access.lines[0]["client"] == "127.0.0.1"


async def test_a_shielded_instance_when_the_node_stops() -> None:
    async with (
        ScriptedUpstream(then_hang(SSE, CHUNK)) as upstream,
        loopback(upstream, profiles=(profile(drain_on_disconnect=True),)) as node,
    ):
        client = await node.client()
        client.send(post(ASK))
        await client.answer(head_only=True)
        client.writer.close()
        await node.until(lambda: len(node.plane.detached) == 1)
        await node.plane.close()
        assert node.admission.leases[0].ended == ["abandon"]


async def test_an_answer_that_is_under_way_when_the_drain_begins_is_the_last() -> None:
    gate = asyncio.Event()

    async def play(request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE + CHUNK)
        await gate.wait()
        writer.write(b"0\r\n\r\n")

    async with ScriptedUpstream(play) as upstream, loopback(upstream) as node:
        client = await node.client()
        client.send(post(ASK))
        await client.answer(head_only=True)
        node.ctx.draining = True
        node.plane.begin_drain()
        gate.set()
        assert (await client.ended()).endswith(b"0\r\n\r\n")


async def test_closing_the_plane_cuts_everything_off() -> None:
    async with ScriptedUpstream(then_hang(SSE, CHUNK)) as upstream, loopback(upstream) as node:
        streaming, queued, idle = [await node.client() for _ in range(3)]
        streaming.send(post(ASK))
        await streaming.answer(head_only=True)
        node.admission.hold = True
        queued.send(post(ASK))
        await node.admission.ticket(1)
        idle.send(get(b"/x"))
        await idle.answer()
        await node.plane.close(grace_s=0.05)
        assert not node.plane.connections
        await node.settled()


# --- limits


async def _limit(node: LoopbackNode) -> Answer:
    client = await node.client()
    client.send(post(ASK))
    return await client.answer()


async def test_max_request_duration() -> None:
    profiles = (profile(max_request_s=0.1),)
    async with ScriptedUpstream(hang, then_hang(SSE, CHUNK)) as up, loopback(up, profiles=profiles) as node:
        running = await _limit(node)
        error = json.loads(running.body)["error"]
        assert (running.status, error["type"], error["source"]) == (502, "request_timeout", "mesh")
        assert "max_request_duration_ms" in error["message"]
        assert b"max_request_duration_ms" in (await _limit(node)).body
        node.admission.hold = True
        queued = await _limit(node)
        error = json.loads(queued.body)["error"]
        assert (queued.status, error["type"], error["source"]) == (503, "request_timeout", "mesh")
        assert "max_request_duration_ms" in error["message"]
        assert [lease.ended for lease in node.admission.leases] == [["abandon"], ["abandon"]]


async def test_upstream_read_timeout() -> None:
    """Silence counts, not length; it is off by default (trap 79)."""
    settings = {"upstream_read_timeout_ms": 100}
    async with ScriptedUpstream(hang, then_hang(SSE, CHUNK)) as up, loopback(up, settings=settings) as node:
        assert (await _limit(node)).status == 502
        broken = await _limit(node)
        assert broken.ended == "broken"
        assert b"sent nothing for 0.1 s" in broken.body


async def test_upstream_read_timeout_of_a_second_attempt() -> None:
    """The time in the queue is nobody's silence."""
    settings = {"upstream_read_timeout_ms": 300}

    async def late(request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.15)
        await json_reply(b"{}")(request, reader, writer)

    async def die_late(request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.1)  # long enough to be looked at
        await die(request, reader, writer)

    async with ScriptedUpstream(die_late, late) as up, loopback(up, settings=settings) as node:
        node.admission.hold = True
        client = await node.client()
        client.send(post(ASK))
        (await node.admission.ticket()).admit()
        second = await node.admission.ticket(1)
        await asyncio.sleep(0.4)
        second.admit()
        assert (await client.answer()).status == 200


# --- many


async def test_a_thousand_clients_that_vanish() -> None:
    """No place, lease or connection is left behind (trap 2)."""
    async with ScriptedUpstream(hang) as upstream, loopback(upstream) as node:
        for batch in range(10):
            clients = [await node.client() for _ in range(100)]
            node.admission.hold = batch % 2 == 0
            for client in clients:
                client.send(post(ASK))
            await node.until(lambda: node.ctx.metrics.current_requests == 100)
            for client in clients:
                client.abort()
            await node.settled()
            node.clients.clear()
        assert node.ctx.metrics.client_disconnects_total == 1000
        pool = node.admission.endpoint.pool
        await node.until(lambda: not node.plane.connections and pool.open == set(pool.idle))
