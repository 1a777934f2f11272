"""A peer serves: what the client sends and gets is as if the instance were its own node's, and nothing else leaks.

``met`` checks after each test that both nodes were given back everything once (trap 1) and that nothing stays.
"""

from __future__ import annotations

import asyncio
import json
import socket

import httpx
import pytest

from tests.api.loopback import Answer, get, post, profile
from tests.api.mesh_pair import TINY, MeshNode, mesh_node, met, offers
from tests.fakes import Received, json_reply, reply

ASK = b'{"model":"tiny","stream":true}'
SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)


async def ask(node: MeshNode, request: bytes = post(ASK)) -> Answer:
    client = await node.client()
    client.send(request)
    return await client.answer(head_only=request.startswith(b"HEAD"))


# --- fidelity


async def test_a_model_that_only_a_peer_has() -> None:
    """The answer is the instance's, byte by byte; who served and who took it are named; one link carries all."""
    async with met(mesh_node(1, profiles=()), mesh_node(2, json_reply(b'{"a": 1.50}'))) as (one, two):
        client = await one.client()
        for _ in range(3):
            client.send(post(ASK))
            answer = await client.answer()
            assert (answer.status, answer.body, answer.ended) == (200, b'{"a": 1.50}', "length")
            assert answer.field(b"x-llama-mesh-node") == b"node-2"
            assert answer.field(b"x-llama-mesh-instance") == b"tiny-2"
            assert answer.field(b"x-llama-mesh-via") == b"node-1"
        assert [request.body for request in two.instance.requests] == [ASK] * 3
        assert one.dials == ["node-2"]
        assert one.admission.tickets == []


async def test_a_real_client() -> None:
    async with met(mesh_node(1, profiles=()), mesh_node(2, json_reply(b'{"a":1}'))) as (one, _):
        async with httpx.AsyncClient() as client:
            answer = await client.post(f"http://127.0.0.1:{one.port}/v1/chat/completions", json={"model": "TINY"})
        assert (answer.status_code, answer.json(), answer.headers["x-llama-mesh-node"]) == (200, {"a": 1}, "node-2")


async def test_both_nodes_count_it_once() -> None:
    usage = b'{"usage":{"completion_tokens":3,"prompt_tokens":5}}'
    async with met(mesh_node(1, profiles=()), mesh_node(2, json_reply(usage))) as (one, two):
        answer = await ask(one, post(ASK, extra=b"X-Request-Id: mine\r\n"))
        assert answer.field(b"x-request-id") == b"mine"
        await two.settled()
        for node, instance in ((one, "@node-2"), (two, "tiny-2")):
            (line,) = node.access.lines
            assert (line["request_id"], line["instance"], line["tokens"], line["error"]) == ("mine", instance, 3, None)
            assert (node.ctx.metrics.requests_total, node.ctx.metrics.errors_total) == (1, 0)
            assert node.ctx.metrics.queue_wait_count == 1
        peer = one.peer(two)
        assert (peer.forwards_total, peer.failures_total, peer.refusals_total) == (1, 0, 0)


async def test_each_request_on_a_link_has_its_own_id() -> None:
    """Its head is the last one's but for that, and the peer knows it again."""
    async with met(mesh_node(1, profiles=()), mesh_node(2)) as (one, two):
        client = await one.client()
        ids = []
        for said in (b"first", b"second-and-longer", b"", b"", b"x" * 128, b"not fit; to be logged"):
            client.send(post(ASK, extra=b"X-Request-Id: %b\r\n" % said if said else b""))
            ids.append((await client.answer()).field(b"x-request-id"))
        assert ids[:2] == [b"first", b"second-and-longer"]
        assert ids[4] == b"x" * 128
        assert len(set(ids)) == 6
        await two.settled()
        for lines in (one.access.lines, two.access.lines):
            assert [line["request_id"].encode() for line in lines] == ids
        assert [request.field(b"x-request-id") for request in two.instance.requests] == [[name] for name in ids]
        assert len(one.dials) == 1


async def test_fields_on_their_way_there_and_back() -> None:
    """Repeated ones survive both hops, in order (trap 69), hop-by-hop ones and the instance's marks none (trap 70)."""
    extra = b"Set-Cookie: a=1\r\nset-cookie: b=2\r\nX-Llama-Mesh-Node: liar\r\nX-Llama-Mesh-Error: queue_full\r\n"
    extra += b"Connection: X-Hop\r\nX-Hop: 1\r\nX-Bytes: \xff\r\n"
    async with met(mesh_node(1, profiles=()), mesh_node(2, json_reply(b"{}", extra=extra))) as (one, two):
        answer = await ask(one, post(ASK, extra=b"X-Kept: a\r\nx-kept:  b \r\nTE: trailers\r\n"))
        lines = answer.head.split(b"\r\n")
        assert [line for line in lines if line.lower().startswith(b"set-cookie")] == [
            b"Set-Cookie: a=1",
            b"set-cookie: b=2",
        ]
        assert answer.field(b"x-bytes") == b"\xff"
        assert answer.field(b"x-hop") is None
        assert answer.field(b"x-llama-mesh-error") is None
        assert [line for line in lines if b"mesh-node" in line.lower()] == [b"X-Llama-Mesh-Node: node-2"]
        got = two.instance.requests[0]
        assert got.field(b"x-kept") == [b"a", b"b"]
        assert got.field(b"te") == []


