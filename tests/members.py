"""Members of a mesh as gossip tells of them: records with their bytes, and a clock that stands until it is told."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mesh.core.breaker import Limits
from mesh.core.node_state import NodeState, PeerKey, ProfileState, encode_state
from mesh.net.peer import Member as GossipMember
from mesh.net.peers import Peers, stand_in
from mesh.net.version_policy import Action, VersionPolicy

VERSION = "0.5.0"


class Clock:
    """Call it for the time; set ``time``."""

    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


@dataclass(frozen=True)
class Member:
    """See ``mesh.net.peers.Member``."""

    key: PeerKey
    payload: bytes
    status: str = "alive"
    incarnation: int = 1
    version: int = 1
    updated_at: float = 1000.0

    def later(self, state: NodeState | None = None, **changes: Any) -> Member:
        """Return its next record."""
        payload = self.payload if state is None else encode_state(state)
        return replace(self, **{"payload": payload, "version": self.version + 1, **changes})


def key_of(number: int) -> PeerKey:
    return PeerKey(bytes([number]) * 32)


def profile(key: str = "qwen:default", **changes: Any) -> ProfileState:
    return ProfileState(**{"key": key, "id": key.removesuffix(":default"), **changes})


def state(node_id: str, *profiles: ProfileState, **changes: Any) -> NodeState:
    return NodeState(**{"node_id": node_id, "version": VERSION, "profiles": profiles, **changes})


def member(number: int, *profiles: ProfileState, status: str = "alive", **changes: Any) -> Member:
    """Return node ``n<number>`` with *profiles*; *changes* are its state's."""
    name = changes.pop("node_id", f"n{number}")
    return Member(key_of(number), encode_state(state(name, *profiles, **changes)), status)


def made_peers(now: Clock, *members: Member, limits: Limits | None = None, action: Action = "warn") -> Peers:
    """Return ``Peers`` that know *members*."""
    stand_ins = partial(stand_in, max_wait_s=60.0, max_request_s=None, max_queue=9)
    peers = Peers(limits or Limits(), VersionPolicy(VERSION, action), now, stand_ins)
    sync(peers, *members)
    return peers


def sync(peers: Peers, *members: GossipMember) -> None:
    """Let *peers* know that *members* are all that there are, as the events of gossip would."""
    now = {member.key: member for member in members}
    for key in [key for key in (*(peer.key for peer in peers), *peers._unreadable) if key not in now]:
        peers.changed(key, None)
    for key, member in now.items():
        peers.changed(key, member)
