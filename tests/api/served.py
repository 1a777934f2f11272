"""A node's app behind uvicorn's own HTTP protocol on a real socket, in the loop of the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from tests.api.node import Node


class Served:
    """A node on a port of 127.0.0.1."""

    def __init__(self, node: Node, port: int, state: ServerState) -> None:
        self.node = node
        self.port = port
        self.state = state

    async def connect(self, head: str, body: str = "") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Send a request on a connection of its own."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        lines = (head, "Host: node", "Content-Type: application/json", f"Content-Length: {len(body)}", "", body)
        writer.write("\r\n".join(lines).encode())
        return reader, writer

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let the loop run until *condition*; fails after 5 s."""
        async with asyncio.timeout(5):
            while not condition():  # noqa: ASYNC110 - the condition belongs to other objects, which have no event
                await asyncio.sleep(0.005)


@asynccontextmanager
async def serving(node: Node) -> AsyncIterator[Served]:
    """Serve *node* on a free port until the end of the block; whatever is open then is aborted."""
    config = uvicorn.Config(node.app, http="httptools", ws="none", lifespan="off", log_config=None, access_log=False)
    config.load()
    state = ServerState()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: HttpToolsProtocol(config, state, {}), "127.0.0.1", 0)
    yield Served(node, server.sockets[0].getsockname()[1], state)
    server.close()
    await server.wait_closed()
    for connection in list(state.connections):
        connection.transport.abort()
    async with asyncio.timeout(5):
        while state.tasks:
            await asyncio.gather(*state.tasks, return_exceptions=True)
