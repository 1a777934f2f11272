"""Gossip shells in one event loop, on a network of function calls: seeded loss, delay, duplicates, cuts, restarts.

Keys and signatures are real. Time is looptime's, so minutes cost nothing. (Many bare cores with clocks of their own run
on ``benchmarks.gossip_net``.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mesh.core.membership import Change, MemberView, Status
from mesh.core.node_state import NodeState, PeerIdentity, PeerKey, encode_state
from mesh.errors import PeerError
from mesh.net.gossip import Gossip, Target
from mesh.net.keys import verify
from mesh.tasks import spawn

TIMEOUT_S = 3.0


class FakeIdentity:
    """An Ed25519 key that is the same for the same name."""

    rotation: bytes | None = None

    def __init__(self, name: str) -> None:
        self._private = Ed25519PrivateKey.from_private_bytes(Random(name).randbytes(32))
        self.key = PeerKey(self._private.public_key().public_bytes_raw())

    def sign(self, message: bytes) -> bytes:
        return self._private.sign(message)


@dataclass(eq=False)
class MemoryNode:
    name: str
    identity: FakeIdentity
    address: str
    gossip: Gossip
    contacts: list[str]
    state: NodeState
    up: bool = True
    running: asyncio.Task[None] | None = None
    changes: list[tuple[Change, str]] = field(default_factory=list)
    refuses: set[str] = field(default_factory=set)  #: node ids that it does not trust
    revoked: set[PeerKey] = field(default_factory=set)
    dialled: list[str] = field(default_factory=list)

    @property
    def key(self) -> PeerKey:
        return self.identity.key

    def publish(self, *, urgent: bool = False, **changed: object) -> None:
        import msgspec

        self.state = msgspec.structs.replace(self.state, **changed)
        self.gossip.publish(encode_state(self.state), urgent=urgent)


class MemoryNet:
    def __init__(self, seed: int = 1, *, loss: float = 0.0, duplicate: float = 0.0, interval_s: float = 5.0) -> None:
        self.random = Random(seed)
        self.loss = loss
        self.duplicate = duplicate
        self.interval_s = interval_s
        self.latency_s = (0.001, 0.01)
        self.nodes: dict[str, MemoryNode] = {}  #: by address
        self.connected: Callable[[str, str], bool] = lambda a, b: True  #: node ids
        self.silent: set[str] = set()  #: they take a message and never answer
        self.requests = 0

    def start(
        self,
        name: str,
        *,
        contacts: Iterable[str] = (),
        address: str | None = None,
        key_name: str | None = None,
        incarnation: int = 1000,
        boot: str | None = None,
    ) -> MemoryNode:
        identity = FakeIdentity(key_name or name)
        address = address or f"{name}:8080"
        state = NodeState(name, addresses=(address,), boot=boot or f"{name}-{self.random.random()}")
        node: MemoryNode
        gossip = Gossip(
            identity=identity,
            payload=encode_state(state),
            incarnation=incarnation,
            verify=verify,
            allows=lambda key, node_id: node_id not in node.refuses and key not in node.revoked,
            exchange=lambda target, body: self._exchange(node, target, body),
            contacts=lambda: node.contacts,
            on_change=lambda change, view: node.changes.append((change, self.name_of(view.key))),
            interval_s=self.interval_s,
            random=self.random.random,
        )
        node = MemoryNode(name, identity, address, gossip, list(contacts), state)
        self.nodes[address] = node
        node.running = spawn(gossip.run(), f"gossip of {name}")
        return node

    async def stop(self, node: MemoryNode) -> None:
        """End it without a word."""
        node.up = False
        assert node.running is not None
        node.running.cancel()
        await asyncio.gather(node.running, return_exceptions=True)

    async def close(self) -> None:
        for node in self.nodes.values():
            await self.stop(node)

    def name_of(self, key: PeerKey) -> str:
        return next((node.name for node in self.nodes.values() if node.key == key), key.hex())

    def live(self) -> list[MemoryNode]:
        return [node for node in self.nodes.values() if node.up]

    def view(self, of: MemoryNode, about: MemoryNode) -> MemberView | None:
        return of.gossip.members().get(about.key)

    def know_each_other(self) -> bool:
        """Whether all live nodes hold exactly the others for alive."""
        live = {node.key for node in self.live()}
        return all(
            {key for key, view in node.gossip.members().items() if view.status is Status.ALIVE} == live - {node.key}
            for node in self.live()
        )

    async def until(self, holds: Callable[[], bool], within_s: float) -> float:
        """Let time pass until *holds*; return how long that took. Fail after *within_s*."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        while not holds():
            assert loop.time() - began < within_s, "it did not come about in time"
            await asyncio.sleep(0.01)
        return loop.time() - began

    async def _exchange(self, node: MemoryNode, target: Target, body: bytes) -> tuple[PeerIdentity, bytes]:
        self.requests += 1
        address = target.addresses[0]
        node.dialled.append(address)
        other = self.nodes.get(address)
        await asyncio.sleep(self.random.uniform(*self.latency_s))
        if other is not None and other.name in self.silent:
            await asyncio.get_running_loop().create_future()
        lost = other is None or not other.up or not self.connected(node.name, other.name)
        if lost or self.random.random() < self.loss:
            await asyncio.sleep(TIMEOUT_S)
            raise PeerError(f"{address} does not answer")
        assert other is not None
        if target.key is not None and other.key != target.key:
            raise PeerError(f"another key at {address}")
        sender = PeerIdentity(node.key, node.name)
        answer = other.gossip.receive(sender, body)
        if self.random.random() < self.duplicate:
            other.gossip.receive(sender, body)
        await asyncio.sleep(self.random.uniform(*self.latency_s))
        if self.random.random() < self.loss or not self.connected(other.name, node.name):
            await asyncio.sleep(TIMEOUT_S)
            raise PeerError(f"{address} did not answer")
        return PeerIdentity(other.key, other.name), answer
