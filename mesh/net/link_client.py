"""A small HTTP/1.1 client over links, for gossip and admin calls; the data plane has its own way.

Keeps up to two idle links per address for a minute, since a handshake costs more than a request. Nothing waits for ever
(trap 56): connecting, the first byte of the answer and the whole call have a limit each; a call that is cancelled or
late takes its link with it. A kept link may have been closed by the other end just now: if it breaks before a byte of
the answer came, the call is made once more, on a new link.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from mesh.config.address import split_address
from mesh.core.node_state import PeerKey
from mesh.errors import LinkError, PeerError
from mesh.net.link_http import Answer, Call, CallConnection
from mesh.net.links import Links

_KEPT_IDLE = 2
_IDLE_S = 60.0
_MAX_BODY_BYTES = 1 << 20

Headers = Iterable[tuple[str, str]]


class LinkClient:
    """See the module. Of one event loop."""

    def __init__(self, links: Links, *, max_body_bytes: int = _MAX_BODY_BYTES, idle_s: float = _IDLE_S) -> None:
        self._links = links
        self._max_body_bytes = max_body_bytes
        self._idle_s = idle_s
        self._idle: dict[str, list[CallConnection]] = {}  # by address; the latest used last
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    async def request(
        self,
        address: str,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        headers: Headers = (),
        expect: PeerKey | None = None,
        connect_s: float = 3.0,
        first_byte_s: float = 5.0,
        total_s: float = 10.0,
    ) -> Answer:
        """Return the answer of the node at *address* (``host:port``), whatever its status.

        Raise ``LinkError`` if there is no link to it or it broke, ``PeerError`` if it does not answer in time or not in
        HTTP. With *expect*, nobody with another key is asked.
        """
        call = Call(method, path, body, tuple(headers), first_byte_s, self._max_body_bytes)
        try:
            async with asyncio.timeout(total_s):
                return await self._request(address, call, expect, connect_s)
        except TimeoutError as error:
            raise PeerError(f"{address}: no complete answer to {method} {path} within {total_s:g} s") from error

    async def _request(self, address: str, call: Call, expect: PeerKey | None, connect_s: float) -> Answer:
        connection = self._take(address, expect)
        if connection is not None:
            try:
                return await self._ask(address, connection, call)
            except LinkError:
                if connection.answered:
                    raise
        return await self._ask(address, await self._connect(address, expect, connect_s), call)

    async def _connect(self, address: str, expect: PeerKey | None, timeout_s: float) -> CallConnection:
        if self._closed:
            raise LinkError(f"{address}: this node is stopping")
        try:
            host, port = split_address(address)
        except ValueError as error:
            raise LinkError(f"'{address}' {error}") from error
        _, connection = await self._links.dial(host, port, CallConnection, timeout_s=timeout_s, expect=expect)
        return connection

    async def _ask(self, address: str, connection: CallConnection, call: Call) -> Answer:
        """Make *call* on *connection*, and keep that only if it ended in order."""
        reusable = False
        try:
            answer = await connection.ask(address, call)
            reusable = connection.reusable
            return answer
        except PeerError as error:
            raise type(error)(f"{address}: {error.message}") from error
        finally:
            if reusable:
                self._give(address, connection)
            else:
                connection.link.abort()

    # --- the kept links

    def _take(self, address: str, expect: PeerKey | None) -> CallConnection | None:
        kept = self._idle.get(address, [])
        for connection in reversed(kept):
            if expect is None or connection.link.peer.key == expect:
                kept.remove(connection)
                if connection.link.is_closing():
                    return self._take(address, expect)
                return connection
        return None

    def _give(self, address: str, connection: CallConnection) -> None:
        if self._closed:
            connection.link.close()
            return
        loop = asyncio.get_running_loop()
        kept = self._idle.setdefault(address, [])
        connection.idle_since = loop.time()
        kept.append(connection)
        if len(kept) > _KEPT_IDLE:
            kept.pop(0).link.close()
        if self._timer is None:
            self._timer = loop.call_later(self._idle_s, self._prune)

    def _prune(self) -> None:
        """Close what was idle for too long; one timer for all, which goes off when the next is due."""
        loop = asyncio.get_running_loop()
        self._timer = None
        due = loop.time() - self._idle_s
        for address, kept in tuple(self._idle.items()):
            for connection in tuple(kept):
                if connection.idle_since <= due or connection.link.is_closing():
                    kept.remove(connection)
                    connection.link.close()
            if not kept:
                del self._idle[address]
        if self._idle:
            oldest = min(connection.idle_since for kept in self._idle.values() for connection in kept)
            self._timer = loop.call_at(oldest + self._idle_s, self._prune)

    async def close(self) -> None:
        """Keep nothing, now and from now on; calls under way go on. Idempotent."""
        self._closed = True
        for kept in self._idle.values():
            for connection in kept:
                connection.link.close()
        self._idle.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
