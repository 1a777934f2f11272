"""The half of an exchange that brings a request to an instance or a peer, and tries again while that is allowed.

A request is sent again only while not one byte of an answer has come: at once if a kept connection turned out to be
closed, and once through the queue, with its old place, if the instance died (trap 75).

In a mesh its ``trip`` (forwarding.py) says where it goes first and next. A peer is an upstream like an instance; what
differs is that its lease says how things went (``PeerLease``), and that it may refuse (``answer_refused``).
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from enum import Enum, auto
from typing import TYPE_CHECKING, Protocol

from mesh.api.http1 import RequestHead, ResponseHead
from mesh.api.relay import Relay
from mesh.api.sender import ONE_PIECE_BYTES, Body
from mesh.api.upstream import Pool, UpstreamConnection
from mesh.core.node_state import PeerIdentity
from mesh.engine.lease import Lease
from mesh.errors import MeshError, PeerError, UpstreamError

if TYPE_CHECKING:
    from mesh.api.dataplane import DataPlane
    from mesh.api.forwarding import Trip
    from mesh.api.peer_pool import PeerLease

#: How long the supervisor gets to notice that an instance died, before the request asks it for another one.
CRASH_NOTICE_S = 0.1
NOT_LOOKED = (-1, 0.0)
ONE_WRITE_BYTES = 4096  # up to here one copy is cheaper than a second buffer


class Phase(Enum):
    QUEUED = auto()
    PAUSED = auto()  # between a crash and the second attempt
    CONNECTING = auto()
    WAITING = auto()  # sent; no byte of an answer yet
    ANSWERING = auto()  # bytes of the answer have come
    DONE = auto()


# Looking a member up on its class costs 70 ns in Python 3.11, many times per request.
_QUEUED, _PAUSED, _CONNECTING, _WAITING, _ANSWERING, _DONE = Phase


class Client(Protocol):
    """The connection that the request came on."""

    @property
    def address(self) -> str: ...
    @property
    def write_paused(self) -> bool: ...
    @property
    def peer(self) -> PeerIdentity | None: ...

    def write(self, data: bytes) -> None: ...
    def answered(self, keep_alive: bool, now: float) -> None:
        """The answer was written; begin the next request or close."""

    def answer_error(self, error: MeshError) -> None:
        """No byte of an answer was written: answer *error*, then go on."""

    def cut_off(self, last_words: bytes) -> None:
        """The answer ends before its end: write *last_words* if any, then close in a way that is not a clean end."""


class Delivery(Relay):
    """See the module. It is the ``Requester`` of its connection."""

    __slots__ = (
        "_body",
        "_crashes",
        "_lease",
        "_peer",
        "_plane",
        "_progress",
        "_retry_timer",
        "_upstream",
        "bytes_in",
        "client",
        "phase",
        "trip",
    )

    def __init__(
        self,
        plane: DataPlane,
        client: Client,
        head: RequestHead,
        body: bytes | memoryview,
        request_id: bytes,
        watched: bool,
    ) -> None:
        super().__init__(head, request_id, client.write, plane.now, watched, to_peer=client.peer is not None)
        self.client: Client | None = client
        self.bytes_in = len(body)
        self.phase = _QUEUED
        self.trip: Trip | None = None  #: set before it starts, in a mesh
        self._plane = plane
        self._body: Body = body  # kept until an answer begins; in parts only if it is larger than one piece
        self._lease: Lease | None = None
        self._peer: PeerLease | None = None  # the lease, if it is a peer's
        self._upstream: UpstreamConnection | None = None
        self._retry_timer: asyncio.TimerHandle | None = None
        self._crashes = 0
        self._progress = NOT_LOOKED  # (bytes, when) of the last look, for the read timeout

    @abstractmethod
    def submit(self) -> None:
        """Ask for an instance, or a peer."""

    @abstractmethod
    def fail(self, error: MeshError) -> None:
        """It cannot be answered, or not to the end."""

    @property
    def wants_connection(self) -> bool:
        return self.phase is _CONNECTING

    def _open(self, pool: Pool) -> None:
        self.phase = _CONNECTING
        if pool.endpoint.alive:
            pool.connect(self)
        else:
            self._try_elsewhere(UpstreamError("the instance is gone"))

    def connected(self, connection: UpstreamConnection) -> None:
        """Send the request."""
        client = self.client
        assert client is not None
        self.phase = _WAITING
        self._upstream = connection
        self._progress = NOT_LOOKED  # the time before is nobody's silence
        connection.requester = self
        if client.write_paused:
            connection.pause_reading()
        pool, head, body = connection.pool, self.request, self._body
        fields = pool.fields if self._peer is None else self._peer.fields
        self.expect(pool, not head.keep_alive or self._plane.ctx.draining)
        length = self.bytes_in
        if 0 < length <= ONE_WRITE_BYTES:
            framing = b"Content-Length: %d\r\nX-Request-Id: " % length
            out = b"".join((head.forward, fields, framing, self.request_id, b"\r\n\r\n", body))  # type: ignore[arg-type]
            self._plane.outbox.write(connection.transport, out)
            return
        framing = b"Content-Length: %d\r\n" % length if length or head.method == b"POST" else b""
        out = b"%b%b%bX-Request-Id: %b\r\n\r\n" % (head.forward, fields, framing, self.request_id)
        if length > ONE_PIECE_BYTES:
            connection.send(out, body)
        elif length:
            # nothing of it is held: what came before was answered
            connection.transport.writelines((out, body))  # type: ignore[arg-type]
        else:
            self._plane.outbox.write(connection.transport, out)

    def connect_failed(self, error: MeshError) -> None:
        self._try_elsewhere(error)

    def answer_begins(self) -> None:
        """From here on the request is not sent again."""
        self.phase = _ANSWERING
        self._body = b""
        connection = self._upstream
        if connection is not None and not connection.reused:
            connection.pool.answers(connection)
        if self._peer is not None:
            self._peer.answered()

    def upstream_lost(self, error: Exception | None) -> None:
        """The connection ended by itself: cleanly (*error* is None) or not."""
        connection, self._upstream = self._upstream, None
        if self.phase is _WAITING:
            assert self._lease is not None
            again = self.client is not None and self._lease.endpoint.alive
            if self._peer is not None and error is not None:
                self._try_elsewhere(_as_peer_error(error))  # not closed for being idle: the peer itself is in trouble
            elif again and connection is not None and connection.reused:  # the next one is new, so this happens once
                self._plane.metrics.upstream_retries_total += 1
                self._open(connection.pool)
            elif self._peer is not None:
                self._try_elsewhere(PeerError(f"node {self._peer.node_id} closed the link before it answered"))
            else:
                self._try_elsewhere(UpstreamError("the instance closed the connection before it answered"))
        elif self.phase is _ANSWERING:
            if self.until_close and error is None and not self._cut_by_us:
                self.answer_complete(reusable=False)
            else:
                self.fail(self._broke_off(error))

    @property
    def _cut_by_us(self) -> bool:
        """Whether this node closed the connections to whoever answers."""
        if self._peer is not None:  # a peer that is no member any more may finish
            return self._peer.endpoint.cut
        return self._lease is None or not self._lease.endpoint.alive

    def _broke_off(self, error: Exception | None) -> MeshError:
        peer = self._peer
        if peer is None:
            return UpstreamError("the instance closed the connection in the middle of its answer")
        self._plane.metrics.peer_stream_body_aborts_total += 1
        text = f"node {peer.node_id} broke off in the middle of its answer"
        if error is None:  # it said goodbye: it is well, perhaps its instance died
            return PeerError(text)
        peer.failed()
        return PeerError(f"{text}: {error}")

    def _try_elsewhere(self, error: MeshError) -> None:
        """The instance is dead or dying: go back to the queue once, with the old place; else give up."""
        peer = self._peer
        if peer is not None and self.trip is not None:
            sent = self.phase is _WAITING
            peer.failed()
            self._end_lease()
            if self.client is None:
                self.fail(error)
            else:
                self.trip.peer_failed(peer.endpoint.peer, error, sent=sent)
            return
        self._crashes += 1
        if self.client is None or self._crashes > 1 or self._lease is None:
            self._end_lease()
            if self.client is None or self.trip is None or not self.trip.refused_here(error, waited=False):
                self.fail(error)
            return
        self._plane.metrics.upstream_retries_total += 1
        self.phase = _PAUSED
        # the lease is kept until then, so that its place is not given to a request that would meet the same
        delay_s = CRASH_NOTICE_S if self._lease.endpoint.alive else 0.0
        self._retry_timer = self._plane.loop.call_later(delay_s, self._resubmit)

    def _resubmit(self) -> None:
        self._retry_timer = None
        self._end_lease()
        self.submit()

    def _end_lease(self) -> None:
        lease, self._lease, self._peer = self._lease, None, None
        if lease is not None:
            lease.release()

    def answer_refused(self, head: ResponseHead, body: bytes, whole: bool) -> None:
        connection, self._upstream, peer = self._upstream, None, self._peer
        assert connection is not None
        assert peer is not None
        assert self.trip is not None
        if whole and not head.closes:
            connection.pool.give(connection, self._now())
        else:
            connection.abort()
        peer.answered()
        peer.refused(head.refusal or "")
        self._end_lease()
        self.trip.peer_refused(peer.endpoint.peer, head.status, head.refusal or "", body if whole else b"")


def _as_peer_error(error: Exception) -> MeshError:
    return error if isinstance(error, MeshError) else PeerError(f"the link broke: {error}")
