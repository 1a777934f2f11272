"""What this node knows of every other one, for routing: its record, its circuit breaker, its distance, own forwards.

Owns no membership (``gossip`` does) and no links. ``changed`` takes over what gossip tells of a node, ``sync`` what it
tells of all; everything here belongs to the event loop's thread. Figures of a record are corrected at once by what a
peer says in person (trap 61), until its next record.

At a thousand nodes somebody has news all the time, mostly of how busy it is. Those cost what it takes to read them.
News of who has what change the indices by that much; nothing is made anew from all nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import inf

from mesh.config.profile import Engine, Profile
from mesh.core.breaker import Limits
from mesh.core.node_state import Kind, PeerKey, ProfileState
from mesh.logs import Log
from mesh.net.keys import fingerprint
from mesh.net.peer import Member, Peer
from mesh.net.peer_models import Models, model_of
from mesh.net.version_policy import VersionPolicy

_log = Log(__name__)

#: How long a model of a node that is gone is still known: its clients get 503 and try again, not 404 (trap 62).
REMEMBERED_S = 600.0

#: What of a peer is in the indices: whether it lives, and what it has.
_Filed = tuple[bool, tuple[ProfileState, ...]]


class Peers:
    """All of them."""

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
        self._peers: dict[PeerKey, Peer] = {}
        self._filed: dict[PeerKey, _Filed] = {}
        self._models = Models(stand_in)
        self._having: dict[str, dict[PeerKey, Peer]] = {}  #: who has each profile, alive or not
        self._holders: dict[str, tuple[Peer, ...]] = {}  #: those that live, in order; made when asked for
        self._order: tuple[Peer, ...] | None = None  #: as the last
        self._unreadable: dict[PeerKey, tuple[int, int]] = {}  #: records that were told of
        self._forget_at = inf  #: when the first of the remembered models is forgotten
        self._epoch = 0
        self.on_gone: Callable[[Peer], None] = _nothing  #: told of each peer that is no member any more

    @property
    def epoch(self) -> int:
        """Return another number than before if a name may lead elsewhere now: also when a model was forgotten."""
        if self._forget_at != inf:
            self._forget()
        return self._epoch

    def changed(self, key: PeerKey, member: Member | None) -> None:
        """Take over what gossip knows of one other node now; None, or that it left: it is no member any more."""
        known = self._peers.get(key)
        if member is None or member.status == "left":
            self._unreadable.pop(key, None)
            if known is not None:
                self._remove(known)
            return
        if known is not None and known.is_as(member):
            return
        peer = known or Peer(key, self._limits, self._now)
        before = None if known is None else known.offer
        try:
            peer.update(member)
        except ValueError as error:
            self._tell_unreadable(member, error)
            if known is None:
                return
        else:
            self._unreadable.pop(key, None)
            peer.rejected = self._versions.judge(key, peer.node_id, peer.state.version)
        self._peers[key] = peer
        if peer.offer != before:
            self._file(peer, (peer.alive, tuple(model_of(profile) for profile in peer.profiles.values())))

    def _tell_unreadable(self, member: Member, error: ValueError) -> None:
        """Log it once for each record: it stays the member's last one until it sends another."""
        stamp = (member.incarnation, member.version)
        if self._unreadable.get(member.key) != stamp:
            self._unreadable[member.key] = stamp
            _log.warning("a record cannot be read", fingerprint=fingerprint(member.key), reason=str(error))

    def _remove(self, peer: Peer) -> None:
        del self._peers[peer.key]
        until = self._now() + REMEMBERED_S
        for model in self._filed[peer.key][1]:
            self._models.remember(model, until)
        self._forget_at = self._models.forgets_at
        self._file(peer, None)
        self._versions.forget(peer.key)
        self.on_gone(peer)

    def _file(self, peer: Peer, now: _Filed | None) -> None:
        """Bring the indices in step with one peer."""
        alive, models = now or (False, ())
        was_alive, had = self._filed.pop(peer.key, (False, ()))
        if now is not None:
            self._filed[peer.key] = now
        for model in models:  # before the next: what it still has is not forgotten in between
            self._models.add(model, alive=alive)
            self._having.setdefault(model.key, {})[peer.key] = peer
        for model in had:
            self._models.remove(model, alive=was_alive)
        keys = {model.key for model in models}
        for key in {model.key for model in had} - keys:
            having = self._having[key]
            del having[peer.key]
            if not having:
                del self._having[key]
        for model in (*models, *had):
            self._holders.pop(model.key, None)
        self._order = None
        self._epoch += 1

    def _forget(self) -> None:
        now = self._now()
        if now >= self._forget_at:
            self._epoch += self._models.forget(now)
            self._forget_at = self._models.forgets_at

    def __iter__(self) -> Iterator[Peer]:
        """Iterate in the order of the names, which does not change."""
        if self._order is None:
            self._order = _in_order(self._peers.values())
        return iter(self._order)

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
            having = self._having.get(key)
            if having is None:  # anybody may ask for anything: only what exists is remembered
                return ()
            found = self._holders[key] = _in_order(peer for peer in having.values() if peer.alive)
        return found

    def may_come(self, key: str, asked: set[PeerKey]) -> bool:
        """Whether somebody who is not among *asked* is a member and has *key*, though it cannot be asked just now."""
        return any(peer.key not in asked and peer.may_serve(key) for peer in self.holders(key))

    def who_has(self, key: str) -> list[str]:
        """Return each node that has *key*, and why it cannot serve it."""
        having = _in_order(self._having.get(key, {}).values())
        return [f"{peer.node_id} ({peer.in_the_way(key) or 'has no room'})" for peer in having]

    def profile(self, name: str) -> Profile | None:
        """Return a stand-in for what peers know by *name*, None if nobody does or did a short while ago."""
        if self._forget_at != inf:
            self._forget()
        return self._models.find(name)

    def profiles(self) -> Sequence[tuple[ProfileState, tuple[str, ...]]]:
        """Return every profile of live peers, by id, with the names of the nodes that have it."""
        held = [(key, holders) for key in self._having if (holders := self.holders(key))]
        found = [(holders[0].profiles[key], tuple(peer.node_id for peer in holders)) for key, holders in held]
        return sorted(found, key=lambda entry: (entry[0].id, entry[0].key))


def _in_order(peers: Iterable[Peer]) -> tuple[Peer, ...]:
    return tuple(sorted(peers, key=lambda peer: (peer.node_id, peer.key)))


def engine_of(state: ProfileState) -> Engine:
    """Return which kind of engine runs it elsewhere: nodes tell what it can do."""
    return Engine.WHISPER if state.kind == Kind.AUDIO else Engine.LLAMA


def stand_in(state: ProfileState, *, max_wait_s: float | None, max_request_s: float | None, max_queue: int) -> Profile:
    """Return a profile for what only others have: never started here, with this node's default limits."""
    model, _, profile = state.key.partition(":")
    flags = {str(Kind.EMBEDDING): ("--embeddings",), str(Kind.RERANK): ("--reranking",)}.get(state.kind, ())
    if state.multimodal:
        flags = (*flags, "--mmproj")
    return Profile(
        key=state.key,
        id=state.id,
        model=model,
        profile=profile or "default",
        args=flags,
        engine=engine_of(state),
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
