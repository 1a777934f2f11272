"""Nodes on loopback that reach each other as ``mesh.member`` lets them, and answer each request as they are told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import h11

from mesh.core.breaker import Limits
from mesh.core.node_state import NodeState, PeerKey, encode_state
from mesh.errors import LinkError
from mesh.net.link import Link
from mesh.net.link_client import LinkClient
from mesh.net.link_http import Answer
from mesh.net.links import Links
from mesh.net.outreach import Outreach
from mesh.net.peer import Peer
from mesh.net.peers import Peers
from tests.members import Clock, Member, made_peers, sync
from tests.net.link_nodes import Node, Recorder, node

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ntrue"


def answer(body: bytes, status: int = 200, *headers: str) -> bytes:
    """Return an HTTP answer."""
    lines = [f"HTTP/1.1 {status} Text", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


@dataclass
class Served:
    """What a node answers, and what it was asked: method, path, headers, body."""

    answers: Callable[[Link], bytes | None] = lambda link: OK  #: None: nothing, for now
    requests: list[tuple[str, str, dict[bytes, bytes], bytes]] = field(default_factory=list)
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    connections: list[Responder] = field(default_factory=list)

    def serve(self) -> Responder:
        self.connections.append(Responder(self))
        return self.connections[-1]

    @property
    def paths(self) -> list[str]:
        return [path for _, path, _, _ in self.requests]


class Responder(Recorder):
    """The serving end of a link: HTTP/1.1 with h11, as little of it as will do."""

    def __init__(self, served: Served) -> None:
        super().__init__()
        self._served = served
        self._h11 = h11.Connection(h11.SERVER)
        self._head: tuple[str, str, dict[bytes, bytes]] = ("", "", {})
        self._body = b""

    def data_received(self, data: bytes) -> None:
        self._h11.receive_data(data)
        while True:
            match self._h11.next_event():
                case h11.Request(method=method, target=target, headers=headers):
                    self._head = (method.decode(), target.decode(), dict(headers))
                case h11.Data(data=part):
                    self._body += part
                case h11.EndOfMessage():
                    self._complete()
                case _:
                    return

    def _complete(self) -> None:
        served = self._served
        served.requests.append((*self._head, self._body))
        served.asked.set()
        self._body = b""
        self._h11 = h11.Connection(h11.SERVER)
        if (reply := served.answers(self.link)) is not None:
            self.link.write(reply)


class NotingClient(LinkClient):
    """Notes which addresses it was given."""

    def __init__(self, links: Links) -> None:
        super().__init__(links)
        self.asked: list[str] = []

    async def request(self, address: str, *args: Any, **options: Any) -> Answer:
        self.asked.append(address)
        return await super().request(address, *args, **options)


@dataclass
class Reaching:
    """A node that reaches out, and what it knows of the others. The clock of its breakers stands."""

    here: Node
    clock: Clock
    peers: Peers
    client: NotingClient
    outreach: Outreach
    members: dict[PeerKey, Member] = field(default_factory=dict)

    def knows(self, key: PeerKey, *addresses: str, name: str = "there") -> Peer:
        """Take over a record that tells of *addresses*; return the peer."""
        state = NodeState(name, version="0.5.0", addresses=addresses)
        known = self.members.get(key)
        self.members[key] = Member(key, encode_state(state)) if known is None else known.later(state)
        sync(self.peers, *self.members.values())
        peer = self.peers.get(key)
        assert peer is not None
        return peer


@asynccontextmanager
async def reaching(limits: Limits | None = None, seed: int = 1) -> AsyncIterator[Reaching]:
    """A node with an ``Outreach``, over real links."""
    clock = Clock()
    async with node(seed) as here:
        peers = made_peers(clock, limits=limits)
        client = NotingClient(here.links)
        yield Reaching(here, clock, peers, client, Outreach(here.links, client, peers, clock))
        await client.close()


def at(there: Node) -> str:
    return f"127.0.0.1:{there.port}"


class FakeLinks:
    """Dials by a table: after how many seconds a host answers; one that is not in it never does."""

    def __init__(self, **hosts: float) -> None:
        self._hosts = hosts
        self.dialled: list[tuple[str, float]] = []  #: host and limit

    async def dial(
        self, host: str, port: int, factory: Callable[[], Any], *, timeout_s: float, expect: PeerKey
    ) -> tuple[None, Any]:
        self.dialled.append((host, timeout_s))
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.sleep(self._hosts.get(host, 3600))
        except TimeoutError as error:
            raise LinkError(f"{host}: cannot be reached") from error
        return None, factory()


class FakeClient:
    """Answers as *reply* says, and notes what it was asked."""

    def __init__(self, reply: Callable[[str], Answer]) -> None:
        self._reply = reply
        self.asked: list[str] = []
        self.options: list[dict[str, Any]] = []

    async def request(self, address: str, method: str, path: str, body: bytes, **options: Any) -> Answer:
        self.asked.append(address)
        self.options.append(options)
        return self._reply(address)


def with_fakes(links: FakeLinks, client: FakeClient, peers: Peers, now: Callable[[], float]) -> Outreach:
    return Outreach(cast(Any, links), cast(Any, client), peers, now)
