"""Addresses that discovery found, and when to try which: this is how a node joins, and how halves of a mesh meet again.

An address is tried while nobody known to live is behind it. After a failure it rests, 1 s at first and up to a minute,
with full jitter, so that a thousand nodes do not knock at the same door together. One that turned out to be this very
node is not tried again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf

from mesh.core.node_state import PeerKey

FIRST_REST_S, LONGEST_REST_S = 1.0, 60.0
#: Between tries of an address that answers, but whose owner does not come to be a member.
_AGAIN_S = 5.0

Lives = Callable[[PeerKey], bool]
Known = Callable[[str], bool]  #: whether an address is this node's, or a living member's


@dataclass(slots=True)
class Contact:
    address: str
    retry_at: float = -inf
    failures: int = 0
    trying: bool = False
    key: PeerKey | None = None  #: who answered there last
    is_self: bool = False


class Contacts:
    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random
        self._contacts: dict[str, Contact] = {}

    def replace(self, addresses: Iterable[str]) -> None:
        """Take what discovery knows now; what it no longer knows is forgotten, unless it is being tried."""
        wanted = dict.fromkeys(addresses)
        kept = {a: c for a, c in self._contacts.items() if a in wanted or c.trying}
        for address in wanted:
            kept.setdefault(address, Contact(address))
        self._contacts = kept

    def due(self, now: float, *, lives: Lives, known: Known) -> list[Contact]:
        """Return whom to try now: nobody who *lives* is behind it, and its address is not *known*."""
        found = [c for c in self._contacts.values() if self._waits(c, lives, known) and c.retry_at <= now]
        for contact in found:
            contact.trying = True
        return found

    def next_deadline(self, *, lives: Lives, known: Known) -> float:
        return min((c.retry_at for c in self._contacts.values() if self._waits(c, lives, known)), default=inf)

    def addresses_of(self, key: PeerKey) -> list[str]:
        """Return where *key* answered."""
        return [c.address for c in self._contacts.values() if c.key == key]

    def reached(self, contact: Contact, key: PeerKey, now: float, *, is_self: bool) -> bool:
        """Note who answered; return whether it had failed before."""
        recovered = contact.failures > 0
        contact.trying, contact.failures = False, 0
        contact.key, contact.is_self = key, is_self
        contact.retry_at = now + _AGAIN_S
        return recovered

    def failed(self, contact: Contact, now: float) -> bool:
        """Note a failure; return whether it is the first in a row."""
        contact.trying = False
        contact.failures += 1
        longest = min(FIRST_REST_S * 2.0 ** min(contact.failures - 1, 10), LONGEST_REST_S)
        contact.retry_at = now + longest * self._random() + 0.05  # never twice in the same moment
        return contact.failures == 1

    def _waits(self, contact: Contact, lives: Lives, known: Known) -> bool:
        if contact.trying or contact.is_self or known(contact.address):
            return False
        return contact.key is None or not lives(contact.key)
