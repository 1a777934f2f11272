"""What is passed on of its own accord: records that changed lately, and members that somebody could not reach.

Each has a budget of sends that grows with the logarithm of the mesh and is never renewed for the same version, so a
change costs O(n log n) sends in all and no message is ever flooded again (trap 67). Whom a rumour was sent to or heard
from is not told again. The first sends carry the record, since hardly anybody has it yet; later ones only mention it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import log2

from mesh.core.gossip_message import Heat
from mesh.core.gossip_record import Age
from mesh.core.node_state import PeerKey

#: Sends of a rumour that carry the record itself.
EAGER_SENDS = 2
#: Rounds more of an urgent rumour that may go out since earlier ones were not answered.
SPARE_ROUNDS = 4


@dataclass(slots=True)
class Rumour:
    age: Age
    sends: int = 0
    told: set[PeerKey] = field(default_factory=set)  #: they have it
    urgent_rounds: int = 0  #: in which it still goes out without waiting for a tick
    spare_rounds: int = SPARE_ROUNDS

    @property
    def is_repeated(self) -> bool:
        """Whether earlier urgent sends came to nothing, so that hardly anybody may have it yet."""
        return self.spare_rounds < SPARE_ROUNDS


def budget(members: int) -> int:
    """Return how often one node sends a rumour in a mesh of so many."""
    return int(log2(members + 2)) + 3


class Rumours:
    """Rumours of one kind, by member: at most one each, the newest."""

    def __init__(self) -> None:
        self.limit = budget(1)  #: sends of each
        self._by_key: dict[PeerKey, Rumour] = {}
        self._urgent: dict[PeerKey, Rumour] = {}  #: all and only those with urgent rounds left

    def __len__(self) -> int:
        return len(self._by_key)

    @property
    def urgent(self) -> Mapping[PeerKey, Rumour]:
        return self._urgent

    def add(self, key: PeerKey, age: Age, *, source: PeerKey | None = None, urgent_rounds: int = 0) -> None:
        """Begin to pass on that *key* is at *age*; *source*, if any, knows."""
        self.drop(key)
        rumour = self._by_key[key] = Rumour(age, urgent_rounds=urgent_rounds)
        rumour.told.add(key)
        if source is not None:
            rumour.told.add(source)
        if urgent_rounds:
            self._urgent[key] = rumour

    def heat(self, key: PeerKey) -> Heat:
        """Return how to pass on what is known of *key*."""
        if key in self._urgent:
            return Heat.URGENT
        return Heat.HOT if key in self._by_key else Heat.COLD

    def drop(self, key: PeerKey) -> None:
        self._by_key.pop(key, None)
        self._urgent.pop(key, None)

    def knows(self, peer: PeerKey, key: PeerKey, age: Age) -> None:
        """*peer* has shown that it has this rumour: one send less is needed."""
        rumour = self._by_key.get(key)
        if rumour is not None and rumour.age == age and peer not in rumour.told:
            self._count(key, rumour, peer)

    def missed(self, peer: PeerKey, key: PeerKey, age: Age) -> None:
        """What was sent to *peer* did not arrive."""
        rumour = self._by_key.get(key)
        if rumour is not None and rumour.age == age:
            rumour.told.discard(peer)

    def arrived(self, key: PeerKey, age: Age) -> None:
        """An urgent send, to somebody who was marked as told, was answered: only then it counts."""
        rumour = self._by_key.get(key)
        if rumour is not None and rumour.age == age:
            self._count(key, rumour, None)

    def rearm(self, key: PeerKey, age: Age) -> None:
        """An urgent send came to nothing, or is late: one more round goes out, if any is left. Several that went out
        in the same round are made good for by one."""
        rumour = self._by_key.get(key)
        if rumour is not None and rumour.age == age and not rumour.urgent_rounds and rumour.spare_rounds:
            rumour.spare_rounds -= 1
            rumour.urgent_rounds = 1
            self._urgent[key] = rumour

    def fresh_for(self, peer: PeerKey | None) -> list[tuple[PeerKey, Rumour]]:
        """Return what *peer* may not know yet, the least told first."""
        found = [(key, rumour) for key, rumour in self._by_key.items() if peer not in rumour.told]
        found.sort(key=lambda entry: entry[1].sends)
        return found

    def sent(self, key: PeerKey, peer: PeerKey | None) -> None:
        """Count a send to *peer*, who thereby has it; ``None``: it was only mentioned, or to a stranger."""
        if (rumour := self._by_key.get(key)) is not None:
            self._count(key, rumour, peer)

    def round_sent(self) -> None:
        """A round of urgent sends went out."""
        for rumour in self._urgent.values():
            rumour.urgent_rounds -= 1
        self._urgent = {key: rumour for key, rumour in self._urgent.items() if rumour.urgent_rounds > 0}

    def _count(self, key: PeerKey, rumour: Rumour, peer: PeerKey | None) -> None:
        """What was sent, or found known, often enough is no longer news."""
        rumour.sends += 1
        if peer is not None:
            rumour.told.add(peer)
        if rumour.sends >= self.limit and not rumour.urgent_rounds:
            self.drop(key)
