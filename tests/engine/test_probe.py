"""Questions to a child that may be anything: healthy, hung, dying, or not a llama-server at all."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from mesh.engine import probe
from mesh.engine.lease import Endpoint
from mesh.engine.probe import Prober
from tests.engine.children import make_profile


class Child:
    """A server that answers everything with the same bytes, or never."""

    def __init__(self) -> None:
        self.answer = b""
        self.hangs = False
        self.heads: list[bytes] = []
        self.left = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.heads.append(await reader.readuntil(b"\r\n\r\n"))
        if self.hangs:
            await reader.read()
            self.left.set()
        writer.write(self.answer)
        writer.close()

    def says(self, body: str, status: int = 200) -> None:
        self.answer = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


@pytest.fixture
def prober() -> Prober:
    return Prober()


@pytest.fixture(params=["127.0.0.1", "::1"])
async def endpoint(request: pytest.FixtureRequest, child: Child) -> AsyncIterator[Endpoint]:
    if request.param == "::1" and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    server = await asyncio.start_server(child.serve, request.param, 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        yield Endpoint("m-1", make_profile(), request.param, port)


@pytest.fixture
def child() -> Child:
    return Child()


async def test_health(prober: Prober, endpoint: Endpoint, child: Child) -> None:
    child.says("{}")
    assert await prober.healthy(endpoint)
    child.says("{}", 503)
    assert not await prober.healthy(endpoint)


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"])
async def test_anything_else_is_no_answer(prober: Prober, endpoint: Endpoint, child: Child, answer: bytes) -> None:
    child.answer = answer
    assert not await prober.healthy(endpoint)
    assert await prober.properties(endpoint) == {}
    assert await prober.busy_slots(endpoint) is None


@pytest.mark.parametrize("body", ["no json", "3", "null"])
async def test_json_of_another_shape_is_no_answer(prober: Prober, endpoint: Endpoint, child: Child, body: str) -> None:
    child.says(body)
    assert await prober.properties(endpoint) == {}
    assert await prober.busy_slots(endpoint) is None


async def test_slots_that_compute_are_counted(prober: Prober, endpoint: Endpoint, child: Child) -> None:
    child.says('[{"is_processing": true}, {"is_processing": false}, {}, 7, {"is_processing": true}]')
    assert await prober.busy_slots(endpoint) == 2


async def test_the_key_is_sent_and_the_operators_proxy_is_not_asked(
    prober: Prober, endpoint: Endpoint, child: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    """trap 104"""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    child.says("{}")
    await prober.healthy(endpoint)
    assert b"authorization" not in child.heads[-1].lower()
    endpoint.api_key = "sesame"
    assert await prober.healthy(endpoint)
    assert b"\r\nauthorization: bearer sesame\r\n" in child.heads[-1].lower()


async def test_a_hung_child_costs_one_timeout(
    endpoint: Endpoint, child: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    """trap 21"""
    monkeypatch.setattr(probe, "TIMEOUT_S", 0.05)
    prober = Prober()
    child.hangs = True
    assert not await asyncio.wait_for(prober.healthy(endpoint), 5)
    await asyncio.wait_for(child.left.wait(), 5)
    assert await prober.busy_slots(endpoint) == probe.TOO_BUSY_TO_SAY, "it computes, so its slots are not free: trap 9"


async def test_nobody_listens(prober: Prober) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = Endpoint("m-1", make_profile(), "127.0.0.1", unused.getsockname()[1])
        assert not await prober.healthy(endpoint)
