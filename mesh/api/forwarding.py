"""A request's way over several nodes: where it goes first, and where next when it was refused or cut off.

``Forwarder`` is the node's, made only in a mesh; ``Trip`` is one request's. The trip chooses, the exchange carries: a
peer is leased (``PeerLease``) like an instance, and its ``PeerPool`` holds links instead of sockets to a child.

Rules: what came from a peer is served here unless that is impossible. Nobody is sent the same generation twice. Who
is full, or could not even be reached, may be asked again after a pause. Nothing goes on beyond the profile's
``max_wait_in_queue_ms``, in which only waiting counts: time in queues, pauses, refusals; not the work of a peer that
was lost. The client sees the refusal of its own node if that was asked, else the last one (trap 59).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Protocol
from urllib.parse import quote

import msgspec

from mesh.api.http1 import MeshFields
from mesh.api.upstream import Pool, UpstreamConnection
from mesh.core.node_state import PeerIdentity, PeerKey
from mesh.core.routing import Ranked
from mesh.errors import (
    CapacityError,
    DrainingError,
    MeshError,
    NoNodeError,
    PeerError,
    PeerRefusalError,
    QueueTimeoutError,
    UnknownModelError,
)
from mesh.net.peer import Peer
from mesh.net.peers import Peers

if TYPE_CHECKING:
    from mesh.api.exchange import Exchange
    from mesh.config.profile import Profile

#: Between two rounds of asking everybody; doubles up to the second.
FIRST_PAUSE_S = 0.1
LAST_PAUSE_S = 1.0
#: Links to one peer that stay open without a request, and for how long; its own limit is http.idle_timeout_seconds.
KEPT_LINKS = 32
LINK_IDLE_S = 25.0
_KNOWN_FIELDS = 64
#: Refusals that pass: who says so may be asked again. Any other one stands.
_FULL = frozenset({"queue_full", "no_capacity"})
#: What peers say or leave unsaid: the last refusal counts for more than any of these.
_OF_PEERS = (PeerRefusalError, PeerError, NoNodeError)
_HERE = PeerKey(b"")  #: stands for this node among those that were asked


class Local(Protocol):
    """What a trip needs to know of its own node."""

    def serves(self, key: str) -> bool:
        """Whether this node may take new work for the profile: it is in the cookbook, and the node is not drained."""

    def rank(self, exchange: Exchange, peers: list[Peer], *, here: bool) -> tuple[Ranked, ...]:
        """Return who would serve the request soonest, this node among them if it may (*here*)."""

    def good_enough(self, key: str, peers: list[Peer]) -> bool:
        """Whether this node is idle and warm, and none of *peers* is much faster: nothing to compare."""


class PeerLease:
    """The right to use a peer for one request: counted from the decision until it ends (trap 50)."""

    __slots__ = ("_key", "_open", "_permit", "endpoint", "fields")

    def __init__(self, endpoint: PeerEndpoint, key: str, fields: bytes) -> None:
        self.endpoint = endpoint
        self.fields = fields  #: what this request carries to the peer
        self._key = key
        self._permit = endpoint.peer.begin(key)
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
        self.closers: list[Callable[[], None]] = []
        self.pool = PeerPool(self, node_id, dial)

    def close(self) -> None:
        """Refuse new connections and close the open ones. Idempotent."""
        self.alive = False
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

    __slots__ = ("_dial", "_fields", "_peer")

    def __init__(self, endpoint: PeerEndpoint, node_id: str, dial: Dial) -> None:
        host = f"Host: {quote(endpoint.peer.node_id)}\r\n".encode("ascii")
        super().__init__(endpoint, host, f"X-Llama-Mesh-Via: {node_id}\r\n".encode("latin-1", "replace"))
        self._peer = endpoint.peer
        self._dial = dial
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

    async def _open(self) -> UpstreamConnection:
        return await self._dial(self._peer, lambda: UpstreamConnection(self))


class Forwarder:
    """What all trips of the node share."""

    def __init__(self, peers: Peers, local: Local, *, node_id: str, dial: Dial, max_hops: int) -> None:
        self.peers = peers
        self.local = local
        self.max_hops = max_hops
        self.paused: Counter[str] = Counter()  #: requests that wait for some node to have room, by profile
        self._node_id = node_id
        self._dial = dial
        self._endpoints: dict[PeerKey, PeerEndpoint] = {}
        peers.on_gone = self._gone

    def trip(self, exchange: Exchange, sender: PeerIdentity | None, said: MeshFields | None) -> Trip:
        """Return the trip of a request that *sender* passed on with what it *said*, or that a client sent (None)."""
        wait_s = exchange.profile.max_wait_s
        if sender is not None and said is not None and said.wait_s is not None:
            wait_s = said.wait_s if wait_s is None else min(wait_s, said.wait_s)
        return Trip(self, exchange, None if sender is None else sender.key, 0 if said is None else said.hops, wait_s)

    def lease(self, peer: Peer, key: str, hops: int, wait_s: float | None) -> PeerLease:
        """Count a request for *peer* from now on."""
        endpoint = self._endpoints.get(peer.key)
        if endpoint is None:
            endpoint = self._endpoints[peer.key] = PeerEndpoint(peer, self._node_id, self._dial)
        return PeerLease(endpoint, key, endpoint.pool.fields_for(key, hops, wait_s))

    def find(self, name: str) -> Profile | None:
        """Return a stand-in for the profile that peers know by *name*, None if nobody does."""
        return self.peers.profile(name)

    def _gone(self, peer: Peer) -> None:
        endpoint = self._endpoints.pop(peer.key, None)
        if endpoint is not None:
            endpoint.close()

    def close(self) -> None:
        """Cut every link."""
        for endpoint in tuple(self._endpoints.values()):
            endpoint.close()
        self._endpoints.clear()


class Trip:
    """See the module. Whatever it does ends in exactly one call of the exchange."""

    __slots__ = ("_asked", "_busy", "_error", "_exchange", "_forwarder", "_hops", "_pause_s", "_paused", "_sender",
                 "_wait_s")  # fmt: skip

    def __init__(
        self, forwarder: Forwarder, exchange: Exchange, sender: PeerKey | None, hops: int, wait_s: float | None
    ) -> None:
        self._forwarder = forwarder
        self._exchange = exchange
        self._sender = sender
        self._hops = hops
        self._wait_s = wait_s  # what is left of the wait; None = for ever
        self._asked: set[PeerKey] = set()  # not again
        self._busy: set[PeerKey] = set()  # after a pause
        self._error: MeshError | None = None
        self._pause_s = FIRST_PAUSE_S
        self._paused: str | None = None  # the profile, during a pause

    def go(self) -> None:
        """Give the request to whoever should serve it next."""
        exchange, key = self._exchange, self._exchange.profile.key
        over = exchange.client is None or (self._wait_s is not None and self._wait_s <= 0)
        if self._error is not None and over:
            exchange.fail(self._error)
            return
        peer, here = self._choose(key)
        if here:
            exchange.queue_here(self._wait_s)
        elif peer is not None:
            exchange.ask_peer(self._forwarder.lease(peer, key, self._hops + 1, self._wait_s))
        else:
            self._nobody_left(key)

    def _choose(self, key: str) -> tuple[Peer | None, bool]:
        """Return the peer to ask, or whether this node should serve it; neither if nobody is left."""
        local, out = self._forwarder.local, self._asked | self._busy
        here = _HERE not in out and local.serves(key)
        if here and self._sender is not None:
            return None, True
        peers = self._peers(key, out)
        if not peers or (here and local.good_enough(key, peers)):
            return None, here
        if not here and len(peers) == 1:  # nothing to compare
            return (peers[0] if peers[0].in_the_way(key) is None else None), False
        for ranked in local.rank(self._exchange, peers, here=here):
            if ranked.excluded is None:
                chosen = ranked.candidate
                return next((peer for peer in peers if peer.key == chosen.key), None), chosen.local
        return None, here

    def _peers(self, key: str, out: set[PeerKey]) -> list[Peer]:
        if self._hops >= self._forwarder.max_hops or (self._sender is not None and self._error is not None):
            return []  # what was passed on to us and refused goes back to who passed it on
        holders = self._forwarder.peers.holders(key)
        return [peer for peer in holders if peer.key not in out and peer.key != self._sender]

    def _nobody_left(self, key: str) -> None:
        """Wait for somebody to have room, if anybody may and there is time; else give up."""
        exchange, forwarder = self._exchange, self._forwarder
        limit = exchange.profile.max_queue
        delay_s = self._pause_s * random.uniform(0.5, 1.0)
        patient = self._wait_s is None or self._wait_s > delay_s
        hopeful = bool(self._busy - {_HERE}) or forwarder.peers.may_come(key, self._asked)
        if self._sender is not None or not (patient and hopeful) or (limit and forwarder.paused[key] >= limit):
            exchange.fail(self._error or self._no_node(key))
            return
        self._pause_s = min(2 * self._pause_s, LAST_PAUSE_S)
        forwarder.paused[key] += 1
        self._paused = key
        exchange.pause_for(delay_s, lambda: self._again(delay_s))

    def _again(self, delay_s: float) -> None:
        self.cancel()
        self.waited(delay_s)
        self._busy.clear()
        self.go()

    def cancel(self) -> None:
        """Its pause is over, or the request is. Idempotent."""
        key, self._paused = self._paused, None
        if key is not None:
            self._forwarder.paused[key] -= 1
            if not self._forwarder.paused[key]:
                del self._forwarder.paused[key]

    def _no_node(self, key: str) -> MeshError:
        profile = self._exchange.profile
        name = profile.id
        if self._sender is not None:
            return UnknownModelError(f"Model '{name}' is not on this node", param="model")
        known = self._forwarder.peers.who_has(key)
        if not known and profile.max_instances and not self._forwarder.local.serves(key):
            return DrainingError(f"this node is drained, and no other one has '{name}'")
        return NoNodeError(f"no node that has '{name}' can serve it now: {'; '.join(known) or 'all of them are gone'}")

    def waited(self, seconds: float) -> None:
        """It has waited so long, here or there, and has the less time for the next one."""
        if self._wait_s is not None:
            self._wait_s -= seconds

    # --- what the exchange tells

    def refused_here(self, error: MeshError, *, waited: bool = True) -> bool:
        """This node cannot serve it, or its instances died: go on, or return False if *error* is the answer.

        Time that an instance worked on it (not *waited*) is not held against it.
        """
        self._error = error
        if self._sender is not None or isinstance(error, QueueTimeoutError):
            return False
        if waited:
            self.waited(self._exchange.waited_s)
        (self._busy if error.type in _FULL else self._asked).add(_HERE)
        self.go()
        return True

    def peer_failed(self, peer: Peer, error: MeshError, *, sent: bool) -> None:
        """*peer* could not be reached, or was lost after the request was *sent*."""
        (self._asked if sent else self._busy).add(peer.key)
        if not sent:  # to its client it is as if nobody had the model (trap 62)
            error = NoNodeError(f"no node that has '{self._exchange.profile.id}' can be reached: {error.message}")
        if self._error is None:
            self._error = error
        self.go()

    def peer_refused(self, peer: Peer, status: int, kind: str, body: bytes) -> None:
        """*peer* said no: as *kind* tells, for now or for good."""
        peer.corrected(self._exchange.profile.key, kind)  # trap 61
        error = _refusal(status, kind, body, peer.node_id)
        if self._error is None or isinstance(self._error, _OF_PEERS):
            self._error = error
        (self._busy if kind in _FULL else self._asked).add(peer.key)
        self.waited(self._exchange.waited_s)
        self.go()


def _refusal(status: int, kind: str, body: bytes, node_id: str) -> PeerRefusalError:
    """Return a peer's refusal in its own words, with its name."""
    try:
        message = str(msgspec.json.decode(body)["error"]["message"])
    except (msgspec.MsgspecError, UnicodeDecodeError, LookupError, TypeError):
        message = kind.replace("_", " ")
    status = status if status in (400, 404, 500, 502, 503, 504) else 502
    retry_after_s = CapacityError("").retry_after_s if status == 503 else None
    return PeerRefusalError(f"node {node_id}: {message}", status=status, type=kind, retry_after_s=retry_after_s)
