"""A large body on its way to an instance or a peer: written piece by piece, as fast as the other end takes it.

The transport never holds more than a piece beyond what it asks for, so a body of 512 MiB costs no more memory than one
of 1 MiB, and each turn of the loop writes a bounded part of it. Each piece is a copy of its own: what the transport
keeps must not keep the whole body mapped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

ONE_PIECE_BYTES = 256 * 1024  # up to here a body is written at once
_PIECES_PER_TURN = 4

Body = bytes | memoryview | tuple[bytes | memoryview, ...]


class BodySender:
    """Writes one body. Stopped, it writes nothing more and holds nothing."""

    __slots__ = ("_paused", "_pieces", "_scheduled", "_transport", "bytes_sent", "done")

    def __init__(self, transport: asyncio.Transport, body: Body) -> None:
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


def _pieces(parts: tuple[bytes | memoryview, ...]) -> Iterator[bytes]:
    for part in parts:
        for start in range(0, len(part), ONE_PIECE_BYTES):
            yield bytes(part[start : start + ONE_PIECE_BYTES])
