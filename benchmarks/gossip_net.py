"""Many membership cores in one process, on a clock of their own: ``benchmarks.gossip`` and core tests run on it.

Messages are really encoded and decoded, so every byte is counted; only signatures are mere hashes. A message may be
lost (its sender then waits for ``timeout_s``), late, or come twice; nodes crash, restart, are cut off, and have clocks
that are wrong and drift. Everything follows from one seed.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from random import Random

from mesh.core.gossip_message import Message, decode_message, encode_message, opened
from mesh.core.gossip_record import SIGNATURE_BYTES, Record
from mesh.core.membership import Change, Kind, Membership, Order, Status, Tuning
from mesh.core.node_state import PeerKey

#: HTTP/1.1 head and Noise framing around a message, each way.
ENVELOPE_BYTES = 180
_CONTACT_RETRY_S = 2.0
_FAREWELLS = 8


@dataclass(slots=True)
class Traffic:
    messages: int = 0
    bytes: int = 0


@dataclass(slots=True, eq=False)
class Node:
    """A core with its clock, which runs *rate* times as fast as the network's and began at *skew*."""

    key: PeerKey
    core: Membership
    contacts: Sequence[PeerKey]
    skew: float = 0.0
    rate: float = 1.0
    up: bool = True
    largest: int = 0  #: message, in bytes
    wake_at: float = -1.0  #: in network time; a wake-up that does not match is out of date
    events: list[tuple[float, Change, PeerKey]] = field(default_factory=list)
    record_events: bool = True


