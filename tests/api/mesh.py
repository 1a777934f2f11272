"""A node's part in a mesh: what it knows of the others is real, what they answer is a table."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from mesh.api.own_state import OwnState
from mesh.api.placing import Placing
from mesh.config.profile import Profile
from mesh.core.node_state import PeerIdentity
from mesh.core.routing import Ranked
from mesh.errors import MeshError, RequestError, UnknownModelError
from tests.api.node import Node
from tests.members import Clock, Member, key_of, made_peers, sync

PEER = PeerIdentity(key_of(1), "n1", "0.5.0")


class FakeMesh:
    """The ``MeshView`` of *node*, which it puts there."""

    own_fingerprint = "own-fingerprint"
    largest_message_bytes = 1000

    def __init__(self, node: Node, *members: Member) -> None:
        self.clock = Clock()
        self.peers = made_peers(self.clock, *members)
        self.own = OwnState(node.ctx, boot="b", addresses=lambda: ("192.0.2.1:8080",))
        self.placing = Placing(node.ctx, self.own, key_of(99))
        self.gossiped: list[tuple[PeerIdentity, bytes]] = []
        self.calls: list[tuple[str, str, Mapping[str, Any], float | None]] = []
        self.answers: dict[str, Any] = {}  #: by node; an error is raised, a missing one is waited for
        self.waiting: set[str] = set()
        self.asked = asyncio.Event()
        self._ctx = node.ctx
        node.ctx.mesh = self

    def sync(self, *members: Member) -> None:
        sync(self.peers, *members)

    def gossip(self, peer: PeerIdentity, body: bytes) -> bytes:
        if body == b"malformed":
            raise RequestError("not gossip")
        self.gossiped.append((peer, body))
        return b"\x93answer"

    def explain(
        self, name: str | None, *, prompt_tokens: int, max_tokens: int | None
    ) -> tuple[Profile, Sequence[Ranked]]:
        try:
            profile = self._ctx.supervisor.catalog.resolve(name)
        except UnknownModelError:
            found = self.peers.profile(name or "")
            if found is None:
                raise
            profile = found
        peers = [peer for peer in self.peers if peer.has(profile.key)]
        return profile, self.placing.explain(profile, peers, prompt_tokens=prompt_tokens, max_tokens=max_tokens)

    async def call(self, node_id: str, path: str, body: Mapping[str, Any], *, timeout_s: float | None) -> Any:
        self.calls.append((node_id, path, dict(body), timeout_s))
        self.asked.set()
        if node_id not in self.answers:
            self.waiting.add(node_id)
            try:
                await asyncio.Event().wait()
            finally:
                self.waiting.discard(node_id)
        answer = self.answers[node_id]
        if isinstance(answer, MeshError):
            raise answer
        return answer
