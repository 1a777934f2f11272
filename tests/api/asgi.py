"""Drives an ASGI app without a socket, and, unlike httpx's transport, streams, and lets the client vanish."""

from __future__ import annotations

import asyncio
import json
from types import TracebackType
from typing import Any

from starlette.types import ASGIApp, Message

from mesh.core.node_state import PeerIdentity
from mesh.tasks import spawn

Headers = dict[str, str]


class Exchange:
    """One request in progress: ``async with Exchange(app, "GET", "/x") as exchange: await exchange.text_until("…")``"""

    def __init__(
        self,
        app: ASGIApp,
        method: str,
        path: str,
        *,
        headers: Headers | None = None,
        body: bytes = b"",
        peer: PeerIdentity | None = None,
    ) -> None:
        """*peer* is the node on whose link the request comes; None for a client's connection."""
        plain, _, query = path.partition("?")
        self._app = app
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": plain,
            "raw_path": plain.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()],
            "client": ("10.1.2.3", 5),
            "server": ("node", 8080),
            "state": {"mesh_peer": peer},
        }
        self._incoming: asyncio.Queue[Message] = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": body, "more_body": False})
        self._changed = asyncio.Event()
        self.status = 0
        self.headers: Headers = {}
        self.body = b""
        self.complete = False

    async def __aenter__(self) -> Exchange:
        self.task = spawn(self._run(), "exchange")
        return self

    async def _run(self) -> None:
        await self._app(self._scope, self._incoming.get, self._send)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.body += message.get("body", b"")
            self.complete = not message.get("more_body", False)
        self._changed.set()

    def vanish(self) -> None:
        """The client is gone."""
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def finished(self) -> None:
        """Wait until the app is done with the request."""
        async with asyncio.timeout(5):
            await self.task

    async def text_until(self, wanted: str) -> str:
        """Wait until *wanted* is in the body, and return all of it."""
        async with asyncio.timeout(5):
            while wanted not in self.body.decode():
                self._changed.clear()
                await self._changed.wait()
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def request(
    app: ASGIApp,
    method: str,
    path: str,
    *,
    headers: Headers | None = None,
    body: bytes | None = None,
    json_body: Any = ...,
    peer: PeerIdentity | None = None,
) -> Exchange:
    """Send a whole request and return the whole answer."""
    headers = dict(headers or {})
    if json_body is not ...:
        headers.setdefault("content-type", "application/json")
        body = json.dumps(json_body).encode()
    async with Exchange(app, method, path, headers=headers, body=body or b"", peer=peer) as exchange:
        await exchange.finished()
    return exchange
