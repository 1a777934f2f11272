"""Requests for the app: what uvicorn's parser would refuse or upgrade reaches it, and every refusal is an envelope.

The app is the real one: keys, access log and error envelopes are its own.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from mesh.api.dataplane import DataPlane
from mesh.api.handoff import AppRequest
from tests.api.loopback import Answer, RawClient, get
from tests.api.node import AUTH, Node

KEY = b"X-Api-Key: admin-key\r\n"
JSON = KEY + b"Content-Type: application/json\r\n"
CHUNKS = b"POST /admin/prewarm HTTP/1.1\r\nHost: n\r\n" + JSON + b"Transfer-Encoding: chunked\r\n\r\n"


class AppNode:
    """A data plane in front of the real app."""

    def __init__(self, node: Node, port: int, plane: DataPlane) -> None:
        self.node = node
        self.plane = plane
        self.port = port

    @asynccontextmanager
    async def client(self) -> AsyncIterator[RawClient]:
        client = RawClient(*await asyncio.open_connection("127.0.0.1", self.port))
        try:
            yield client
        finally:
            client.abort()

    async def ask(self, request: bytes) -> Answer:
        async with self.client() as client:
            client.send(request)
            return await client.answer()


@asynccontextmanager
async def app_node(**http: object) -> AsyncIterator[AppNode]:
    node = Node(auth=AUTH, http=http)
    plane = DataPlane(node.ctx, node.app, sweep_interval_s=0.02)
    server = await asyncio.get_running_loop().create_server(plane.protocol, "127.0.0.1", 0)
    try:
        yield AppNode(node, server.sockets[0].getsockname()[1], plane)
    finally:
        server.close()
        await plane.close()
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("method", [b"BREW", b"QUERY", b"CONNECT", b"get", b"OPTIONS"])
async def test_any_method_is_the_apps_to_judge(method: bytes) -> None:
    """405 with Allow on a known path, 404 elsewhere, 401 without a key; all logged (trap 74)."""
    async with app_node() as node:
        wrong = await node.ask(get(b"/v1/chat/completions", KEY, method))
        assert (wrong.status, wrong.field(b"allow")) == (405, b"POST")
        assert json.loads(wrong.body)["error"]["type"] == "invalid_request_error"
        assert (await node.ask(get(b"/v1/models", KEY, method))).status == 405
        assert (await node.ask(get(b"/nowhere", KEY, method))).status == 404
        assert (await node.ask(get(b"/nowhere", b"", method))).status == 401
        assert [line["status"] for line in node.node.access_log.lines] == [405, 405, 404, 401]
        assert {line["method"] for line in node.node.access_log.lines} == {method.decode()}


@pytest.mark.parametrize(
    ("target", "status"),
    [
        (b"http://u:p@x/v1/models?a=b", 200),
        (b"HTTPS://x:99999999/v1/models", 200),
        (b"http://[::1/v1/models", 200),
        (b"/v1/%6dodels", 200),
        (b"//", 404),
        (b"//v1/models", 404),
        (b"/health#x", 404),
        (b'/{}|^`"<>', 404),
        (b"http:///v1/models", 400),
    ],
)
async def test_any_target_is_judged_once(target: bytes, status: int) -> None:
    async with app_node() as node:
        answer = await node.ask(get(target, KEY))
        assert answer.status == status
        json.loads(answer.body)


async def test_an_offer_of_http_2_is_declined() -> None:
    """Java's HttpClient sends it with each first request; the body behind it is read, and the connection lives on."""
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"
    body = b'{"model":"nobody"}'
    async with app_node() as node, node.client() as client:
        for _ in range(2):
            head = b"POST /admin/prewarm HTTP/1.1\r\nHost: n\r\n%b%bContent-Length: %d\r\n\r\n"
            client.send(head % (JSON, offer, len(body)) + body)
            answer = await client.answer()
            assert answer.status == 404
            assert b"model_not_found" in answer.body


async def test_connection_close_and_http_1_0_still_end_the_connection() -> None:
    async with app_node() as node:
        for request in (get(b"/health", b"Connection: close\r\n"), b"GET /health HTTP/1.0\r\n\r\n"):
            async with node.client() as client:
                client.send(request)
                assert (await client.answer()).status == 200
                assert await client.ended() == b""


async def test_chunks_that_only_our_parser_accepts() -> None:
    """Blanks behind a size, an extension with an open quote, a trailer."""
    body = b'{"model":"nobody"}'
    async with app_node() as node, node.client() as client:
        for size in (b"12  ", b'12;a="b'):
            client.send(CHUNKS + size + b"\r\n" + body + b"\r\n0\r\nT: 1\r\n\r\n")
            answer = await client.answer()
            assert answer.status == 404
            assert b"model_not_found" in answer.body


@pytest.mark.parametrize("first", [b"", b"1\r\n{\r\n"])
async def test_a_malformed_chunk_is_an_envelope(first: bytes) -> None:
    async with app_node() as node, node.client() as client:
        client.send(CHUNKS + first)
        await asyncio.sleep(0.01)  # the app is waiting for the body
        client.send(b"zz\r\n")
        answer = await client.answer()
        assert (answer.status, answer.field(b"connection")) == (400, b"close")
        assert "malformed body" in json.loads(answer.body)["error"]["message"]
        assert await client.ended() == b""


def test_what_uvicorn_refuses_all_the_same_is_an_envelope() -> None:
    written: list[bytes] = []

    class Transport:
        def write(self, data: bytes) -> None:
            written.append(data)

        def close(self) -> None:
            written.append(b"closed")

    request = AppRequest.__new__(AppRequest)
    request.transport = Transport()  # type: ignore[assignment]
    request.send_400_response("Invalid HTTP request received.")
    head, _, body = written[0].partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert written[1] == b"closed"
