"""What two nodes send each other in an exchange, as MessagePack maps: unknown fields are ignored (trap 66).

A request that has a digest asks for a full exchange; its answer lists the buckets that differ and rumours. A request
without one (a probe, urgent news, a follow-up) is answered with what it asks for, and with corrections.
``Draft`` puts a message together under the size cap and knows whether something had to be left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import msgspec

from mesh.core.gossip_record import Age, Count, Record, ShortId, read
from mesh.core.node_state import PROTOCOL, PeerKey

MAX_MESSAGE_BYTES = 64 * 1024
#: Of one that is accepted: a later version may send longer ones.
MAX_RECEIVED_BYTES = 256 * 1024
#: Each may cost the receiver the verification of a signature, 0.1 ms.
MAX_RECORDS = 128
#: Of rumours per message, so that one full-sized record always has room beside them.
MAX_HOT, MAX_DOUBTS, MAX_WANTS = 96, 32, 512

# More than each can take at most, framing and integers of any size included.
_MESSAGE_COST, _RECORD_COST, _STAMP_COST, _DOUBT_COST, _WANT_COST, _LIST_COST = 96, 96, 30, 56, 10, 8


class Stamp(msgspec.Struct, frozen=True, array_like=True):
    """Which record of a member somebody has."""

    short: bytes
    incarnation: Count
    version: Count

    @property
    def age(self) -> Age:
        return self.incarnation, self.version


class Doubt(msgspec.Struct, frozen=True, array_like=True):
    """Somebody could not reach this member and knows nothing newer of it than this."""

    key: bytes
    incarnation: Count
    version: Count

    @property
    def age(self) -> Age:
        return self.incarnation, self.version


class Heat(IntEnum):
    """What somebody who did not know a record is to do with it."""

    COLD = 0  # old news that the receiver had missed: keep it
    HOT = 1  # a recent change: pass it on in the ticks to come
    URGENT = 2  # pass it on at once


class Carried(msgspec.Struct, frozen=True, omit_defaults=True):
    """A record on its way, and how its sender thinks of it."""

    body: bytes = msgspec.field(name="b")
    signature: bytes = msgspec.field(name="s")
    heat: int = msgspec.field(default=Heat.COLD, name="h")


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    protocol: int = msgspec.field(default=PROTOCOL, name="v")
    me: Stamp | None = None  #: the sender's own record
    check: bytes = msgspec.field(default=b"", name="c")  #: tells it from another one of the same age
    members: int = msgspec.field(default=0, name="n")  #: how many it knows
    digest: bytes = msgspec.field(default=b"", name="d")
    records: tuple[Carried, ...] = msgspec.field(default=(), name="r")
    hot: tuple[Stamp, ...] = msgspec.field(default=(), name="h")  #: recently changed; ask if you lack them
    doubts: tuple[Doubt, ...] = msgspec.field(default=(), name="s")
    wants: tuple[bytes, ...] = msgspec.field(default=(), name="w")  #: short ids whose records to send
    lists: dict[int, tuple[Stamp, ...]] = msgspec.field(default_factory=dict, name="l")  #: what is in which bucket
    more: bool = msgspec.field(default=False, name="m")  #: not everything had room


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def encode_message(message: Message) -> bytes:
    return _encoder.encode(message)


def decode_message(data: bytes) -> Message:
    """Return what *data* says; raise ``ValueError`` if it is no message or one of another protocol."""
    if len(data) > MAX_RECEIVED_BYTES:
        raise ValueError(f"a gossip message of {len(data)} bytes; {MAX_RECEIVED_BYTES} is the limit")
    try:
        message = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        raise ValueError(f"not a gossip message: {error}") from error
    if message.protocol != PROTOCOL:
        raise ValueError(f"gossip of protocol {message.protocol}; this node speaks {PROTOCOL}")
    return message


def opened(message: Message) -> list[tuple[Record, int]]:
    """Return the records in *message*, not verified, each with its heat. What is no record is left out."""
    found = []
    for carried in message.records[:MAX_RECORDS]:
        try:
            found.append((read(carried.body, carried.signature), carried.heat))
        except ValueError:
            continue
    return found


class Draft:
    """A message in the making. Each method returns whether it is (already) in; what has no room has to wait."""

    def __init__(self, me: Record, *, members: int = 0, digest: bytes = b"", cap: int = MAX_MESSAGE_BYTES) -> None:
        self._me = me
        self._members = members
        self._digest = digest
        self._room = cap - _MESSAGE_COST - len(digest)
        self._records: dict[PeerKey, Carried] = {}
        self._hot: dict[bytes, Stamp] = {}
        self._doubts: dict[PeerKey, Doubt] = {}
        self._wants: dict[bytes, None] = {}
        self._lists: dict[int, tuple[Stamp, ...]] = {}
        self.more = False

    @property
    def room(self) -> int:
        return self._room

    @property
    def empty(self) -> bool:
        """Whether it says nothing but who sends it."""
        return not (self._records or self._hot or self._doubts or self._wants or self._lists)

    def carry(self, record: Record, heat: int) -> bool:
        if record.key in self._records:
            return True
        if len(self._records) >= MAX_RECORDS or not self._take(len(record.body) + _RECORD_COST):
            self.more = True
            return False
        self._records[record.key] = Carried(record.body, record.signature, heat)
        return True

    def mention(self, record: Record) -> bool:
        if len(self._hot) >= MAX_HOT or not self._take(_STAMP_COST):
            return False
        self._hot[record.short] = stamp_of(record)
        return True

    def doubt(self, record: Record) -> bool:
        if record.key in self._doubts:
            return True
        if len(self._doubts) >= MAX_DOUBTS or not self._take(_DOUBT_COST):
            return False
        self._doubts[record.key] = Doubt(record.key, *record.age)
        return True

    def want(self, short: ShortId) -> bool:
        if short in self._wants:
            return True
        if len(self._wants) >= MAX_WANTS or not self._take(_WANT_COST):
            self.more = True
            return False
        self._wants[short] = None
        return True

    def list_bucket(self, bucket: int, records: Sequence[Record]) -> bool:
        if not self._take(_LIST_COST + _STAMP_COST * len(records)):
            return False
        self._lists[bucket] = tuple(stamp_of(record) for record in records)
        return True

    def message(self) -> Message:
        return Message(
            me=stamp_of(self._me),
            check=check_of(self._me),
            members=self._members,
            digest=self._digest,
            records=tuple(self._records.values()),
            hot=tuple(self._hot.values()),
            doubts=tuple(self._doubts.values()),
            wants=tuple(self._wants),
            lists=self._lists,
            more=self.more,
        )

    def _take(self, cost: int) -> bool:
        if cost > self._room:
            return False
        self._room -= cost
        return True


def stamp_of(record: Record) -> Stamp:
    return Stamp(record.short, *record.age)


def check_of(record: Record) -> bytes:
    return record.signature[:8]


def list_cost(records: int) -> int:
    """Return what a listed bucket of so many records may take."""
    return _LIST_COST + _STAMP_COST * records
