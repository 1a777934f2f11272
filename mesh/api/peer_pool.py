"""A peer as an upstream: the right to ask it, and the links to it that carry requests.

A peer is leased like an instance, and its pool holds links instead of sockets to a child. Knows how to reach one peer;
who is asked, and what its refusals lead to, is ``forwarding``'s.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import ClassVar, Protocol
from urllib.parse import quote

from mesh.api.upstream import Pool, Requester, UpstreamConnection
from mesh.errors import MeshError, PeerError
from mesh.net.peer import Peer

#: Links to one peer that stay open without a request, and for how long; its own limit is http.idle_timeout_seconds.
KEPT_LINKS = 256
LINK_IDLE_S = 25.0
_KNOWN_FIELDS = 64
_DIALS_AT_ONCE = 16  # to one peer


class PeerLease:
    """The right to use a peer for one request: counted from the decision until it ends (trap 50)."""

    __slots__ = ("_key", "_open", "_permit", "_stamp", "endpoint", "fields")

    def __init__(self, endpoint: PeerEndpoint, key: str, fields: bytes) -> None:
        self.endpoint = endpoint
        self.fields = fields  #: what this request carries to the peer
        self._key = key
        self._permit = endpoint.peer.begin(key)
        self._stamp = endpoint.peer.stamp
        self._open = True

    @property
    def node_id(self) -> str:
        return self.endpoint.peer.node_id

    def answered(self) -> None:
        """It answers, whatever it says: saturation is not a failure."""
        self.endpoint.peer.succeeded(self._permit)

    def failed(self) -> None:
        """It could not be reached, or was lost."""
        self.endpoint.peer.failed(self._permit)

    def refused(self, kind: str) -> None:
        """It said no; a newer record of it than the one that led there knows better (trap 61)."""
        self.endpoint.peer.corrected(self._key, kind, self._stamp)

    def release(self) -> None:
        if self._open:
            self._open = False
            self.endpoint.peer.end(self._key, self._permit)

    def abandon(self, *, streaming: bool = False) -> None:
        """The link was cut, so that the peer ends its part; what that frees is for its own record to say."""
        self.release()


class PeerEndpoint:
    """A peer as something to connect to. Lives as long as the peer is a member."""

    def __init__(self, peer: Peer, node_id: str, dial: Dial) -> None:
        self.peer = peer
        self.instance_id = f"@{peer.node_id}"
        self.alive = True
        self.cut = False  #: its links were closed by this node
        self.closers: list[Callable[[], None]] = []
        self.pool = PeerPool(self, node_id, dial)

    def retire(self) -> None:
        """Open no new links, close those that idle; those in use end by themselves, or by their silence."""
        self.alive = False
        for connection in tuple(self.pool.idle):
            connection.abort()

    def close(self) -> None:
        """Refuse new connections and close the open ones. Idempotent."""
        self.alive, self.cut = False, True
        while self.closers:
            self.closers.pop()()


class Dial(Protocol):
    """Opens a link to a peer with *factory*'s protocol on it; raises ``PeerError``."""

    async def __call__(self, peer: Peer, factory: Callable[[], UpstreamConnection]) -> UpstreamConnection: ...


class PeerPool(Pool):
    """The links to one peer that carry requests."""

    of_peer: ClassVar[bool] = True
    idle_limit_s: ClassVar[float] = LINK_IDLE_S
    kept_idle: ClassVar[int] = KEPT_LINKS

    __slots__ = ("_dial", "_dialing", "_fields", "_peer", "_waiting")

    def __init__(self, endpoint: PeerEndpoint, node_id: str, dial: Dial) -> None:
        host = f"Host: {quote(endpoint.peer.node_id)}\r\n".encode("ascii")
        super().__init__(endpoint, host, f"X-Llama-Mesh-Via: {node_id}\r\n".encode("latin-1", "replace"))
        self._peer = endpoint.peer
        self._dial = dial
        self._dialing = 0
        self._waiting: deque[Requester] = deque()
        self._fields: dict[tuple[str, int, float | None], bytes] = {}  # few: a wait is a whole one, or a retry

    def fields_for(self, key: str, hops: int, wait_s: float | None) -> bytes:
        """Return what a request for the profile *key* carries, its *hops* so far and the rest of its wait."""
        fields = self._fields.get((key, hops, wait_s))
        if fields is None:
            wait = b"" if wait_s is None else b"X-Llama-Mesh-Wait-Ms: %d\r\n" % max(0, wait_s * 1000)
            model = quote(key, safe=":/ ").encode("ascii")
            fields = b"%bX-Llama-Mesh-Hops: %d\r\nX-Llama-Mesh-Model: %b\r\n%b" % (self.fields, hops, model, wait)
            if len(self._fields) >= _KNOWN_FIELDS:
                self._fields.clear()
            self._fields[key, hops, wait_s] = fields
        return fields

    def connect(self, requester: Requester) -> None:
        """Open a link for *requester*, or give it the next one that is free: few handshakes at once are enough.

        Whoever waits for one waits for a dial that is under way: its end, whatever that is, goes on with the next.
        """
        if self._dialing < _DIALS_AT_ONCE:
            self._dialing += 1
            super().connect(requester)
        else:
            self._waiting.append(requester)

    def give(self, connection: UpstreamConnection, now: float) -> None:
        requester = self._next() if self.endpoint.alive and not connection.transport.is_closing() else None
        if requester is None:
            super().give(connection, now)
            return
        if connection.paused:
            connection.resume_reading()
        connection.reused = True
        requester.connected(connection)

    def _next(self) -> Requester | None:
        """Return the first that still waits for a link."""
        while self._waiting:
            requester = self._waiting.popleft()
            if requester.wants_connection:
                return requester
        return None

    def _turn_away(self, error: MeshError) -> None:
        """No link is to be had: tell everybody who waits for one; each would find out the same, after seconds."""
        while (waiting := self._next()) is not None:
            waiting.connect_failed(error)

    async def _open(self) -> UpstreamConnection:
        try:
            connection = await self._dial(self._peer, lambda: UpstreamConnection(self))
        except MeshError as error:
            self._turn_away(error)
            raise
        except Exception:  # a bug; those who wait depend on somebody's dial to end
            self._turn_away(PeerError(f"cannot connect to node {self._peer.node_id}"))
            raise
        finally:
            self._dialing -= 1
        if not self.endpoint.alive:
            self._turn_away(PeerError(f"node {self._peer.node_id} is gone"))
        elif (waiting := self._next()) is not None:
            self.connect(waiting)
        return connection
