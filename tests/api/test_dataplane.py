"""Requests and answers through the data plane over real sockets: fidelity, framing, keep-alive, pipelining, limits."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest

from mesh.errors import QueueFullError
from tests.api.loopback import RawClient, catalog, get, loopback, post, profile
from tests.fakes import ScriptedUpstream, json_reply, reply

ASK = b'{"model":"tiny","messages":[]}'
USAGE = b'{"usage":{"completion_tokens":3,"prompt_tokens":5}}'
CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n"


async def test_a_small_request_and_its_answer() -> None:
    """One kept connection each way; ids, marks and accounting on each answer."""
    async with ScriptedUpstream(json_reply(USAGE)) as upstream, loopback(upstream) as node:
        client = await node.client()
        ids = set()
        for _ in range(3):
            client.send(post(ASK))
            answer = await client.answer()
            assert (answer.status, answer.body) == (200, USAGE)
            assert answer.field(b"X-Llama-Mesh-Node") == b"node-1"
            assert answer.field(b"X-Llama-Mesh-Instance") == b"tiny-1"
            ids.add(answer.field(b"X-Request-Id"))
        assert len(ids) == 3
        assert upstream.connections == 1
        assert upstream.requests[0].body == ASK
        assert [lease.ended for lease in node.admission.leases] == [["release"]] * 3
        line = node.access.lines[0]
        assert (line["status"], line["tokens"], line["model"], line["instance"]) == (200, 3, "tiny", "tiny-1")
        model = node.ctx.metrics.model("hash-tiny", "tiny")
        assert (model.requests_total, model.tokens_generated_total, model.tokens_prompt_total) == (3, 9, 15)
        assert model.errors_total == 0


async def test_what_the_child_gets() -> None:
    """Credentials, cookies, hop-by-hop and mesh headers stay here (traps 70, 102); the rest is verbatim (trap 69)."""
    extra = (
        b"Authorization: Bearer sk-1\r\nX-Api-Key: sk-2\r\nCookie: a=b\r\nConnection: keep-alive, X-Hop\r\nX-Hop: 1\r\n"
        b"X-Llama-Mesh-Hops: 3\r\nTE: trailers\r\nAccept-Encoding: gzip\r\nX-Kept: a\r\n"
        b"x-kept:  b \r\nX-Bytes: \xff\xfe\r\n"
    )
    async with ScriptedUpstream(json_reply(b"{}")) as upstream, loopback(upstream, api_key="child-key") as node:
        client = await node.client()
        client.send(post(ASK, path=b"/v1/chat/completions?a=%20b&c=%2F", extra=extra))
        assert (await client.answer()).status == 200
        got = upstream.requests[0]
        assert got.request_line == b"POST /v1/chat/completions?a=%20b&c=%2F HTTP/1.1"
        assert got.field(b"authorization") == [b"Bearer child-key"]
        assert got.field(b"host") == [b"127.0.0.1:%d" % upstream.port]
        assert got.field(b"x-kept") == [b"a", b"b"]
        assert got.field(b"x-bytes") == [b"\xff\xfe"]
        assert got.field(b"content-type") == [b"application/json"]
        for name in (b"x-api-key", b"cookie", b"connection", b"x-hop", b"x-llama-mesh-hops", b"te", b"accept-encoding"):
            assert got.field(name) == [], name
        assert b"sk-" not in got.head


async def test_what_the_client_gets() -> None:
    """Repeated headers survive, hop-by-hop ones and the child's own ids do not (traps 69, 70)."""
    head = (
        b"HTTP/1.1 418 I'm a teapot\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\nKeep-Alive: timeout=5, max=100\r\n"
        b"X-Llama-Mesh-Node: forged\r\nX-Request-Id: theirs\r\nContent-Length: 2\r\n\r\n{}"
    )
    async with ScriptedUpstream(reply(head)) as upstream, loopback(upstream) as node:
        client = await node.client()
        client.send(post(ASK, extra=b"X-Request-Id: my-id\r\n"))
        answer = await client.answer()
        assert answer.head.startswith(b"HTTP/1.1 418 I'm a teapot\r\n")
        assert answer.head.count(b"Set-Cookie: ") == 2
        assert answer.field(b"X-Request-Id") == b"my-id"
        assert answer.field(b"X-Llama-Mesh-Node") == b"node-1"
        assert b"forged" not in answer.head
        assert answer.field(b"Keep-Alive") is None
        assert upstream.requests[0].field(b"x-request-id") == [b"my-id"]


