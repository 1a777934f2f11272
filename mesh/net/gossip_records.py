"""Which records may come in: each signature is verified once, and trust is asked each time.

A record reaches the core only if it is genuine and its owner trusted. A verification costs 0.1 ms of the event loop, so
``opened`` takes MAX_RECORDS per message at most, what was verified is remembered, and for a while what was refused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from hashlib import sha256

from mesh.core.gossip_message import Message, opened
from mesh.core.gossip_record import Record
from mesh.core.node_state import PeerKey, decode_state
from mesh.logs import Log

_log = Log(__name__)

#: Members, and bytes of their records, that a node keeps: who has the token could make up any number of them.
MOST_MEMBERS = 20_000
MOST_BYTES = 64 * 1024 * 1024
_REMEMBERED = 4096
_REFUSED_S = 60.0

Verify = Callable[[PeerKey, bytes, bytes], bool]
Allows = Callable[[PeerKey, str], bool]


class Gate:
    """*is_member* tells whether a key is (still) one of a member."""

    def __init__(self, verify: Verify, allows: Allows, is_member: Callable[[PeerKey], bool]) -> None:
        self._verify = verify
        self._allows = allows
        self._is_member = is_member
        self._sizes: dict[PeerKey, int] = {}  #: of the records that were passed on, by owner
        self._bytes = 0
        self._full = False
        self._genuine: OrderedDict[bytes, None] = OrderedDict()  #: hashes of what was verified
        self._refused: dict[tuple[PeerKey, bytes], float] = {}
        self.verifications = 0

    def pass_on(
        self, message: Message, is_news: Callable[[Record], bool], now: float
    ) -> tuple[list[tuple[Record, int]], list[Record]]:
        """Return the records of *message* for the core, and those that are genuine, but not trusted.

        Forged ones are dropped without a word: what they say of their owner must not be held against it. What is no
        news is passed on unverified: it changes nothing, it only shows what its sender has.
        """
        passed: list[tuple[Record, int]] = []
        refused: list[Record] = []
        for record, heat in opened(message):
            if not is_news(record):
                passed.append((record, heat))
            elif self._is_refused(record, now):
                continue
            elif not self._is_genuine(record):
                self._refuse(record, now)
            elif self._is_trusted(record) and self._has_room(record):
                passed.append((record, heat))
            else:
                refused.append(record)
                self._refuse(record, now)
        return passed, refused

    def _is_genuine(self, record: Record) -> bool:
        name = sha256(record.signature + record.body).digest()
        if name in self._genuine:
            self._genuine.move_to_end(name)
            return True
        self.verifications += 1
        if not self._verify(record.key, record.signature, record.signed):
            return False
        self._genuine[name] = None
        if len(self._genuine) > _REMEMBERED:
            self._genuine.popitem(last=False)
        return True

    def _is_trusted(self, record: Record) -> bool:
        try:
            state = decode_state(record.payload)
        except ValueError:
            return False
        return self._allows(record.key, state.node_id)

    def _has_room(self, record: Record) -> bool:
        """Whether the table may grow by *record*. Who is a member already can always be replaced, but not grow it."""
        if self._fits(record):
            self._count(record)
            self._full = False
            return True
        self._sizes = {key: size for key, size in self._sizes.items() if self._is_member(key)}
        self._bytes = sum(self._sizes.values())
        if self._fits(record):
            self._count(record)
            return True
        if not self._full:
            _log.error(
                "the mesh has more members than this node keeps; new ones are left out",
                members=len(self._sizes),
                bytes=self._bytes,
            )
        self._full = True
        return False

    def _fits(self, record: Record) -> bool:
        known = self._sizes.get(record.key)
        grown = self._bytes + len(record.body) - (known or 0)
        return grown <= MOST_BYTES and (known is not None or len(self._sizes) < MOST_MEMBERS)

    def _count(self, record: Record) -> None:
        self._bytes += len(record.body) - self._sizes.get(record.key, 0)
        self._sizes[record.key] = len(record.body)

    def _is_refused(self, record: Record, now: float) -> bool:
        return self._refused.get((record.key, record.signature), now) > now

    def _refuse(self, record: Record, now: float) -> None:
        if len(self._refused) >= _REMEMBERED:
            self._refused = {name: until for name, until in self._refused.items() if until > now}
        if len(self._refused) < _REMEMBERED:
            self._refused[record.key, record.signature] = now + _REFUSED_S
