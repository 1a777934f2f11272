"""Connections to instances: one protocol per connection, one pool per endpoint.

A pool lives and dies with its endpoint, so a connection can never serve a port's next tenant (trap 26). llama-server
closes what was idle for 5 s and after 100 requests; we use nothing that was idle for 4 s, honour ``Connection: close``,
and leave the race that remains to the relay's one retry. Never decides about requests.

llama-server has one thread for each open connection, idle or not, and few threads (slots + 2 on a small machine); what
has none waits. So idle connections beyond two are dropped soon, and as long as a request on a new connection has been
without an answer for 20 ms, perhaps for want of a thread, none is kept at all.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import ClassVar, Protocol, cast

from mesh.api.http1 import ResponseHead, parse_response
from mesh.api.known_heads import read_known
from mesh.api.responses import ProtocolError
from mesh.api.sender import Body, BodySender, StreamedBody, StreamSender
from mesh.engine.lease import Endpoint, Target
from mesh.errors import MeshError, UpstreamError
from mesh.logs import Log
from mesh.tasks import spawn

_log = Log(__name__)

IDLE_LIMIT_S = 4.0
_CONNECT_TIMEOUT_S = 10.0
_KEPT_IDLE = 2  # for IDLE_LIMIT_S; more of them only from one look to the next, while a busy pool's come and go
_PRUNE_INTERVAL_S = 0.25
_STARVED_S = 0.02  # a new connection that gets no answer for so long may be waiting for a thread
_MAX_KNOWN_HEADS = 4
_MAX_KNOWN_HEAD_BYTES = 4096
_MAX_HEAD_BYTES = 65536
_RESET = struct.pack("ii", 1, 0)


def reset_on_close(transport: asyncio.BaseTransport) -> None:
    """Let the other end see at once that *transport* was closed, and not as an end in order."""
    if (sock := transport.get_extra_info("socket")) is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


class Requester(Protocol):
    """Whose answer a connection brings."""

    def connected(self, connection: UpstreamConnection) -> None: ...
    def connect_failed(self, error: MeshError) -> None: ...
    @property
    def wants_connection(self) -> bool: ...
    def upstream_lost(self, error: Exception | None) -> None: ...
    @property
    def feed(self) -> Callable[[bytes], None]:
        """What takes the bytes of the answer; another one as the answer goes on."""


class UpstreamConnection(asyncio.Protocol):
    """One connection to an instance, used by at most one request at a time."""

    __slots__ = ("_sender", "idle_since", "paused", "pool", "requester", "reused", "transport")

    transport: asyncio.Transport

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.requester: Requester | None = None
        self.reused = False  # whether it has answered (anything); later the instance may just be closing it
        self.paused = False
        self.idle_since = 0.0
        self._sender: BodySender | StreamSender | None = None  # of the latest large body

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        self.pool.open.add(self)

    def data_received(self, data: bytes) -> None:
        requester = self.requester
        if requester is not None:
            requester.feed(data)
        else:  # nobody asked: whatever it is, the next answer could be mistaken for it
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.pool.forget(self)
        self._stop_sending()
        requester, self.requester = self.requester, None
        if requester is not None:
            requester.upstream_lost(exc)

    def pause_reading(self) -> None:
        if not self.paused and not self.transport.is_closing():
            self.paused = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        if self.paused:
            self.paused = False
            if not self.transport.is_closing():
                self.transport.resume_reading()

    def abort(self) -> None:
        """Close at once, whatever is still to be sent; the instance then frees the slot. Nobody is told any more."""
        if self._sender is not None and self.requester is not None and self.pool.of_peer:
            reset_on_close(self.transport)  # a peer that does not read at the moment would not see it end
        self.requester = None
        self._stop_sending()
        self.pool.forget(self)
        self.transport.abort()

    # --- large bodies

    def send(self, head: bytes, body: Body) -> None:
        """Write *head*, then *body* as fast as the other end takes it."""
        self.transport.write(head)
        self._sender = (
            StreamSender(self.transport, body) if isinstance(body, StreamedBody) else BodySender(self.transport, body)
        )
        self._sender.resume()

    @property
    def sent(self) -> bool:
        """Whether all that was to be sent is with the kernel."""
        return (self._sender is None or self._sender.done) and self.transport.get_write_buffer_size() == 0

    @property
    def bytes_sent(self) -> int:
        """How much of a large body was taken."""
        return 0 if self._sender is None else self._sender.bytes_sent

    def pause_writing(self) -> None:
        if self._sender is not None:
            self._sender.pause()

    def resume_writing(self) -> None:
        if self._sender is not None:
            self._sender.resume()

    def _stop_sending(self) -> None:
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.stop()


class Pool:
    """The open connections to one endpoint, and the response heads it is known to send."""

    of_peer: ClassVar[bool] = False  #: whether another node is at the other end
    idle_limit_s: ClassVar[float] = IDLE_LIMIT_S
    kept_idle: ClassVar[int] = _KEPT_IDLE

    __slots__ = ("_heads", "_instance_fields", "_prune_timer", "_starved", "endpoint", "fields", "idle", "open")

    def __init__(self, endpoint: Target, fields: bytes, instance_fields: bytes) -> None:
        self.endpoint = endpoint
        self.open: set[UpstreamConnection] = set()
        self.idle: list[UpstreamConnection] = []  # the most recently used one last
        self._starved: set[UpstreamConnection] = set()  # new, asked something, silent
        self._heads: list[ResponseHead] = []
        self._prune_timer: asyncio.TimerHandle | None = None
        self.fields = fields  #: what every request to it carries
        self._instance_fields = instance_fields  # what every answer of it is given
        endpoint.closers.append(self.close)

    def take(self, now: float) -> UpstreamConnection | None:
        """Return a kept connection that is fresh enough, None if there is none."""
        idle = self.idle
        while idle:
            connection = idle.pop()
            if now - connection.idle_since < self.idle_limit_s and not connection.transport.is_closing():
                return connection
            connection.abort()
        return None

    def give(self, connection: UpstreamConnection, now: float) -> None:
        """Keep *connection* for the next request, and drop those that were idle for too long."""
        connection.requester = None
        if self._starved or not self.endpoint.alive:
            connection.abort()
            return
        if connection.paused:
            connection.resume_reading()
        connection.idle_since = now
        connection.reused = True  # from now on it may be closed for being idle, answered or not
        self.idle.append(connection)
        if self._prune_timer is None:
            self._prune_timer = asyncio.get_running_loop().call_later(_PRUNE_INTERVAL_S, self._prune)

    def _prune(self) -> None:
        """Drop what was idle for too long; a child's thread waits on each. One timer per pool, not per connection."""
        loop = asyncio.get_running_loop()
        self._prune_timer = None
        now, spare = loop.time(), len(self.idle) - self.kept_idle
        for number, connection in enumerate(tuple(self.idle)):
            if now - connection.idle_since >= (_PRUNE_INTERVAL_S if number < spare else self.idle_limit_s):
                connection.abort()
        if self.idle:
            self._prune_timer = loop.call_later(_PRUNE_INTERVAL_S, self._prune)

    def answers(self, connection: UpstreamConnection) -> None:
        """A new connection's first answer begins: it has a thread."""
        connection.reused = True
        self._starved.discard(connection)

    def _look_after(self, connection: UpstreamConnection) -> None:
        """If a new connection is silent, give its request the threads that idle connections hold."""
        if connection.requester is not None and not connection.reused:
            self._starved.add(connection)
            for idle in tuple(self.idle):
                idle.abort()

    def connect(self, requester: Requester) -> None:
        """Open a new connection for *requester*; if it is gone by then, the connection is kept for another."""
        spawn(self._connect_surely(requester), f"connect to {self.endpoint.instance_id}")

    async def _connect_surely(self, requester: Requester) -> None:
        """Whatever goes wrong, even a bug: the request must hear of it, or it would wait for ever."""
        try:
            await self._connect(requester)
        except Exception:
            _log.exception("connecting failed unexpectedly", instance=self.endpoint.instance_id)
            if requester.wants_connection:
                requester.connect_failed(UpstreamError("cannot connect to the instance"))

    async def _open(self) -> UpstreamConnection:
        """Return a new connection; raise ``MeshError`` if there is none to be had."""
        loop, endpoint = asyncio.get_running_loop(), cast(Endpoint, self.endpoint)
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(
                    lambda: UpstreamConnection(self), endpoint.host, endpoint.port
                )
        except OSError as error:  # TimeoutError is one
            raise UpstreamError(f"cannot connect to the instance: {str(error) or 'timed out'}") from error
        return connection

    async def _connect(self, requester: Requester) -> None:
        loop = asyncio.get_running_loop()
        try:
            connection = await self._open()
        except MeshError as error:
            if requester.wants_connection:
                requester.connect_failed(error)
            return
        if not self.endpoint.alive or connection.transport.is_closing():
            connection.abort()
            if requester.wants_connection:
                requester.connect_failed(UpstreamError("the instance closed the connection at once"))
        elif requester.wants_connection:
            requester.connected(connection)
            if not self.of_peer:
                loop.call_later(_STARVED_S, self._look_after, connection)
        else:
            self.give(connection, loop.time())

    def forget(self, connection: UpstreamConnection) -> None:
        self.open.discard(connection)
        self._starved.discard(connection)
        if connection in self.idle:
            self.idle.remove(connection)

    def close(self) -> None:
        """Abort every connection; those in use tell their requester. Idempotent."""
        for connection in tuple(self.open):
            connection.transport.abort()
        self.idle.clear()
        if self._prune_timer is not None:
            self._prune_timer.cancel()
            self._prune_timer = None

    def read_head(self, data: bytes) -> tuple[ResponseHead | None, int, int]:
        """Return the response head that *data* begins with, where it ends and its length; None if it is not whole.

        Raise ``UpstreamError`` if it is not HTTP.
        """
        for known in self._heads:
            end, length = read_known(known, data)
            if end:
                if known is not self._heads[0]:
                    self._heads.remove(known)
                    self._heads.insert(0, known)
                return known, end, length
        end = data.find(b"\r\n\r\n") + 4
        if end > _MAX_HEAD_BYTES or (end == 3 and len(data) > _MAX_HEAD_BYTES):
            raise UpstreamError("the instance's response head is too large")
        if end == 3:
            return None, 0, 0
        try:
            head = parse_response(data[:end], of_peer=self.of_peer)
        except ProtocolError as error:
            raise UpstreamError(f"the instance did not answer in HTTP: {error.message}") from error
        head.forward += self._instance_fields
        if end <= _MAX_KNOWN_HEAD_BYTES:
            self._heads = [head, *self._heads[: _MAX_KNOWN_HEADS - 1]]
        return head, end, head.length


