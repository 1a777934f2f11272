"""HTTP calls over links: reuse, retry, every limit, cancellation; on real sockets, and with time on the fake clock."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import h11
import pytest

from mesh.core.node_state import PeerIdentity, PeerKey
from mesh.errors import LinkError, PeerError
from mesh.net.link_client import LinkClient
from tests.net.link_nodes import Node, Recorder, node, until


class Responder(Recorder):
    """Answers each request as ``answer`` says: bytes to write, or what to do with the link."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server = server
        self._h11 = h11.Connection(h11.SERVER)
        self._body = b""

    def data_received(self, data: bytes) -> None:
        self._h11.receive_data(data)
        while True:
            match self._h11.next_event():
                case h11.Request(method=method, target=target, headers=headers):
                    self._request = (method.decode(), target.decode(), dict(headers))
                case h11.Data(data=part):
                    self._body += part
                case h11.EndOfMessage():
                    self.server.requests.append((*self._request, self._body))
                    self._body = b""
                    self.server.answer(self)
                    if self._h11.our_state is h11.SEND_RESPONSE and self._h11.their_state is h11.DONE:
                        self._h11 = h11.Connection(h11.SERVER)
                case _:
                    return


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Colour: blue\r\n\r\nok"


def ok(responder: Responder) -> None:
    responder.link.write(OK)


class Server:
    """What a node answers, and what it was asked."""

    def __init__(self) -> None:
        self.answer: Callable[[Responder], None] = ok
        self.requests: list[tuple[str, str, dict[bytes, bytes], bytes]] = []
        self.connections: list[Responder] = []

    def serve(self) -> asyncio.Protocol:
        self.connections.append(Responder(self))
        return self.connections[-1]


@asynccontextmanager
async def client_of_two() -> AsyncIterator[tuple[LinkClient, Server, Node]]:
    server = Server()
    async with node(1) as one, node(2, server.serve) as two:
        client = LinkClient(one.links)
        yield client, server, two
        await client.close()


def at(two: Node) -> str:
    return f"127.0.0.1:{two.port}"


async def test_a_call() -> None:
    async with client_of_two() as (client, server, two):
        answer = await client.request(at(two), "POST", "/cluster/gossip", b"news", headers=[("X-A", "b")])
        assert (answer.status, answer.body) == (200, b"ok")
        assert ("x-colour", "blue") in answer.headers
        assert answer.peer.node_id == "node2"
        assert 0 <= answer.rtt_s < 5
        method, path, headers, body = server.requests[0]
        assert (method, path, body) == ("POST", "/cluster/gossip", b"news")
        assert headers[b"host"] == at(two).encode()
        assert headers[b"x-a"] == b"b"


async def test_links_are_kept_and_no_more_than_two() -> None:
    async with client_of_two() as (client, server, two):
        for _ in range(10):
            await client.request(at(two), "GET", "/")
        assert len(server.connections) == 1
        await asyncio.gather(*(client.request(at(two), "GET", "/") for _ in range(5)))
        assert len(server.connections) == 5
        await until(lambda: sum(not each.lost.is_set() for each in server.connections) == 2)
        assert all(each.error is None for each in server.connections)  # the others got a goodbye


async def test_expecting_somebody() -> None:
    async with client_of_two() as (client, server, two):
        await client.request(at(two), "GET", "/", expect=two.identity.key)
        with pytest.raises(LinkError, match="another key"):
            await client.request(at(two), "GET", "/", expect=PeerKey(bytes(32)))
        assert len(server.requests) == 1


async def test_any_status_and_any_framing() -> None:
    chunked = b"HTTP/1.1 503 Busy\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    informed = b"HTTP/1.1 103 Early Hints\r\n\r\n" + OK
    async with client_of_two() as (client, server, two):
        for wire, status, body in ((chunked, 503, b"abcde"), (informed, 200, b"ok")):
            server.answer = lambda responder, wire=wire: responder.link.write(wire)  # type: ignore[misc]
            answer = await client.request(at(two), "GET", "/")
            assert (answer.status, answer.body) == (status, body)

        def until_the_end(responder: Responder) -> None:
            responder.link.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nall of it")
            responder.link.close()

        server.answer = until_the_end
        assert (await client.request(at(two), "GET", "/")).body == b"all of it"
        server.answer = ok
        assert (await client.request(at(two), "GET", "/")).status == 200