async def test_an_insane_request_id_is_replaced() -> None:
    async with ScriptedUpstream(json_reply(b"{}")) as upstream, loopback(upstream) as node:
        client = await node.client()
        client.send(post(ASK, extra=b'X-Request-Id: a"b c\r\n'))
        assert (await client.answer()).field(b"X-Request-Id") not in (None, b'a"b c')


@pytest.mark.parametrize("step", [1, 7])
async def test_bytes_in_any_pieces(step: int) -> None:
    """Framing works on bytes however they are cut, both ways (trap 71)."""
    answer_bytes = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
    pieces = [answer_bytes[i : i + step] for i in range(0, len(answer_bytes), step)]
    async with ScriptedUpstream(reply(*pieces)) as upstream, loopback(upstream) as node:
        client = await node.client()
        request = post(ASK)
        for i in range(0, len(request), step):
            client.send(request[i : i + step])
            await client.writer.drain()
            await asyncio.sleep(0)
        assert (await client.answer()).body == b"hello"
        assert upstream.requests[0].body == ASK


async def test_a_chunked_answer_passes_verbatim() -> None:
    body = b"3\r\nabc\r\n1;ext=1\r\nd\r\n0\r\nX-Trailer: 1\r\n\r\n"
    async with (
        ScriptedUpstream(reply(CHUNKED, *(body[i : i + 1] for i in range(len(body)))), reply(CHUNKED + body)) as up,
        loopback(up) as node,
    ):
        client = await node.client()
        for _ in range(2):
            client.send(post(ASK))
            head = await client.answer(head_only=True)
            assert head.field(b"transfer-encoding") == b"chunked"
            assert await client.reader.readexactly(len(body)) == body
        assert up.connections == 1


async def test_a_chunked_request_is_forwarded_with_a_length() -> None:
    async with ScriptedUpstream(json_reply(b"{}")) as upstream, loopback(upstream) as node:
        client = await node.client()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: n\r\nTransfer-Encoding: chunked\r\n\r\n"
        coded = b"a\r\n" + ASK[:10] + b"\r\n%x;q=1\r\n" % (len(ASK) - 10) + ASK[10:] + b"\r\n0\r\nT: 1\r\n\r\n"
        for piece in (head, coded[:1], coded[1:14], coded[14:], get(b"/after")):
            client.send(piece)
            await asyncio.sleep(0)
        assert (await client.answer()).status == 200
        assert upstream.requests[0].body == ASK
        assert upstream.requests[0].field(b"content-length") == [b"%d" % len(ASK)]
        assert upstream.requests[0].field(b"transfer-encoding") == []
        assert (await client.answer()).body == b"GET /after 0"


async def test_a_large_body_both_ways() -> None:
    """20 MB with the model as its last key is routed by it (trap 72), and back-pressure does not lose a byte."""
    ask = b'{"image":"' + b"A" * 20_000_000 + b'","model":"tiny"}'
    big = b"x" * 5_000_000
    async with ScriptedUpstream(json_reply(big)) as upstream, loopback(upstream) as node:
        client = await node.client()
        client.send(post(ask))
        answer = await client.answer()
        assert answer.body == big
        assert upstream.requests[0].body == ask


async def test_expect_100_continue() -> None:
    async with ScriptedUpstream(json_reply(b"{}")) as upstream, loopback(upstream) as node:
        client = await node.client()
        request = post(ASK, extra=b"Expect: 100-continue\r\n")
        client.send(request[: -len(ASK)])
        interim = await client.answer(head_only=True)
        assert interim.status == 100
        client.send(ASK)
        assert (await client.answer()).status == 200
        assert upstream.requests[0].field(b"expect") == []


async def test_an_unknown_expectation_is_refused() -> None:
    async with loopback() as node:
        client = await node.client()
        client.send(post(ASK, extra=b"Expect: miracles\r\n"))
        assert (await client.answer()).status == 417


