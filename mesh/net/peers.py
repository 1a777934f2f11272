"""What this node knows of every other one, for routing: its record, its circuit breaker, its distance, own forwards.

Owns no membership (``gossip`` does) and no links. ``sync`` brings it in step with the members; everything here belongs
to the event loop's thread. Figures of a record are corrected at once by what a peer says in person (trap 61), until its
next record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from mesh.config.profile import Profile
from mesh.core.breaker import Limits
from mesh.core.node_state import Kind, PeerKey, ProfileState
from mesh.logs import Log
from mesh.net.keys import fingerprint
from mesh.net.peer import Member, Peer
from mesh.net.version_policy import VersionPolicy

_log = Log(__name__)

#: How long a model of a node that is gone is still known: its clients get 503 and try again, not 404 (trap 62).
REMEMBERED_S = 600.0


class Peers:
    """All of them. ``epoch`` changes with everything that changes what they have."""

    def __init__(
        self,
        limits: Limits,
        versions: VersionPolicy,
        now: Callable[[], float],
        stand_in: Callable[[ProfileState], Profile],
    ) -> None:
        self._limits = limits
        self._versions = versions
        self._now = now
        self._stand_in = stand_in
        self._peers: dict[PeerKey, Peer] = {}
        self._holders: dict[str, tuple[Peer, ...]] = {}
        self._names: dict[str, ProfileState] | None = None
        self._remembered: dict[str, tuple[ProfileState, float]] = {}  #: of nodes that are gone, and until when
        self._known: dict[tuple[str, str, str, tuple[str, ...]], Profile] = {}
        self._unreadable: dict[PeerKey, tuple[int, int]] = {}  #: records that were told of
        self.epoch = 0
        self.on_gone: Callable[[Peer], None] = _nothing  #: told of each peer that is no member any more

    def sync(self, members: Mapping[PeerKey, Member]) -> None:
        """Bring everything in step with *members*, who are the others."""
        for key in [key for key in self._peers if key not in members]:
            self._remove(self._peers.pop(key))
        self._unreadable = {key: stamp for key, stamp in self._unreadable.items() if key in members}
        for key, member in members.items():
            peer = self._peers.get(key) or Peer(key, self._limits, self._now)
            try:
                peer.update(member)
            except ValueError as error:
                self._tell_unreadable(member, error)
                continue
            self._peers[key] = peer
            peer.rejected = self._versions.judge(key, peer.node_id, peer.state.version)
        self.epoch += 1
        self._holders.clear()
        self._names = None

    def _tell_unreadable(self, member: Member, error: ValueError) -> None:
        """Log it once for each record: it stays the member's last one until it sends another."""
        stamp = (member.incarnation, member.version)
        if self._unreadable.get(member.key) != stamp:
            self._unreadable[member.key] = stamp
            _log.warning("a record cannot be read", fingerprint=fingerprint(member.key), reason=str(error))

    def _remove(self, peer: Peer) -> None:
        until = self._now() + REMEMBERED_S
        for profile in peer.profiles.values():
            self._remembered[profile.key] = (profile, until)
        self._versions.forget(peer.key)
        self.on_gone(peer)

    def __iter__(self) -> Iterator[Peer]:
        """Iterate in the order of the names, which does not change."""
        return iter(sorted(self._peers.values(), key=lambda peer: (peer.node_id, peer.key)))

    def __len__(self) -> int:
        return len(self._peers)

    def get(self, key: PeerKey) -> Peer | None:
        return self._peers.get(key)

    def named(self, node_id: str) -> Peer | None:
        """Return the live peer of this name, else one that is gone, else None."""
        found = [peer for peer in self._peers.values() if peer.node_id == node_id]
        return max(found, key=lambda peer: (peer.alive, peer.stamp), default=None)

    def by_name(self) -> Mapping[str, Peer]:
        """Return one peer for each name, as ``named`` does: a node with a new key is known by its old one too."""
        best = {peer.node_id: peer for peer in sorted(self, key=lambda peer: (peer.alive, peer.stamp))}
        return dict(sorted(best.items()))

    # --- who has what

    def holders(self, key: str) -> tuple[Peer, ...]:
        """Return the live peers that have the profile *key*, whether they can be asked now or not."""
        found = self._holders.get(key)
        if found is None:
            found = tuple(peer for peer in self if peer.alive and peer.has(key))
            if found:  # anybody may ask for anything: only what exists is remembered
                self._holders[key] = found
        return found

    def may_come(self, key: str, asked: set[PeerKey]) -> bool:
        """Whether somebody who is not among *asked* is a member and has *key*, though it cannot be asked just now."""
        return any(peer.key not in asked and peer.may_serve(key) for peer in self.holders(key))

    def who_has(self, key: str) -> list[str]:
        """Return each node that has *key*, and why it cannot serve it."""
        return [f"{p.node_id} ({p.in_the_way(key) or 'has no room'})" for p in self if p.has(key)]

    def profile(self, name: str) -> Profile | None:
        """Return a stand-in for what peers know by *name*, None if nobody does or did a short while ago."""
        if self._names is None:
            self._names = self._index()
        state = self._names.get(name.lower())
        if state is None:
            return None
        what = (state.key, state.id, state.kind, state.aliases)
        profile = self._known.get(what)
        if profile is None:
            if len(self._known) > 4 * len(self._names):
                self._known.clear()
            profile = self._known[what] = self._stand_in(state)
        return profile

    def profiles(self) -> Sequence[tuple[ProfileState, tuple[str, ...]]]:
        """Return every profile of live peers, by id, with the names of the nodes that have it."""
        found: dict[str, tuple[ProfileState, list[str]]] = {}
        for peer in self:
            for profile in peer.profiles.values() if peer.alive else ():
                found.setdefault(profile.key, (profile, []))[1].append(peer.node_id)
        return [(p, tuple(nodes)) for p, nodes in sorted(found.values(), key=lambda e: (e[0].id, e[0].key))]

    def _index(self) -> dict[str, ProfileState]:
        """Return every name that leads to a profile, lower-case. Keys win over ids, ids over aliases."""
        now = self._now()
        self._remembered = {key: entry for key, entry in self._remembered.items() if entry[1] > now}
        known = [profile for profile, _ in self._remembered.values()]
        states = [*known, *(p for peer in self for p in peer.profiles.values() if not peer.alive)]
        states += [p for peer in self for p in peer.profiles.values() if peer.alive]  # later ones win
        names: dict[str, ProfileState] = {}
        for by in (lambda p: p.aliases, lambda p: (p.id,), lambda p: (p.key,)):
            for state in states:
                names.update((name.lower(), state) for name in by(state))
        return names


def stand_in(state: ProfileState, *, max_wait_s: float | None, max_request_s: float | None, max_queue: int) -> Profile:
    """Return a profile for what only others have: never started here, with this node's default limits."""
    model, _, profile = state.key.partition(":")
    flags = {str(Kind.EMBEDDING): ("--embeddings",), str(Kind.RERANK): ("--reranking",)}.get(state.kind, ())
    return Profile(
        key=state.key,
        id=state.id,
        model=model,
        profile=profile or "default",
        args=flags,
        aliases=state.aliases,
        description=state.description or None,
        max_instances=0,
        max_wait_s=max_wait_s,
        max_request_s=max_request_s,
        max_queue=max_queue,
        args_hash="peers",
    )


def _nothing(peer: Peer) -> None:
    pass
