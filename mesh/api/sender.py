"""A large body on its way to an instance or a peer: written piece by piece, as fast as the other end takes it.

The transport never holds more than a piece beyond what it asks for, so a body of 512 MiB costs no more memory than one
of 1 MiB, and each turn of the loop writes a bounded part of it. Each piece is a copy of its own: what the transport
keeps must not keep the whole body mapped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

ONE_PIECE_BYTES = 256 * 1024  # up to here a body is written at once
_PIECES_PER_TURN = 4


class Source(Protocol):
    """Where the rest of a body comes from, which is not here yet."""

    def flow(self, sender: StreamSender) -> None:
        """Give it to *sender* as it comes. Called once."""

    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def close(self) -> None:
        """Nobody wants the rest. Idempotent."""


@dataclass(frozen=True, slots=True)
class StreamedBody:
    """A body whose middle is still on its way to here."""

    before: bytes
    source: Source
    after: bytes


WholeBody = bytes | memoryview | tuple[bytes | memoryview, ...]
Body = WholeBody | StreamedBody


class BodySender:
    """Writes one body. Stopped, it writes nothing more and holds nothing."""

    __slots__ = ("_paused", "_pieces", "_scheduled", "_transport", "bytes_sent", "done")

    def __init__(self, transport: asyncio.Transport, body: WholeBody) -> None:
        self._transport = transport
        self._pieces = _pieces(body if isinstance(body, tuple) else (body,))
        self._paused = False
        self._scheduled = False
        self.bytes_sent = 0
        self.done = False  #: all of it was given to the transport

    def pause(self) -> None:
        """The transport has enough."""
        self._paused = True

    def resume(self) -> None:
        """Go on: the transport takes more."""
        self._paused = False
        if not self._scheduled:
            self._write()

    def stop(self) -> None:
        self._pieces = iter(())
        self._paused = True

    def _write(self) -> None:
        self._scheduled = False
        for _ in range(_PIECES_PER_TURN):
            if self._paused or self.done or self._transport.is_closing():
                return
            piece = next(self._pieces, None)
            if piece is None:
                self.done = True
                return
            self.bytes_sent += len(piece)
            self._transport.write(piece)  # may pause, or even stop, this
        self._scheduled = True
        asyncio.get_running_loop().call_soon(self._write)


class StreamSender:
    """Writes a body as it comes; what cannot be written yet is not read either. Used as a ``BodySender``."""

    __slots__ = ("_body", "_flows", "_transport", "bytes_sent", "done", "paused")

    def __init__(self, transport: asyncio.Transport, body: StreamedBody) -> None:
        self._transport = transport
        self._body = body
        self._flows = False
        self.paused = False
        self.bytes_sent = 0
        self.done = False

    def pause(self) -> None:
        self.paused = True
        if self._flows:
            self._body.source.pause()

    def resume(self) -> None:
        """Begin, or go on."""
        self.paused = False
        if self._flows:
            self._body.source.resume()
            return
        self._flows = True
        self._transport.write(self._body.before)
        self._body.source.flow(self)

    def write(self, data: bytes) -> None:
        """Take the next bytes from the source."""
        self.bytes_sent += len(data)
        if data and not self._transport.is_closing():
            self._transport.write(data)

    def end(self) -> None:
        """The source has given all."""
        self.done = True
        if not self._transport.is_closing():
            self._transport.write(self._body.after)

    def stop(self) -> None:
        if not self.done:
            self._body.source.close()


def _pieces(parts: tuple[bytes | memoryview, ...]) -> Iterator[bytes]:
    for part in parts:
        for start in range(0, len(part), ONE_PIECE_BYTES):
            yield bytes(part[start : start + ONE_PIECE_BYTES])