async def test_pipelined_requests_are_answered_in_order() -> None:
    """Inference, app and refused requests mixed in one write."""
    async with ScriptedUpstream(json_reply(b"1"), json_reply(b"22")) as upstream, loopback(upstream) as node:
        client = await node.client()
        client.send(post(ASK) + get(b"/hello") + post(b"{") + post(ASK) + get(b"/bye"))
        answers = [await client.answer() for _ in range(5)]
        assert [a.status for a in answers] == [200, 200, 400, 200, 200]
        assert [a.body for a in answers if a.status == 200] == [b"1", b"GET /hello 0", b"22", b"GET /bye 0"]


async def test_thousands_of_pipelined_refusals_do_not_recurse() -> None:
    async with loopback() as node:
        client = await node.client()
        client.send(post(b"{") * 3000)
        for _ in range(3000):
            assert (await client.answer()).status == 400


async def test_reading_pauses_when_too_much_comes_ahead() -> None:
    async with ScriptedUpstream(json_reply(b"{}")) as upstream, loopback(upstream) as node:
        node.admission.hold = True
        client = await node.client()
        client.send(post(ASK))
        ticket = await node.admission.ticket()
        client.send(post(b" " * 100_000 + ASK) * 30)
        connection = next(iter(node.plane.connections))
        await node.until(lambda: connection._reading_paused)
        assert len(connection._reader._ahead) < 600_000
        node.admission.hold = False
        ticket.admit()
        for _ in range(31):
            assert (await client.answer()).status == 200


async def test_head_has_no_body() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"
    async with ScriptedUpstream(reply(head)) as upstream, loopback(upstream, default_model="tiny") as node:
        client = await node.client()
        client.send(get(b"/props", method=b"HEAD") + get(b"/x", method=b"HEAD"))
        answer = await client.answer(head_only=True)
        assert answer.field(b"content-length") == b"1000"
        assert (await client.answer(head_only=True)).status == 200
        assert upstream.requests[0].request_line == b"HEAD /props HTTP/1.1"


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
async def test_statuses_without_a_body(status: bytes) -> None:
    async with ScriptedUpstream(reply(b"HTTP/1.1 %b\r\nX: 1\r\n\r\n" % status)) as upstream, loopback(upstream) as node:
        client = await node.client()
        for _ in range(2):
            client.send(post(ASK))
            answer = await client.answer()
            assert answer.status == int(status[:3])
            assert answer.field(b"transfer-encoding") is None
        assert upstream.connections == 1


async def test_an_http_1_0_client_gets_plain_bytes_and_a_close() -> None:
    body = b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    async with ScriptedUpstream(reply(CHUNKED, body[:5], body[5:])) as upstream, loopback(upstream) as node:
        client = await node.client()
        client.send(b"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(ASK), ASK))
        answer = await client.answer()
        assert (answer.ended, answer.body) == ("eof", b"abcde")
        assert answer.field(b"connection") == b"close"


async def test_connection_close_is_honoured() -> None:
    async with ScriptedUpstream(json_reply(b"{}")) as upstream, loopback(upstream) as node:
        client = await node.client()
        client.send(post(ASK, extra=b"Connection: close\r\n"))
        assert (await client.answer()).field(b"connection") == b"close"
        assert await client.ended() == b""


async def test_an_answer_that_ends_with_the_connection() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n"
    async with ScriptedUpstream(reply(head, b"abc", b"def", close=True)) as upstream, loopback(upstream) as node:
        client = await node.client()
        client.send(post(ASK))
        answer = await client.answer()
        assert (answer.ended, answer.body, answer.field(b"connection")) == ("eof", b"abcdef", b"close")


async def test_interim_responses_of_the_child_are_dropped() -> None:
    final = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    async with ScriptedUpstream(reply(interim + final), reply(interim, final)) as upstream, loopback(upstream) as node:
        client = await node.client()
        for _ in range(2):
            client.send(post(ASK))
            assert (await client.answer()).status == 200
        assert upstream.connections == 1


async def test_the_childs_close_is_honoured() -> None:
    """llama-server ends a connection with its 100th answer; the next request uses a new one."""
    last = json_reply(b"{}", extra=b"Connection: close\r\n")
    async with ScriptedUpstream(last) as upstream, loopback(upstream) as node:
        client = await node.client()
        for _ in range(3):
            client.send(post(ASK))
            assert (await client.answer()).status == 200
        assert upstream.connections == 3
        assert node.ctx.metrics.upstream_retries_total == 0


async def test_bytes_after_an_answer_are_never_anothers_answer() -> None:
    smuggled = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nbad"
    first = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}" + smuggled
    split = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"
    chunked = CHUNKED + b"2\r\n{}\r\n0\r\n\r\n" + smuggled
    script = (reply(first), reply(split, b"abcde" + smuggled), reply(chunked), json_reply(b"ok"))
    async with ScriptedUpstream(*script) as upstream, loopback(upstream) as node:
        client = await node.client()
        for body in (b"{}", b"abcde", b"{}", b"ok"):
            client.send(post(ASK))
            assert (await client.answer()).body == body
        assert upstream.connections == 4


