"""Chunked transfer coding, incremental and strict; used for what clients send and for what instances answer.

The decoder is fed raw bytes and hands out payload; it never keeps more than an unfinished line. The relay writes the
raw bytes on as they are and only watches through it where chunks and the message end.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum

# Extensions are allowed and ignored. Sizes of more than 15 digits are an attack on somebody's 64-bit counter.
_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?[ \t]*\r\n")
_TRAILER_LINE = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*\r\n")
_MAX_LINE_BYTES = 4096
_MAX_TRAILER_BYTES = 16384
_MAX_PADDING_BYTES = 65536


# By its length, what a read begins with if it is exactly one chunk, as nearly every read of an event stream is: nothing
# needs to be parsed then.
_ONE_CHUNK = {len(line := b"%x\r\n" % size) + size + 2: line for size in range(1, 2048)}


class ChunkError(ValueError):
    """The bytes are not chunked coding."""


class _Next(Enum):
    SIZE = "size"
    PAYLOAD = "payload"
    CRLF = "crlf"
    TRAILER = "trailer"
    END = "end"


# Looking a member up on its class costs 70 ns in Python 3.11, several times per event.
_SIZE, _PAYLOAD, _CRLF, _TRAILER, _END = _Next


class ChunkedDecoder:
    """Follows one chunked message. ``done`` once its last byte was consumed."""

    __slots__ = ("_left", "_line", "_next", "_trailer_bytes")

    def __init__(self) -> None:
        self._next = _SIZE
        self._left = 0  # payload bytes of the current chunk still to come
        self._line = b""  # the start of a line whose end has not come yet
        self._trailer_bytes = 0

    @property
    def done(self) -> bool:
        return self._next is _END

    def feed(self, data: bytes, pos: int, sink: Callable[[bytes], object]) -> int:
        """Consume *data* from *pos* on, give payload to *sink*, and return where the message or the data ended.

        Raise ``ChunkError`` if it is malformed; what was well-formed before has gone to *sink*.
        """
        end = len(data)
        if (
            self._next is _SIZE
            and not (pos or self._line)
            and (line := _ONE_CHUNK.get(end)) is not None
            and data.startswith(line)
            and data.endswith(b"\r\n")
        ):
            sink(data[len(line) : -2])
            return end
        while pos < end and self._next is not _END:
            if self._next is _PAYLOAD:
                pos = self._payload(data, pos, sink)
                continue
            if self._next is _SIZE and not self._line:
                # The usual case: size, payload and CRLF came in one read, perhaps among others.
                found = _SIZE_LINE.match(data, pos)
                if found is not None and (size := int(found[1], 16)):
                    start = found.end()
                    stop = start + size
                    if data[stop : stop + 2] == b"\r\n":
                        sink(data[start:stop])
                        pos = stop + 2
                        continue
            pos = self._one_line(data, pos)
        return pos

    def _payload(self, data: bytes, pos: int, sink: Callable[[bytes], object]) -> int:
        piece = data[pos : pos + self._left]
        sink(piece)
        self._left -= len(piece)
        if self._left == 0:
            self._next = _CRLF
        return pos + len(piece)

    def _one_line(self, data: bytes, pos: int) -> int:
        stop = data.find(b"\n", pos) + 1
        if stop == 0:
            self._line += data[pos:]
            if len(self._line) > _MAX_LINE_BYTES:
                raise ChunkError("a chunk's size line or trailer is too long")
            return len(data)
        line, self._line = self._line + data[pos:stop], b""
        if len(line) > _MAX_LINE_BYTES:
            raise ChunkError("a chunk's size line or trailer is too long")
        self._take_line(line)
        return stop

    def _take_line(self, line: bytes) -> None:
        if self._next is _SIZE:
            if (found := _SIZE_LINE.fullmatch(line)) is None:
                raise ChunkError("malformed chunk size")
            self._left = int(found[1], 16)
            self._next = _PAYLOAD if self._left else _TRAILER
        elif self._next is _CRLF:
            if line != b"\r\n":
                raise ChunkError("a chunk is longer than its size")
            self._next = _SIZE
        elif line == b"\r\n":
            self._next = _END
        else:
            self._trailer_bytes += len(line)
            if self._trailer_bytes > _MAX_TRAILER_BYTES or _TRAILER_LINE.fullmatch(line) is None:
                raise ChunkError("malformed or oversized trailer")

    def interruption(self, event: bytes) -> bytes:
        """Return the bytes that carry *event* to a client whose stream stopped here, without ever ending the message.

        Inside a chunk the promised payload is made up with newlines, which server-sent events ignore; so the client
        reads the event and then sees the connection end before the message does. Empty if there is no such way.
        *event* must begin with an empty line: the payload so far may end inside another event.
        """
        match self._next:
            case _Next.SIZE if not self._line:
                return chunk(event)
            case _Next.PAYLOAD if self._left > _MAX_PADDING_BYTES:
                return event
            case _Next.PAYLOAD:
                return b"\n" * self._left + b"\r\n" + chunk(event)
            case _Next.CRLF:
                return b"\r\n"[len(self._line) :] + chunk(event)
            case _:
                return b""


def chunk(payload: bytes | bytearray) -> bytes:
    """Return *payload*, which is not empty, as one chunk."""
    return b"%x\r\n%s\r\n" % (len(payload), payload)