async def test_nothing_of_the_clients_that_is_not_the_peers_business_gets_there() -> None:
    """Credentials in any header, cookies, what it says in our name (trap 102). The peer asks no key on a link."""
    auth = {"enabled": True, "allowed_keys": ["sk-one"]}
    others = {"enabled": True, "allowed_keys": ["sk-two"], "required_header": "X-Two"}
    extra = (
        b"Authorization: Bearer sk-one\r\nX-Api-Key: sk-one\r\nApi-Key: sk-one\r\nCookie: sk-one\r\n"
        b"Proxy-Authorization: sk-one\r\nX-Llama-Mesh-Model: other:default\r\nX-Llama-Mesh-Wait-Ms: 1\r\n"
        b"X-Llama-Mesh-Secret: sk-one\r\nX-Llama-Mesh-Hops: 0\r\n"
    )
    async with met(mesh_node(1, profiles=(), settings={"auth": auth}), mesh_node(2, settings={"auth": others})) as (
        one,
        two,
    ):
        assert (await ask(one)).status == 401
        assert two.heard == b""
        assert (await ask(one, post(ASK, extra=extra))).status == 200
        assert b"sk-one" not in two.heard
        assert b"sk-one" not in two.instance.requests[0].head
        assert b"x-llama-mesh" not in two.instance.requests[0].head.lower()
        said = [line for line in two.heard.split(b"\r\n") if line.lower().startswith(b"x-llama-mesh")]
        assert said[0] == b"X-Llama-Mesh-Hops: 1"
        assert said[1] == b"X-Llama-Mesh-Model: tiny:default"
        assert 59_000 < int(said[2].removeprefix(b"X-Llama-Mesh-Wait-Ms: ")) <= 60_000
        assert len(said) == 3
        assert (await ask(two)).status == 401  # who is not on a link needs a key


async def test_events_are_sent_on_one_by_one() -> None:
    """Through two nodes each event leaves before the next one comes (traps 76, 77)."""
    gate = asyncio.Event()

    async def play(request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE)
        for piece in (CHUNK, CHUNK[:9], CHUNK[9:], b"3\r\n:\n\n\r\n", b"0\r\n\r\n"):
            await gate.wait()
            gate.clear()
            writer.write(piece)

    async with met(mesh_node(1, profiles=()), mesh_node(2, play)) as (one, two):
        client = await one.client()
        client.send(post(ASK))
        head = await client.answer(head_only=True)
        assert (head.field(b"x-accel-buffering"), head.field(b"x-llama-mesh-node")) == (b"no", b"node-2")
        for piece in (CHUNK, CHUNK[:9], CHUNK[9:], b"3\r\n:\n\n\r\n", b"0\r\n\r\n"):
            gate.set()
            async with asyncio.timeout(5):
                assert await client.reader.readexactly(len(piece)) == piece
        await two.settled()
        assert [node.access.lines[0]["tokens"] for node in (one, two)] == [2, 2]
        assert one.access.lines[0]["ttft_s"] is not None