async def test_queue_wait_and_refusal() -> None:
    """A refusal is a status with Retry-After, before any byte (traps 36, 109)."""
    async with loopback() as node:
        node.admission.refusal = QueueFullError("Queue full")
        client = await node.client()
        client.send(post(ASK))
        answer = await client.answer()
        assert (answer.status, answer.field(b"retry-after")) == (503, b"5")
        assert json.loads(answer.body)["error"]["type"] == "queue_full"
        assert node.ctx.metrics.errors_total == 1
        client.send(get(b"/alive"))
        assert (await client.answer()).status == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "type_"),
    [
        (b"/v1/chat/completions", b"{", 400, "invalid_request_error"),
        (b"/v1/chat/completions", b"", 400, "invalid_request_error"),
        (b"/v1/chat/completions", b"[" * 200_000, 400, "invalid_request_error"),
        (b"/v1/chat/completions", b'{"model":null}', 400, "invalid_request_error"),
        (b"/v1/chat/completions", b'{"model":""}', 400, "invalid_request_error"),
        (b"/v1/chat/completions", b'{"model":7}', 400, "invalid_request_error"),
        (b"/v1/chat/completions", b'{"model":["tiny"]}', 400, "invalid_request_error"),
        (b"/v1/chat/completions", b"{}", 400, "invalid_request_error"),
        (b"/v1/chat/completions", b"[]", 400, "invalid_request_error"),
        (b"/v1/chat/completions", b'{"model":"nobody"}', 404, "model_not_found"),
        (b"/v1/embeddings", b'{"model":"tiny"}', 404, "model_not_found"),
        (b"/v1/rerank", b'{"model":"tiny"}', 404, "model_not_found"),
        (b"/v1/completions", b'{"model":"embed"}', 400, "invalid_request_error"),
    ],
)
async def test_requests_that_cannot_be_served(path: bytes, body: bytes, status: int, type_: str) -> None:
    """The model's name is judged strictly (trap 73), in the envelope (trap 74); the connection lives on."""
    profiles = (profile(), profile("embed", args=("--embedding",)))
    async with loopback(profiles=profiles) as node:
        client = await node.client()
        client.send(post(body, path=path))
        answer = await client.answer()
        assert (answer.status, json.loads(answer.body)["error"]["type"]) == (status, type_)
        client.send(get(b"/alive"))
        assert (await client.answer()).status == 200
        assert node.admission.tickets == []


async def test_the_anthropic_envelope() -> None:
    async with loopback() as node:
        client = await node.client()
        client.send(post(b'{"model":"nobody"}', path=b"/v1/messages"))
        body = json.loads((await client.answer()).body)
        assert body["type"] == "error"
        assert body["error"]["type"] == "not_found_error"
        assert body["request_id"]


async def test_default_model_aliases_and_query() -> None:
    """Percent-encoded names work (trap 78); /props takes no slot and keeps no idle instance."""
    profiles = (profile(aliases=("org/tiny v2",)),)
    async with (
        ScriptedUpstream(json_reply(b"{}")) as upstream,
        loopback(upstream, profiles=profiles, default_model="tiny") as node,
    ):
        client = await node.client()
        for request in (post(b"{}"), post(b'{"model":"TINY"}'), get(b"/props?model=org%2Ftiny+v2&x=1")):
            client.send(request)
            assert (await client.answer()).status == 200
        assert upstream.requests[2].request_line == b"GET /props?model=org%2Ftiny+v2&x=1 HTTP/1.1"
        assert upstream.requests[2].field(b"content-length") == []
        assert [t.needs_slot for t in node.admission.tickets] == [True, True, False]
        assert [t.waiter.only_looks for t in node.admission.tickets] == [False, False, True]
        client.send(get(b"/props?model="))
        assert (await client.answer()).status == 400