# --- what goes wrong


async def test_a_kept_link_that_was_closed_meanwhile() -> None:
    """Noticed or not, it costs no call."""
    async with client_of_two() as (client, server, two):
        await client.request(at(two), "GET", "/")
        server.connections[0].link.close()
        await server.connections[0].lost.wait()
        await client.request(at(two), "GET", "/")

        def close_instead(responder: Responder) -> None:
            server.answer = ok
            responder.link.abort()

        server.answer = close_instead  # as if it had been closed while the request was on its way
        assert (await client.request(at(two), "POST", "/", b"x")).status == 200
        assert [body for *_, body in server.requests] == [b"", b"", b"x", b"x"]


async def test_a_new_link_that_breaks_is_not_tried_again() -> None:
    async with client_of_two() as (client, server, two):
        server.answer = lambda responder: responder.link.abort()
        with pytest.raises(LinkError, match=at(two)):
            await client.request(at(two), "GET", "/")
        assert len(server.requests) == 1


async def test_an_answer_that_breaks_off_is_not_tried_again() -> None:
    async with client_of_two() as (client, server, two):
        await client.request(at(two), "GET", "/")
        for end in ("abort", "close"):

            def half(responder: Responder, end: str = end) -> None:
                responder.link.write(OK[:-1])
                asyncio.get_running_loop().call_later(0.01, getattr(responder.link, end))

            server.answer = half
            before = len(server.requests)
            with pytest.raises(LinkError, match=at(two)):
                await client.request(at(two), "GET", "/")
            assert len(server.requests) == before + 1


@pytest.mark.parametrize("wire", [b"rubbish\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", b"\x00" * 99])
async def test_what_is_no_http(wire: bytes) -> None:
    async with client_of_two() as (client, server, two):
        server.answer = lambda responder: responder.link.write(wire)
        with pytest.raises(PeerError, match="does not answer in HTTP"):
            await client.request(at(two), "GET", "/")
        await until(lambda: server.connections[0].lost.is_set())


async def test_an_answer_that_is_too_large() -> None:
    async with client_of_two() as (_, server, two), node(3) as three:
        client = LinkClient(three.links, max_body_bytes=1000)
        for head in (b"Content-Length: 1001", b"Transfer-Encoding: chunked"):
            body = bytes(1001) if b"Length" in head else b"3e9\r\n" + bytes(1001) + b"\r\n0\r\n\r\n"
            server.answer = lambda responder, head=head, body=body: responder.link.write(  # type: ignore[misc]
                b"HTTP/1.1 200 OK\r\n%b\r\n\r\n%b" % (head, body)
            )
            with pytest.raises(PeerError, match="larger than 1000 bytes"):
                await client.request(at(two), "GET", "/")
        await client.close()


async def test_more_than_an_answer() -> None:
    """Its link is not used again: the next answer could be the wrong one."""
    async with client_of_two() as (client, server, two):
        server.answer = lambda responder: responder.link.write(OK + OK)
        for _ in range(2):
            await client.request(at(two), "GET", "/")
        assert len(server.connections) == 2


async def test_a_call_that_is_cancelled_takes_its_link_with_it() -> None:
    async with client_of_two() as (client, server, two):
        server.answer = lambda responder: None
        task = asyncio.get_running_loop().create_task(client.request(at(two), "GET", "/"))
        await until(lambda: len(server.requests) == 1)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await server.connections[0].lost.wait()
        assert isinstance(server.connections[0].error, LinkError)


async def test_addresses_and_requests_that_are_none() -> None:
    async with client_of_two() as (client, server, two):
        with pytest.raises(LinkError, match="has no port"):
            await client.request("somewhere", "GET", "/")
        with pytest.raises(ValueError, match="no request"):
            await client.request(at(two), "GET", "/with a space\r\n")
        await client.close()
        await client.close()
        with pytest.raises(LinkError, match="stopping"):
            await client.request(at(two), "GET", "/")
        assert not server.requests


