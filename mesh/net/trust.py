"""Whom this node trusts. The rules, in their order; ``known_peers`` says how the file looks:

1. A key that is revoked, or was replaced by its owner, is refused. ``cluster.noise.allowed_keys`` does not help it.
2. With ``allowed_keys``, these keys are trusted, and those that took their place by a rotation statement; no others.
   A name that belongs to another of them is refused: two nodes must not share one.
3. Without, a known name needs its known key, or a rotation statement of that key. A known key may change its name.
   The name of a revoked key stays its own, unless that was replaced, until somebody trusts another key under it.
4. What is not known is remembered (trust on first use), or refused if ``cluster.noise.tofu`` is false.

This node's own name is nobody else's, whatever the rules say. Decisions are made in memory at once;
``mesh.net.peer_store`` writes the file behind them. One event loop owns it.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from mesh.config.diagnostics import ConfigErrors, Diagnostic
from mesh.config.settings import Noise
from mesh.core.node_state import PeerKey
from mesh.errors import UntrustedPeerError
from mesh.logs import Log
from mesh.net import known_peers
from mesh.net.cluster_files import cluster_files
from mesh.net.keys import fingerprint, key_text, looks_like_key, parse_key, rotated_from
from mesh.net.known_peers import NAMELESS, Change, KnownPeers, encode_name
from mesh.net.peer_store import PeerStore

_log = Log(__name__)

#: Trust on first use ends here: whoever has the token must not fill the disk with keys.
MOST_PEERS = 10_000
#: As it is written. Peers times names fit into what ``mesh.files`` reads.
_LONGEST_NAME = 512


def today() -> str:
    """Return the date, for people who read the file."""
    return datetime.now(UTC).date().isoformat()


def load_trust(noise: Noise, *, node_id: str | None = None, key: PeerKey | None = None) -> Trust:
    """Return what *noise* and its ``known_peers`` say; raise ``ConfigError`` if either is not valid.

    *node_id* and *key* are this node's own.
    """
    path = cluster_files(noise).known_peers
    return Trust(path, allowed=allowed_keys(noise), tofu=noise.tofu, node_id=node_id, key=key)


def allowed_keys(noise: Noise) -> frozenset[PeerKey]:
    """Return ``cluster.noise.allowed_keys``; raise ``ConfigErrors`` with all that are none."""
    keys: set[PeerKey] = set()
    problems = []
    for index, text in enumerate(noise.allowed_keys):
        try:
            keys.add(parse_key(text))
        except ValueError as error:
            problems.append(Diagnostic("config", None, f"cluster.noise.allowed_keys[{index}]", str(error)))
    if problems:
        raise ConfigErrors(problems)
    return frozenset(keys)


class Trust:
    """The rules, over the file's content and what is still to be written to it."""

    def __init__(
        self,
        path: Path,
        *,
        allowed: Iterable[PeerKey] = (),
        tofu: bool = True,
        node_id: str | None = None,
        key: PeerKey | None = None,
        today: Callable[[], str] = today,
    ) -> None:
        """Read the file; raise ``ConfigError`` if it is not valid: there is nothing to fall back on yet."""
        self._pinned = frozenset(allowed)
        self._tofu = tofu
        self._own = node_id, key
        self._today = today
        self._dropped: set[PeerKey] = set()  #: not trusted any more, not yet told by ``reload``
        self._store = PeerStore(path, self._changed)
        self._allowed = _with_successors(self._pinned, self._store.known)

    @property
    def known(self) -> KnownPeers:
        """What is known now, written or not."""
        return self._store.known

    @property
    def unsaved(self) -> str | None:
        """Why the file lacks something that is known; None if it does not."""
        return self._store.unsaved

    def admit(self, key: PeerKey, node_id: str, rotation: bytes | None = None) -> None:
        """Let *key*, whose possession was proven, in as *node_id*, and remember it. Raise ``UntrustedPeerError``."""
        _check_name(node_id)
        if self._is_our_name(key, node_id):
            raise UntrustedPeerError(
                f"this node is called {_shown(node_id)}, too: give one of them another node_id; the other one has the"
                f" key {fingerprint(key)}"
            )
        if self.known.refused(key):
            raise UntrustedPeerError(self._why_refused(key, node_id))
        old = rotated_from(rotation, key) if rotation else None
        if old is not None and self._replaces_refused(old, key):
            raise UntrustedPeerError(self._why_refused(old, node_id, successor=key))
        about = ("key", key)
        if old is not None and self._may_follow(old, key, node_id):
            about = ("rotation to", key)
            taken = self._name_taken_from(key, node_id)
            change: Change = partial(
                known_peers.rotate, old=old, new=key, node_id=node_id, today=self._today(), instead_of=taken
            )
            if change(self.known) is not self.known:
                _log.info("peer replaced its key", peer=node_id, key=fingerprint(key), old_key=fingerprint(old))
        elif self._pinned:
            change = self._admit_allowed(key, node_id)
        else:
            change = self._admit_known(key, node_id)
        entry = self.known.by_key.get(key)
        renamed = entry is not None and entry.node_id != node_id
        self._store.apply(about, change, later=renamed)  # two machines with one key rename it all day long

    def _is_our_name(self, key: PeerKey, node_id: str) -> bool:
        """Whether *node_id* is this node's own and *key* is not."""
        own_name, own_key = self._own
        return node_id == own_name and key != own_key

    def allows(self, key: PeerKey, node_id: str) -> bool:
        """Whether what others say of *key* as *node_id* is of interest. Learns nothing, touches no disk."""
        if self.known.refused(key) or self._is_our_name(key, node_id):
            return False
        if key not in self._allowed if self._pinned else self.known.reserved(node_id) is not None:
            return False
        holder = self.known.by_name.get(node_id)
        if holder is not None and holder.key != key:
            return self._name_taken_from(key, node_id) is not None
        return self._tofu or bool(self._pinned) or key in self.known.by_key

    def _replaces_refused(self, old: PeerKey, key: PeerKey, *, even_if_known: bool = False) -> bool:
        """Whether *key* took the place of a key that is refused: the same owner, unless somebody trusts it by hand."""
        if not self.known.refused(old) or self.known.by_key[old].successor == key:
            return False
        return even_if_known or (key not in self.known.by_key and key not in self._allowed)

    def _may_follow(self, old: PeerKey, key: PeerKey, node_id: str) -> bool:
        """Whether the owner of *old*, which it replaced by *key*, would be let in as *node_id*."""
        if old not in self._allowed if self._pinned else old not in self.known.by_key:
            return False
        if self._replaces_refused(old, key, even_if_known=True):
            return False
        if not self._pinned and self.known.reserved(node_id) is not None:
            return False
        holder = self.known.by_name.get(node_id)
        return holder is None or holder.key in (old, key) or bool(self._name_taken_from(key, node_id))

    def _name_taken_from(self, key: PeerKey, node_id: str) -> PeerKey | None:
        """Return the key that loses its name to *key*: with ``allowed_keys`` the others have no say."""
        holder = self.known.by_name.get(node_id)
        if holder is None or holder.key == key or not self._pinned or holder.key in self._allowed:
            return None
        return holder.key

    def _admit_allowed(self, key: PeerKey, node_id: str) -> Change:
        if key not in self._allowed:
            raise UntrustedPeerError(
                f"node {_shown(node_id)} has the key {key_text(key)} ({fingerprint(key)}), which is not in"
                " cluster.noise.allowed_keys; add it there and restart this node if that is right"
            )
        holder = self.known.by_name.get(node_id)
        if holder is not None and holder.key != key and holder.key in self._allowed:
            raise UntrustedPeerError(self._another_key(key, node_id, holder.key))
        return self._learning(key, node_id, instead_of=self._name_taken_from(key, node_id))

    def _admit_known(self, key: PeerKey, node_id: str) -> Change:
        holder = self.known.by_name.get(node_id)
        if holder is not None and holder.key != key:
            raise UntrustedPeerError(self._another_key(key, node_id, holder.key))
        if (revoked := self.known.reserved(node_id)) is not None:
            raise UntrustedPeerError(self._name_of_revoked(key, node_id, revoked.key))
        if key not in self.known.by_key:
            if not self._tofu:
                raise UntrustedPeerError(self._unknown(key, node_id))
            if len(self.known.by_key) >= MOST_PEERS:
                raise UntrustedPeerError(
                    f"{self._store.path} has {MOST_PEERS} keys; remove old ones, or accept this one by hand:"
                    f" {trust_command(node_id, key)}"
                )
        return self._learning(key, node_id)

    def _learning(self, key: PeerKey, node_id: str, *, instead_of: PeerKey | None = None) -> Change:
        entry = self.known.by_key.get(key)
        if entry is None:
            _log.info("first contact, key remembered", peer=node_id, key=fingerprint(key), path=str(self._store.path))
        elif entry.node_id != node_id:
            _log.info("peer has a new name", peer=node_id, old_name=entry.node_id, key=fingerprint(key))
        return partial(known_peers.learn, node_id=node_id, key=key, today=self._today(), instead_of=instead_of)

    def _why_refused(self, key: PeerKey, node_id: str, *, successor: PeerKey | None = None) -> str:
        entry = self.known.by_key[key]
        since = f" since {entry.since}" if entry.since else ""
        by = f" by {fingerprint(entry.successor)}" if entry.successor else ""
        was = f"was replaced{by}" if entry.standing is known_peers.Standing.ROTATED else "is revoked"
        shown = f"the key {fingerprint(key)}"
        if successor is not None:
            shown = f"the key {fingerprint(successor)} takes the place of {fingerprint(key)}, which"
        return (
            f"node {_shown(node_id)}: {shown} {was}{since} ({self._store.path});"
            f" to trust it all the same: {trust_command(node_id, successor or key)}"
        )

    def _another_key(self, key: PeerKey, node_id: str, expected: PeerKey) -> str:
        return (
            f"node {_shown(node_id)} has the key {fingerprint(key)}, but {fingerprint(expected)} is known for it;"
            " either two nodes have this node_id, or it was set up anew, or somebody pretends to be it."
            f" To accept the new key: {trust_command(node_id, key)}"
        )

    def _name_of_revoked(self, key: PeerKey, node_id: str, revoked: PeerKey) -> str:
        return (
            f"node {_shown(node_id)} has the key {fingerprint(key)}, but this name belongs to {fingerprint(revoked)},"
            f" which is revoked ({self._store.path}). To accept the new key: {trust_command(node_id, key)}"
        )

    def _unknown(self, key: PeerKey, node_id: str) -> str:
        return (
            f"node {_shown(node_id)} with the key {fingerprint(key)} is not known, and cluster.noise.tofu is false;"
            f" to accept it: {trust_command(node_id, key)}"
        )

    def reload(self) -> frozenset[PeerKey]:
        """Look whether the file changed, and take it over if it is valid; return the keys that lost their trust.

        Blocks; ``refresh`` does not.
        """
        self._store.look()
        return self._take_dropped()

    async def refresh(self) -> frozenset[PeerKey]:
        """Do as ``reload``, with the disk left to a thread: call it every second. Never waits long for a disk."""
        await self._store.refresh()
        return self._take_dropped()

    def _take_dropped(self) -> frozenset[PeerKey]:
        dropped = frozenset(self._dropped)
        self._dropped.clear()
        return dropped

    def _changed(self, before: KnownPeers) -> None:
        known = self.known
        self._allowed = _with_successors(self._pinned, known)
        self._dropped |= {key for key in known.by_key if known.refused(key) and not before.refused(key)}
        self._dropped |= {entry.key for entry in before.by_name.values() if not self.allows(entry.key, entry.node_id)}

    async def close(self) -> None:
        """Write what is still to be written."""
        await self._store.close()


def trust_command(node_id: str, key: PeerKey) -> str:
    """Return what to type to accept *key*."""
    return f"llama-mesh keys trust {shlex.quote(encode_name(node_id))} {key_text(key)}"


def _with_successors(pinned: frozenset[PeerKey], known: KnownPeers) -> frozenset[PeerKey]:
    """Return *pinned*, and the keys that took the place of one of them."""
    allowed = set(pinned)
    waiting = list(pinned)
    while waiting:
        entry = known.by_key.get(waiting.pop())
        if entry is not None and entry.successor is not None and entry.successor not in allowed:
            allowed.add(entry.successor)
            waiting.append(entry.successor)
    return frozenset(allowed)


def _check_name(node_id: str) -> None:
    if not node_id or len(encode_name(node_id)) > _LONGEST_NAME or not node_id.isprintable() or node_id == NAMELESS:
        raise UntrustedPeerError("a node without a sane name")
    if looks_like_key(node_id):  # 'llama-mesh keys revoke' would not know which one is meant
        raise UntrustedPeerError(f"a node must not be called like a key or a fingerprint, as {_shown(node_id)} is")


def _shown(node_id: str) -> str:
    return f"'{encode_name(node_id)}'"
