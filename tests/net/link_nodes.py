"""Nodes with links on real loopback sockets, and a protocol that records what a link does with it."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from mesh.core.node_state import PeerKey
from mesh.errors import UntrustedPeerError
from mesh.net.link import Link
from mesh.net.links import Links
from mesh.net.listener import Listener
from tests.net.link_sessions import PSK, FakeIdentity


@dataclass
class FakeTrust:
    """Trusts everybody but *strangers*, and remembers whom it admitted."""

    strangers: set[PeerKey] = field(default_factory=set)
    admitted: list[tuple[PeerKey, str, bytes | None]] = field(default_factory=list)

    def admit(self, key: PeerKey, node_id: str, rotation: bytes | None) -> None:
        if key in self.strangers:
            raise UntrustedPeerError(f"the key of '{node_id}' is not trusted")
        self.admitted.append((key, node_id, rotation))


class Recorder(asyncio.Protocol):
    """What happened on a link, in order. ``on_data`` may act on it."""

    def __init__(self, on_data: Callable[[Recorder, bytes], None] | None = None) -> None:
        self.events: list[str] = []
        self.data = bytearray()
        self.chunks: list[int] = []
        self.on_data = on_data
        self.error: Exception | None = None
        self.lost = asyncio.Event()
        self.made = asyncio.Event()
        self.link: Link

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.link = cast(Link, transport)
        self.events.append("made")
        self.made.set()

    def data_received(self, data: bytes) -> None:
        assert data
        self.data += data
        self.chunks.append(len(data))
        if self.on_data is not None:
            self.on_data(self, data)

    def eof_received(self) -> None:
        self.events.append("eof")

    def connection_lost(self, exc: Exception | None) -> None:
        self.events.append("lost")
        self.error = exc
        self.lost.set()

    def pause_writing(self) -> None:
        self.events.append("pause")

    def resume_writing(self) -> None:
        self.events.append("resume")

    async def until(self, condition: Callable[[], bool]) -> None:
        await until(condition)


def echo(recorder: Recorder, data: bytes) -> None:
    recorder.link.write(data)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # conditions of code that signals nobody
            await asyncio.sleep(0.001)


class Node:
    """Its links, its listener, and the protocols of the links that others began."""

    def __init__(self, seed: int, serve: Callable[[], asyncio.Protocol] | None = None, **options: Any) -> None:
        host = options.pop("host", "127.0.0.1")
        self.identity = FakeIdentity(seed)
        self.trust = FakeTrust()
        self.served: list[Recorder] = []
        self._serve = serve
        settings: dict[str, Any] = {
            "identity": self.identity,
            "psk": PSK,
            "trust": self.trust,
            "node_id": f"node{seed}",
            "version": "1.0",
            "serve": self.serve,
        }
        self.links = Links(**(settings | options))
        self.listener = Listener(host, 0, asyncio.Protocol, detect_timeout_s=5, noise=self.links.accept)

    def serve(self) -> asyncio.Protocol:
        if self._serve is not None:
            return self._serve()
        self.served.append(Recorder())
        return self.served[-1]

    @property
    def port(self) -> int:
        return self.listener.port

    async def dial(self, other: Node, protocol: Recorder | None = None, **options: Any) -> Recorder:
        wanted = protocol or Recorder()
        _, recorder = await self.links.dial("127.0.0.1", other.port, lambda: wanted, **({"timeout_s": 10.0} | options))
        return recorder


@asynccontextmanager
async def node(seed: int, serve: Callable[[], asyncio.Protocol] | None = None, **options: Any) -> AsyncIterator[Node]:
    made = Node(seed, serve, **options)
    await made.listener.start()
    try:
        yield made
    finally:
        await made.links.close()
        await made.listener.close()
        await asyncio.sleep(0.005)
        gc.collect()  # what was forgotten is complained about here, not in somebody else's test


@asynccontextmanager
async def linked(**options: Any) -> AsyncIterator[tuple[Recorder, Recorder]]:
    """Return the protocols at both ends of a link, the one that began it first."""
    async with node(1) as one, node(2, **options) as two:
        mine = await one.dial(two)
        await until(lambda: bool(two.served) and two.served[0].made.is_set())
        yield mine, two.served[0]