async def test_stream_is_stripped_from_embeddings() -> None:
    """trap 4: all other values stay verbatim."""
    body = b'{"input": "a\\u00e9 ", "stream":true, "x": 1.50, "model":"embed"}'
    profiles = (profile("embed", args=("--embedding",)),)
    async with ScriptedUpstream(json_reply(b"{}")) as upstream, loopback(upstream, profiles=profiles) as node:
        client = await node.client()
        client.send(post(body, path=b"/v1/embeddings"))
        assert (await client.answer()).status == 200
        assert upstream.requests[0].body == b'{"input":"a\\u00e9 ","x":1.50,"model":"embed"}'
        client.send(post(b'{"model":"embed", "stream": false}', path=b"/v1/embeddings"))
        assert (await client.answer()).status == 200
        assert upstream.requests[1].body == b'{"model":"embed", "stream": false}'


async def test_keys_are_checked_on_every_request() -> None:
    """Also on a head that is known (trap 99), with either header; the key goes no further (trap 102)."""
    auth = {"enabled": True, "allowed_keys": ["sk-good"]}
    async with ScriptedUpstream(json_reply(b"{}")) as upstream, loopback(upstream, auth=auth) as node:
        client = await node.client()
        good, other = b"Authorization: Bearer sk-good\r\n", b"x-api-key: sk-good\r\n"
        bad = b"Authorization: Bearer sk-goof\r\n"
        for extra, status in ((good, 200), (good, 200), (bad, 401), (bad, 401), (b"", 401), (other, 200)):
            client.send(post(ASK, extra=extra))
            answer = await client.answer()
            assert answer.status == status, extra
        assert json.loads(answer.body) == {}
        assert len(upstream.requests) == 3
        assert all(b"sk-good" not in request.head for request in upstream.requests)


async def _refused(client: RawClient) -> int:
    answer = await client.answer()
    assert answer.field(b"connection") == b"close"
    assert await client.ended() == b""
    return answer.status


async def test_a_declared_length_over_the_limit() -> None:
    """413 at once, and the client may go on sending without losing the answer."""
    async with loopback(http={"request_body_limit_bytes": 1000}) as node:
        client = await node.client()
        client.send(post(b"x" * 400_000))
        assert await _refused(client) == 413


async def test_a_refusal_survives_what_the_client_goes_on_sending() -> None:
    """Closing over unread bytes would reset the connection, and the answer with it."""
    async with loopback(http={"request_body_limit_bytes": 1000}) as node:
        loop = asyncio.get_running_loop()
        with socket.socket() as sock:
            sock.setblocking(False)
            await loop.sock_connect(sock, ("127.0.0.1", node.port))
            await loop.sock_sendall(sock, post(b"x" * 3_000_000)[:300])
            await node.until(lambda: len(node.access.lines) == 1)
            await asyncio.sleep(0.02)  # the answer is here, and not read
            await loop.sock_sendall(sock, b"x" * 1_000_000)
            assert (await loop.sock_recv(sock, 1000)).startswith(b"HTTP/1.1 413 ")


async def test_a_body_in_pieces_with_the_next_request_behind_it() -> None:
    async with ScriptedUpstream(json_reply(b"{}")) as upstream, loopback(upstream) as node:
        client = await node.client()
        client.send(post(ASK)[:-4])
        await node.until(lambda: any(not connection.idle for connection in node.plane.connections))
        client.send(ASK[-4:] + post(ASK))
        for _ in range(2):
            assert (await client.answer()).status == 200
        assert [request.body for request in upstream.requests] == [ASK, ASK]


async def test_chunks_over_the_limit() -> None:
    async with loopback(http={"request_body_limit_bytes": 1000}) as node:
        client = await node.client()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: n\r\nTransfer-Encoding: chunked\r\n\r\n"
        client.send(head + (b"100\r\n" + b"x" * 256 + b"\r\n") * 4)
        assert await _refused(client) == 413


async def test_a_slow_body() -> None:
    async with loopback(http={"body_read_timeout_ms": 50}) as node:
        client = await node.client()
        client.send(post(ASK)[:-5])
        assert await _refused(client) == 408