async def test_reading_routes() -> None:
    """GET and HEAD find their model in the query; a body that is not there is not waited for."""
    async with met(mesh_node(1, profiles=()), mesh_node(2, json_reply(b"{}"))) as (one, two):
        two.instance.scripts = [json_reply(b'{"slots":4}'), reply(b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n")]
        answer = await ask(one, get(b"/props?model=tiny"))
        assert (answer.status, answer.body) == (200, b'{"slots":4}')
        client = await one.client()
        client.send(get(b"/slots?model=TINY%3Adefault", method=b"HEAD"))
        head = await client.answer(head_only=True)
        assert (head.status, head.field(b"content-length")) == (200, b"11")
        two.instance.scripts.append(json_reply(b"{}"))
        client.send(post(ASK))  # and the connection is in step
        assert (await client.answer()).body == b"{}"
        assert [r.request_line.split()[0] for r in two.instance.requests] == [b"GET", b"HEAD", b"POST"]
        assert [t.needs_slot for t in two.admission.tickets] == [False, False, True]


async def test_an_alias_that_only_the_entry_knows() -> None:
    """The peer is told the profile's key; the body stays verbatim."""
    body = b'{ "model" : "gpt-4o" }'
    mine = profile(aliases=("gpt-4o",), max_instances=0)
    async with met(mesh_node(1, profiles=(mine,)), mesh_node(2)) as (one, two):
        two.knows(one)
        assert (await ask(two, post(body))).status == 404
        one.admission.catalog = type(one.admission.catalog)(
            profiles=(mine,), names={"tiny:default": mine, "gpt-4o": mine}, default_model="gpt-4o"
        )
        for request in (post(body), post(b"{}")):  # and the default model
            assert (await ask(one, request)).status == 200
        assert [request.body for request in two.instance.requests] == [body, b"{}"]


async def test_a_default_model_that_only_a_peer_has() -> None:
    async with met(mesh_node(1, profiles=(), default_model="tiny"), mesh_node(2)) as (one, two):
        assert (await ask(one, post(b'{"x":1}'))).status == 200
        assert two.instance.requests[0].body == b'{"x":1}'


async def test_names_that_need_quoting() -> None:
    """trap 78"""
    key = "org/größe 7b:default"
    theirs = profile("org/größe 7b")
    async with met(mesh_node(1, profiles=()), mesh_node(2, profiles=(theirs,))) as (one, two):
        assert theirs.key == key
        assert (await ask(one, post(json.dumps({"model": "Org/Größe 7b"}).encode()))).status == 200
        assert two.admission.tickets[0].profile is theirs


async def test_an_old_client() -> None:
    """HTTP/1.0 gets no chunks; the end of the connection is the end."""
    async with met(mesh_node(1, profiles=()), mesh_node(2, reply(SSE, CHUNK, b"0\r\n\r\n"))) as (one, _):
        answer = await ask(one, post(ASK, version=b"1.0"))
        assert (answer.body, answer.ended, answer.field(b"connection")) == (EVENT, "eof", b"close")


async def test_an_answer_that_ends_with_its_connection() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n"
    async with met(mesh_node(1, profiles=()), mesh_node(2, reply(head, b"to the end", close=True))) as (one, _):
        answer = await ask(one)
        assert (answer.status, answer.body, answer.ended) == (200, b"to the end", "eof")


async def test_answers_of_the_instance_that_are_errors_are_answers() -> None:
    """What the child says is for the client to see; only the peer's own no leads elsewhere."""
    async with met(mesh_node(1, profiles=()), mesh_node(2, json_reply(b'{"error":1}', status=b"503 Busy"))) as (
        one,
        two,
    ):
        answer = await ask(one)
        assert (answer.status, answer.body) == (503, b'{"error":1}')
        two.instance.scripts = [json_reply(b"no", status=b"404 Not Found")]
        assert (await ask(one)).body == b"no"
        assert len(two.instance.requests) == 2
        assert one.peer(two).refusals_total == 0


# --- size


async def test_a_large_request() -> None:
    """5 MB, its model's name at the end (trap 72)."""
    body = b'{"image":"' + b"x" * 5_000_000 + b'","model":"tiny"}'
    async with met(mesh_node(1, profiles=()), mesh_node(2)) as (one, two):
        assert (await ask(one, post(body))).status == 200
        assert two.instance.requests[0].body == body


async def test_a_slow_reader_slows_the_instance() -> None:
    """Nothing is buffered beyond the transports' limits, on either node; all of it arrives in the end."""
    size = 30_000_000
    async with met(mesh_node(1, profiles=()), mesh_node(2, json_reply(b"x" * size))) as (one, two):
        loop = asyncio.get_running_loop()
        with socket.socket() as sock:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            await loop.sock_connect(sock, ("127.0.0.1", one.port))
            await loop.sock_sendall(sock, post(ASK))
            await one.until(lambda: any(c.write_paused for c in one.plane.connections))
            await two.until(lambda: any(c.write_paused for c in two.plane.connections))
            (upstream,) = one.pool.open
            assert upstream.paused
            for node in (one, two):
                for connection in node.plane.connections:
                    assert connection._transport.get_write_buffer_size() < 1_000_000
            assert one.ctx.metrics.current_requests == two.ctx.metrics.current_requests == 1
            got = 0
            async with asyncio.timeout(20):
                while got < size:
                    got += len(await loop.sock_recv(sock, 1_000_000))


# --- hops


@pytest.mark.parametrize("hops", [b"x", b"-1", b"1.5", b"", b"99999", b"\xb2"])
async def test_hops_that_are_no_number(hops: bytes) -> None:
    """trap 60"""
    async with met(mesh_node(1)) as (one,):
        assert (await ask(one, post(ASK, extra=b"X-Llama-Mesh-Hops: %b\r\n" % hops))).status == 400
        assert one.admission.tickets == []


async def test_hops_twice_or_too_many() -> None:
    """There is one count (trap 60)."""
    async with met(mesh_node(1, settings={"max_hops": 2})) as (one,):
        assert (await ask(one, post(ASK, extra=b"X-Llama-Mesh-Hops: 1\r\n" * 2))).status == 400
        over = await ask(one, post(ASK, extra=b"X-Llama-Mesh-Hops: 3\r\n"))
        assert (over.status, b"hops" in over.body) == (400, True)
        assert one.admission.tickets == []
        assert (await ask(one, post(ASK, extra=b"X-Llama-Mesh-Hops: 2\r\n"))).status == 200


async def test_what_was_passed_on_is_served_here() -> None:
    """Though a third node, and the sender, look far better (trap 60)."""
    async with met(mesh_node(1, profiles=()), mesh_node(2), mesh_node(3)) as (one, two, three):
        one.knows(three)
        two.admission.hold = two.admission.cold = True
        two.knows(one, offers(decode_tps=9999.0))
        two.knows(three, offers(decode_tps=9999.0))
        client = await one.client()
        client.send(post(ASK))
        (await two.admission.ticket()).admit()
        assert (await client.answer()).field(b"x-llama-mesh-node") == b"node-2"
        assert two.dials == []
        assert three.admission.tickets == []


async def test_what_is_not_there_any_more_goes_on() -> None:
    """Once more, not back to where it came from; each node on the way is named."""
    async with met(mesh_node(1, profiles=()), mesh_node(2, profiles=()), mesh_node(3)) as (one, two, three):
        one.knows(three)
        one.knows(two, offers())  # it was there
        two.knows(one, offers(decode_tps=9999.0))
        answer = await ask(one)
        assert answer.field(b"x-llama-mesh-node") == b"node-3"
        via = [line for line in answer.head.split(b"\r\n") if line.startswith(b"X-Llama-Mesh-Via")]
        assert via == [b"X-Llama-Mesh-Via: node-2", b"X-Llama-Mesh-Via: node-1"]
        assert b"X-Llama-Mesh-Hops: 2\r\n" in three.heard
        assert two.dials == ["node-3"]


async def test_the_last_hop() -> None:
    """A request that may not go on is refused to its sender, whose table is corrected at once (traps 60, 61)."""
    hops = {"max_hops": 1}
    async with met(
        mesh_node(1, profiles=(), settings=hops), mesh_node(2, profiles=(), settings=hops), mesh_node(3, settings=hops)
    ) as (one, two, _):  # fmt: skip
        one.knows(two, offers(decode_tps=9999.0))
        for _ in range(2):
            assert (await ask(one)).field(b"x-llama-mesh-node") == b"node-3"
        assert two.dials == []
        assert one.dials == ["node-2", "node-3"]  # the second time it knew
        assert one.peer(two).in_the_way(TINY) == "it says that it does not have the model"
        one.knows(two, offers())  # until its next record
        assert one.peer(two).in_the_way(TINY) is None


async def test_two_nodes_that_each_believe_the_other_has_it() -> None:
    """No ping-pong: each is asked once at most (trap 60)."""
    async with met(mesh_node(1, profiles=()), mesh_node(2, profiles=())) as (one, two):
        one.knows(two, offers())
        two.knows(one, offers())
        answer = await ask(one)
        assert answer.status in (404, 503)
        assert (one.dials, two.dials) == (["node-2"], [])


async def test_a_refusal_that_comes_from_further_on_corrects_the_first_node_too() -> None:
    """Who has it passed on and was told no has not got it either: another one is asked (trap 61)."""
    async with met(
        mesh_node(1, profiles=()), mesh_node(2, profiles=()), mesh_node(3, profiles=()), mesh_node(4)
    ) as (one, two, three, four):  # fmt: skip
        one.knows(two, offers(decode_tps=9999.0))
        two.knows(three, offers())
        two.knows(four)
        three.forgets(four)
        answer = await ask(one)
        assert answer.field(b"x-llama-mesh-node") == b"node-4"
        assert one.dials == ["node-2", "node-4"]
        assert one.peer(two).in_the_way(TINY) == "it says that it does not have the model"


async def test_unknown_and_gone() -> None:
    """404 for what nobody ever had, 503 for what a node had that is gone (trap 62)."""
    async with met(mesh_node(1, profiles=()), mesh_node(2)) as (one, two):
        unknown = await ask(one, post(b'{"model":"other"}'))
        assert (unknown.status, json.loads(unknown.body)["error"]["type"]) == (404, "model_not_found")
        one.forgets(two)
        gone = await ask(one)
        error = json.loads(gone.body)["error"]
        assert (gone.status, error["type"], gone.field(b"retry-after")) == (503, "no_capacity", b"5")
        assert "drained" not in error["message"]