class Network:
    def __init__(
        self,
        seed: int,
        *,
        loss: float = 0.0,
        duplicate: float = 0.0,
        latency_s: tuple[float, float] = (0.002, 0.02),
        timeout_s: float = 3.0,
        tuning: Tuning | None = None,
    ) -> None:
        self.random = Random(seed)
        self.now = 0.0
        self.loss = loss
        self.duplicate = duplicate
        self.latency_s = latency_s
        self.timeout_s = timeout_s
        self.tuning = tuning or Tuning()
        self.nodes: dict[PeerKey, Node] = {}
        self.traffic = Traffic()
        self.connected: Callable[[PeerKey, PeerKey], bool] = lambda a, b: True  #: may be one way only
        self.on_event: Callable[[Node, Change, PeerKey], None] = lambda node, change, key: None
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self._known: dict[bytes, Record] = {}

    # --- nodes

    def start(
        self,
        key: PeerKey,
        *,
        contacts: Sequence[PeerKey] = (),
        payload: bytes = b"state",
        incarnation: int = 1,
        skew: float = 0.0,
        rate: float = 1.0,
    ) -> Node:
        """Start the node *key*, or start it again with nothing but its key."""
        core = Membership(
            key,
            incarnation=incarnation,
            sign=lambda message: blake2b(message, digest_size=SIGNATURE_BYTES).digest(),
            random=self.random.random,
            now=self.now * rate + skew,
            payload=payload,
            tuning=self.tuning,
        )
        node = Node(key, core, contacts, skew, rate)
        self.nodes[key] = node
        for contact in contacts:
            self._call(self.now, self._contact(node, contact))
        self._pump(node)
        return node

    def crash(self, key: PeerKey) -> None:
        self.nodes[key].up = False

    def leave(self, key: PeerKey) -> None:
        """Say goodbye to a few, and be gone half a second later."""
        node = self.nodes[key]
        node.core.leave()
        for order in node.core.farewell(_FAREWELLS, self.local(node)):
            self._exchange(node, order, order.key)
        self._call(self.now + 0.5, lambda: setattr(node, "up", False))

    def publish(self, key: PeerKey, payload: bytes, *, urgent: bool = False) -> None:
        self.nodes[key].core.publish(payload, urgent=urgent)
        self._pump(self.nodes[key])

    def live(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.up]

    def local(self, node: Node) -> float:
        return self.now * node.rate + node.skew

    # --- time

    def run(self, seconds: float, until: Callable[[], bool] | None = None, every_s: float = 0.25) -> bool:
        """Let time pass; stop early once *until* holds (looked at every *every_s*). Return whether it did."""
        end, look_at = self.now + seconds, self.now
        while self._queue and self._queue[0][0] <= end:
            at, _, action = heapq.heappop(self._queue)
            while until is not None and look_at <= at:
                self.now = max(self.now, look_at)
                if until():
                    heapq.heappush(self._queue, (at, -1, action))
                    return True
                look_at += every_s
            self.now = max(self.now, at)
            action()
        self.now = end
        return until is not None and until()

    def _call(self, at: float, action: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._queue, (at, self._sequence, action))

    # --- a node's shell

    def _pump(self, node: Node) -> None:
        """Do what is due at *node* and come back when it next has something to do."""
        if not node.up:
            return
        for order in node.core.due(self.local(node)):
            self._exchange(node, order, order.key)
        for event in node.core.take_events():
            if node.record_events:
                node.events.append((self.now, event.change, event.record.key))
            self.on_event(node, event.change, event.record.key)
        at = max((node.core.next_deadline() - node.skew) / node.rate, self.now + 1e-6)
        if node.wake_at <= self.now or at < node.wake_at:
            node.wake_at = at
            self._call(at, lambda: self._wake(node, at))

    def _wake(self, node: Node, at: float) -> None:
        if node.wake_at == at:
            node.wake_at = -1.0
            self._pump(node)

    def _contact(self, node: Node, contact: PeerKey) -> Callable[[], None]:
        def try_it() -> None:
            if not node.up or self.nodes.get(node.key) is not node:
                return
            view = node.core.view(contact)
            if view is None or view.status is Status.DEAD:
                self._exchange(node, node.core.contact(self.local(node)), contact)
            self._call(self.now + _CONTACT_RETRY_S * (0.5 + self.random.random()), try_it)

        return try_it

    # --- an exchange

    def _exchange(self, node: Node, order: Order, target: PeerKey | None) -> None:
        assert target is not None

        def failed() -> None:
            node.core.failed(order, self.local(node))
            self._pump(node)

        def answered(message: Message) -> None:
            follow_up = node.core.answered(order, target, message, self._records(node, message), self.local(node))
            if follow_up is not None:
                self._request(node, target, follow_up, concluded, lambda: None)
            self._pump(node)

        def concluded(message: Message) -> None:
            node.core.concluded(target, message, self._records(node, message), self.local(node))
            self._pump(node)

        self._request(node, target, node.core.request(order), answered, failed)

    def _request(
        self,
        node: Node,
        target: PeerKey,
        message: Message,
        answered: Callable[[Message], None],
        failed: Callable[[], None],
    ) -> None:
        settled = False

        def settle(action: Callable[[], None]) -> None:
            nonlocal settled
            if not settled and node.up:
                settled = True
                action()

        def arrive(data: bytes) -> None:
            other = self.nodes.get(target)
            if other is None or not other.up or not self.connected(node.key, target):
                return
            request = decode_message(data)
            answer = other.core.receive(node.key, request, self._records(other, request), self.local(other))
            self._pump(other)
            if self.connected(target, node.key):
                self._send(other, answer, lambda back: settle(lambda: answered(decode_message(back))))

        self._send(node, message, arrive)
        self._call(self.now + self.timeout_s, lambda: settle(failed))

    def _send(self, node: Node, message: Message, deliver: Callable[[bytes], None]) -> None:
        data = encode_message(message)
        node.largest = max(node.largest, len(data))
        self.traffic.messages += 1
        self.traffic.bytes += len(data) + ENVELOPE_BYTES
        for _ in range(2 if self.random.random() < self.duplicate else 1):
            if self.random.random() >= self.loss:
                self._call(self.now + self.random.uniform(*self.latency_s), lambda: deliver(data))

    def _records(self, node: Node, message: Message) -> list[tuple[Record, int]]:
        """Return the records; one object for all nodes that hold the same, or a big mesh would fill the memory."""
        return [(self._known.setdefault(record.body, record), heat) for record, heat in opened(message)]


def make_key(number: int) -> PeerKey:
    """Return a key as evenly spread as real ones are."""
    return PeerKey(Random(number).randbytes(32))


__all__ = ["Change", "Kind", "Network", "Node", "Status", "make_key"]
