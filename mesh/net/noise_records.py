"""The records of an established link: two bytes of length, then one Noise transport message. Sans-io.

A ``Sealer`` makes them, an ``Opener`` reads them; each has one key and counts its nonces, so a record that is changed,
left out, repeated, moved or sent back to its sender does not open. A record without content is control: its kind is the
associated data that it was sealed with. The ciphers are driven directly; noiseprotocol's layers would cost half as much
again per record. (Nonces cannot run out: 2^64 records are more than a link can carry.)
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from struct import Struct
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from mesh.errors import LinkError

TAG_BYTES = 16
MAX_MESSAGE = 65535  # of Noise, which is also what two bytes can say
MAX_CONTENT = MAX_MESSAGE - TAG_BYTES

_length = Struct(">H").pack
_nonce = Struct("<4xQ").pack  # Noise's for ChaChaPoly: four zero bytes, then the count


class Control(Enum):
    """What an empty record says. The value is its associated data; data records have none, as Noise wants it."""

    PING = b"ping"
    CLOSE = b"close"  # nothing follows, and nothing is missing
    REFUSED = b"refused"  # the other end does not want this node; its log says why


class Sealer:
    """Turns content into records, in order."""

    __slots__ = ("_count", "_encrypt")

    def __init__(self, key: bytes) -> None:
        self._encrypt = ChaCha20Poly1305(key).encrypt
        self._count = 0

    def seal(self, content: bytes | bytearray | memoryview) -> bytes:
        """Return *content*, of 1 to ``MAX_CONTENT`` bytes, as one record."""
        count = self._count
        self._count = count + 1
        message = self._encrypt(_nonce(count), content, None)
        return _length(len(message)) + message

    def seal_all(self, content: bytes | bytearray | memoryview) -> list[bytes]:
        """Return *content* of any length as as many records as it takes."""
        view = memoryview(content).cast("B")
        return [self.seal(view[at : at + MAX_CONTENT]) for at in range(0, len(view), MAX_CONTENT)]

    def seal_control(self, kind: Control) -> bytes:
        count = self._count
        self._count = count + 1
        return _length(TAG_BYTES) + self._encrypt(_nonce(count), b"", kind.value)


class Opener:
    """Takes records apart, in whatever pieces they arrive."""

    __slots__ = ("_count", "_decrypt", "_missing", "_pieces")

    def __init__(self, key: bytes) -> None:
        self._decrypt: Callable[[bytes, Any, bytes | None], bytes] = ChaCha20Poly1305(key).decrypt
        self._count = 0
        self._pieces: list[bytes] = []  # of a record that is not whole; joined once, however many they are
        self._missing = 0  # so many bytes more are needed to go on

    @property
    def within_record(self) -> bool:
        return bool(self._pieces)

    def open(self, data: bytes) -> list[bytes | Control]:
        """Return what the records say that are whole now; nothing after ``CLOSE`` or ``REFUSED`` is looked at.

        Raise ``LinkError`` for what was not sealed by the other end, just now, in this order.
        """
        if self._pieces:
            self._pieces.append(data)
            self._missing -= len(data)
            if self._missing > 0:
                return []
            data = b"".join(self._pieces)
            self._pieces = []
        opened: list[bytes | Control] = []
        at, end = 0, len(data)
        while end - at >= 2:
            stop = at + 2 + (data[at] << 8 | data[at + 1])
            if stop - at - 2 < TAG_BYTES:
                raise LinkError("a record that is too short to be one")
            if stop > end:
                break
            if stop - at - 2 == TAG_BYTES:
                kind = self._open_control(data[at + 2 : stop])
                opened.append(kind)
                if kind is not Control.PING:
                    return opened
            else:
                try:
                    opened.append(self._decrypt(_nonce(self._count), data[at + 2 : stop], None))
                except InvalidTag:
                    raise LinkError("a record was changed, repeated or left out on its way") from None
                self._count += 1
            at = stop
        if at < end:
            self._keep(data[at:] if at else data)
        return opened

    def _keep(self, rest: bytes) -> None:
        whole = 2 + (rest[0] << 8 | rest[1]) if len(rest) >= 2 else 2
        self._pieces.append(rest)
        self._missing = whole - len(rest)

    def _open_control(self, message: bytes) -> Control:
        for kind in Control:
            try:
                self._decrypt(_nonce(self._count), message, kind.value)
            except InvalidTag:
                continue
            self._count += 1
            return kind
        raise LinkError("a control record of an unknown kind, or one that was changed on its way")