# --- time


class FakeLink:
    """What the client does to a link."""

    def __init__(self, protocol: Any, clock: asyncio.AbstractEventLoop) -> None:
        self.protocol, self._clock = protocol, clock
        self.peer = PeerIdentity(PeerKey(bytes(32)), "fake")
        self.ended: str | None = None
        self.ended_at = 0.0
        self.script: list[tuple[float, bytes]] = [(0.1, OK)]
        protocol.connection_made(self)

    def write(self, data: bytes) -> None:
        for delay_s, answer in self.script:
            self._clock.call_later(delay_s, self._answer, answer)

    def _answer(self, data: bytes) -> None:
        if self.ended is None:
            self.protocol.data_received(data)

    def is_closing(self) -> bool:
        return self.ended is not None

    def close(self, how: str = "close") -> None:
        if self.ended is None:
            self.ended, self.ended_at = how, self._clock.time()
            self._clock.call_soon(self.protocol.connection_lost, None)

    def abort(self) -> None:
        self.close("abort")


class FakeLinks:
    def __init__(self, script: list[tuple[float, bytes]] | None = None) -> None:
        self.made: list[FakeLink] = []
        self._script = script

    async def dial(self, host: str, port: int, factory: Any, **options: Any) -> tuple[FakeLink, Any]:
        assert options["timeout_s"] == 3.0
        await asyncio.sleep(0.5)
        link = FakeLink(factory(), asyncio.get_running_loop())
        if self._script is not None:
            link.script = self._script
        self.made.append(link)
        return link, link.protocol


def client_on(links: FakeLinks) -> LinkClient:
    return LinkClient(links)  # type: ignore[arg-type]


@pytest.mark.looptime
async def test_rtt_is_without_the_handshake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.net.link_http.perf_counter", asyncio.get_running_loop().time)
    client = client_on(FakeLinks())
    for _ in range(2):
        assert (await client.request("a:1", "GET", "/")).rtt_s == pytest.approx(0.1, abs=0.01)
    await client.close()


@pytest.mark.looptime
async def test_the_first_byte_is_late() -> None:
    """trap 56"""
    links, loop = FakeLinks([(60.0, OK)]), asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(PeerError, match=r"a:1: no answer to GET /x within 5 s"):
        await client_on(links).request("a:1", "GET", "/x")
    assert loop.time() - began == pytest.approx(5.5, abs=0.01)
    assert links.made[0].ended == "abort"
    assert len(links.made) == 1  # not tried again: it would be late, too


@pytest.mark.looptime
async def test_an_answer_that_drips() -> None:
    links = FakeLinks([(1.0 * second, OK[second : second + 1]) for second in range(60)])
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(PeerError, match="no complete answer to GET / within 10 s"):
        await client_on(links).request("a:1", "GET", "/")
    assert loop.time() - began == pytest.approx(10, abs=0.01)
    assert links.made[0].ended == "abort"


@pytest.mark.looptime
async def test_idle_links_are_closed_after_a_minute() -> None:
    links = FakeLinks()
    client = client_on(links)
    await client.request("a:1", "GET", "/")
    await asyncio.sleep(40)
    await client.request("b:1", "GET", "/")
    await asyncio.sleep(30)
    first, second = links.made
    assert (first.ended, second.ended) == ("close", None)
    await asyncio.sleep(60)
    assert second.ended == "close"
    assert first.ended_at == pytest.approx(60.6, abs=0.1)
    assert second.ended_at == pytest.approx(101.2, abs=0.1)
    assert client._timer is None


@pytest.mark.looptime
async def test_what_nobody_asked_for_ends_a_kept_link() -> None:
    links = FakeLinks()
    client = client_on(links)
    await client.request("a:1", "GET", "/")
    links.made[0]._answer(OK)
    assert links.made[0].ended == "abort"
    assert (await client.request("a:1", "GET", "/")).status == 200
    await client.close()
    assert links.made[1].ended == "close"
