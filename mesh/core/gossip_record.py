"""One node's record: what it says of itself, with its age and its signature. Values only; nothing is verified here.

The signature is over the body's bytes as they travel, and they are passed on unchanged: a node that knows fewer fields
than the owner still verifies and relays them all (trap 66). The newer (incarnation, version) wins; a node raises its
incarnation to contradict what others say of it, its version with every change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, NewType

import msgspec

from mesh.core.node_state import PeerKey

#: The first bytes of a key, enough to tell members apart in lists.
ShortId = NewType("ShortId", bytes)
#: (incarnation, version), compared as a tuple.
Age = tuple[int, int]

DOMAIN = b"llama-mesh gossip record 1\x00"
KEY_BYTES = 32
SIGNATURE_BYTES = 64
SHORT_BYTES = 8
#: Of a body. One record always fits into a message, whatever else is in it.
MAX_RECORD_BYTES = 56 * 1024
#: Of a payload, beside keys and a rotation statement.
MAX_PAYLOAD_BYTES = MAX_RECORD_BYTES - 1024
MAX_COUNT = 2**53
#: Incarnations start at wall-clock seconds and go up one by one; a claim above this is a lie that would use them up.
MAX_CLAIM = 2**52

Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_COUNT)]


class _Body(msgspec.Struct, frozen=True, omit_defaults=True):
    key: bytes = msgspec.field(name="k")
    incarnation: Count = msgspec.field(name="i")
    version: Count = msgspec.field(name="v")
    payload: bytes = msgspec.field(name="p")
    rotation: bytes | None = msgspec.field(default=None, name="r")
    left: bool = msgspec.field(default=False, name="l")


class Record(msgspec.Struct, frozen=True):
    """A record and, for its signature and for others, the very bytes it came in."""

    key: PeerKey
    age: Age
    payload: bytes
    rotation: bytes | None
    left: bool
    body: bytes
    signature: bytes
    short: ShortId

    @property
    def signed(self) -> bytes:
        """What the signature is over."""
        return DOMAIN + self.body


def short(key: PeerKey) -> ShortId:
    return ShortId(key[:SHORT_BYTES])


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Body)


def seal(
    key: PeerKey, age: Age, payload: bytes, *, rotation: bytes | None, left: bool, sign: Callable[[bytes], bytes]
) -> Record:
    """Return this node's signed record; raise ``ValueError`` if the payload is too large to travel."""
    body = _encoder.encode(_Body(key, age[0], age[1], payload, rotation, left))
    if len(body) > MAX_RECORD_BYTES:
        raise ValueError(f"a node's state of {len(body)} bytes; {MAX_RECORD_BYTES} is the limit")
    return Record(key, age, payload, rotation, left, body, sign(DOMAIN + body), short(key))


def read(body: bytes, signature: bytes) -> Record:
    """Return the record in *body*, not verified. Raise ``ValueError`` if it is none."""
    if len(body) > MAX_RECORD_BYTES or len(signature) != SIGNATURE_BYTES:
        raise ValueError("a record of a size that none has")
    try:
        found = _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        raise ValueError(f"not a record: {error}") from error
    if len(found.key) != KEY_BYTES:
        raise ValueError("a record whose key is none")
    key, age = PeerKey(found.key), (found.incarnation, found.version)
    return Record(key, age, found.payload, found.rotation, found.left, body, signature, short(key))
