"""A client's connection as something to write to and to close: refusals, and every way to end it.

The half of ``ClientConnection`` that knows no requests; which is served by whom is the other half's.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from mesh.api.request_reader import RequestReader
from mesh.api.responses import raw_error
from mesh.api.routes import Dialect
from mesh.api.upstream import reset_on_close
from mesh.core.node_state import PeerIdentity
from mesh.errors import MeshError

if TYPE_CHECKING:
    from mesh.api.dataplane import DataPlane

NEVER = float("inf")
_LINGER_S = 2.0  # how long a client may go on sending what nobody will read, so that it gets to read the answer


class ClientSocket(asyncio.Protocol):
    """See the module. A base class, not a part: a second object for each connection would have to know the first."""

    __slots__ = (
        "_closing",
        "_deadline",
        "_plane",
        "_reader",
        "_reading_paused",
        "_request_id",
        "_transport",
        "address",
        "peer",
        "write",
    )

    _reader: RequestReader
    _transport: asyncio.Transport
    write: Callable[[bytes], None]

    def __init__(self, plane: DataPlane) -> None:
        self._plane = plane
        self._request_id = b""  # of the request under way
        self._closing = False
        self._reading_paused = False
        self._deadline = NEVER  # for what the client owes us
        self.address = ""
        self.peer: PeerIdentity | None = None  #: the node at the other end, if this is a link

    # --- reading

    def too_far_ahead(self) -> None:
        if not self._reading_paused:
            self._reading_paused = True
            self._transport.pause_reading()

    def _read_on(self) -> None:
        self._reading_paused = False
        if not self._transport.is_closing():
            self._transport.resume_reading()

    @property
    def _reset_unseen(self) -> bool:
        """Whether the other end is gone, which nobody tells of a connection that is not read."""
        sock = self._transport.get_extra_info("socket")
        return sock is not None and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0

    # --- the end

    def _write_error(self, error: MeshError, keep_alive: bool) -> None:
        head, plane = self._reader.head, self._plane
        dialect = head.route.dialect if head is not None and head.route is not None else Dialect.OPENAI
        answer = raw_error(
            error,
            dialect,
            self._request_id,
            plane.node_field,
            to_peer=self.peer is not None,
            keep_alive=keep_alive,
            head_only=head is not None and head.method == b"HEAD",
        )
        self.write(answer)

    def _break_off(self, last_words: bytes) -> None:
        """End an answer that is not complete, so that the client can tell."""
        if last_words:
            self.write(last_words)
            self._close()  # the framing is left open: not a clean end, yet the words arrive
        else:
            self._closing = True
            self._plane.outbox.flush()
            reset_on_close(self._transport)  # a plain close is a clean end to whoever was told no length
            self._transport.abort()

    def _linger(self) -> None:
        """Close once the client stops sending: closing over unread bytes would reset the answer away."""
        self._plane.outbox.flush()
        self._reader.stop()
        if self._reading_paused:
            self._read_on()
        self._deadline = self._plane.now() + _LINGER_S
        if self._transport.can_write_eof() and not self._transport.is_closing():
            self._transport.write_eof()

    def _close(self) -> None:
        """Close when what was written has gone out, or after a while if the client does not take it."""
        self._closing = True
        self._reader.stop()
        self._deadline = self._plane.now() + self._plane.idle_timeout_s
        self._plane.outbox.flush()
        self._transport.close()

    def abort(self) -> None:
        self._transport.abort()
