"""A request's way over several nodes: where it goes first, and where next when it was refused or cut off.

``Forwarder`` is the node's, made only in a mesh; ``Trip`` is one request's. The trip chooses, the exchange carries.

Rules: what came from a peer is served here unless that is impossible. Nobody is sent the same generation twice. Who
is full, or could not even be reached, may be asked again after a pause. Nothing goes on beyond the profile's
``max_wait_in_queue_ms``, in which only waiting counts: time in queues, pauses, refusals; not the work of a peer that
was lost. The client sees the refusal of its own node if that was asked, else the last one (trap 59).
"""

from __future__ import annotations

import random
from itertools import count
from math import inf
from typing import TYPE_CHECKING, Protocol

import msgspec

from mesh.api.http1 import MeshFields
from mesh.api.peer_pool import Dial, PeerEndpoint, PeerLease
from mesh.api.responses import internal_error
from mesh.api.waiting_line import WaitingLine
from mesh.core.node_state import PeerIdentity, PeerKey
from mesh.core.routing import Ranked
from mesh.errors import (
    CapacityError,
    DrainingError,
    MeshError,
    NoNodeError,
    PeerError,
    PeerRefusalError,
    QueueFullError,
    QueueTimeoutError,
    UnknownModelError,
)
from mesh.logs import Log
from mesh.net.peer import FULL, Peer
from mesh.net.peers import Peers

if TYPE_CHECKING:
    from mesh.api.exchange import Exchange
    from mesh.config.profile import Profile

_log = Log(__name__)

#: Holders that are compared, warm ones and as many others: of a thousand a sample is as good, and takes a hundredth of
#: the time.
_COMPARED = 16
#: Refusals after an instance worked on it: that time was no waiting.
_WORKED = frozenset({"upstream_error", "processing_failed"})
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


class Forwarder:
    """What all trips of the node share."""

    def __init__(self, peers: Peers, local: Local, *, node_id: str, dial: Dial, max_hops: int) -> None:
        self.peers = peers
        self.local = local
        self.max_hops = max_hops
        self.lines: dict[str, WaitingLine] = {}  #: requests that wait for some node to have room, by profile
        self.places = count()  #: in all of them
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

    def line(self, key: str) -> WaitingLine:
        """Return the line of requests for *key* that no node can take now."""
        line = self.lines.get(key)
        if line is None:
            line = self.lines[key] = WaitingLine(lambda: self._emptied(key))
        return line

    def waiting(self, key: str) -> int:
        """Return how many wait in that line."""
        line = self.lines.get(key)
        return 0 if line is None else len(line)

    def _emptied(self, key: str) -> None:
        self.lines.pop(key, None)

    def find(self, name: str) -> Profile | None:
        """Return a stand-in for the profile that peers know by *name*, None if nobody does."""
        return self.peers.profile(name)

    def _gone(self, peer: Peer) -> None:
        """*peer* is no member any more; what it still sends is not cut off for that."""
        endpoint = self._endpoints.pop(peer.key, None)
        if endpoint is not None:
            endpoint.retire()

    def close(self) -> None:
        """Cut every link."""
        for endpoint in tuple(self._endpoints.values()):
            endpoint.close()
        self._endpoints.clear()