async def test_a_body_for_the_app_may_take_its_time() -> None:
    """The limit is on silence, for its bodies too."""
    async with loopback(http={"body_read_timeout_ms": 150}) as node:
        client = await node.client()
        client.send(b"POST /app HTTP/1.1\r\nHost: n\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(8):
            client.send(b"1388\r\n" + b" " * 5000 + b"\r\n")
            await asyncio.sleep(0.05)
        client.send(b"0\r\n\r\n")
        assert (await client.answer()).body == b"POST /app 40000"
        client.send(post(ASK, path=b"/app")[:-1])
        assert await _refused(client) == 408


async def test_a_slow_head() -> None:
    async with loopback(http={"head_read_timeout_ms": 50}) as node:
        client = await node.client()
        client.send(b"POST /v1/chat/comp")
        assert await _refused(client) == 408


async def test_a_huge_head() -> None:
    async with loopback(http={"head_limit_bytes": 2000}) as node:
        for request in (get(b"/", extra=b"X: %b\r\n" % (b"a" * 3000)), b"GET /" + b"a" * 3000):
            client = await node.client()
            client.send(request)
            assert await _refused(client) == 431


async def test_an_idle_connection_is_closed() -> None:
    async with (
        ScriptedUpstream(json_reply(b"{}")) as upstream,
        loopback(upstream, http={"idle_timeout_seconds": 0.05}) as node,
    ):
        client = await node.client()
        client.send(post(ASK))
        assert (await client.answer()).status == 200
        assert await client.ended() == b""


async def test_a_client_that_does_not_read_is_dropped() -> None:
    """It would hold a slot for ever; its upstream is paused meanwhile, not buffered."""
    async with (
        ScriptedUpstream(json_reply(b"x" * 30_000_000)) as upstream,
        loopback(upstream, http={"idle_timeout_seconds": 0.2}) as node,
    ):
        client = await node.client()
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.send(post(ASK))
        await node.until(lambda: bool(node.admission.leases) and bool(node.admission.leases[0].ended))
        assert node.admission.leases[0].ended == ["abandon"]


async def test_draining() -> None:
    """Idle connections close, the answer under way is the last, new requests get 503."""
    async with ScriptedUpstream(json_reply(b"{}")) as upstream, loopback(upstream) as node:
        idle, busy, late = await node.client(), await node.client(), await node.client()
        node.admission.hold = True
        busy.send(post(ASK) + post(ASK))
        ticket = await node.admission.ticket()
        late.send(post(ASK)[:-1])
        idle.send(get(b"/x"))
        await idle.answer()
        await node.until(lambda: sum(not c.idle for c in node.plane.connections) == 2)
        node.ctx.draining = True
        node.plane.begin_drain()
        assert await idle.ended() == b""
        ticket.admit()
        answer = await busy.answer()
        assert (answer.status, answer.field(b"connection")) == (200, b"close")
        assert await busy.ended() == b""
        late.send(ASK[-1:])
        (await node.admission.ticket(1)).admit()  # it was accepted before the drain
        assert (await late.answer()).status == 200
        new = await node.client()
        new.send(post(ASK))
        refused = await new.answer()
        assert (refused.status, refused.field(b"connection"), refused.field(b"retry-after")) == (503, b"close", b"5")
        assert json.loads(refused.body)["error"]["type"] == "draining"


async def test_a_connection_without_a_word_when_the_drain_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first request may be here, unread: it gets an answer, not a reset; silence is closed soon."""
    monkeypatch.setattr("mesh.api.client._FIRST_REQUEST_S", 0.3)
    async with loopback() as node:
        fresh, silent = await node.client(), await node.client()
        await node.until(lambda: len(node.plane.connections) == 2)
        fresh.send(post(ASK))
        node.ctx.draining = True
        node.plane.begin_drain()
        later = await node.client()
        assert (await fresh.answer()).status == 503
        async with asyncio.timeout(2):
            assert await silent.ended() == await later.ended() == b""


async def test_reload_is_seen_at_once() -> None:
    async with ScriptedUpstream(json_reply(b"{}")) as upstream, loopback(upstream) as node:
        client = await node.client()
        client.send(post(ASK))
        assert (await client.answer()).status == 200
        node.admission.catalog = catalog(profile("other"))
        client.send(post(ASK))
        assert (await client.answer()).status == 404
        node.admission.catalog = catalog(profile(args=("--rerank",)))
        client.send(post(ASK))
        assert (await client.answer()).status == 400
