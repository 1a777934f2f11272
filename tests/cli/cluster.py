"""For tests of commands about several nodes: a home of one's own, and a real node to greet."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mesh.core.node_state import PeerKey
from mesh.net.keys import Identity, psk_of
from mesh.net.links import Links
from mesh.net.trust import Trust

TOKEN = "0123456789abcdef0123456789abcdef"


@dataclass
class OtherNode:
    """A node in a thread: only what takes links."""

    port: int
    key: PeerKey
    trust: Trust

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


@contextmanager
def other_node(
    directory: Path, *, token: str = TOKEN, tofu: bool = True, seed: bytes = b"o" * 32
) -> Iterator[OtherNode]:
    """Run a node called 'other' that accepts links; everything is gone afterwards."""
    identity = Identity.of_seed(seed)
    trust = Trust(directory / "known_peers", tofu=tofu)

    def accepting() -> Links:
        return Links(
            identity=identity, psk=psk_of(token.encode()), trust=trust, node_id="other", version="9.8.7",
            serve=asyncio.Protocol,
        )  # fmt: skip

    with _in_thread(accepting) as port:
        yield OtherNode(port, identity.key, trust)


@contextmanager
def plain_server(answer: bytes) -> Iterator[int]:
    """Run what is no node: it says *answer* to whatever it hears, and closes."""

    class Plain(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            self.transport.write(answer)
            self.transport.close()

    with _in_thread(lambda: Plain) as port:
        yield port


@contextmanager
def _in_thread(make: Callable[[], Links | type[asyncio.Protocol]]) -> Iterator[int]:
    ready = threading.Event()
    ports: list[int] = []
    loops: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        loop, over, made = asyncio.get_running_loop(), asyncio.Event(), make()
        server = await loop.create_server(made.accept if isinstance(made, Links) else made, "127.0.0.1", 0)
        ports.append(server.sockets[0].getsockname()[1])
        loops.append((loop, over))
        ready.set()
        await over.wait()
        server.close()
        if isinstance(made, Links):
            await made.close()
        await server.wait_closed()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    ready.wait()
    try:
        yield ports[0]
    finally:
        loop, over = loops[0]
        loop.call_soon_threadsafe(over.set)
        thread.join()