class SingleUsePool(Pool):
    """The connections to an instance that wants a new one for each request."""

    __slots__ = ()

    def give(self, connection: UpstreamConnection, now: float) -> None:
        connection.abort()


def pool_of(endpoint: Target, node_id: str) -> Pool:
    """Return the endpoint's pool, made on first use; a peer brings its own."""
    if endpoint.pool is None:
        assert isinstance(endpoint, Endpoint)
        served_by = b"X-Llama-Mesh-Node: %s\r\nX-Llama-Mesh-Instance: %s\r\n" % (
            node_id.encode("latin-1", "replace"),
            endpoint.instance_id.encode("latin-1", "replace"),
        )
        kind = Pool if endpoint.keeps_alive else SingleUsePool
        endpoint.pool = kind(endpoint, _request_fields(endpoint), served_by)
    pool: Pool = endpoint.pool
    return pool


def _request_fields(endpoint: Endpoint) -> bytes:
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    fields = f"Host: {host}:{endpoint.port}\r\n"
    if endpoint.api_key is not None:  # the instance's own, never the client's (traps 102, 104)
        fields += f"Authorization: Bearer {endpoint.api_key}\r\n"
    if not endpoint.keeps_alive:
        fields += "Connection: close\r\n"
    return fields.encode("latin-1")