class Trip:
    """See the module. Whatever it does ends in exactly one call of the exchange. It may wait in a ``WaitingLine``."""

    __slots__ = ("_asked", "_busy", "_error", "_exchange", "_forwarder", "_hops", "_joined_at", "_line", "_sender",
                 "_wait_s", "place")  # fmt: skip

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
        self._line: WaitingLine | None = None  # while it waits there
        self._joined_at: float | None = None
        self.place = -1  #: in the line, from its first time there to its end

    def go(self) -> None:
        """Give the request to whoever should serve it next."""
        try:
            self._go()
        except Exception:
            request_id = self._exchange.request_id.decode("latin-1")
            _log.exception("a request failed unexpectedly", request_id=request_id)
            self._exchange.fail(internal_error())

    def _go(self) -> None:
        exchange, key = self._exchange, self._exchange.profile.key
        over = exchange.client is None or (self._wait_s is not None and self._wait_s <= 0)
        if self._error is not None and over:
            exchange.fail(self._error)
            return
        peer, here = self._choose(key)
        if here:
            exchange.queue_here(self._wait_s)
        elif peer is None:
            self._nobody_left(key)
        elif self._joined_at is None and self._sender is None and self._forwarder.waiting(key):
            self._nobody_left(key)  # others wait for the same, and were here before
        else:
            exchange.ask_peer(self._forwarder.lease(peer, key, self._hops + 1, self._wait_s))

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
        """Return whom to compare: those that may be asked, of very many a sample."""
        if self._hops >= self._forwarder.max_hops or (self._sender is not None and self._error is not None):
            return []  # what was passed on to us and refused goes back to who passed it on
        holders = self._forwarder.peers.holders(key)
        peers = [peer for peer in holders if peer.key not in out and peer.key != self._sender]
        if len(peers) <= 2 * _COMPARED:
            return peers
        open_to = [peer for peer in peers if peer.in_the_way(key) is None]
        warm = [peer for peer in open_to if peer.profiles[key].ready]
        cold = [peer for peer in open_to if not peer.profiles[key].ready]
        return [*_sample(warm), *_sample(cold)]

    def _nobody_left(self, key: str) -> None:
        """Wait for somebody to have room, if anybody may and there is time; else give up."""
        exchange, forwarder = self._exchange, self._forwarder
        patient = self._wait_s is None or self._wait_s > 0
        hopeful = bool(self._busy - {_HERE}) or forwarder.peers.may_come(key, self._asked)
        if self._sender is not None or self._hops >= forwarder.max_hops or not (patient and hopeful):
            exchange.fail(self._error or self._no_node(key))
            return
        again = self._joined_at is not None
        if not again:
            if (limit := exchange.profile.max_queue) and forwarder.waiting(key) >= limit:
                exchange.fail(self._error or _too_many(limit, exchange.profile))
                return
            self.place = next(forwarder.places)
        self._joined_at = exchange.wait_in_line()
        self._line = forwarder.line(key)
        self._line.join(self, again=again)

    @property
    def ends_at(self) -> float:
        """When its wait in the line is over."""
        return inf if self._wait_s is None or self._joined_at is None else self._joined_at + self._wait_s

    def retry(self) -> None:
        """Its turn has come: try everybody again who was full or out of reach."""
        self._line = None
        self.waited(self._exchange.waited_s)
        self._busy.clear()
        self.go()

    def expired(self) -> None:
        """Nobody had room in time."""
        self._line = None
        self._exchange.fail(self._error or self._no_node(self._exchange.profile.key))

    def cancel(self) -> None:
        """The request is over. Idempotent."""
        line, self._line = self._line, None
        if line is not None:
            line.leave(self)

    def _no_node(self, key: str) -> MeshError:
        profile, local = self._exchange.profile, self._forwarder.local
        name = profile.id
        drained = bool(profile.max_instances) and not local.serves(key)
        if self._sender is not None:
            if drained:
                return DrainingError(f"this node is drained; it serves '{name}' no more")
            return UnknownModelError(f"Model '{name}' is not on this node", param="model")
        known = self._forwarder.peers.who_has(key)
        if not known and drained:
            return DrainingError(f"this node is drained, and no other one has '{name}'")
        if not known and not profile.max_instances and self._forwarder.peers.profile(key) is None:
            return UnknownModelError(f"Model '{name}' not found in local cookbook or any peer", param="model")
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
        (self._busy if error.type in FULL else self._asked).add(_HERE)
        self.go()
        return True

    def peer_failed(self, peer: Peer, error: MeshError, *, sent: bool) -> None:
        """*peer* could not be reached, or was lost after the request was *sent*."""
        (self._asked if sent else self._busy).add(peer.key)
        if not sent:  # to its client it is as if nobody had the model (trap 62)
            self.waited(self._exchange.waited_s)
            error = NoNodeError(f"no node that has '{self._exchange.profile.id}' can be reached: {error.message}")
        if self._error is None:
            self._error = error
        self.go()

    def peer_refused(self, peer: Peer, status: int, kind: str, body: bytes) -> None:
        """*peer* said no: as *kind* tells, for now or for good."""
        error = _refusal(status, kind, body, peer.node_id)
        if self._error is None or isinstance(self._error, _OF_PEERS):
            self._error = error
        if kind == "request_timeout" and status != 408:  # max_request_duration_ms: it would be the same elsewhere
            self._exchange.fail(error)
            return
        (self._busy if kind in FULL else self._asked).add(peer.key)
        if kind not in _WORKED:
            self.waited(self._exchange.waited_s)
        self.go()


def _sample(peers: list[Peer]) -> list[Peer]:
    return peers if len(peers) <= _COMPARED else random.sample(peers, _COMPARED)


def _too_many(limit: int, profile: Profile) -> MeshError:
    text = f"Queue full: {limit} requests already wait for some node to have room for '{profile.id}' (max_queue_size)"
    return QueueFullError(text)


def _refusal(status: int, kind: str, body: bytes, node_id: str) -> PeerRefusalError:
    """Return a peer's refusal in its own words, with its name."""
    try:
        message = str(msgspec.json.decode(body)["error"]["message"])
    except (msgspec.MsgspecError, UnicodeDecodeError, LookupError, TypeError, RecursionError):
        message = kind.replace("_", " ")
    status = status if status in (400, 404, 408, 413, 431, 500, 502, 503, 504, 507) else 502
    retry_after_s = CapacityError("").retry_after_s if status == 503 else None
    return PeerRefusalError(f"node {node_id}: {message}", status=status, type=kind, retry_after_s=retry_after_s)
